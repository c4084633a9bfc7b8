"""Token files to batches. Knows numbers on disk; nothing of text, models or arrays on devices.

A token file is nothing but ids, `uint16` or `uint32`, one after the other; `meta.json` beside it says which. nanoGPT's
`train.bin` and `val.bin` are such files.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 2**24  # ids or bytes looked at in one go


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the numbers."""


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Returns what `meta.json` in a folder of token files says of them, or nothing.

    Raises:
      DataError: the file is no object, its `dtype` is neither uint16 nor uint32, or there is a `meta.pkl` instead.
    """
    file = Path(folder) / "meta.json"
    if not file.is_file():
        if file.with_suffix(".pkl").is_file():
            raise DataError(
                f"{file.with_suffix('.pkl')} is not read, as a pickle can run any code: write the size of the "
                'vocabulary to meta.json, such as {"vocab_size": 65}.'
            )
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, got {error}.") from error
    if not isinstance(meta, dict) or meta.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise DataError(f'{file}: expected an object whose `dtype` is "uint16" or "uint32".')
    return meta


def open_tokens(file: str | Path, *, vocab_size: int) -> np.ndarray:
    """Returns the ids of a token file, mapped into memory: `uint16[N]` (nanoGPT's), or as `meta.json` says.

    Raises:
      DataError: the file is missing, empty, of no whole number of ids, or holds an id outside the vocabulary.
    """
    file = Path(file)
    dtype = np.dtype(read_meta(file.parent).get("dtype", "uint16"))
    if not file.is_file():
        raise DataError(f"{file}: there is no such file.")
    size = file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(
            f"{file}: expected a whole number of {dtype.name} ids, at least one, got {size} bytes."
        )
    tokens = np.memmap(file, dtype, mode="r")
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        if chunk.max() >= vocab_size:
            place = int(np.argmax(chunk >= vocab_size))
            raise DataError(
                f"{file}: expected ids in [0, {vocab_size}) (`vocab_size`), got {chunk[place]} at {start + place}."
            )
    return tokens


class Batches:
    """Windows of a token file in random order: a pure function from a cursor to a batch.

    An epoch begins at a random phase and passes over the file in windows of `length + 1` ids, in random order; each
    shares one id with the next, so that each id is predicted once. The end of the file is never passed.

    Args:
      tokens: `[N]` ids.
      batch_size: windows of a batch.
      length: how many ids of a window are predicted.
      seed: of phases and orders.

    Raises:
      DataError: there are fewer than `length + 1` ids.
    """

    def __init__(self, tokens: np.ndarray, *, batch_size: int, length: int, seed: int):
        if batch_size < 1 or length < 1:
            raise ValueError(
                f"`batch_size` and `length` must be at least 1, got {batch_size} and {length}."
            )
        if len(tokens) < length + 1:
            raise DataError(
                f"Windows of {length} and 1 ids need as many tokens, the file has {len(tokens)}."
            )
        self.tokens, self.batch_size, self.length, self.seed = tokens, batch_size, length, seed
        self.per_epoch = max(1, (len(tokens) - length) // length)  # windows
        self._starts = lru_cache(maxsize=2)(self._draw_starts)

    def __call__(self, cursor: int) -> np.ndarray:
        """Returns `int32[batch_size, length + 1]`, the batch after `cursor` others."""
        if cursor < 0:
            raise ValueError(f"`cursor` must not be negative, got {cursor}.")
        numbers = range(cursor * self.batch_size, (cursor + 1) * self.batch_size)
        starts = [self._starts(n // self.per_epoch)[n % self.per_epoch] for n in numbers]
        return np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(
            np.int32
        )

    def _draw_starts(self, epoch: int) -> np.ndarray:
        """Returns where the windows of an epoch start, in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        room = len(self.tokens) - 1 - self.per_epoch * self.length
        phase = rng.integers(min(self.length, room + 1))
        return phase + self.length * rng.permutation(self.per_epoch)


def windows(
    tokens: np.ndarray, *, batch_size: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields a whole file in order: ids `int32[batch_size, length + 1]` and weights `float32` of the same shape.

    Each id but the first is predicted once, with weight 1. What fills up the last batch has weight 0.
    """
    starts = range(0, max(len(tokens) - 1, 0), length)
    for first in range(0, len(starts), batch_size):
        ids = np.zeros((batch_size, length + 1), np.int32)
        weights = np.zeros((batch_size, length + 1), np.float32)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + length + 1]
            ids[row, : len(window)] = window
            weights[row, 1 : len(window)] = 1
        yield ids, weights


def fingerprint(file: str | Path) -> dict[str, Any]:
    """Returns a file's size and sha256: what a run remembers of its data."""
    with Path(file).open("rb") as opened:
        return {
            "bytes": Path(file).stat().st_size,
            "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
        }
