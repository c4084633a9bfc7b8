"""Shards: together they are the corpus, whoever wrote them, and nothing else is taken for it."""

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from gpt2_jax import Tokenizer
from gpt2_jax.files import CheckpointError
from gpt2_jax.training import encoding
from gpt2_jax.training.corpus import open_corpus, verify
from gpt2_jax.training.data import Place
from gpt2_jax.training.prepare import prepare
from gpt2_jax.training.shards import merge
from gpt2_jax.training.texts import Reading, Shard, Span, part_of
from gpt2_jax.training.token_files import DataError
from gpt2_jax.training.vocabularies import char_tokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789."
STORIES = [f"story {i} of {'many ' * (i % 7)}words." for i in range(60)]
FIELD = Reading(field="text")


@pytest.fixture
def texts(tmp_path):
    """A folder of five files of twelve records, a tokenizer beside it."""
    for number in range(5):
        lines = [json.dumps({"text": text}) for text in STORIES[12 * number : 12 * number + 12]]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jsonl").write_text("\n".join(lines))
    letters = char_tokenizer([ALPHABET])
    Tokenizer(letters.vocab, letters.merges, {"<|endoftext|>": len(ALPHABET)}).save(
        tmp_path / "tokenizer"
    )
    return tmp_path


def prepare_shard(texts, out, shard=None, **options):
    """Prepares a share of the texts."""
    defaults = {"reading": FIELD, "val_fraction": 0.2, "shard_tokens": 200, "workers": 1}
    inputs = [texts / "in"]
    tokenizer = texts / "tokenizer"
    return prepare(inputs, texts / out, tokenizer=tokenizer, shard=shard, **(defaults | options))


def documents(folder, part):
    """The documents of a part, in its order."""
    tokens = getattr(open_corpus(folder), part)
    rows = [tokens.read(Place(file, 0, int(size))) for file, size in enumerate(tokens.sizes)]
    text = Tokenizer.load(folder).decode(np.concatenate(rows).tolist())
    assert text.endswith("<|endoftext|>")
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>")


