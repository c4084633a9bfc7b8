"""What a forward pass reads, checked: tokens, their positions, and which of them each one sees.

Nothing here is jitted; everything can be. Values are checked where they can be seen, outside `jit`.

Axes are those of `modules.py`: B rows, T tokens, S keys (here T), H heads, D model width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.modules import Pass
from gpt2_jax.sharding import own_values

# Ids `[B, T]`, or what the table of embeddings would have given for them, `[B, T, D]`.
Tokens = Int[Array, "B T"] | Float[Array, "B T D"]


class Layout(NamedTuple):
    """How the tokens of a batch lie. Where all is None, each row is one text, from its start on.

    The arguments of `apply` of these names.
    """

    positions: Int[ArrayLike, "#B T"] | None = None
    mask: Shaped[ArrayLike, "B T"] | Shaped[ArrayLike, "#B #H T T"] | None = None
    segment_ids: Int[ArrayLike, "B T"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is said."""
        return self.positions is None and self.mask is None and self.segment_ids is None

    def without_last(self) -> "Layout":
        """Returns the layout of all tokens but the last, which is only predicted."""
        mask = self.mask
        if mask is not None:
            mask = jnp.asarray(mask)
            mask = mask[:, :-1] if mask.ndim == 2 else mask[:, :, :-1, :-1]
        return Layout(
            positions=None if self.positions is None else jnp.asarray(self.positions)[:, :-1],
            mask=mask,
            segment_ids=None if self.segment_ids is None else jnp.asarray(self.segment_ids)[:, :-1],
        )


def read_tokens(
    ids: Int[ArrayLike, "B T"] | None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None,
    *,
    config: GPT2Config,
    longest: int,
) -> Tokens:
    """Returns ids, or the embeddings in their place.

    Raises:
      ValueError: both are given, or neither, or one of another shape, or as `check_ids`.
    """
    if inputs_embeds is None:
        if ids is None:
            raise ValueError("`ids` or `inputs_embeds` must be given, got neither.")
        return check_ids(ids, config, longest=longest)
    if ids is not None:
        raise ValueError("`inputs_embeds` stand in the place of `ids`, which must be None then.")
    return check_stream("inputs_embeds", inputs_embeds, config, longest=longest)


def read_layout(layout: Layout, shape: tuple[int, ...], *, config: GPT2Config) -> Pass:
    """Returns positions and mask of right-padded rows.

    Args:
      layout: see `apply`.
      shape: `(B, T)`.
      config: the model's configuration.

    Raises:
      ValueError: an array is of another shape or kind, a position is none of the model's, or
        `segment_ids` come beside a mask that says all.
    """
    plain = causal(shape[1])
    if layout.is_plain:
        return plain
    positions = plain.positions
    mask = plain.mask
    if layout.segment_ids is not None:
        # Runs of equal numbers, not the numbers: a number may come again, and is another text then.
        run = _runs(_integers("segment_ids", layout.segment_ids, [shape]))
        positions = _within_runs(run)
        mask = mask & (run[:, None, :, None] == run[:, None, None, :])
    whole_mask = None
    if layout.mask is not None:
        given = _check_mask(layout.mask, shape, config)
        if given.ndim == 2:
            mask = mask & given[:, None, None, :]
        elif layout.segment_ids is not None:
            raise ValueError("A `mask` of queries and keys says all: leave out `segment_ids`.")
        else:
            whole_mask = given
    if layout.positions is not None:
        positions = _integers("positions", layout.positions, [shape, (1, shape[1])])
        _check_values("positions", positions, config.n_positions, "n_positions")
    if whole_mask is not None:
        # Without the promise that no query sees a later key, by which attention skips such keys.
        return Pass(positions=positions, mask=whole_mask, is_causal=False)
    return Pass(positions=positions, mask=mask)


def left_padded(lengths: Int[ArrayLike, " B"] | None, length: int, layout: Layout) -> Pass:
    """Returns positions and mask of rows that are padded on the left.

    Raises:
      ValueError: `lengths` are missing, or something else says how the tokens lie.
    """
    if lengths is None:
        raise ValueError(
            '`lengths` must be given for `padding_side="left"`: they say what is padding.'
        )
    if not layout.is_plain:
        raise ValueError(
            '`padding_side="left"` says where tokens lie: leave out `positions`, `mask` and'
            " `segment_ids`, or give these alone."
        )
    shared = causal(length)
    n_padding = length - jnp.asarray(lengths)[:, None]
    positions = shared.positions - n_padding  # negative in the padding
    # Of the keys alone: a query in the padding sees none, and nobody reads what comes of it.
    is_real = (positions >= 0)[:, None, None, :]
    # Any position will do in the padding, but it must be one: below 0, a lookup counts from the
    # end of the table.
    return Pass(positions=jnp.maximum(positions, 0), mask=shared.mask & is_real)


def causal(length: int) -> Pass:
    """Returns positions and mask of a text that is read from its start."""
    positions = jnp.arange(length)[None]  # [1, T]
    # One mask for all rows: what is right-padded needs no mask of its own.
    mask = positions[:, None, None, :] <= positions[:, None, :, None]  # [1, 1, T, T]
    return Pass(positions=positions, mask=mask)


def last_token(
    shared: Pass, lengths: Int[Array, " B"]
) -> tuple[Bool[Array, "B T"], Int[Array, " B"]]:
    """Returns what each row's last token sees, and its position: what later tokens go on from."""
    n_rows = len(lengths)
    length = shared.positions.shape[1]
    last = (lengths - 1)[:, None]  # [B, 1]
    # By any head: a key that one of them sees stays in the cache of all.
    by_query = shared.mask.any(axis=1)  # [1 or B, T, T]
    by_query = jnp.broadcast_to(by_query, (n_rows, length, length))
    positions = jnp.broadcast_to(shared.positions, (n_rows, length))
    seen = jnp.take_along_axis(by_query, last[:, :, None], axis=1)[:, 0]
    position = jnp.take_along_axis(positions, last, axis=1)[:, 0]
    return seen, position


