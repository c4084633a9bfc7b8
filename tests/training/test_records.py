"""Files of records: one field is text, whatever it holds; what is damaged is named, and where."""

import csv
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from gpt2_jax.training.data import DataError
from gpt2_jax.training.records import is_records, read_field

TEXTS = ["Story 0.\nIt ran.", 'a "quoted, text"\tx', "é\u2028漢\x85\x0c", "long " * 40_000]


def write(file, content):
    """Writes bytes, packed as the name says; returns the file."""
    if file.suffix == ".gz":
        content = gzip.compress(content)
    if file.suffix == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    file.write_bytes(content)
    return file


def records():
    """The texts as rows with a field that is none."""
    return [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


def content_of(kind):
    """The rows as bytes, as the format's own library writes them."""
    if kind == ".json":
        return json.dumps(records(), indent=1).encode()
    lines = [json.dumps(row, ensure_ascii=False) for row in records()]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.jsonl.zst", "a.json", "A.JSON.GZ"])
def test_a_field_of_json_is_read(tmp_path, name):
    kind = ".json" if ".json." in f"{name.lower()}." else ".jsonl"
    file = write(tmp_path / name, b"")
    write(tmp_path / name.lower(), content_of(kind)).rename(file)
    assert list(read_field(file, "text")) == TEXTS


def test_lines_may_be_called_json(tmp_path):
    file = write(tmp_path / "a.json", content_of(".jsonl"))
    assert list(read_field(file, "text")) == TEXTS


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_column_is_read(tmp_path, name, delimiter):
    longest = csv.field_size_limit()
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as opened:
        rows = csv.DictWriter(opened, ["id", "text"], delimiter=delimiter)
        rows.writeheader()
        rows.writerows(records())
    assert list(read_field(tmp_path / name, "text")) == TEXTS
    assert csv.field_size_limit() == longest


def test_parquet_is_read(tmp_path):
    table = pyarrow.Table.from_pylist(records())
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(read_field(tmp_path / "a.parquet", "text")) == TEXTS
    with pytest.raises(DataError, match=r"row 1: expected a field `body`, got \['id', 'text'\]"):
        list(read_field(tmp_path / "a.parquet", "body"))


def test_names_tell_records_from_texts(tmp_path):
    names = ["a.jsonl", "a.csv.gz", "a.parquet", "a.txt", "a.txt.gz", "a.md", "jsonl"]
    found = [name for name in names if is_records(tmp_path / name)]
    assert found == ["a.jsonl", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"txt": 1}',
            r"line 3: expected a field `text`, got \['txt'",
        ),
        ("a.jsonl", b'{"text": null}', "line 1: expected `text` to be a text, got None"),
        ("a.jsonl", b'{"text": "a"', "line 1: expected a JSON object"),
        (
            "a.jsonl",
            b'{"text": "\xff"}',
            "line 1: expected UTF-8, but invalid start byte at byte 10",
        ),
        ("a.json", b'[{"text": "a"}, 3]', "record 2: expected a JSON object"),
        ("a.json", b'{"data": []}', r"line 1: expected a field `text`, got \['data'\]"),
        ("a.csv", b"body\na\n", r"line 2: expected a field `text`, got \['body'\]"),
        ("a.csv", b"id,text\n1\n", "line 2: expected `text` to be a text, got None"),
        ("a.csv", b'text\n"a', "line 2: expected CSV, but unexpected end of data"),
        ("a.parquet", b"PAR1 and no more", "expected Parquet, but "),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        list(read_field(file, "text"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("n_bytes", [5, 30])
def test_a_packed_file_that_is_cut_off_is_named(tmp_path, name, n_bytes):
    whole = write(tmp_path / name, content_of(".jsonl")).read_bytes()
    (tmp_path / name).write_bytes(whole[:n_bytes])
    with pytest.raises(DataError, match=rf"{name}: expected a sound \.\w+ file, but "):
        list(read_field(tmp_path / name, "text"))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "gpt2_jax\[data\]"'):
        list(read_field(write(tmp_path / name, b"x"), "text"))