def test_a_corpus_becomes_files_of_so_many_tokens(texts):
    meta = prepare_shard(texts, "out")
    sizes = open_corpus(texts / "out").train.sizes
    assert all(sizes[:-1] == 200) and 0 < sizes[-1] <= 200
    assert (texts / "out" / "train_00000.bin").stat().st_size == 400
    assert meta["train"]["tokens"] == sizes.sum()
    assert meta["train"]["documents"] + meta["val"]["documents"] == 60
    assert sorted(documents(texts / "out", "train") + documents(texts / "out", "val")) == sorted(
        STORIES
    )
    assert 2 <= meta["val"]["documents"] <= 24
    manifest = json.loads((texts / "out" / "manifest.json").read_text())
    assert sum(file["documents"] for file in manifest["train"]) == meta["train"]["documents"]
    assert verify(texts / "out")["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]


@pytest.mark.parametrize("count", [2, 5, 7])  # files in turn up to five, documents from there on
def test_shards_have_the_documents_of_all_each_in_the_same_part(texts, count):
    prepare_shard(texts, "one")
    for number in reversed(range(1, count + 1)):
        prepare_shard(texts, "out", Shard(number, count))
    with pytest.raises(DataError, match=f"got {count} shards: merge them, `gpt2-jax prepare --me"):
        open_corpus(texts / "out")
    meta = merge(texts / "out")
    for part in ("train", "val"):
        found = documents(texts / "out", part)
        assert sorted(found) == sorted(documents(texts / "one", part))
        assert all(part_of(text, 0.2) == part for text in found)
        assert meta[part]["documents"] == len(found)
    assert meta == json.loads((texts / "out" / "meta.json").read_text())
    total = verify(texts / "out")
    assert total["tokens"] == meta["train"]["tokens"] + meta["val"]["tokens"]


def test_a_shard_is_the_same_whoever_writes_it_and_when(texts):
    prepare_shard(texts, "a", Shard(2, 3))
    shutil.copytree(texts / "in", texts / "moved" / "in")
    shutil.copytree(texts / "tokenizer", texts / "moved" / "tokenizer")
    prepare_shard(texts / "moved", "b", Shard(3, 3))
    prepare_shard(texts / "moved", "b", Shard(2, 3))
    ours = texts / "a" / "shard-002-of-003"
    theirs = texts / "moved" / "b" / "shard-002-of-003"
    for file in ours.iterdir():
        if file.name != "meta.json":  # which has the name of the tokenizer's folder
            assert file.read_bytes() == (theirs / file.name).read_bytes()
    # Such shards are one corpus, too.
    shutil.copytree(texts / "moved" / "b", texts / "c")
    shutil.rmtree(texts / "c" / "shard-002-of-003")
    shutil.move(ours, texts / "c")
    prepare_shard(texts, "c", Shard(1, 3))
    merge(texts / "c")
    assert len(documents(texts / "c", "train")) > 30


def test_more_shards_than_documents_leave_some_empty(texts):
    (texts / "in" / "0.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    for number in range(1, 5):
        (texts / "in" / f"{number}.jsonl").unlink()
    for number in range(1, 4):
        prepare_shard(texts, "out", Shard(number, 3), val_fraction=0)
    assert "train" not in json.loads((texts / "out/shard-003-of-003/meta.json").read_text())
    assert merge(texts / "out")["train"]["documents"] == 2
    assert documents(texts / "out", "train") == ["one", "two"]


@pytest.fixture
def shards(texts):
    """Two shards, not merged."""
    for number in (1, 2):
        prepare_shard(texts, "out", Shard(number, 2))
    return texts


def another_shard(texts, **options):
    """Writes the second shard anew."""
    prepare_shard(texts, "out", Shard(2, 2), overwrite=True, **options)


def rename(before, after):
    """Something that renames a shard."""
    return lambda texts: shutil.copytree(texts / "out" / before, texts / "out" / after)


def other_tokenizer(texts):
    """Writes the second shard with another tokenizer of as many tokens."""
    letters = char_tokenizer([ALPHABET.replace("q", "!")])
    Tokenizer(letters.vocab, letters.merges, {"<|endoftext|>": len(ALPHABET)}).save(
        texts / "tokenizer"
    )
    another_shard(texts)


def one_file_less(texts):
    """Writes the second shard on a machine that lacks a file."""
    (texts / "in" / "4.jsonl").unlink()
    another_shard(texts)


def flip_a_byte(texts):
    """Changes an id of a shard."""
    file = texts / "out" / "shard-002-of-002" / "train_00000.bin"
    file.write_bytes(b"\7" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda texts: shutil.rmtree(texts / "out" / "shard-002-of-002"),
            "expected 2 shards, got 1: 1 missing, such as shard-002-of-002",
        ),
        (
            rename("shard-002-of-002", "shard-02-of-02"),
            "expected each shard once, got shard-002-of-002, shard-02-of-02",
        ),
        (
            rename("shard-002-of-002", "shard-003-of-003"),
            "shards of one count, got shard-001-of-002, shard-003-of-003",
        ),
        (
            lambda texts: (texts / "out/shard-002-of-002").rename(texts / "out/shard-000-of-002"),
            "expected 2 shards, got 2: 1 missing, such as shard-002-of-002",
        ),
        (
            lambda texts: shutil.copy(
                texts / "out/shard-001-of-002/meta.json", texts / "out/shard-002-of-002"
            ),
            "shard-002-of-002/meta.json: expected the `shard` \"2/2\", got '1/2'",
        ),
        (
            lambda texts: another_shard(texts, val_fraction=0.3),
            "one `val_fraction`, got 0.2 in shard-001-of-002, 0.3 in shard-002-of-002",
        ),
        (one_file_less, "one `input_bytes`, got [0-9]+ in shard-001-of-002, [0-9]+ in shard-002"),
        (
            other_tokenizer,
            "one tokenizer, got two in shard-001-of-002 and shard-002-of-002, by their vocab.json",
        ),
        (flip_a_byte, "shard-002-of-002/train_00000.bin: .* as manifest.json says, sample "),
        (
            lambda texts: (texts / "out/shard-002-of-002/manifest.json").unlink(),
            "shard-002-of-002: expected a manifest.json",
        ),
        (lambda texts: shutil.rmtree(texts / "out"), "expected folders such as shard-001-of-064"),
    ],
)
def test_shards_that_are_not_one_corpus_are_named(shards, change, message):
    change(shards)
    with pytest.raises(DataError, match=message):
        merge(shards / "out")
    assert not (shards / "out" / "manifest.json").exists()


