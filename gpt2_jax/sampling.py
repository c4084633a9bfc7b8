"""From next-token logits to token ids: transforms, which reshape logits, and samplers, which draw from them.

Knows nothing of models. A transform maps `(logits[B, V], history)` to logits, with -inf for what it removes; the
largest logit always survives. A sampler maps `(keys[B], logits, history)` to ids. All are pytrees: their numbers are
leaves, so that new values recompile nothing, and each may be a scalar or hold one value per row, `[B]`. The
definitions are HF transformers' (generation/logits_process.py), ties included.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Number = Any  # a float, or an array of one value per row


class History(NamedTuple):
    """The tokens that came before the one being chosen, for rules that look back."""

    ids: Array  # int32[B, S], the prompt and what was generated, with gaps
    valid: Array  # bool[B, S], which of them are real
    step: Array  # int32[], tokens generated so far


@struct.dataclass
class Temperature:
    """Divides logits by `temperature`, which must be positive: 0 would be `Greedy`."""

    temperature: Number

    def __post_init__(self):
        _check("temperature", self.temperature, "greater than 0", lambda x: (x > 0) & np.isfinite(x))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        return logits / _per_row(self.temperature)


@struct.dataclass
class TopK:
    """Keeps the `k` largest logits and any tied with the last of them."""

    k: int = struct.field(pytree_node=False)  # static: it shapes the program

    def __post_init__(self):
        if not isinstance(self.k, int | np.integer) or self.k < 1:
            raise ValueError(f"`k` of TopK must be a positive integer, got {self.k!r}.")

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][..., -1:]
        return jnp.where(logits < kth, -jnp.inf, logits)


@struct.dataclass
class TopP:
    """Keeps the most likely tokens whose probabilities together reach `p` (nucleus sampling, arXiv:1904.09751).

    A token is dropped when it and all less likely ones hold at most `1 - p`. Of tied tokens the first go first.
    """

    p: Number

    def __post_init__(self):
        _check("p", self.p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        p = _per_row(self.p)
        order = jnp.argsort(logits, axis=-1)  # ascending and stable
        tail = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
        drop = (tail <= 1 - p) & (p < 1)  # at p = 1 nothing is dropped, whatever the sum's last digit
        drop = drop.at[..., -1].set(False)
        return jnp.where(jnp.put_along_axis(drop, order, drop, axis=-1, inplace=False), -jnp.inf, logits)


@struct.dataclass
class MinP:
    """Keeps tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082)."""

    min_p: Number

    def __post_init__(self):
        _check("min_p", self.min_p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        probs = jax.nn.softmax(logits, axis=-1)
        largest = probs.max(axis=-1, keepdims=True)
        return jnp.where(probs < _per_row(self.min_p) * largest, -jnp.inf, logits)


@struct.dataclass
class Chain:
    """Applies transforms in order. HF's order is temperature, top-k, top-p, min-p."""

    transforms: tuple = ()

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        for transform in self.transforms:
            logits = transform(logits, history)
        return logits


@struct.dataclass
class Greedy:
    """Takes the largest logit, the first of ties, after an optional transform."""

    transform: Any = Chain()

    def __call__(self, keys: Array | None, logits: Array, history: History | None = None) -> Array:
        del keys
        return jnp.argmax(self.transform(logits, history), axis=-1).astype(jnp.int32)


@struct.dataclass
class Categorical:
    """Draws from the softmax of the logits, each row with its own key, after an optional transform."""

    transform: Any = Chain()

    def __call__(self, keys: Array, logits: Array, history: History | None = None) -> Array:
        return jax.vmap(jax.random.categorical)(keys, self.transform(logits, history)).astype(jnp.int32)


def _per_row(number: Number) -> Array:
    """Lines a scalar, or one value per row, up with `logits[B, V]`."""
    number = jnp.asarray(number)
    return number[:, None] if number.ndim else number


def _check(name: str, number: Number, expected: str, holds) -> None:
    """Raises `ValueError` where a number is out of range. Traced numbers have no value to check."""
    concrete = isinstance(number, int | float | np.ndarray | np.generic | jax.Array)
    if concrete and not isinstance(number, jax.core.Tracer) and not np.all(holds(np.asarray(number))):
        raise ValueError(f"`{name}` must be {expected}, got {number}.")
