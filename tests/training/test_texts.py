"""Texts: what parts documents, how they are divided, and that no cut changes an id."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.tokenizer import splitter
from gpt2_jax.training import texts
from gpt2_jax.training.data import DataError
from gpt2_jax.training.texts import Reading, documents, read_documents, spans, split


def test_the_mark_parts_documents_wherever_it_stands():
    text = "one <|endoftext|>two\n<|endoftext|> \t\r\n<|endoftext|>\nthree\n<|endoftext|>"
    assert documents(text, Reading()) == ["one ", "two\n", "three\n"]
    assert documents("a<|endoftext|> b", Reading()) == ["a", " b"]
    assert documents(text, Reading(eot_as_text=True)) == [text]


def test_unwrapping_joins_the_lines_of_a_paragraph_alone():
    assert documents(" a\n b \n \n\nc", Reading(unwrap=True)) == ["a b\n\nc"]


def read(*names, **reading):
    """The documents of files."""
    return list(read_documents([str(name) for name in names], Reading(**reading)))


def test_a_mark_of_byte_order_is_no_text_and_line_ends_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read(tmp_path / "a.txt") == [["one\r\ntwo\n"]]


def test_a_folder_without_texts_is_named(tmp_path):
    (tmp_path / "notes.md").write_text("not this")
    with pytest.raises(DataError, match=r"expected a file, or a folder with \*.txt"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a folder with files of records \(.jsonl, "):
        read(tmp_path, field="text")


def test_a_folder_is_read_for_its_texts_or_for_its_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a record"}\n')
    (tmp_path / "b.txt").write_text("a text")
    with gzip.open(tmp_path / "c.TXT.gz", "wt") as packed:
        packed.write("a packed text")
    assert read(tmp_path) == [["a text"], ["a packed text"]]
    assert read(tmp_path, field="text") == [["a record"]]


def test_syntax_is_never_read_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a record"}\n')
    (tmp_path / "b.txt").write_text("a text")
    with pytest.raises(DataError, match="a.jsonl: expected a text, got records: .* `--field text`"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "folder" / "a.jsonl")
    with pytest.raises(DataError, match=r"with \*.txt, got records: name the field"):
        read(tmp_path / "folder")
    with pytest.raises(DataError, match="b.txt: expected records .*`text`, got a text"):
        read(tmp_path / "b.txt", field="text")
    with pytest.raises(DataError, match="Standard input is a text, and has no field `text`"):
        read("-", field="text")


def test_a_single_document_is_divided_by_characters():
    assert split([["0123456789"]], 0.25) == (["0123456"], ["789"])
    assert split([["ab"]], 0.1) == (["a"], ["b"])
    assert split([["a"]], 0.1) == ([], ["a"])


@pytest.mark.parametrize(
    "counts, fraction, expected",
    [
        ([10], 0.0, (10, 0)),
        ([10], 0.1, (9, 1)),
        ([2], 0.01, (1, 1)),
        ([3], 0.99, (1, 2)),
        ([10, 4], 0.25, (7 + 3, 3 + 1)),
    ],
)
def test_whole_documents_are_divided(counts, fraction, expected):
    files = [[f"{file} {index}" for index in range(count)] for file, count in enumerate(counts)]
    train, val = split(files, fraction)
    assert (len(train), len(val)) == expected
    assert sorted(train + val) == sorted(sum(files, []))


def test_spans_are_the_texts(monkeypatch):
    monkeypatch.setattr(texts, "CHARACTERS_PER_PIECE", 10)
    whole = ["some words that can be cut\n" * 9, "", "x" * 50, "short"]
    pieces = list(spans(whole))
    assert len(pieces) > 15
    for text in whole:
        of_text = [piece for piece in pieces if piece.text == text]
        assert "".join(piece.cut() for piece in of_text) == text
    assert [piece.cut() for piece in pieces if piece.text == "x" * 50] == ["x" * 50]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab1.' \n\t\r\x1c\x85\xa0\u2028\u3000\u0301漢é🦓"), min_size=4))
def test_the_tokenizers_pattern_finds_the_same_wherever_a_text_may_be_cut(text):
    cuts = [0, *(cut.end() for cut in texts.SAFE_CUT.finditer(text)), len(text)]
    parts = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    assert sum((splitter(part).findall(part) for part in parts), []) == splitter(text).findall(text)


@pytest.mark.parametrize("line", ["Привет как дела", "吾輩は猫である"])
def test_texts_of_any_script_are_cut(monkeypatch, line):
    monkeypatch.setattr(texts, "CHARACTERS_PER_PIECE", 40)
    lengths = [len(piece.cut()) for piece in spans([f"{line}\n" * 100])]
    assert len(lengths) > 10
    assert max(lengths) < 80
