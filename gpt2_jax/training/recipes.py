"""What makes a training run what it is: a frozen dataclass and presets. Knows no array or file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt2_jax.config import MAX_COUNT, GPT2Config

MAX_SEED = 2**32 - 1  # that of the command generate, too
# What a pretrained model brings with it.
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "bias")
COUNTS = ("batch_size", "micro_batches", "steps", "eval_every", "save_every", "keep", "log_every")


def option(default: Any, help: str, *, curve: bool = True) -> Any:
    """Returns a field with its default and the help that the command line shows.

    `curve` says whether it shapes the loss curve, so that a resumed run must not change it.
    """
    return dataclasses.field(default=default, metadata={"help": help, "curve": curve})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run, but for its data. The defaults train GPT-2 124M, on one device.

    Batches, steps and optimizer are those of nanoGPT's `config/train_gpt2.py`. The model is
    OpenAI's: its layers have biases, its GELU is the tanh one, and its table has a row for each
    token. nanoGPT's has no biases, the exact GELU, and 50,304 rows for 50,257 tokens.

    Raises:
      ValueError: a field is of another type than its default, or out of range.

    Examples:
      >>> from gpt2_jax.training.recipes import RECIPES, Recipe
      >>> RECIPES["shakespeare_char"].n_layer, Recipe().n_layer
      (4, 12)
    """

    n_layer: int = option(12, "layers")
    n_head: int = option(12, "attention heads of a layer")
    n_embd: int = option(768, "width")
    n_positions: int = option(1024, "longest context")
    bias: bool = option(
        True, "biases in dense layers and LayerNorms, as in GPT-2; nanoGPT has none"
    )
    length: int = option(0, "tokens of a training window; 0 means n_positions")
    dropout: float = option(0.0, "rate of all three dropouts: embeddings, attention, residuals")
    dtype: str = option(
        "float32", "what the model computes in; parameters are float32 all the same"
    )
    remat: str = option(
        "none", "what the backward pass recomputes, for less memory: none, dots or full"
    )
    stack_layers: bool = option(
        False, "scan over the layers as one stack: compiles sooner; for accelerators"
    )
    # Half a million tokens: nanoGPT's 12 windows, 5 accumulation steps, 8 GPUs.
    batch_size: int = option(480, "windows of an update")
    micro_batches: int = option(
        40, "parts of a batch that pass through the model one after the other"
    )
    steps: int = option(600_000, "updates")
    # Muon learns more from each token, and a step of it takes longer: see the demo's model card.
    optimizer: str = option("adamw", "adamw, or muon for the layers' matrices")
    # The end is a tenth of the peak, "per Chinchilla" (nanoGPT's `train.py`; arXiv:2203.15556).
    learning_rate: float = option(6e-4, "at its peak")
    min_learning_rate: float = option(6e-5, "at the end of the cosine")
    warmup_steps: int = option(2000, "updates before the peak")
    decay_steps: int = option(0, "updates of the cosine, at the end; 0 means all after the warmup")
    weight_decay: float = option(0.1, "of matrices and embeddings")
    b1: float = option(0.9, "Adam's decay of the mean")
    b2: float = option(0.95, "Adam's decay of the square")
    max_grad_norm: float = option(1.0, "global norm that gradients are clipped to")
    seed: int = option(0, "of initial weights, batches and dropout")
    # From here on, what a resumed run may change.
    eval_every: int = option(2000, "updates between losses on the validation set", curve=False)
    save_every: int = option(2000, "updates between checkpoints", curve=False)
    keep: int = option(2, "latest checkpoints to keep, besides the best", curve=False)
    log_every: int = option(10, "updates between lines of metrics", curve=False)
    sample_tokens: int = option(100, "tokens of text to make at each evaluation", curve=False)

    def __post_init__(self):  # also after `dataclasses.replace`
        self._check_types()
        self._check_counts()
        self._check_learning_rates()
        self._check_optimizer()
        if self.remat not in ("none", "dots", "full"):
            expected = '"none", "dots" or "full"'
            raise ValueError(f"`remat` must be {expected}, got {self.remat!r}.")
        self.adapt(GPT2Config())  # raises where the dropout's rate or the dtype is not one

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe that `dataclasses.asdict` gave, as a run's `run.json` holds it.

        Raises:
          ValueError: a name that is no field's, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            expected = ", ".join(sorted(known))
            raise ValueError(f"Expected the fields of a recipe, {expected}; got {unknown}.")
        values = dict(values)
        # What it was before there were degrees of it.
        if isinstance(values.get("remat"), bool):
            values["remat"] = "full" if values["remat"] else "none"
        return cls(**values)

    def config(self, *, vocab_size: int, eot_id: int | None) -> GPT2Config:
        """Returns the config of a new model.

        Raises:
          ValueError: as `GPT2Config`.
        """
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.n_positions,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            bias=self.bias,
            bos_token_id=eot_id,  # GPT-2 has one token for both ends of a text
            eos_token_id=eot_id,
        )
        return self.adapt(config)

    def adapt(self, config: GPT2Config) -> GPT2Config:
        """Returns a config with this recipe's dropout and dtype."""
        return config.replace(
            dtype=self.dtype,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
        )

    def window_length(self, config: GPT2Config) -> int:
        """Returns how many tokens of a training window the model predicts.

        Raises:
          ValueError: the model has fewer positions.
        """
        length = self.length or config.n_positions
        if length > config.n_positions:
            raise ValueError(
                f"`length` must be at most {config.n_positions} (`n_positions`), got {length}."
            )
        return length

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            if kind is float and type(value) is int:
                # A whole number is welcome where a fraction could stand: 0 for 0.0. The class is
                # frozen, so that a plain assignment would raise.
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:  # not `isinstance`: True would be a number of steps
                raise ValueError(f"`{field.name}` must be of type {kind.__name__}, got {value!r}.")
            most = MAX_SEED if field.name == "seed" else MAX_COUNT
            if kind is int and value > most:
                raise ValueError(f"`{field.name}` must be at most {most}, got {value!r:.30}.")

    def _check_counts(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("length", "weight_decay", "sample_tokens", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                "`batch_size` must be a multiple of `micro_batches`, "
                f"got {self.batch_size} and {self.micro_batches}."
            )

    def _check_learning_rates(self) -> None:
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"`warmup_steps` must be in [0, {self.steps}) (`steps`), got {self.warmup_steps}."
            )
        if not 0 <= self.min_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                "`learning_rate` must be positive and `min_learning_rate` between 0 and it, "
                f"got {self.learning_rate} and {self.min_learning_rate}."
            )

        n_left = self.steps - self.warmup_steps
        if not 0 <= self.decay_steps <= n_left:
            expected = f"[0, {n_left}] (`steps` less `warmup_steps`)"
            raise ValueError(f"`decay_steps` must be in {expected}, got {self.decay_steps}.")

    def _check_optimizer(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f'`optimizer` must be "adamw" or "muon", got {self.optimizer!r}.')
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
        if not self.max_grad_norm > 0:  # so written, it refuses NaN too
            raise ValueError(f"`max_grad_norm` must be positive, got {self.max_grad_norm}.")


