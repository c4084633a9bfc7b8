"""What makes a training run what it is: one frozen dataclass, and presets. Knows nothing of arrays or files."""

import dataclasses
from typing import Any

from gpt2_jax.config import GPT2Config

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")  # what a pretrained model brings with it


def option(default: Any, help: str, *, curve: bool = True) -> Any:
    """Returns a field; `curve` says whether it changes the loss curve, so that a resumed run must not change it."""
    return dataclasses.field(default=default, metadata={"help": help, "curve": curve})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run, but for its data. The defaults are nanoGPT's for GPT-2 124M, on one device.

    Raises:
      ValueError: a field is out of range.
    """

    n_layer: int = option(12, "layers")
    n_head: int = option(12, "attention heads of a layer")
    n_embd: int = option(768, "width")
    n_positions: int = option(1024, "longest context")
    length: int = option(0, "tokens of a training window; 0 means n_positions")
    dropout: float = option(0.0, "rate of all three dropouts: embeddings, attention, residuals")
    dtype: str = option(
        "float32", "what the model computes in; parameters are float32 all the same"
    )
    remat: bool = option(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    batch_size: int = option(480, "windows of an update")
    micro_batches: int = option(
        40, "parts of a batch that pass through the model one after the other"
    )
    steps: int = option(600_000, "updates")
    learning_rate: float = option(6e-4, "at its peak")
    min_learning_rate: float = option(6e-5, "at the end of the cosine")
    warmup_steps: int = option(2000, "updates before the peak")
    weight_decay: float = option(0.1, "of matrices and embeddings")
    b1: float = option(0.9, "Adam's decay of the mean")
    b2: float = option(0.95, "Adam's decay of the square")
    max_grad_norm: float = option(1.0, "global norm that gradients are clipped to")
    seed: int = option(0, "of initial weights, batches and dropout")
    eval_every: int = option(2000, "updates between losses on the validation set", curve=False)
    save_every: int = option(2000, "updates between checkpoints", curve=False)
    keep: int = option(2, "latest checkpoints to keep, besides the best", curve=False)
    log_every: int = option(10, "updates between lines of metrics", curve=False)
    sample_tokens: int = option(100, "tokens of text to make at each evaluation", curve=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise ValueError(f"`{field.name}` must be of type {kind.__name__}, got {value!r}.")
        counts = (
            "batch_size",
            "micro_batches",
            "steps",
            "eval_every",
            "save_every",
            "keep",
            "log_every",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"`batch_size` must be a multiple of `micro_batches`, got {self.batch_size} and {self.micro_batches}."
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"`warmup_steps` must be in [0, {self.steps}) (`steps`), got {self.warmup_steps}."
            )
        if not 0 <= self.min_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                "`learning_rate` must be positive and `min_learning_rate` between 0 and it, "
                f"got {self.learning_rate} and {self.min_learning_rate}."
            )
        for name in ("length", "weight_decay", "sample_tokens", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if not self.max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` must be positive, got {self.max_grad_norm}.")
        self.adapt(GPT2Config())  # raises where a dropout or a dtype is none

    def config(self, *, vocab_size: int, eot_id: int | None) -> GPT2Config:
        """Returns the config of a new model.

        Raises:
          ValueError: as `GPT2Config`.
        """
        shape = {name: getattr(self, name) for name in SHAPE}
        return self.adapt(
            GPT2Config(vocab_size=vocab_size, bos_token_id=eot_id, eos_token_id=eot_id, **shape)
        )

    def adapt(self, config: GPT2Config) -> GPT2Config:
        """Returns a config with this recipe's dropout and dtype."""
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        return config.replace(dtype=self.dtype, **rates)


RECIPES = {
    # nanoGPT's recipe for a CPU, `config/train_shakespeare_char.py` with the changes that its README names.
    "shakespeare_char": Recipe(
        n_layer=4,
        n_head=4,
        n_embd=128,
        n_positions=64,
        batch_size=12,
        micro_batches=1,
        steps=2000,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=100,
        b2=0.99,
        eval_every=250,
        save_every=250,
        seed=1337,
    ),
    # The model that ships with the package as "demo": 4.3 M parameters, an hour or two on two cores.
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
    # nanoGPT's `config/train_gpt2.py`: 124M parameters, half a million tokens an update.
    "gpt2": Recipe(dtype="bfloat16"),
}
