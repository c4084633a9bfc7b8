"""The command `prepare`: shards, and what looks after a folder that is there."""

import json

import numpy as np
import pytest

from gpt2_jax.commands.prepare import parse_shard
from gpt2_jax.training.corpus import open_corpus


@pytest.fixture
def texts(tmp_path):
    """Six files of a document each."""
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(f"Story {number}, of a king and a queen.")
    return tmp_path


def test_shards_are_written_merged_and_verified(texts, command):
    out = str(texts / "out")
    for number in (2, 1):
        inputs = (str(texts / "in"), "--out", out, "--val_fraction", "0")
        done = command(
            "prepare", *inputs, "--shard", f"{number}/2", "--shard_tokens", "12", model=()
        )
        assert (done.code, done.out) == (0, "")
    done = command("prepare", "--merge", out, model=())
    assert done.code == 0
    assert done.err.startswith("train: ") and "6 documents" in done.err
    tokens = open_corpus(out).train
    done = command("prepare", "--verify", out, "--quiet", model=())
    assert (done.code, done.err) == (0, "")
    file = texts / "out" / "shard-001-of-002" / "train_00001.bin"
    ids = np.fromfile(file, np.uint16)
    ids[::-1].tofile(file)
    done = command("prepare", "--verify", out, "--quiet", model=())
    assert done.code == 2
    assert "shard-001-of-002/train_00001.bin: expected, as manifest.json says" in done.err
    assert max(tokens.sizes) == 12


def test_a_folder_of_nanogpts_is_given_a_manifest(tmp_path, command):
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "train.bin")
    done = command("prepare", "--index", str(tmp_path), model=())
    assert done.code == 0
    assert done.err.splitlines()[-1] == "index: 1 files, 9 tokens, 18 bytes"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [file["name"] for file in manifest["train"]] == ["train.bin"]
    assert command("prepare", "--index", str(tmp_path), model=()).code == 2
    again = ("prepare", "--index", str(tmp_path), "--overwrite", "--quiet")
    assert command(*again, model=()).code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("a.txt",), "Expected texts and --out FOLDER, or --merge, --verify or --index FOLDER"),
        (("--out", "x"), "Expected texts and --out FOLDER"),
        (("a.txt", "--verify", "x"), "--verify cannot be combined with texts."),
        (("--merge", "x", "--val_fraction", "0"), "--merge cannot be combined with --val_fraction"),
        (("--verify", "x", "--overwrite"), "--verify cannot be combined with --overwrite"),
        (("--verify", "x", "--index", "y"), "--verify cannot be combined with --index"),
        (("a.txt", "--out", "x", "--shard", "3"), "--shard must be K/N, as in 3/64, got '3'"),
        (("a.txt", "--out", "x", "--shard", "0/4"), "--shard must be in 1/4 to 4/4, got 0/4"),
    ],
)
def test_what_does_not_go_together_is_one_line(command, arguments, message):
    done = command("prepare", *arguments, model=())
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_a_shard_is_counted_from_one():
    assert parse_shard("64/64") == (64, 64)