def changeable_fields() -> frozenset[str]:
    """Returns the names of the fields that a resumed run may change: its curve stays as it was."""
    fields = dataclasses.fields(Recipe)
    return frozenset(field.name for field in fields if not field.metadata["curve"])


RECIPES = {
    # nanoGPT's recipe for a CPU, `config/train_shakespeare_char.py` with the changes that its
    # README names, but for the optimizer: there it is AdamW, from `learning_rate=1e-3` to a tenth.
    "shakespeare_char": Recipe(
        n_layer=4,
        n_head=4,
        n_embd=128,
        n_positions=64,
        batch_size=12,
        micro_batches=1,
        steps=2000,
        optimizer="muon",
        learning_rate=4e-3,
        min_learning_rate=4e-5,
        warmup_steps=100,
        b2=0.99,  # more than elsewhere, as an update sees few tokens
        eval_every=250,
        save_every=250,
        seed=1337,
    ),
    # The model that ships with the package as "demo": 3.5 M parameters on TinyStories, an hour and
    # a half on two cores.
    "tinystories": Recipe(
        n_layer=3,
        n_head=4,
        n_embd=256,
        n_positions=256,
        batch_size=8,
        micro_batches=1,
        steps=12_000,
        optimizer="muon",
        learning_rate=4e-3,
        min_learning_rate=4e-5,
        warmup_steps=100,
        decay_steps=2000,
        eval_every=500,
        save_every=250,
    ),
    # 4.3 M parameters on children's books, which are harder: an hour or two on two cores.
    "storyteller": Recipe(
        n_layer=4,
        n_head=4,
        n_embd=256,
        n_positions=256,
        dropout=0.1,
        batch_size=16,
        micro_batches=4,
        steps=4500,
        learning_rate=2e-3,
        min_learning_rate=2e-5,
        warmup_steps=150,
        eval_every=500,
        save_every=250,
    ),
    # A start for `from_pretrained`: small steps that leave most of what the model knows as it is.
    "finetune": Recipe(
        length=256,
        dropout=0.1,
        batch_size=8,
        micro_batches=2,
        steps=400,
        learning_rate=5e-5,
        min_learning_rate=5e-6,
        warmup_steps=20,
        eval_every=100,
        save_every=100,
    ),
    # The defaults: OpenAI's GPT-2 124M by nanoGPT's batches and optimizer (`config/train_gpt2.py`),
    # half a million tokens an update.
    "gpt2": Recipe(dtype="bfloat16"),
}