# Checks.


def check_ids(
    ids: Int[ArrayLike, "B T"], config: GPT2Config, *, longest: int | None = None
) -> Int[Array, "B T"]:
    """Returns `ids` as an array.

    Raises:
      ValueError: it is not one `[B, T]` of ids, at most `longest` a row. Values are seen outside
        `jit` alone.
    """
    return jnp.asarray(checked_ids(ids, config, longest=longest))


def checked_ids(
    ids: Int[ArrayLike, "B T"], config: GPT2Config, *, longest: int | None = None
) -> Int[Array, "B T"] | Int[np.ndarray, "B T"]:
    """Returns what `check_ids` does, but on the host what was there, which loads no program."""
    # Lists stay on the host until they are checked; arrays of JAX stay where they are.
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        got = f"{ids.dtype} of shape {list(ids.shape)}"
        raise ValueError(f"`ids` must be an integer array of shape [B, T], got {got}.")
    _check_length("ids", ids.shape[1], config, longest)
    _check_values("ids", ids, config.vocab_size, "vocab_size")
    return ids


def check_stream(
    name: str, given: Float[ArrayLike, "B T D"], config: GPT2Config, *, longest: int
) -> Float[Array, "B T D"]:
    """Returns vectors of the model's width as an array; raises `ValueError` for anything else."""
    stream = jnp.asarray(given)
    width = config.n_embd
    fits = stream.ndim == 3 and stream.shape[2] == width
    if not fits or not jnp.issubdtype(stream.dtype, jnp.floating):
        got = f"{stream.dtype} of shape {list(stream.shape)}"
        raise ValueError(f"`{name}` must be floats of shape [B, T, {width}], got {got}.")
    _check_length(name, stream.shape[1], config, longest)
    return stream


def check_side(padding_side: str) -> None:
    """Raises `ValueError` unless `padding_side` names a side."""
    if padding_side not in ("left", "right"):
        raise ValueError(f'`padding_side` must be "left" or "right", got {padding_side!r}.')


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts as one batch, `ids[B, T]` padded on the right with 0, and their lengths.

    `T` is the longest row's length, or `width`.
    """
    # On the host: rows of many lengths would be as many programs on the device.
    lengths = np.array([len(row) for row in rows], np.int32)
    if width is None:
        # At least one column, even of no rows: no program takes a width of 0.
        width = int(lengths.max(initial=1))
    # Padded with an id that every vocabulary has; which one does not matter.
    ids = np.zeros((len(rows), width), np.int32)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = row
    return ids, lengths


def _check_length(name: str, width: int, config: GPT2Config, longest: int | None) -> None:
    if width < 1 or (longest is not None and width > longest):
        expected = f"1 to {config.n_positions} (`n_positions`) columns"
        raise ValueError(f"`{name}` must have {expected}, got {width}.")


def _check_values(name: str, array: Array | np.ndarray, limit: int, limit_name: str) -> None:
    """Raises `ValueError` for a number outside `[0, limit)`, where numbers can be seen."""
    if isinstance(array, Tracer) or not array.size:
        return
    # This waits for the device; but ids are few, and NaN from a wrong one is found late.
    values = own_values(array)
    outside = values[(values < 0) | (values >= limit)]
    if outside.size:
        raise ValueError(f"`{name}` must be in [0, {limit}) (`{limit_name}`), got {outside[0]}.")


def _integers(name: str, given: ArrayLike, shapes: Sequence[tuple[int, ...]]) -> Int[Array, "_ T"]:
    """Returns an array of integers that has one of some shapes."""
    array = given if isinstance(given, jax.Array) else np.asarray(given)
    if array.shape not in shapes or not jnp.issubdtype(array.dtype, jnp.integer):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise ValueError(f"`{name}` must be integers of shape {expected}, got {got}.")
    return jnp.asarray(array)


def _check_mask(
    given: ArrayLike, shape: tuple[int, ...], config: GPT2Config
) -> Bool[Array, "B T"] | Bool[Array, "_ _ T T"]:
    """Returns a mask as booleans."""
    mask = given if isinstance(given, jax.Array) else np.asarray(given)
    n_rows, length = shape
    # Numbers that are added to scores are HF's other kind of mask: taken for 0 and 1, they would
    # mean the contrary.
    is_kind = mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)
    square = (length, length)
    fits = mask.shape == (n_rows, length) or (
        mask.ndim == 4
        and mask.shape[0] in (1, n_rows)
        and mask.shape[1] in (1, config.n_head)
        and mask.shape[2:] == square
    )
    if not is_kind or not fits:
        expected = f"[{n_rows}, {length}] or [{n_rows}, 1, {length}, {length}]"
        got = f"{mask.dtype} of shape {list(mask.shape)}"
        raise ValueError(f"`mask` must be booleans, or 0 and 1, of shape {expected}, got {got}.")
    return jnp.asarray(mask).astype(bool)


# Segments.


def _runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the number of each token's run of equal ids."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1), ((0, 0), (1, 0)))


def _within_runs(run: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns each token's place in its run, from 0 on."""
    places = jnp.broadcast_to(jnp.arange(run.shape[1])[None], run.shape)
    begins = jnp.pad(run[:, 1:] != run[:, :-1], ((0, 0), (1, 0)))
    # The place of the last beginning so far; the first run begins at 0.
    start = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
    return places - start
