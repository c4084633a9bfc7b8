"""What shapes a GPT-2 and its arithmetic.

Knows HF's `config.json`, and nothing of arrays: it can be imported without JAX.
"""

import contextlib
import dataclasses
import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from gpt2_jax.files import read_json_object

# HF's names (transformers/activations.py). `modules.ACTIVATIONS` holds the function of each; the
# names stand here as well, so that a config is checked without JAX.
ACTIVATIONS = (
    "gelu_new",
    "gelu",
    "gelu_pytorch_tanh",
    "gelu_python_tanh",
    "gelu_accurate",
    "gelu_python",
    "gelu_fast",
    "gelu_10",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "silu",
    "swish",
    "mish",
    "tanh",
    "sigmoid",
    "linear",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of params and of computation alike
PRECISIONS = ("default", "high", "highest")  # those of `jax.lax.Precision`

MAX_COUNT = 2**31 - 1  # what JAX counts with is int32

# Fields by what they may hold.
COUNTS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
POSITIVE = ("layer_norm_epsilon", "initializer_range")
FLAGS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
CHOICES = {"activation_function": ACTIVATIONS, "dtype": DTYPES, "precision": PRECISIONS}

# HF's other names of four fields (`GPT2Config.attribute_map`), those of most other models.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# What the earliest files, which name no `model_type`, hold of a GPT-2 and of few others.
OWN_FIELDS = ("n_embd", "n_head", "n_layer")

# Fields of `config.json` that, unless they are empty, change the model in a way that is not built
# here -> why, or what to do about it. They are refused, as the rest would load without a word.
UNSUPPORTED = {
    "add_cross_attention": "this library holds the decoder alone",
    "is_encoder_decoder": "this library holds the decoder alone",
    "pruned_heads": "save the pruned model with all its heads",
    "quantization_config": "load the checkpoint that it was quantised from",
}


def as_integer(value: Any) -> int | None:
    """Returns an integer, numpy's and JAX's too, as Python's `int`, and `None` for what is none."""
    # `True` is an integer to Python, but no count of layers.
    if isinstance(value, bool):
        return None
    with contextlib.suppress(TypeError):
        return operator.index(value)
    return None


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Returns a count as Python's `int`, from any integer: numpy's and JAX's too, but no bool.

    Args:
      name: what the message calls the value.
      value: what was given.
      least: the smallest count that makes sense.

    Raises:
      ValueError: `value` is no integer (not even 2.0 is), less than `least` or more than int32
        holds.
    """
    count = as_integer(value)
    if count is None or count < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
    if count > MAX_COUNT:
        raise ValueError(f"`{name}` must be at most {MAX_COUNT}, got {count!r:.30}.")
    return count


def ids_within(ids: Iterable[int | None], vocab_size: int) -> tuple[int, ...]:
    """Returns the ids that are in a vocabulary: no model draws the others, and `None` is none."""
    return tuple(token for token in ids if token is not None and 0 <= token < vocab_size)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape and the arithmetic of a GPT-2, under the names of HF's `GPT2Config`.

    Frozen and hashable: to JAX it is static, a part of the program (`modules.py` registers it so).
    Numbers of numpy are stored as Python's. The three last fields are ours:

    * `bias`: whether dense layers and LayerNorms have biases. nanoGPT's models may have none; then
      none is among the params, none is trained and none is added. HF's models always have them.
    * `dtype`: the dtype of matrix products and activations. LayerNorm statistics, softmax and
      logits are computed in float32 (float64 when `dtype` is float64). Parameters keep the dtype
      they come in.
    * `precision`: how exactly an accelerator multiplies float32 matrices. `"highest"` means true
      float32, `"high"` and `"default"` let a TPU or GPU use fewer bits (bfloat16 passes, TF32); on
      CPU all are equal.

    Raises:
      ValueError: a field is of another type, out of range, or names something unsupported.

    Examples:
      >>> small = gpt2_jax.GPT2Config(n_layer=2, n_embd=16, n_head=2)
      >>> small.head_dim, small.mlp_width, small.dtype
      (8, 64, 'float32')
      >>> small.replace(dtype="bfloat16") == small
      False
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    # HF's flag for float16; here scores are always scaled and normalised in float32 or better.
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    bias: bool = True
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self) -> None:
        for name in COUNTS:
            self._store(name, as_count(name, getattr(self, name)))
        if self.n_inner is not None:
            self._store("n_inner", as_count("n_inner", self.n_inner))
        if self.n_embd % self.n_head:
            got = f"n_embd={self.n_embd} and n_head={self.n_head}"
            raise ValueError(f"`n_embd` must be a multiple of `n_head`, got {got}.")
        for name in PROBABILITIES:
            self._store(name, _as_probability(name, getattr(self, name)))
        for name in POSITIVE:
            self._store(name, _as_positive(name, getattr(self, name)))
        # Not what is true or false to Python: "false" is true.
        if not isinstance(self.bias, bool):
            raise ValueError(f"`bias` must be true or false, got {self.bias!r}.")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")
        for name in FLAGS:
            self._store(name, _as_flag(name, getattr(self, name)))
        for name in ("bos_token_id", "pad_token_id"):
            self._store(name, _as_id(name, getattr(self, name)))
        self._store("eos_token_id", _as_ids("eos_token_id", self.eos_token_id))

    def __repr__(self) -> str:
        # The shape, and what is not as in GPT-2: it fits a line, and says the whole.
        named = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in COUNTS or value != field.default:
                named.append(f"{field.name}={value!r}")
        return f"GPT2Config({', '.join(named)})"

    def _store(self, name: str, value: Any) -> None:
        """Sets a field while the config is being made."""
        # `self.name = value` is what a frozen dataclass forbids, here too.
        object.__setattr__(self, name, value)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd  # 4: the paper's

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: none, one or several, all of them in the vocabulary.

        `eos_token_id` may hold others, as its default does where the vocabulary is smaller.
        """
        ids = self.eos_token_id
        return ids_within(ids if isinstance(ids, tuple) else (ids,), self.vocab_size)

    def replace(self, **changes: Any) -> "GPT2Config":
        """Returns a copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPT2Config":
        """Builds a config from the contents of HF's `config.json`.

        Four fields have a second name (`ALIASES`). Fields that only other heads, generation or
        bookkeeping use are passed over. `n_ctx`, which old files hold, counts where `n_positions`
        is missing; where it is another number HF has no use for it, and a warning says so.

        Raises:
          ValueError: another architecture, a field whose value this library does not support, or
            two values under the two names of one field.
        """
        values = dict(values)
        _check_model(values)
        for name, advice in UNSUPPORTED.items():
            if values.get(name):
                raise ValueError(f"`{name}={values[name]!r}` is not supported: {advice}.")
        _rename_aliases(values)
        _settle_positions(values)
        known = {field.name for field in dataclasses.fields(cls)}
        # HF's `dtype` (once `torch_dtype`) says how the file is stored; the weights themselves say
        # it better.
        known -= {"dtype", "precision"}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of an HF `config.json` for a `GPT2LMHeadModel` of this shape."""
        values = dataclasses.asdict(self)
        del values["precision"]  # says how to compute, not what the model is
        if self.bias:
            del values["bias"]  # HF's models have them, and its files no such field
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | values

    @classmethod
    def from_json_file(cls, path: str | Path) -> "GPT2Config":
        """Reads HF's `config.json`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the message names the file and what is wrong in it, such as another model's
            fields.
        """
        values = read_json_object(Path(path))
        try:
            _check_own_fields(values)
            return cls.from_dict(values)
        # `TypeError`: a list or an object where a name should stand cannot be looked up. The last
        # two are of integers too large for a float, and of lists too deep to walk.
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error


# What `config.json` may hold.


def _check_model(values: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the config of another model, as far as it names its own."""
    model_type = values.get("model_type")
    if model_type not in (None, "gpt2"):
        got = f'got "{model_type}": this is another architecture'
        raise ValueError(f'`model_type` must be "gpt2", {got}.')
    classes = values.get("architectures") or ["GPT2LMHeadModel"]
    # Anyone may write a class of their own for a GPT-2: only without a `model_type` its name is
    # all there is.
    if model_type is None and not any(str(name).startswith("GPT2") for name in classes):
        raise ValueError(f"`architectures` must name GPT-2's, got {classes}.")


def _check_own_fields(values: Mapping[str, Any]) -> None:
    """Raises `ValueError` where neither `model_type` nor the names of the fields say GPT-2."""
    if values.get("model_type") is not None:
        return
    missing = [name for name in OWN_FIELDS if name not in values]
    if missing:
        expected = f'`"model_type": "gpt2"`, or GPT-2\'s fields {", ".join(OWN_FIELDS)}'
        raise ValueError(f"expected {expected}; {', '.join(missing)} is missing.")


def _rename_aliases(values: dict[str, Any]) -> None:
    """Gives fields that stand under HF's other name their own.

    Raises:
      ValueError: a field stands under both names with two values.
    """
    for alias, name in ALIASES.items():
        if alias not in values:
            continue
        value = values.pop(alias)
        # HF lets the alias win, without a word.
        if values.setdefault(name, value) != value:
            got = f"{alias}={value!r} and {name}={values[name]!r}"
            raise ValueError(f"`{alias}` and `{name}` are names of one field, got {got}.")


def _settle_positions(values: dict[str, Any]) -> None:
    """Takes `n_ctx` for `n_positions` where that is missing; warns where they differ."""
    if "n_ctx" not in values:
        return
    n_ctx = values["n_ctx"]
    n_positions = values.setdefault("n_positions", n_ctx)
    if n_positions != n_ctx:
        got = f"`n_ctx` is {n_ctx} and `n_positions` {n_positions}"
        warnings.warn(f"{got}: `n_positions` counts, as in transformers.", stacklevel=4)


# What a field may hold. Booleans are numbers to Python, and nowhere here.


def _as_probability(name: str, value: Any) -> float:
    """Returns the rate of a dropout as Python's `float`."""
    rate = _as_float(value)
    if not 0.0 <= rate < 1.0:  # at 1, nothing would be left to rescale
        raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")
    return rate


def _as_positive(name: str, value: Any) -> float:
    """Returns a positive number as Python's `float`."""
    number = _as_float(value)
    if not 0.0 < number < math.inf:  # so written, it refuses NaN too
        raise ValueError(f"`{name}` must be positive, got {value!r}.")
    return number


def _as_float(value: Any) -> float:
    """Returns a number as Python's `float`, and NaN for what is none."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _as_flag(name: str, value: Any) -> bool:
    """Returns a flag as Python's `bool`."""
    # By the type's name, which numpy's has too. What Python finds true is not asked: "false" is.
    if type(value).__name__ != "bool":
        raise ValueError(f"`{name}` must be true or false, got {value!r}.")
    return bool(value)


# The values of ids are free: some files hold -1, or an id beyond the vocabulary, for a token that
# the model never had.


def _as_id(name: str, value: Any) -> int | None:
    """Returns a token id as Python's `int`, or `None`."""
    token = as_integer(value)
    if token is None and value is not None:
        raise ValueError(f"`{name}` must be an integer or None, got {value!r}.")
    return token


def _as_ids(name: str, value: Any) -> int | tuple[int, ...] | None:
    """Returns a token id, or several, or `None`."""
    if not isinstance(value, (list, tuple)):
        return _as_id(name, value)
    tokens = [as_integer(token) for token in value]
    if None in tokens:
        raise ValueError(f"`{name}` must be an integer, a list of integers, or None, got {value}.")
    # A list, as JSON has it, becomes a tuple: a config must be hashable.
    return tuple(token for token in tokens if token is not None)


# The published models, under the names that HF gave them.
PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}
