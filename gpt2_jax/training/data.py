"""Token files to batches. Knows numbers on disk; nothing of text, models or arrays on devices.

A token file is nothing but ids, `uint16` or `uint32`, one after the other; `meta.json` beside it
says which. nanoGPT's `train.bin` and `val.bin` are such files. Those of llm.c begin with a header,
and numpy's `.npy` are read too.

Axes: B rows of a batch, T ids of a row, N ids of a file, W windows of an epoch.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from gpt2_jax.files import LFS_MAGIC, STAND_INS, read_json_object

IDS_PER_CHECK = 2**24  # looked at in one go: 32 MiB of uint16, as files may be larger than memory


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the numbers."""


# Files.


def read_meta(folder: str | Path) -> dict[str, Any]:
    """Returns what `meta.json` in a folder of token files says of them, or nanoGPT's `meta.pkl`.

    Of the second come `vocab_size` and, where it has them, `itos`, the token of each id, in order.
    A folder with neither gives an empty dict.

    Raises:
      DataError: the file is not a JSON object, its `dtype` is neither uint16 nor uint32, or the
        pickle is damaged or holds more than plain data.
    """
    file = Path(folder) / "meta.json"
    if not file.is_file():
        pickled = file.with_suffix(".pkl")  # as nanoGPT's `prepare.py` writes it
        return _read_pickle(pickled) if pickled.is_file() else {}
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
        if part == "val" and "tokens" in values and "bytes" not in values:
            raise DataError(f"{file}: expected `val.bytes` beside `val.tokens`, got none.")
    for name, count in counts.items():
        # `type`, as `True` would be an integer.
        if type(count) is not int or count < 0:
            raise DataError(f"{file}: expected a count as `{name}`, got {count!r:.60}.")


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers. Nothing is looked up, so there is nothing to run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Raises: every class and function that a pickle could call comes by way of this method."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def _read_pickle(file: Path) -> dict[str, Any]:
    """Returns the size of the vocabulary and the tokens that nanoGPT's `meta.pkl` holds."""
    try:
        with file.open("rb") as opened:
            content = _PlainUnpickler(opened).load()
    # Of a damaged pickle, nearly any: Python's documentation lists some.
    except Exception as error:
        raise DataError(f"{file}: expected a pickle of plain data, but {error}.") from None
    content = content if isinstance(content, dict) else {}
    vocab_size = content.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        expected = "a positive `vocab_size`, as nanoGPT writes it"
        raise DataError(f"{file}: expected {expected}, got {vocab_size!r:.40}.")
    meta: dict[str, Any] = {"vocab_size": vocab_size}
    if "itos" in content:
        meta["itos"] = _tokens_in_order(file, content["itos"], vocab_size)
    return meta


def _tokens_in_order(file: Path, itos: Any, vocab_size: int) -> list[str]:
    """Returns the token of each id, from 0 on."""
    tokens = itos if isinstance(itos, dict) else {}
    ids = range(vocab_size)
    if tokens.keys() != set(ids) or not all(isinstance(tokens[id], str) for id in ids):
        raise DataError(f"{file}: expected `itos` to have a text for each id below {vocab_size}.")
    return [tokens[id] for id in ids]


class Layout(NamedTuple):
    """How ids lie in a file."""

    dtype: np.dtype
    offset: int  # bytes before the first
    n_ids: int


# The first int32 of llm.c's token files (`dev/data/data_common.py`) -> its version, and the dtype
# of the ids, which follow a header of 256 int32 whose third is their number.
LLM_C_TOKENS = {20240520: (1, np.dtype("uint16")), 20240801: (7, np.dtype("uint32"))}
LLM_C_HEADER = 1024  # bytes
# ... and of its files of other kinds.
LLM_C_OTHERS = {20240326: "a model", 20240327: "a state to test against", 20240328: "a tokenizer"}

# How files begin that are no token files, whatever their names say. Long enough that no ids are
# taken for them: that every second id is 0, as in a file of int32, is no proof.
FOREIGN = {
    LFS_MAGIC: STAND_INS[LFS_MAGIC],
    b"\x93NUMPY": "numpy's format: call it .npy",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"MMIDIDX\x00\x00": "Megatron's index",
    b"ARROW1\x00\x00": "an Arrow file",
    b"SQLite format 3": "SQLite",
}


