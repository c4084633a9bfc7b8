"""Edits: what becomes of an activation, everywhere or at some positions of a text.

Knows arrays; where edits act is said in `taps`.

Axes are those of `modules.py`; `...` are the axes of a site that its name decides.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.pytrees import dataclass, static

AnyArray = Array | np.ndarray
# What becomes of an activation: a function of it, or a value that broadcasts to it.
Edit = Callable[[Array], Array] | ArrayLike
# `[N]`, `[B, N]`, or one.
Positions = ArrayLike | Sequence[int] | Sequence[Sequence[int]]


def replace(value: ArrayLike, where: ArrayLike = True, *, at: Positions | None = None) -> Edit:
    """Returns the edit that puts `value` in an activation's place where a mask is true.

    Args:
      value: what broadcasts to the activation.
      where: a mask that does.
      at: at which positions of the text, all by default: whole numbers from 0 on, `[N]`, or for
        each row its own, `[B, N]`, of which none comes twice. They are found wherever the token is
        read, in a prompt, on a cache or while decoding. For `scores` and `pattern` they are those
        of the queries. `value` and `where` may then have N entries along that axis: one for each.

    Raises:
      ValueError: `at` is none of these.

    Examples:
      >>> edit = gpt2_jax.replace(0.0, where=jnp.array([True, False]))
      >>> edit(jnp.array([3.0, 4.0])).tolist()
      [0.0, 4.0]
      >>> last = gpt2_jax.replace(0.0, at=[3])  # at position 3 of the text alone
      >>> logits = gpt2_jax.patch(params, ids, config=config, edits={"h.0.mlp.out": last})
      >>> np.allclose(logits[:, :3], gpt2_jax.apply(params, ids, config=config)[:, :3], atol=1e-5)
      True
    """
    return Change((value, where), _checked_at(at), _replace)


def add(vector: ArrayLike, strength: ArrayLike = 1.0, *, at: Positions | None = None) -> Edit:
    """Returns the edit that adds `strength * vector`, which broadcasts to the activation.

    With `at`, at these positions of the text: see `replace`.

    Raises:
      ValueError: as `replace`.

    Examples:
      >>> gpt2_jax.add(jnp.array([1.0, 2.0]), 10.0)(jnp.zeros(2)).tolist()
      [10.0, 20.0]
    """
    return Change((vector, strength), _checked_at(at), _add)


def _replace(value: ArrayLike, where: ArrayLike, x: Array) -> Array:
    value = jnp.asarray(value, x.dtype)
    # Broadcast by hand, for programs that forbid ranks to be promoted in silence.
    value = jnp.broadcast_to(value, x.shape)
    where = jnp.broadcast_to(where, x.shape)
    return jnp.where(where, value, x)


def _add(vector: ArrayLike, strength: ArrayLike, x: Array) -> Array:
    # Multiplied before the cast: in bfloat16 the strength would lose digits of its own.
    offset = jnp.asarray(vector * strength, x.dtype)
    return x + jnp.broadcast_to(offset, x.shape)


@dataclass
class Change:
    """An edit by arrays, as `replace` and `add` make it.

    A pytree whose arrays are leaves: a jitted caller compiles once for all values.
    """

    values: tuple[Any, ...]  # the arrays
    at: Any  # positions `[N]` or `[B, N]`, or None for all
    function: Any = static()  # `(*values, x) -> x`

    def __call__(self, x: Array) -> Array:
        if self.at is not None:
            raise ValueError(
                "An edit `at` positions must be told those of the tokens: it is one for `patch`,"
                " `capture` and `make_tap`, which see to that."
            )
        return self.function(*self.values, x)

    def of_tokens(self, x: Array, positions: Int[Array, "#B T"], axis: int) -> Array:
        """Returns the activation of tokens at some positions, which lie along an axis."""
        at = jnp.atleast_2d(jnp.asarray(self.at))  # [1 or B, N]
        n_rows = len(x)
        if len(at) not in (1, n_rows):
            raise ValueError(f"`at` must have 1 row, or {n_rows} as the batch, got {len(at)}.")
        is_at = positions[:, :, None] == at[:, None]  # [1 or B, T, N]
        # By tokens, with the other axes of the activation.
        shape = [1] * x.ndim
        shape[0] = len(is_at)
        shape[axis] = x.shape[axis]
        index = is_at.argmax(axis=-1).reshape(shape)
        is_any = is_at.any(axis=-1).reshape(shape)
        count = at.shape[1]
        values = [_of_tokens(value, index, axis - x.ndim, count) for value in self.values]
        return jnp.where(is_any, self.function(*values, x), x)

    def repeated(self, n: int, ranks: tuple[int, ...]) -> "Change":
        """Returns the edit of a batch with each row `n` times, of an activation of such a rank."""
        values = tuple(repeat_rows(value, n, ranks) for value in self.values)
        at = None if self.at is None else repeat_rows(self.at, n, (2,))
        return Change(values, at, self.function)


def _of_tokens(value: ArrayLike, index: Int[Array, "..."], axis: int, count: int) -> ArrayLike:
    """Returns of `count` entries along an axis, which counts from the end, each token's own."""
    shape = jnp.shape(value)
    # One for all, or none: it is broadcast.
    if len(shape) < -axis or shape[axis] == 1:
        return value
    if shape[axis] != count:
        expected = f"1 entry, or one for each of the {count} positions in `at`"
        raise ValueError(f"A value must have {expected}; got {shape[axis]} of {list(shape)}.")
    aligned = jnp.reshape(value, (1,) * (index.ndim - len(shape)) + shape)
    return jnp.take_along_axis(aligned, index, axis=axis)


def repeat_rows(value: Any, n: int, ranks: tuple[int, ...]) -> Any:
    """Returns an array with each row `n` times, if it has more than one and such a rank."""
    if jnp.ndim(value) not in ranks or len(value) == 1:
        return value
    return jnp.repeat(jnp.asarray(value), n, axis=0)


def has_positions(edit: Any) -> TypeGuard[Change]:
    return isinstance(edit, Change) and edit.at is not None


# Positions.


def _checked_at(at: Any) -> Any:
    """Returns positions as an array, None as it is."""
    if at is None:
        return None
    if not isinstance(at, jax.Array):
        at = np.asarray(at)
    if at.ndim > 2 or not jnp.issubdtype(at.dtype, jnp.integer):
        got = f"{at.dtype} of shape {list(at.shape)}"
        raise ValueError(f"`at` must be integers of shape [N] or [B, N], got {got}.")
    at = jnp.atleast_1d(at) if isinstance(at, jax.Array) else np.atleast_1d(at)
    if not isinstance(at, Tracer):
        _check_positions(at)
    return at


def _check_positions(at: AnyArray) -> None:
    """Raises `ValueError` for positions that no text has, or that come twice."""
    for row in np.atleast_2d(at):
        if (row < 0).any():
            raise ValueError(f"`at` must be positions, from 0 on, got {row.min()}.")
        if len(np.unique(row)) < len(row):
            raise ValueError(f"`at` must hold each position once, got {row.tolist()}.")


def check_context(at: AnyArray, config: GPT2Config) -> None:
    """Raises `ValueError` for a position beyond a model's last."""
    if isinstance(at, Tracer) or not at.size:
        return
    if np.max(at) >= config.n_positions:
        expected = f"less than {config.n_positions} (`n_positions`)"
        raise ValueError(f"`at` must be {expected}, got {np.max(at)}.")
