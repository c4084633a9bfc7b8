"""Text to token files: the tokenizer's ids, the parts that were asked for, all or nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from gpt2_jax import Tokenizer
from gpt2_jax.added_tokens import AddedToken
from gpt2_jax.files import CheckpointError
from gpt2_jax.tokenizer_template import Template
from gpt2_jax.training import encoding, texts
from gpt2_jax.training import prepare as prepare_module
from gpt2_jax.training.encoding import Piece, encode
from gpt2_jax.training.prepare import prepare
from gpt2_jax.training.texts import Reading, Span
from gpt2_jax.training.token_files import DataError
from gpt2_jax.training.vocabularies import char_tokenizer
from tests.reference import DATA, ROOT

PAGE = (DATA / "held-out.txt").read_text(encoding="utf-8")


def read(folder, name):
    """The ids of a token file."""
    return np.fromfile(
        folder / f"{name}.bin", json.loads((folder / "meta.json").read_text())["dtype"]
    ).tolist()


def write(file, text):
    """A file with this text and nothing changed."""
    file.write_text(text, encoding="utf-8", newline="")
    return file


def test_one_text_is_cut_by_characters_and_gets_no_mark_as_in_nanogpt(tmp_path):
    meta = prepare([write(tmp_path / "a.txt", PAGE)], tmp_path / "out")
    cut = int(len(PAGE) * 0.9)
    gpt2 = Tokenizer.gpt2()
    assert read(tmp_path / "out", "train") == gpt2.encode(PAGE[:cut])
    assert read(tmp_path / "out", "val") == gpt2.encode(PAGE[cut:])
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", 50257)
    assert meta["train"]["tokens"] == len(gpt2.encode(PAGE[:cut]))
    assert meta["val"]["bytes"] == len(PAGE[cut:].encode())
    assert Tokenizer.load(tmp_path / "out").encode(PAGE) == gpt2.encode(PAGE)


def test_documents_end_with_a_mark_and_stay_whole(tmp_path):
    texts = [f"Document {i}.\r\nIts second line.\n" for i in range(10)]
    write(tmp_path / "a.txt", "\ufeff" + "<|endoftext|>\n".join(texts) + "<|endoftext|>")
    prepare([tmp_path / "a.txt"], tmp_path / "out", val_fraction=0.25)
    ids = [Tokenizer.gpt2().encode(text) + [50256] for text in texts]
    assert read(tmp_path / "out", "train") == sum(ids[:7], [])
    assert read(tmp_path / "out", "val") == sum(ids[7:], [])


def test_each_record_is_a_document(tmp_path):
    stories = ["One.\nTwo.", "<|endoftext|> Three.", "Four."]
    lines = [json.dumps({"story": story}) for story in stories]
    write(tmp_path / "a.jsonl", "\n".join(lines))
    reading = Reading(field="story")
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", reading=reading, val_fraction=0.3)
    encode = Tokenizer.gpt2().encode
    expected = [*encode("One.\nTwo."), 50256, *encode(" Three."), 50256]
    assert read(tmp_path / "out", "train") == expected
    assert read(tmp_path / "out", "val") == [*encode("Four."), 50256]
    assert (meta["field"], meta["unwrap"], meta["eot_as_text"]) == ("story", False, False)


def test_half_a_character_is_read_as_the_bytes_of_one(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a\\ud83d"}')
    for options in ({}, {"shard_tokens": 9}):
        out = tmp_path / f"out{len(options)}"
        meta = prepare(
            [tmp_path / "a.jsonl"], out, reading=Reading(field="text"), val_fraction=0, **options
        )
        assert meta["train"]["bytes"] == 4


def test_the_mark_may_be_text(tmp_path):
    text = "Its <|endoftext|> second\n<|endoftext|>\nline."
    reading = Reading(eot_as_text=True)
    write(tmp_path / "a.txt", text)
    prepare([tmp_path / "a.txt"], tmp_path / "out", reading=reading, val_fraction=0)
    ids = read(tmp_path / "out", "train")
    assert ids == Tokenizer.gpt2().encode(text)
    assert 50256 not in ids


def test_folders_are_read_in_order_and_each_file_is_divided(tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    write(tmp_path / "in" / "b.txt", "b" * 10)
    write(tmp_path / "in" / "deeper" / "a.txt", "a" * 10)
    write(tmp_path / "in" / "notes.md", "not this")
    prepare([tmp_path / "in"], tmp_path / "out", val_fraction=0.5)
    tokenizer = Tokenizer.gpt2()
    expected = [*tokenizer.encode("b" * 5), 50256, *tokenizer.encode("a" * 5), 50256]
    assert read(tmp_path / "out", "train") == read(tmp_path / "out", "val") == expected


def test_without_validation_there_is_no_file_of_it(tmp_path):
    meta = prepare([write(tmp_path / "a.txt", PAGE)], tmp_path / "out", val_fraction=0)
    assert "val" not in meta
    assert not (tmp_path / "out" / "val.bin").exists()
    assert read(tmp_path / "out", "train") == Tokenizer.gpt2().encode(PAGE)


def test_printed_lines_are_unwrapped(tmp_path):
    text = "\n\nA line\nand its  end.\r\n \t\r\nA second\n   paragraph.\n\n\n\nA third.\n"
    write(tmp_path / "a.txt", text)
    reading = Reading(unwrap=True)
    prepare([tmp_path / "a.txt"], tmp_path / "out", reading=reading, val_fraction=0)
    expected = "A line and its  end.\n\nA second paragraph.\n\nA third."
    assert Tokenizer.gpt2().decode(read(tmp_path / "out", "train")) == expected


def test_characters_are_tokens_in_the_order_of_their_code_points(tmp_path):
    text = "zebra, éclair, 10€, 🦓🦒!\n\tzebra"
    meta = prepare(
        [write(tmp_path / "a.txt", text)], tmp_path / "out", tokenizer="char", val_fraction=0
    )
    chars = sorted(set(text))
    assert read(tmp_path / "out", "train") == [chars.index(char) for char in text]
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.decode(read(tmp_path / "out", "train")) == text
    assert meta["vocab_size"] == tokenizer.vocab_size > len(chars)
    assert meta["eot_id"] is None
    assert char_tokenizer(["to be or not"]).vocab_size == len(set("to be or not"))


def test_a_trained_vocabulary_encodes_as_its_library_does(tmp_path):
    write(tmp_path / "a.txt", PAGE)
    meta = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="bpe", vocab_size=400)
    files = [str(tmp_path / "out" / name) for name in ("vocab.json", "merges.txt")]
    reference = tokenizers.ByteLevelBPETokenizer(*files)
    cut = int(len(PAGE) * 0.9)
    assert read(tmp_path / "out", "train") == reference.encode(PAGE[:cut]).ids
    assert read(tmp_path / "out", "val") == reference.encode(PAGE[cut:]).ids
    assert (meta["vocab_size"], meta["eot_id"]) == (400, 0)


def test_a_models_tokenizer_is_used(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder none"):
        prepare([write(tmp_path / "a.txt", PAGE)], tmp_path / "out", tokenizer="./none")
    char_tokenizer([PAGE]).save(tmp_path / "tokenizer")
    write(tmp_path / "a.txt", PAGE)
    prepare(
        [tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "tokenizer", val_fraction=0
    )
    assert read(tmp_path / "out", "train") == [sorted(set(PAGE)).index(char) for char in PAGE]


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_each_document_has_what_the_tokenizer_adds_to_a_text(
    tmp_path, monkeypatch, add_prefix_space
):
    monkeypatch.setattr(texts, "CHARACTERS_PER_PIECE", 40)
    gpt2 = Tokenizer.gpt2()
    framed = Tokenizer(
        gpt2.vocab,
        gpt2.merges,
        [*gpt2.added_tokens, AddedToken("a  b", 50257, special=False)],
        template=Template((50256, 7), (8,)),
        add_prefix_space=add_prefix_space,
    )
    framed.save(tmp_path / "tokenizer")
    page = PAGE[:300] + "a  b" * 50
    write(tmp_path / "a.txt", f"{page}\n<|endoftext|>\n{PAGE[:50]}")
    prepare(
        [tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "tokenizer", val_fraction=0
    )
    first, second = texts.documents(
        (tmp_path / "a.txt").read_text(encoding="utf-8"), texts.Reading()
    )
    # These part documents; there is no further mark.
    assert read(tmp_path / "out", "train") == framed.encode(first) + framed.encode(second)
    assert framed.encode(first)[:2] == [50256, 7]


def test_bytes_that_a_models_vocabulary_lacks_are_dropped_if_asked(tmp_path):
    Tokenizer({"a": 0, "b": 1}, []).save(tmp_path / "tokenizer")
    write(tmp_path / "a.txt", "a b\na")
    options = {"tokenizer": tmp_path / "tokenizer", "val_fraction": 0}
    with pytest.raises(ValueError, match="no token for byte 32"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", **options)
    prepare([tmp_path / "a.txt"], tmp_path / "out", missing_bytes="drop", **options)
    assert read(tmp_path / "out", "train") == [0, 1, 0]


@pytest.mark.parametrize("workers", [1, 2])
def test_pieces_and_workers_change_no_id(monkeypatch, workers):
    monkeypatch.setattr(texts, "CHARACTERS_PER_PIECE", 40)
    monkeypatch.setattr(encoding, "MIN_CHARACTERS_FOR_WORKERS", 1)
    hard = PAGE[:2000] + "\n \n  x 1 y's  we'll\t z " * 30 + "ß é 漢字 " * 20 + "Don't stop " * 10
    whole = [hard, "", "short", hard[::-1]]
    pieces = list(encode(Tokenizer.gpt2(), whole, workers))
    assert len(pieces) > 50
    ids = []
    ids_of_texts = []
    for piece in pieces:
        ids += piece.ids.tolist()
        if piece.ends_text:
            ids_of_texts.append(ids)
            ids = []
    assert ids_of_texts == [Tokenizer.gpt2().encode(text) for text in whole if text]
    n_characters = sum(piece.span.end - piece.span.start for piece in pieces)
    assert n_characters == sum(len(text) for text in whole)


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
    def fails(*args):
        yield Piece(np.array([1], np.uint32), Span("two", 0, 1))
        raise OSError("disk full")

    monkeypatch.setattr(prepare_module, "encode", fails)
    with pytest.raises(OSError, match="disk full"):
        prepare([write(tmp_path / "a.txt", PAGE)], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_in_use_stays_as_it_is_unless_told(tmp_path):
    write(tmp_path / "a.txt", PAGE)
    write(tmp_path / "b.txt", "other")
    prepare([tmp_path / "a.txt"], tmp_path / "out")
    before = read(tmp_path / "out", "train")
    with pytest.raises(CheckpointError, match="out exists already: expected a new or empty place"):
        prepare([tmp_path / "b.txt"], tmp_path / "out")
    assert read(tmp_path / "out", "train") == before
    prepare([tmp_path / "b.txt"], tmp_path / "out", overwrite=True, val_fraction=0)
    assert read(tmp_path / "out", "train") == Tokenizer.gpt2().encode("other")
    assert not (tmp_path / "out" / "val.bin").exists()


def test_what_is_no_file_of_ours_stays_where_token_files_are_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "text.txt").write_text("some text of mine")
    (out / "val.bin").write_bytes(b"of before")
    prepare([out / "text.txt"], out, tokenizer="char", val_fraction=0, overwrite=True)
    assert (out / "text.txt").read_text() == "some text of mine"
    assert (out / "train.bin").is_file() and not (out / "val.bin").exists()


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"abc \xff", {}, "a.txt: expected UTF-8, but invalid start byte at byte 4"),
        (b"\n \n", {}, "a.txt: expected a text, got an empty one"),
        (b"text", {"val_fraction": 1.0}, r"`val_fraction` must be in \[0, 1\), got 1.0"),
        (
            b"text",
            {"tokenizer": "bpe"},
            '`vocab_size` is for the tokenizer "bpe", which needs it; got None',
        ),
        (b"text", {"vocab_size": 300}, 'got 300 for "gpt2"'),
        (b"text", {"workers": 0}, "`workers` must be at least 1, got 0"),
        (b"text", {"tokenizer": "bpe", "vocab_size": 256}, "at least 257.*got 256"),
        (None, {}, "a.txt: expected a file, or a folder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "a.txt"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_script_reads_standard_input_and_explains_mistakes(tmp_path):
    def run(*args, text=PAGE):
        command = [sys.executable, ROOT / "scripts" / "prepare_data.py", *args]
        return subprocess.run(
            command,
            input=text.encode(),
            capture_output=True,
            env={"PYTHONPATH": str(ROOT)},
            timeout=60,
        )

    done = run("-", "--out", tmp_path / "out", "--tokenizer", "char", "--val_fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert b"val: " in done.stderr
    chars = sorted(set(PAGE))
    assert read(tmp_path / "out", "train") == [
        chars.index(char) for char in PAGE[: int(len(PAGE) * 0.8)]
    ]
    wrong = run(tmp_path / "none.txt", "--out", tmp_path / "other")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert b"none.txt: expected" in wrong.stderr