def test_what_was_merged_is_replaced_only_if_told_and_a_new_shard_is_noticed(shards):
    merge(shards / "out")
    with pytest.raises(CheckpointError, match="manifest.json exists already"):
        merge(shards / "out")
    (shards / "in" / "1.jsonl").write_text(json.dumps({"text": "a new story"}))
    for number in (1, 2):
        prepare_shard(shards, "out", Shard(number, 2), overwrite=True)
    with pytest.raises(DataError, match=r"/shard-00\d-of-002/train_0000\d.bin: "):
        open_corpus(shards / "out")
    merge(shards / "out", overwrite=True)
    everything = documents(shards / "out", "train") + documents(shards / "out", "val")
    assert "a new story" in everything


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shard": Shard(0, 4)}, "`shard` must be one of 1/4 to 4/4, got 0/4"),
        ({"shard": Shard(5, 4)}, "`shard` must be one of 1/4 to 4/4, got 5/4"),
        ({"shard_tokens": 1}, "`shard_tokens` must be at least 2, got 1"),
        ({"shard": Shard(1, 2), "tokenizer": "char"}, 'there already, got "char": prepare a part'),
        ({"shard_tokens": 9, "tokenizer": "bpe", "vocab_size": 300}, 'already, got "bpe"'),
        ({"shard": Shard(1, 2), "inputs": ["-"]}, "which all shards can read, got standard input"),
    ],
)
def test_what_no_shard_can_be_is_named(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("text")
    options = {"inputs": [tmp_path / "a.txt"]} | options
    inputs = options.pop("inputs")
    with pytest.raises(DataError, match=message):
        prepare(inputs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_named_by_the_shard_that_reads_it(texts):
    (texts / "in" / "2.jsonl").write_text("\n")
    prepare_shard(texts, "out", Shard(1, 5))
    with pytest.raises(DataError, match="2.jsonl: expected a text, got an empty one"):
        prepare_shard(texts, "out", Shard(3, 5))
    assert [path.name for path in (texts / "out").iterdir()] == ["shard-001-of-005"]


def test_about_the_fraction_that_was_asked_for_is_for_validation():
    numbers = [str(number) for number in range(4000)]
    small = {text for text in numbers if part_of(text, 0.1) == "val"}
    assert 330 < len(small) < 470
    # Who is for validation stays so where more are.
    assert small < {text for text in numbers if part_of(text, 0.2) == "val"}
    assert not any(part_of(text, 0) == "val" for text in numbers)


def test_workers_are_given_no_more_than_they_can_do_soon(monkeypatch):
    read = []
    spans = (read.append(i) or Span(f"a{i}", 0, 2) for i in range(100))
    letters = char_tokenizer(["a0123456789"])
    monkeypatch.setattr(encoding, "_worker_tokenizer", letters, raising=False)
    with ThreadPoolExecutor(2) as pool:
        encoded = encoding._encoded_by(pool, spans, 8)
        assert letters.decode(next(encoded).ids) == "a0"
        assert len(read) == 8
        assert len(list(encoded)) == 99


def test_a_worker_that_is_killed_is_told():
    context = multiprocessing.get_context("spawn")
    letters = char_tokenizer(["a"])
    with ProcessPoolExecutor(1, context, encoding._start_worker, (letters,)) as pool:
        encoded = encoding._encoded_by(pool, iter([Span("aa", 0, 2)] * 3), 1)
        assert next(encoded).ids.tolist() == [0, 0]
        (worker,) = pool._processes
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="encodes has ended before its work"):
            list(encoded)
