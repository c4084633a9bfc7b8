"""Token files to batches. Knows numbers on disk; nothing of text, models or arrays on devices.

A token file is nothing but ids, `uint16` or `uint32`, one after the other; `meta.json` beside it
says which. nanoGPT's `train.bin` and `val.bin` are such files.

Axes: B rows of a batch, T ids of a row, N ids of a file, W windows of an epoch.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from gpt2_jax.files import read_json_object

IDS_PER_CHECK = 2**24  # looked at in one go: 32 MiB of uint16, as files may be larger than memory


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the numbers."""


# Files.


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Returns what `meta.json` in a folder of token files says of them; without one, an empty dict.

    Raises:
      DataError: the file is not a JSON object, its `dtype` is neither uint16 nor uint32, or there
        is a `meta.pkl` instead.
    """
    file = Path(folder) / "meta.json"
    if not file.is_file():
        pickled = file.with_suffix(".pkl")  # as nanoGPT's `prepare.py` writes it
        if pickled.is_file():
            raise DataError(
                f"{pickled} is not read, as a pickle can run any code: write the size of the "
                'vocabulary to meta.json, such as {"vocab_size": 65}.'
            )
        return {}
    try:
        meta = read_json_object(file)
    except ValueError as error:
        raise DataError(str(error)) from error
    dtype = meta.get("dtype", "uint16")
    if dtype not in ("uint16", "uint32"):
        raise DataError(f'{file}: expected the `dtype` "uint16" or "uint32", got {dtype!r}.')
    _check_counts(file, meta)
    return meta


def _check_counts(file: Path, meta: dict[str, Any]) -> None:
    """Raises `DataError` where a `meta.json` has something else in the place of a count."""
    counts = {name: meta[name] for name in ("vocab_size",) if name in meta}
    for part in ("train", "val"):
        values = meta.get(part, {})
        if not isinstance(values, dict):
            raise DataError(f"{file}: expected an object as `{part}`, got {values!r:.60}.")
        counts |= {f"{part}.{name}": values[name] for name in values if name in ("tokens", "bytes")}
        if "tokens" in values and "bytes" not in values:
            raise DataError(f"{file}: expected `{part}.bytes` beside `{part}.tokens`, got none.")
    for name, count in counts.items():
        # `type`, as `True` would be an integer.
        if type(count) is not int or count < 0:
            raise DataError(f"{file}: expected a count as `{name}`, got {count!r:.60}.")


def open_tokens(file: str | Path, *, vocab_size: int) -> Integer[np.ndarray, " N"]:
    """Returns a token file's ids, mapped into memory: uint16 (nanoGPT's), or as `meta.json` says.

    Raises:
      DataError: the file is missing, empty, no whole number of ids, or holds an id outside the
        vocabulary.
    """
    file = Path(file)
    # nanoGPT's files have no `meta.json`, or one that knows of no dtype: they are uint16.
    dtype = np.dtype(read_meta(file.parent).get("dtype", "uint16"))
    if not file.is_file():
        raise DataError(f"{file}: there is no such file.")
    n_bytes = file.stat().st_size
    if n_bytes == 0 or n_bytes % dtype.itemsize:
        raise DataError(
            f"{file}: expected a whole number of {dtype.name} ids, at least one, "
            f"got {n_bytes} bytes."
        )
    tokens = np.memmap(file, dtype, mode="r")  # read-only: what is trained on stays as it was
    # All of them, before a run begins: one bad id would stop it days later, when its batch comes.
    for start in range(0, len(tokens), IDS_PER_CHECK):
        ids = tokens[start : start + IDS_PER_CHECK]
        if ids.max() >= vocab_size:
            offset = int(np.argmax(ids >= vocab_size))  # of the first one
            raise DataError(
                f"{file}: expected ids in [0, {vocab_size}) (`vocab_size`), "
                f"got {ids[offset]} at {start + offset}."
            )
    return tokens


def fingerprint(file: str | Path) -> dict[str, Any]:
    """Returns a file's size in `bytes` and its `sha256`: what a run remembers of its data."""
    file = Path(file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")  # in blocks: no file is in memory whole
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


# Batches, for training.


class Batches:
    """Windows of a token file in random order: a pure function from a cursor to a batch.

    An epoch begins at a random phase and passes over the file in windows of `length + 1` ids, in
    random order; each shares one id with the next, so that each id is predicted once. The end of
    the file is never passed. The last batch of an epoch is filled up from the next epoch.

    Args:
      tokens: the ids of the file.
      batch_size: windows of a batch.
      length: how many ids of a window are predicted.
      seed: of phases and orders.

    Raises:
      DataError: there are fewer than `length + 1` ids.
      ValueError: `batch_size` or `length` is less than 1.
    """

    def __init__(
        self, tokens: Integer[np.ndarray, " N"], *, batch_size: int, length: int, seed: int
    ):
        if batch_size < 1 or length < 1:
            raise ValueError(
                f"`batch_size` and `length` must be at least 1, got {batch_size} and {length}."
            )
        if len(tokens) < length + 1:
            raise DataError(
                f"Windows of {length} and 1 ids need as many tokens, the file has {len(tokens)}."
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        # One less than would fit: at least `length - 1` ids are left over, so that each phase is
        # possible. (A file of a single window has one phase.)
        self.windows_per_epoch = max(1, (len(tokens) - length) // length)
        # Two: where one epoch ends, a batch needs both. They depend on the seed alone, so nothing
        # that a caller sees depends on what is remembered.
        self._starts_of_epoch = lru_cache(maxsize=2)(self._draw_starts)

    def __call__(self, cursor: int) -> Int32[np.ndarray, "B T"]:
        """Returns the batch after `cursor` others, `T = length + 1` ids a row.

        Raises:
          ValueError: `cursor` is negative.
        """
        if cursor < 0:
            raise ValueError(f"`cursor` must not be negative, got {cursor}.")
        first = cursor * self.batch_size  # windows are counted through all epochs
        rows = []
        for number in range(first, first + self.batch_size):
            epoch, index = divmod(number, self.windows_per_epoch)
            start = self._starts_of_epoch(epoch)[index]
            rows.append(self.tokens[start : start + self.length + 1])
        # JAX's own integer, whichever of the two the file holds.
        return np.stack(rows).astype(np.int32)

    def _draw_starts(self, epoch: int) -> Int64[np.ndarray, " W"]:
        """Returns where the windows of an epoch start, in their order."""
        # Seeded by both numbers: their sum would give epoch 1 of seed 0 the order of epoch 0 of 1.
        rng = np.random.default_rng((self.seed, epoch))
        n_predicted = self.windows_per_epoch * self.length
        n_left_over = len(self.tokens) - 1 - n_predicted  # the first id is never predicted
        phase = rng.integers(min(self.length, n_left_over + 1))
        return phase + self.length * rng.permutation(self.windows_per_epoch)


# Windows, for validation.


class Windows(NamedTuple):
    """Some windows of a file, and how much each of their ids counts."""

    ids: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]  # 1 where an id is predicted, else 0


def windows(
    tokens: Integer[np.ndarray, " N"], *, batch_size: int, length: int
) -> Iterator[Windows]:
    """Yields a whole file in order, `batch_size` rows of `length + 1` ids at a time.

    Each id but the first is predicted once, with weight 1. What fills up the last rows has
    weight 0.
    """
    n_predicted = max(len(tokens) - 1, 0)
    starts = range(0, n_predicted, length)
    for first in range(0, len(starts), batch_size):
        # Every batch has one shape, the last one too: one program scores them all.
        ids = np.zeros((batch_size, length + 1), np.int32)
        weights = np.zeros((batch_size, length + 1), np.float32)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + length + 1]
            ids[row, : len(window)] = window
            weights[row, 1 : len(window)] = 1  # a window's first id was the last of the one before
        yield Windows(ids, weights)
