"""Token files: how ids lie in them, which files of a folder they are, and what goes with them.

A token file is nothing but ids, `uint16` or `uint32`, one after the other; `meta.json` beside it
says which. nanoGPT's `train.bin` and `val.bin` are such files. Those of llm.c begin with a header,
and numpy's `.npy` are read too. Knows bytes and names; nothing of text, models or batches.

Axes: N ids of a file.
"""

import mmap
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from gpt2_jax.files import LFS_MAGIC, STAND_INS, read_json_object, some


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


# How ids lie in a file.


class TokenFile(NamedTuple):
    """A token file, and how ids lie in it."""

    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first
    n_ids: int

    def map(self, *, is_random: bool = False) -> Integer[np.ndarray, " N"]:
        """Returns the ids, mapped into memory, to be read only.

        Args:
          is_random: whether what lies around a row is not wanted. Else the system reads it too,
            from 128 KiB to megabytes, and keeps it for later.

        Raises:
          DataError: the file has become shorter, or is gone.
        """
        try:
            with self.path.open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            if is_random and hasattr(mmap, "MADV_RANDOM"):  # Windows has none
                mapped.madvise(mmap.MADV_RANDOM)
            return np.frombuffer(mapped, self.dtype, self.n_ids, self.offset)
        except (OSError, ValueError) as error:
            expected = f"{self.n_ids} {self.dtype.name} ids, as there were"
            raise DataError(f"{self.path}: expected {expected}, but {error}.") from error


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


def token_file(path: str | Path, dtype: str = "uint16") -> TokenFile:
    """Returns how ids lie in a file, by its first bytes and its size; no id is read.

    Args:
      path: a file of nanoGPT's or llm.c's, or numpy's `.npy`.
      dtype: of the ids in a file whose beginning does not say it.

    Raises:
      DataError: the file is missing, empty, no whole number of ids, or one of another kind; or it
        has not as many ids as its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    if path.suffix == ".npy":
        return _npy_file(path)
    with path.open("rb") as opened:
        beginning = opened.read(LLM_C_HEADER)
    for magic, kind in FOREIGN.items():
        if beginning.startswith(magic):
            raise DataError(f"{path}: expected token ids, got {kind}.")
    if beginning.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        raise DataError(f"{path}: expected token ids, got a zip, such as PyTorch and numpy write.")
    header = np.frombuffer(beginning[: len(beginning) // 4 * 4], "<i4")
    magic = int(header[0]) if len(header) else 0
    if magic in LLM_C_OTHERS:
        raise DataError(f"{path}: expected llm.c's tokens, got {LLM_C_OTHERS[magic]} of llm.c's.")
    if magic in LLM_C_TOKENS:
        return _llm_c_file(path, header)
    return _plain_file(path, np.dtype(dtype))


def _llm_c_file(path: Path, header: Integer[np.ndarray, " H"]) -> TokenFile:
    """Returns the layout that a header of llm.c's says, which must be that of the file."""
    version, dtype = LLM_C_TOKENS[int(header[0])]
    n_bytes = path.stat().st_size - LLM_C_HEADER
    said = tuple(header[1:3].tolist())
    found = (version, n_bytes // dtype.itemsize)
    if n_bytes <= 0 or n_bytes % dtype.itemsize or said != found:
        expected = f"llm.c's version {version} and a header that counts the ids"
        raise DataError(f"{path}: expected {expected}, got {said} with {n_bytes} bytes of ids.")
    return TokenFile(path, dtype, LLM_C_HEADER, found[1])


def _plain_file(path: Path, dtype: np.dtype) -> TokenFile:
    """Returns the layout of a file without a header."""
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % dtype.itemsize:
        raise DataError(
            f"{path}: expected a whole number of {dtype.name} ids, at least one, "
            f"got {n_bytes} bytes."
        )
    return TokenFile(path, dtype, 0, n_bytes // dtype.itemsize)


def _npy_file(path: Path) -> TokenFile:
    """Returns the layout of one of numpy's files."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: expected numpy's format, but {error}.") from error
    is_row = isinstance(tokens, np.memmap) and tokens.ndim == 1 and len(tokens) > 0
    if not is_row or not np.issubdtype(tokens.dtype, np.integer):
        got = f"{tokens.dtype} of shape {list(tokens.shape)}" if hasattr(tokens, "dtype") else "npz"
        raise DataError(f"{path}: expected one row of integers, got {got}.")
    return TokenFile(path, tokens.dtype, tokens.offset, len(tokens))


# Which files of a folder they are.


OUR_NAME = re.compile(r"(train|val)(_\d+)?\.bin")
UNNUMBERED = -1


class Series(NamedTuple):
    """Files of one name, but for their numbers."""

    stem: str
    suffix: str


def is_our_name(name: str) -> bool:
    """Returns whether a file is called as `prepare` calls those with ids."""
    return OUR_NAME.fullmatch(name) is not None


def find_token_files(folder: Path, part: str) -> list[Path]:
    """Returns the token files of a part, "train" or "val", in the order of their numbers.

    That is `train.bin` or `train.npy`; or `train_00000.bin`, `train_00001.bin`, ...; or names such
    as llm.c's `tiny_shakespeare_train.bin` and `fineweb_train_000001.bin`. None gives no files.

    Raises:
      DataError: files of several names may be it, or a number is missing or there twice.
    """
    found = _series_of(folder, part)
    # The plain names first: among other files, one of these is what is meant.
    for suffix in (".bin", ".npy"):
        numbers = found.get(Series(part, suffix), {})
        if UNNUMBERED not in numbers:
            continue
        if len(numbers) > 1:
            expected = f"`{part}{suffix}` or files with numbers"
            raise DataError(f"{folder}: expected {expected}, got both.")
        return numbers[UNNUMBERED]
    if len(found) > 1:
        names = some(f"{series.stem}*{series.suffix}" for series in found)
        raise DataError(f"{folder}: expected token files of one name for {part}, got {names}.")
    for numbers in found.values():
        _check_numbers(folder, numbers)
        return [files[0] for _, files in sorted(numbers.items())]
    return []


def _series_of(folder: Path, part: str) -> dict[Series, dict[int, list[Path]]]:
    """Returns the files of each name by their numbers."""
    pattern = re.compile(rf"((?:.*_)?{part})(?:_(\d+))?(\.bin|\.npy)")
    found: dict[Series, dict[int, list[Path]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(file.name)
        if match and file.is_file():
            numbers = found.setdefault(Series(match[1], match[3]), {})
            numbers.setdefault(int(match[2] or UNNUMBERED), []).append(file)
    return found


def _check_numbers(folder: Path, numbers: dict[int, list[Path]]) -> None:
    """Raises `DataError` where files are not numbered one by one, from 0 or 1 on."""
    for files in numbers.values():
        if len(files) > 1:
            got = some(file.name for file in files)
            raise DataError(f"{folder}: expected one file for each number, got {got}.")
    if len(numbers) == 1:
        return  # whatever its number: it may be the one that was downloaded
    in_order = sorted(numbers)
    # llm.c's begin at 1: its 0 is the validation set.
    first = 0 if 0 in numbers else 1
    for expected, number in enumerate(in_order, first):
        if number != expected:
            got = numbers[number][0].name
            n_files = f"{len(numbers)} files with numbers from 0 or 1 on"
            raise DataError(f"{folder}: expected {n_files}, got {got} in place of {expected}.")
