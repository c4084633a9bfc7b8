"""From next-token logits to token ids: samplers, which choose from what transforms make of them.

Knows nothing of models, and of transforms that they can be called. A sampler maps
`(keys, logits, history)` to ids: see `Sampler`. All are pytrees, as transforms are, and none
compiles itself.

Axes: B rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32

from gpt2_jax.generation.transforms import (
    Chain,
    History,
    Ids,
    Logits,
    Transform,
    as_transform,
    compiled_in,
)
from gpt2_jax.kernels import argmax, categorical
from gpt2_jax.pytrees import dataclass

Keys = Key[Array, " B"] | UInt32[Array, "B _"]  # one key per row, typed or raw


@runtime_checkable
class Sampler(Protocol):
    """What chooses the next token of each row: `Greedy`, `Categorical`, and those of `as_sampler`.

    `transform` is what it does to logits before it chooses, or None where that is not known. Beam
    search and speculation need it: they choose by rules of their own. A class of its own method
    `pick(keys, scores)`, to which transformed logits are given, has these computed once, for the
    choice and for what `generate` says of it.

    Examples:
      >>> sampler = gpt2_jax.Categorical(gpt2_jax.TopK(2))
      >>> isinstance(sampler, gpt2_jax.generation.sampling.Sampler), sampler.draws
      (True, True)
    """

    draws: ClassVar[bool]  # whether its choice is random, so that it needs keys

    @property
    def transform(self) -> Any: ...

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        """Returns the chosen ids, int32."""
        ...


@dataclass
class Greedy:
    """Takes the largest logit, the first of ties, after an optional transform.

    Raises:
      ValueError: the transform is none: see `Chain`.

    Examples:
      >>> gpt2_jax.Greedy()(None, jnp.array([[0.0, 2.0, 1.0]])).tolist()
      [1]
    """

    transform: Any = Chain()
    draws: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "transform", as_transform(self.transform))

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        return self.pick(keys, self.transform(logits, history))

    def pick(self, keys: Keys | None, scores: Logits) -> Ids:
        """Returns the ids chosen from logits that are transformed already."""
        del keys
        return argmax(scores)


@dataclass
class Categorical:
    """Draws from the softmax of transformed logits, each row with its own key.

    Raises:
      ValueError: the transform is none: see `Chain`.

    Examples:
      >>> keys = jax.random.split(jax.random.key(0), 2)  # a key for each row
      >>> logits = jnp.array([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
      >>> gpt2_jax.Categorical(gpt2_jax.TopK(1))(keys, logits).tolist()
      [1, 1]
    """

    transform: Any = Chain()
    draws: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "transform", as_transform(self.transform))

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        return self.pick(keys, self.transform(logits, history))

    def pick(self, keys: Keys | None, scores: Logits) -> Ids:
        """Returns the ids drawn from logits that are transformed already."""
        if keys is None:
            raise ValueError("Categorical draws: `keys` must hold a key for each row, got None.")
        return categorical(keys, scores)


@dataclass
class FunctionSampler:
    """A user's function in the form of a sampler: `as_sampler` makes it."""

    function: Callable[..., Any]  # a pytree
    draws: ClassVar[bool] = True  # it may

    @property
    def transform(self) -> None:
        """Not known."""

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        ids = jnp.asarray(self.function(keys, logits, history))
        n_rows = len(logits)
        if ids.shape != (n_rows,) or not jnp.issubdtype(ids.dtype, jnp.integer):
            got = f"{ids.dtype} of shape {list(ids.shape)}"
            raise ValueError(f"`sampler` must return integers of shape [{n_rows}], got {got}.")
        return ids.astype(jnp.int32)  # with `jax_enable_x64` a user's argmax is int64


def pick(
    sampler: Any, keys: Keys | None, logits: Logits, history: History
) -> tuple[Ids, Logits | None]:
    """Returns what a sampler chooses, and the transformed logits that it chose from, if known."""
    if sampler.transform is None:
        return sampler(keys, logits, history), None
    scores = sampler.transform(logits, history)
    # Of its very class: who inherits ours with another `__call__` chooses by that.
    pick_from = vars(type(sampler)).get("pick")
    if pick_from is None:
        return sampler(keys, logits, history), scores
    return pick_from(sampler, keys, scores), scores


def as_sampler(sampler: Any) -> Sampler:
    """Returns what a user gave as a sampler in the form of one.

    Args:
      sampler: None for `Greedy()`; a `Sampler`, that is, a callable pytree with the attributes
        `transform` and `draws`, as it is; or a function
        `(keys[B], logits[B, V], history) -> ids[B]`, which runs under `jit` and is taken to draw.
        An own class without those attributes counts as such a function: as a pytree
        (`flax.struct.dataclass` makes one) its numbers may change without recompiling, otherwise it
        must be hashable and compiles once for each object.

    Raises:
      ValueError: it is a transform, a class instead of an object, not hashable, or nothing that can
        be called.
    """
    if sampler is None:
        return Greedy()
    if isinstance(sampler, type):
        name = sampler.__name__
        raise ValueError(f"`sampler` must be an object, got the class {name}: use `{name}(...)`.")
    name = type(sampler).__name__
    if isinstance(sampler, Transform):
        raise ValueError(f"{name} is a transform, not a sampler: use `Categorical({name}(...))`.")
    # Before `callable`, after which a type checker takes it for a plain function.
    if hasattr(sampler, "transform") and hasattr(sampler, "draws"):
        return sampler
    if not callable(sampler):
        expected = "a sampler or a function `(keys, logits, history) -> ids`"
        raise ValueError(f"`sampler` must be {expected}, got {sampler!r}.")
    # What JAX takes for a leaf is no pytree.
    if not jax.tree_util.all_leaves([sampler]):
        return FunctionSampler(sampler)
    return FunctionSampler(compiled_in("sampler", sampler))
