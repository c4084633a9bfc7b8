"""Texts in files of records: one field of JSON lines, JSON, CSV or Parquet, packed or not.

Knows a file's kind by the end of its name; nothing of documents or tokens.
"""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from gpt2_jax.files import decode_text
from gpt2_jax.training.token_files import DataError

LONGEST_LISTING = 200  # characters of the names in one message
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is 128 KiB, less than a book


class Record(NamedTuple):
    """One record, and where it stands."""

    place: str
    fields: Mapping[str, Any]


def is_records(file: Path) -> bool:
    """Returns whether a file holds records, by its name: what stands there is syntax, not text."""
    return kind_of(file) in RECORD_READERS


def kind_of(file: Path) -> str:
    """Returns the end of a file's name that says what it holds, such as ".jsonl" or ".txt"."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKINGS else name.suffix


def read_field(file: Path, field: str) -> Iterator[str]:
    """Yields one field of each record of a file.

    Raises:
      DataError: the file is damaged, or a record lacks the field or holds no text there; the
        message names the place.
      ImportError: the file is one for `pyarrow`, which is not installed.
    """
    for record in RECORD_READERS[kind_of(file)](file, field):
        where = f"{file}, {record.place}"
        if field not in record.fields:
            got = str(list(record.fields))[:LONGEST_LISTING]
            raise DataError(f"{where}: expected a field `{field}`, got {got}.")
        text = record.fields[field]
        # A table's row that is too short has None here.
        if not isinstance(text, str):
            raise DataError(f"{where}: expected `{field}` to be a text, got {text!r:.40}.")
        yield text


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Opens a file to read its bytes, of a packed one those that are in it.

    Raises:
      DataError: a packed file is damaged, as far as it is read.
      ImportError: it is one for `pyarrow`, which is not installed.
    """
    unpack = PACKINGS.get(file.suffix.lower())
    if unpack is None:
        with file.open("rb") as stream:
            yield stream
        return
    try:
        with unpack(file) as stream:
            # Within the `try`, since a packed file is unpacked as it is read, and damage shows only
            # then.
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        packing = file.suffix.lower()
        raise DataError(f"{file}: expected a sound {packing} file, but {error}.") from error


def text_in(file: Path) -> str:
    """Returns the text of a file, packed or not.

    Raises:
      DataError: it is not UTF-8, or damaged.
    """
    with opened(file) as stream:
        content = stream.read()
    return _decoded(content, file)


def _decoded(content: bytes, source: str | Path) -> str:
    """Returns the text of some bytes; errors name the source."""
    try:
        return decode_text(content, source)
    except ValueError as error:
        raise DataError(str(error)) from None


# Packings.


def _gunzip(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file))


def _unzstd(file: Path) -> BinaryIO:
    pyarrow = _pyarrow(file)
    # Buffered by Python, whose streams are read line by line.
    return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"))


def _pyarrow(file: Path) -> Any:
    """Returns `pyarrow`, an extra."""
    try:
        # Not at the top: most texts are none of its files.
        import pyarrow.parquet
    except ImportError:
        advice = 'pip install "gpt2_jax[data]"'
        raise ImportError(f"{file}: reading it needs `pyarrow`: {advice}.") from None
    return pyarrow


PACKINGS: dict[str, Callable[[Path], BinaryIO]] = {".gz": _gunzip, ".zst": _unzstd}

# Kinds of records.


def _json_lines(file: Path, field: str) -> Iterator[Record]:
    del field
    # As bytes, whose lines end at "\n" alone, and one by one: all at once would be one more corpus
    # in memory.
    with opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                place = f"line {number}"
                value = _parsed(_decoded(line, f"{file}, {place}"))
                yield _as_record(file, place, value)


def _json(file: Path, field: str) -> Iterator[Record]:
    """Yields the objects of a list or, as many a file of this name has them, of lines."""
    content = _parsed(text_in(file))
    # What is no list is read as lines: the first that is no object is refused, by its number.
    if not isinstance(content, list):
        yield from _json_lines(file, field)
        return
    for number, value in enumerate(content, start=1):
        yield _as_record(file, f"record {number}", value)


def _parsed(text: str) -> Any:
    """Returns what a text of JSON says, and `None` where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the second where it is nested too deeply
        return None


def _as_record(file: Path, place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{file}, {place}: expected a JSON object.")
    return Record(place, value)


def _comma_separated(file: Path, field: str) -> Iterator[Record]:
    return _table(file, field, delimiter=",")


def _tab_separated(file: Path, field: str) -> Iterator[Record]:
    return _table(file, field, delimiter="\t")


def _table(file: Path, field: str, *, delimiter: str) -> Iterator[Record]:
    """Yields the rows of a table, whose first line names the columns."""
    del field
    # Ends of line within quotes are text: they stay as they are.
    text = io.StringIO(text_in(file), newline="")
    longest = csv.field_size_limit(LONGEST_CELL)
    # Not strict, a quote that is never closed would take in the rest of the file without a word.
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            yield Record(f"line {rows.line_num}", row)
    except csv.Error as error:
        where = f"{file}, line {rows.reader.line_num}"
        raise DataError(f"{where}: expected CSV, but {error}.") from error
    finally:
        csv.field_size_limit(longest)  # the setting is the whole process's


def _parquet(file: Path, field: str) -> Iterator[Record]:
    pyarrow = _pyarrow(file)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        # A column that is not there is missing in the first row; nobody else reads the others.
        columns = [field] if field in names else names
        number = 0
        # In batches, as all rows at once would be one more corpus in memory.
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: expected Parquet, but {error}.") from error


RECORD_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}
