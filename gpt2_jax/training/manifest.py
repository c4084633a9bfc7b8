"""What a folder says of its token files, so that opening it reads none of them: `manifest.json`.

Of each file it has the name, size, number and largest of the ids, and two hashes: of all bytes,
and of a sample, which is compared whenever the folder is opened. Knows files and numbers; nothing
of text or batches.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.files import read_json_object, some
from gpt2_jax.training.data import first_outside, outside
from gpt2_jax.training.token_files import DataError, TokenFile

NAME = "manifest.json"
VERSION = 1
PARTS = ("train", "val")
IDS_PER_READ = 2**23  # looked at in one go: 16 MiB of uint16, as files may be larger than memory
SAMPLE_BLOCK = 4096  # bytes of each of three: at the beginning, in the middle, at the end


class FileRecord(NamedTuple):
    """What is known of a token file."""

    name: str  # relative to the folder, with "/" between the parts
    bytes: int
    tokens: int
    dtype: str
    max_id: int
    documents: int | None  # that begin in it; None where nobody has counted
    sha256: str  # of all bytes
    sample: str  # the sha256 of the size and of three blocks


Manifest = dict[str, list[FileRecord]]  # "train", "val" -> their files in order


class Scan(NamedTuple):
    """What reading a whole file tells."""

    sha256: str
    max_id: int


# Reading and writing.


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Writes what a folder has, a line for each file."""
    lines = []
    for part in PARTS:
        records = [json.dumps(record._asdict()) for record in manifest.get(part, [])]
        listed = ",\n    ".join(records)
        lines.append(f'  "{part}": [\n    {listed}\n  ]' if records else f'  "{part}": []')
    joined = ",\n".join([f'  "version": {VERSION}', *lines])
    file.write_text(f"{{\n{joined}\n}}\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Returns what the `manifest.json` of a folder says, or None where there is none.

    Raises:
      DataError: it is damaged, or of another version.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        content = read_json_object(file)
    except ValueError as error:
        raise DataError(str(error)) from error
    if content.get("version") != VERSION:
        got = f"{content.get('version')!r:.40}"
        raise DataError(f"{file}: expected the `version` {VERSION}, got {got}.")
    manifest = {part: _records(file, content.get(part)) for part in PARTS}
    names = Counter(record.name for records in manifest.values() for record in records)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise DataError(f"{file}: expected each file once, got {some(twice)} again.")
    return manifest


def _records(file: Path, values: Any) -> list[FileRecord]:
    """Returns the records of a part as they stand in a manifest."""
    if not isinstance(values, list):
        raise DataError(f"{file}: expected lists of files, got {values!r:.60}.")
    return [_record(file, value) for value in values]


def _record(file: Path, value: Any) -> FileRecord:
    try:
        record = FileRecord(**value)
    except TypeError as error:
        raise DataError(f"{file}: expected {FileRecord._fields}, got {value!r:.60}.") from error
    counts = [record.bytes, record.tokens, record.max_id]
    if record.documents is not None:
        counts.append(record.documents)
    texts = [record.name, record.dtype, record.sha256, record.sample]
    # `type`, as `True` would be an integer.
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    are_texts = all(isinstance(text, str) for text in texts)
    if not are_counts or not are_texts:
        raise DataError(f"{file}: expected counts and texts, got {value!r:.200}.")
    path = PurePosixPath(record.name)
    # A manifest that came from elsewhere must not name files elsewhere, nor one in two ways.
    if path.is_absolute() or ".." in path.parts or path.as_posix() != record.name:
        raise DataError(f"{file}: expected names within the folder, got {record.name!r:.100}.")
    return record


# Looking at files.


def sample_of(path: Path) -> str:
    """Returns a hash of a file's size and of three blocks: quick, whatever the size.

    The blocks have `SAMPLE_BLOCK` bytes and start at 0, at half of `size - SAMPLE_BLOCK`, rounded
    down, and at `size - SAMPLE_BLOCK`. No change within a block or of the size escapes it; changes
    elsewhere do.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(size - SAMPLE_BLOCK, 0)
    with path.open("rb") as opened:
        for start in (0, last // 2, last):
            opened.seek(start)
            digest.update(opened.read(SAMPLE_BLOCK))
    return digest.hexdigest()


def scan(file: TokenFile, vocab_size: int) -> Scan:
    """Reads a whole file, once.

    Raises:
      DataError: an id is outside the vocabulary.
    """
    highest = 0
    position = 0
    with file.path.open("rb") as opened:
        digest = hashlib.sha256(opened.read(file.offset))
        # In blocks: no file is in memory whole.
        while (ids := np.fromfile(opened, file.dtype, IDS_PER_READ)).size:
            digest.update(ids.tobytes())
            highest = max(highest, int(ids.max()))
            lowest = ids.min()
            if highest >= vocab_size or lowest < 0:
                offset = first_outside(ids, vocab_size)
                raise outside(file.path, vocab_size, ids[offset], position + offset)
            position += len(ids)
    return Scan(digest.hexdigest(), highest)


def record_of(
    file: TokenFile, name: str, found: Scan, *, documents: int | None = None
) -> FileRecord:
    """Returns what is known of a file that was read or written."""
    return FileRecord(
        name=name,
        bytes=file.path.stat().st_size,
        tokens=file.n_ids,
        dtype=file.dtype.name,
        max_id=found.max_id,
        documents=documents,
        sha256=found.sha256,
        sample=sample_of(file.path),
    )


def check_record(file: TokenFile, record: FileRecord, vocab_size: int) -> None:
    """Raises `DataError` where a file is not what its record says, as far as a look tells."""
    # What was not read is taken to be as it says.
    found = record_of(file, record.name, Scan(record.sha256, record.max_id))
    check_same(file.path, record, found)
    if record.max_id >= vocab_size:
        expected = f"ids in [0, {vocab_size}) (`vocab_size`)"
        raise DataError(f"{file.path}: expected {expected}, got {record.max_id} by {NAME}.")


def check_same(path: Path, said: FileRecord, found: FileRecord) -> None:
    """Raises `DataError`, with both values, where a file is not what its record says."""
    found = found._replace(documents=said.documents)  # in the file they are ids like others
    pairs = zip(said._fields, said, found, strict=True)
    differences = [f"{name} {old}, got {new}" for name, old, new in pairs if old != new]
    if differences:
        raise DataError(f"{path}: expected, as {NAME} says, {'; '.join(differences)}.")


# What a run remembers of its data.


def identity_of(kind: str, n_bytes: Sequence[int], digests: Sequence[str]) -> dict[str, Any]:
    """Returns what tells some files from others, whatever they are called.

    Args:
      kind: "sha256" or "sample", which the digests are.
      n_bytes: the size of each file.
      digests: that of each.
    """
    # Of one file as ever, so that a run goes on that knew nothing of several.
    if len(digests) == 1:
        return {"bytes": n_bytes[0], kind: digests[0]}
    return {"files": len(digests), "bytes": sum(n_bytes), kind: digest_of(digests)}


def digest_of(texts: Iterable[str]) -> str:
    """Returns one digest of several."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
