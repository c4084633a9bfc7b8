"""What shapes a GPT-2 and its arithmetic. Knows HF's `config.json`, and nothing of arrays."""

import dataclasses
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
DTYPES = ("float32", "bfloat16", "float16", "float64")
PRECISIONS = ("default", "high", "highest")


def as_count(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number of at least `least`; raises `ValueError`, which names it, for anything else."""
    expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.") from None
    if isinstance(value, bool) or count < least:
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")
    return count


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape and the arithmetic of a GPT-2, under the names of HF's `GPT2Config`.

    Frozen and hashable, so that it can be a static argument of `jax.jit`. The two last fields are ours:

    * `dtype`: the dtype of matrix products and activations. LayerNorm statistics, softmax and logits are
      computed in float32 (float64 when `dtype` is float64). Parameters keep the dtype they come in.
    * `precision`: how exactly an accelerator multiplies float32 matrices. `"highest"` means true float32,
      `"high"` and `"default"` let a TPU or GPU use fewer bits (bfloat16 passes, TF32); on CPU all are equal.

    Raises:
      ValueError: a field is out of range or names something unsupported.
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
    reorder_and_upcast_attn: bool = (
        False  # scores are always scaled and normalised in float32 or better
    )
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    dtype: str = "float32"
    precision: str = "highest"

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if name == "n_inner" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"`n_embd` must be a multiple of `n_head`, got n_embd={self.n_embd} and n_head={self.n_head}."
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)!r}.")
        if not self.layer_norm_epsilon > 0.0:
            raise ValueError(
                f"`layer_norm_epsilon` must be positive, got {self.layer_norm_epsilon!r}."
            )
        if not self.initializer_range > 0.0:
            raise ValueError(
                f"`initializer_range` must be positive, got {self.initializer_range!r}."
            )
        for name, allowed in (
            ("activation_function", ACTIVATIONS),
            ("dtype", DTYPES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}; got {getattr(self, name)!r}."
                )
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text: none, one or several."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self, **changes) -> "GPT2Config":
        """Returns a copy with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPT2Config":
        """Builds a config from the contents of HF's `config.json`.

        Fields that only other heads, generation or bookkeeping use are passed over. `n_ctx`, which old files
        hold beside or instead of `n_positions`, must agree with it.

        Raises:
          ValueError: another architecture, or a field whose value this library does not support.
        """
        values = dict(values)
        model_type = values.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(
                f'`model_type` must be "gpt2", got "{model_type}": this is another architecture.'
            )
        for name, why in _UNSUPPORTED.items():
            if values.get(name):
                raise ValueError(f"`{name}={values[name]!r}` is not supported: {why}.")
        if "n_ctx" in values:
            n_ctx = values.pop("n_ctx")
            if values.setdefault("n_positions", n_ctx) != n_ctx:
                raise ValueError(
                    f"`n_ctx` must equal `n_positions`, got n_ctx={n_ctx} and n_positions={values['n_positions']}."
                )
        # HF's `dtype` (once `torch_dtype`) says how the file is stored; the weights themselves say it better.
        known = {field.name for field in dataclasses.fields(cls)} - {"dtype", "precision"}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of an HF `config.json` for a `GPT2LMHeadModel` of this shape."""
        values = dataclasses.asdict(self)
        del values["precision"]
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | values

    @classmethod
    def from_json_file(cls, path: str | Path) -> "GPT2Config":
        """Reads HF's `config.json`; a `ValueError` names the file and what is wrong in it."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"expected an object, got {type(values).__name__}")
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


_UNSUPPORTED = {
    "add_cross_attention": "this library holds the decoder alone",
    "is_encoder_decoder": "this library holds the decoder alone",
    "pruned_heads": "save the pruned model with all its heads",
    "quantization_config": "load the checkpoint that it was quantised from",
}

PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "distilgpt2": GPT2Config(n_layer=6),
}