def open_tokens(file: str | Path, *, vocab_size: int) -> Integer[np.ndarray, " N"]:
    """Returns a token file's ids, mapped into memory.

    They are uint16, nanoGPT's, or as `meta.json` says; or as a header of llm.c's, or the name
    `.npy`, says.

    Raises:
      DataError: the file is missing, empty, no whole number of ids, or one of another kind; it has
        not as many ids as its header or `meta.json` says; or an id is outside the vocabulary.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file.")
    if file.suffix == ".npy":
        tokens = _open_npy(file)
    else:
        layout = _layout_of(file)
        # Read-only: what is trained on stays as it was.
        tokens = np.memmap(file, layout.dtype, "r", layout.offset, (layout.n_ids,))
    _check_ids(file, tokens, vocab_size)
    return tokens


def _layout_of(file: Path) -> Layout:
    """Returns how ids lie in a file that is no `.npy`."""
    with file.open("rb") as opened:
        beginning = opened.read(LLM_C_HEADER)
    for magic, kind in FOREIGN.items():
        if beginning.startswith(magic):
            raise DataError(f"{file}: expected token ids, got {kind}.")
    if beginning.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
        raise DataError(f"{file}: expected token ids, got a zip, such as PyTorch and numpy write.")
    header = np.frombuffer(beginning[: len(beginning) // 4 * 4], "<i4")
    magic = int(header[0]) if len(header) else 0
    if magic in LLM_C_OTHERS:
        raise DataError(f"{file}: expected llm.c's tokens, got {LLM_C_OTHERS[magic]} of llm.c's.")
    if magic in LLM_C_TOKENS:
        return _llm_c_layout(file, header)
    return _plain_layout(file)


def _llm_c_layout(file: Path, header: Integer[np.ndarray, " H"]) -> Layout:
    """Returns the layout that a header of llm.c's says, which must be that of the file."""
    version, dtype = LLM_C_TOKENS[int(header[0])]
    n_bytes = file.stat().st_size - LLM_C_HEADER
    said = tuple(header[1:3].tolist())
    found = (version, n_bytes // dtype.itemsize)
    if n_bytes <= 0 or n_bytes % dtype.itemsize or said != found:
        expected = f"llm.c's version {version} and a header that counts the ids"
        raise DataError(f"{file}: expected {expected}, got {said} with {n_bytes} bytes of ids.")
    return Layout(dtype, LLM_C_HEADER, found[1])


def _plain_layout(file: Path) -> Layout:
    """Returns the layout of a file without a header."""
    meta = read_meta(file.parent)
    # nanoGPT's files have no `meta.json`, or one that knows of no dtype: they are uint16.
    dtype = np.dtype(meta.get("dtype", "uint16"))
    n_bytes = file.stat().st_size
    if n_bytes == 0 or n_bytes % dtype.itemsize:
        raise DataError(
            f"{file}: expected a whole number of {dtype.name} ids, at least one, "
            f"got {n_bytes} bytes."
        )
    n_ids = n_bytes // dtype.itemsize
    part = meta.get(file.stem)
    said = part.get("tokens", n_ids) if isinstance(part, dict) else n_ids
    # A file of int32 has twice as many uint16, and would be trained on all the same.
    if said != n_ids:
        raise DataError(
            f"{file}: expected {said} {dtype.name} ids, as meta.json says, got {n_ids}."
        )
    return Layout(dtype, 0, n_ids)


def _open_npy(file: Path) -> Integer[np.ndarray, " N"]:
    """Returns the ids of one of numpy's files."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{file}: expected numpy's format, but {error}.") from error
    is_row = isinstance(tokens, np.ndarray) and tokens.ndim == 1 and len(tokens) > 0
    if not is_row or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} of shape {list(tokens.shape)}" if hasattr(tokens, "dtype") else "npz"
        raise DataError(f"{file}: expected one row of integers, got {got}.")
    return tokens


def _check_ids(file: Path, tokens: Integer[np.ndarray, " N"], vocab_size: int) -> None:
    """Raises `DataError` where an id is outside the vocabulary."""
    # All of them, before a run begins: one bad id would stop it days later, when its batch comes.
    for start in range(0, len(tokens), IDS_PER_CHECK):
        ids = tokens[start : start + IDS_PER_CHECK]
        if ids.max() >= vocab_size or ids.min() < 0:
            offset = int(np.argmax((ids >= vocab_size) | (ids < 0)))  # of the first one
            raise DataError(
                f"{file}: expected ids in [0, {vocab_size}) (`vocab_size`), "
                f"got {ids[offset]} at {start + offset}."
            )


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
