"""Texts and their documents: read, parted, divided for validation, cut into pieces. Knows strings.

What is written here is read by `corpus.py`, which makes ids of it.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.tokenizer_settings import END_OF_TEXT
from gpt2_jax.training.data import DataError

CHARACTERS_PER_PIECE = 2**20  # about so many are encoded at a time
BYTE_ORDER_MARK = "\ufeff"  # Windows' editors begin UTF-8 files with it; it is no part of the text

# Behind a letter or sign that a space or a line end follows, no piece of the tokenizer's pattern
# goes on: the ids of what stands before, and then those of what stands behind, are those of both.
SAFE_CUT = re.compile(r"\S(?=[ \n])")

# A line of its own, with its end. Within a line the mark is ordinary text.
DOCUMENT_END = re.compile(rf"^{re.escape(END_OF_TEXT)}[ \t]*(?:\r?\n|$)", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*")


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


def read_texts(names: Iterable[str]) -> Iterator[str]:
    """Yields the texts of files, of folders' `*.txt` and, for "-", of standard input.

    Line ends stay as they are.

    Raises:
      DataError: there is no such file, or no text in a folder, or a text is empty or not UTF-8.
    """
    for name in names:
        if name == "-":
            yield _decoded(name, sys.stdin.buffer.read())
            continue
        for file in _text_files(Path(name).expanduser()):
            yield _decoded(file, file.read_bytes())


def documents(text: str, unwrap: bool) -> list[str]:
    """Returns the documents of a text, which lines `<|endoftext|>` part; empty ones are left out.

    With `unwrap`, the lines of each paragraph are joined to one.
    """
    parted = DOCUMENT_END.split(text)
    # Before the first mark and after the last there may be nothing.
    found = [document for document in parted if document.strip()]
    if unwrap:
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


def _text_files(path: Path) -> list[Path]:
    """Returns a file, or the texts of a folder and its folders in the order of their names."""
    if path.is_file():
        return [path]
    # Sorted: disks list their files in orders of their own, and the ids must be the same anywhere.
    files = sorted(path.rglob("*.txt")) if path.is_dir() else []
    if not files:
        raise DataError(f"{path}: expected a text file, or a folder with *.txt.")
    return files


def _decoded(source: str | Path, content: bytes) -> str:
    """Returns the text of a file's bytes; errors name the source."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: expected UTF-8, but {error.reason} at byte {error.start}."
        ) from None
    text = text.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        raise DataError(f"{source}: expected a text, got an empty one.")
    return text


def _unwrapped(text: str) -> str:
    """Returns a text with each paragraph on one line, an empty line between them."""
    joined = []
    for paragraph in PARAGRAPH_END.split(text.strip()):
        lines = [line.strip() for line in paragraph.split("\n")]
        joined.append(" ".join(lines))
    return "\n\n".join(joined)
