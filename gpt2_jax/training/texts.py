"""Texts and their documents: read, parted, divided for validation, cut into pieces. Knows strings.

What comes from here goes to `prepare.py`, which makes ids of it.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.files import decode_text, local_path
from gpt2_jax.tokenizer_settings import END_OF_TEXT
from gpt2_jax.training.records import (
    RECORD_READERS,
    is_records,
    kind_of,
    read_field,
    text_in,
)
from gpt2_jax.training.token_files import DataError

FIELD_ADVICE = "name the field that is the text, as in `--field text`"
CHARACTERS_PER_PIECE = 2**20  # about so many are encoded at a time

# Behind a letter or sign that a space or a line end follows, no piece of the tokenizer's pattern
# goes on: the ids of what stands before, and then those of what stands behind, are those of both.
SAFE_CUT = re.compile(r"\S(?=[ \n])")

# With the end of its line where nothing else follows there: that belongs to the mark.
DOCUMENT_END = re.compile(rf"{re.escape(END_OF_TEXT)}(?:[ \t]*(?:\r?\n|\Z))?")
PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")


class Reading(NamedTuple):
    """What of a file is text, and where its documents end."""

    field: str | None = None  # of the records that files hold; None for plain text
    unwrap: bool = False  # whether the lines of each paragraph are joined to one
    eot_as_text: bool = False  # whether `<|endoftext|>` is text like any other, and parts nothing


class Parts(NamedTuple):
    """The texts for training and those for validation."""

    train: list[str]
    val: list[str]


class Span(NamedTuple):
    """A piece of a text that is not cut out yet: all pieces at once would hold the corpus twice."""

    text: str
    start: int
    end: int

    def cut(self) -> str:
        """Returns the piece."""
        return self.text[self.start : self.end]


class Source(NamedTuple):
    """A file, or standard input."""

    name: str | Path
    texts: Callable[[], Iterable[str]]  # reads them


class Shard(NamedTuple):
    """One of `count` shares of the documents; whoever prepares it needs to know of no other."""

    number: int = 1  # from 1 on
    count: int = 1


def find_sources(names: Iterable[str], reading: Reading) -> Iterator[Source]:
    """Yields files, folders' files and, for "-", standard input, none of which is read yet.

    Of a folder these are its `*.txt` or, with `reading.field`, its files of records.

    Raises:
      DataError: there is no such file, or none that fits in a folder.
    """
    for name in names:
        if name == "-":
            yield Source("Standard input", partial(_typed, reading.field))
            continue
        for file in _files(local_path(name), reading.field):
            yield Source(file, partial(_texts_in, file, reading.field))


def read_documents(names: Iterable[str], reading: Reading) -> Iterator[list[str]]:
    """Yields the documents of each file. Line ends stay as they are.

    Raises:
      DataError: as `find_sources`; or a file is empty, damaged, not UTF-8, or holds records and no
        field is named, or the other way round.
      ImportError: a file is one for `pyarrow`, which is not installed.
    """
    for source in find_sources(names, reading):
        yield list(_documents_of(source, reading))


def stream_documents(sources: list[Source], reading: Reading, shard: Shard) -> Iterator[str]:
    """Yields the documents of a shard, one by one.

    Files go to the shards in turn or, where there are fewer files than shards, documents do: each
    is in one shard, whatever their number.

    Raises:
      DataError, ImportError: as `read_documents`, of the files that are read.
    """
    by_file = len(sources) >= shard.count
    n_documents = 0
    for number, source in enumerate(sources):
        # A file of another shard is not even opened.
        if by_file and number % shard.count != shard.number - 1:
            continue
        for document in _documents_of(source, reading):
            if by_file or n_documents % shard.count == shard.number - 1:
                yield document
            n_documents += 1


def part_of(document: str, val_fraction: float) -> str:
    """Returns "val" for about so many of all documents, else "train".

    By a hash of the document, so that it is on the same side whichever shard it is in, and so are
    its copies.
    """
    content = document.encode("utf-8", "surrogatepass")  # half a character, as JSON may spell it
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def _documents_of(source: Source, reading: Reading) -> Iterator[str]:
    """Yields the documents of a file, at least one."""
    is_empty = True
    for text in source.texts():
        for document in documents(text, reading):
            is_empty = False
            yield document
    if is_empty:
        raise DataError(f"{source.name}: expected a text, got an empty one.")


def documents(text: str, reading: Reading) -> list[str]:
    """Returns the documents of a text, which `<|endoftext|>` parts; empty ones are left out."""
    parted = [text] if reading.eot_as_text else DOCUMENT_END.split(text)
    # Before the first mark and after the last there may be nothing.
    found = [document for document in parted if document.strip()]
    if reading.unwrap:
        return [_unwrapped(document) for document in found]
    return found


def split(files: list[list[str]], val_fraction: float) -> Parts:
    """Returns each file's first documents for training and its last for validation.

    A file with a single document is divided by characters: that is how nanoGPT's `prepare.py` does
    it. Of several, each part gets at least one, unless `val_fraction` is 0.
    """
    train: list[str] = []
    val: list[str] = []
    for texts in files:
        if len(texts) == 1:
            document = texts[0]
            # 1 - 0.1 is 0.9 to the last bit: nanoGPT's `int(n * 0.9)`, character for character.
            n_characters = int(len(document) * (1 - val_fraction))
            texts = [document[:n_characters], document[n_characters:]]
        n_train = len(texts)
        if val_fraction > 0:
            n_train = int(len(texts) * (1 - val_fraction))
            # So that a small fraction of few documents is one, and a large one not all of them.
            n_train = min(max(n_train, 1), len(texts) - 1)
        train += texts[:n_train]
        val += texts[n_train:]
    # Of a very short document, one of the two is empty.
    return Parts(
        train=[text for text in train if text],
        val=[text for text in val if text],
    )


def spans(texts: Iterable[str]) -> Iterator[Span]:
    """Yields the texts in pieces whose ids, put together, are the ids of the texts.

    A piece has about `CHARACTERS_PER_PIECE` characters, more where a text can not be cut.
    """
    for text in texts:
        start = 0
        while start < len(text):
            # The first safe place behind the aimed length: to look ahead, not back, never stalls.
            cut = SAFE_CUT.search(text, start + CHARACTERS_PER_PIECE)
            end = cut.end() if cut else len(text)
            yield Span(text, start, end)
            start = end


def _files(path: Path, field: str | None) -> list[Path]:
    """Returns a file, or those of a folder and its folders in the order of their names."""
    if path.is_file():
        return [path]
    # Sorted: disks list their files in orders of their own, and the ids must be the same anywhere.
    inside = sorted(path.rglob("*")) if path.is_dir() else []
    files = []
    for file in inside:
        wanted = kind_of(file) == ".txt" if field is None else is_records(file)
        if wanted and file.is_file():
            files.append(file)
    if not files:
        kinds = "*.txt" if field is None else f"files of records ({', '.join(RECORD_READERS)})"
        has_records = field is None and any(is_records(file) for file in inside)
        got = f", got records: {FIELD_ADVICE}" if has_records else ""
        raise DataError(f"{path}: expected a file, or a folder with {kinds}{got}.")
    return files


def _texts_in(file: Path, field: str | None) -> Iterable[str]:
    """Returns the texts of a file: one, or a field of each record."""
    if is_records(file):
        if field is None:
            raise DataError(f"{file}: expected a text, got records: {FIELD_ADVICE}.")
        return read_field(file, field)
    if field is not None:
        kinds = ", ".join(RECORD_READERS)
        raise DataError(f"{file}: expected records ({kinds}) with a field `{field}`, got a text.")
    return [text_in(file)]


def _typed(field: str | None) -> list[str]:
    """Returns the text on standard input."""
    if field is not None:
        raise DataError(f"Standard input is a text, and has no field `{field}`: name a file.")
    try:
        return [decode_text(sys.stdin.buffer.read(), "Standard input")]
    except ValueError as error:
        raise DataError(str(error)) from None


def _unwrapped(text: str) -> str:
    """Returns a text with each paragraph on one line, an empty line between them."""
    joined = []
    for paragraph in PARAGRAPH_END.split(text.strip()):
        lines = [line.strip() for line in paragraph.split("\n")]
        joined.append(" ".join(lines))
    return "\n\n".join(joined)
