"""Token files and batches: each id once, never past the end, the same whatever came before."""

import hashlib
import io
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.training import data
from gpt2_jax.training.data import Batches, DataError, fingerprint, open_tokens, read_meta, windows


def test_nanogpts_files_are_read_as_they_are(tmp_path):
    ids = np.arange(50_000, 50_257)
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    tokens = open_tokens(tmp_path / "train.bin", vocab_size=50257)
    np.testing.assert_array_equal(tokens, ids)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_meta_json_says_how_wide_the_ids_are(tmp_path):
    np.array([1, 70_000], np.uint32).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint32"}))
    np.testing.assert_array_equal(
        open_tokens(tmp_path / "train.bin", vocab_size=70_001), [1, 70_000]
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "expected JSON, got "),
        ("[]", "expected an object, got list"),
        ('{"dtype": "int8"}', 'expected the `dtype` "uint16" or "uint32", got \'int8\''),
    ],
)
def test_a_damaged_meta_json_is_named(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(DataError, match=f"meta.json: {message}"):
        read_meta(tmp_path)


def test_a_folder_without_meta_says_nothing(tmp_path):
    assert read_meta(tmp_path) == {}


def write_pickle(folder, content):
    """Writes a `meta.pkl`."""
    with (folder / "meta.pkl").open("wb") as opened:
        pickle.dump(content, opened)


def test_nanogpts_pickle_is_read(tmp_path):
    itos = {1: "b", 0: "a"}  # the ids count, not their order in the file
    write_pickle(tmp_path, {"vocab_size": 2, "itos": itos, "stoi": {"a": 0, "b": 1}})
    assert read_meta(tmp_path) == {"vocab_size": 2, "itos": ["a", "b"]}


class Runs:
    """What a pickle can hold: a function and what to call it with."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"vocab_size": 2, "itos": Runs()}, protocol)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(DataError, match="meta.pkl: expected a pickle of plain data, but it names"):
        read_meta(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # elsewhere it does run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "expected a positive `vocab_size`, as nanoGPT writes it, got None"),
        ({"vocab_size": "65"}, "as nanoGPT writes it, got '65'"),
        ({"vocab_size": 2, "itos": {0: "a"}}, "a text for each id below 2"),
        ({"vocab_size": 1, "itos": {0: 7}}, "a text for each id below 1"),
    ],
)
def test_another_pickle_is_named(tmp_path, content, message):
    write_pickle(tmp_path, content)
    with pytest.raises(DataError, match=f"meta.pkl: .*{message}"):
        read_meta(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(b"no pickle at all")
    with pytest.raises(DataError, match="meta.pkl: expected a pickle of plain data, but invalid"):
        read_meta(tmp_path)


def llm_c_file(file, magic, version, ids):
    """Writes tokens as `write_datafile` of llm.c's `dev/data/data_common.py` does."""
    header = np.zeros(256, np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(ids)
    file.write_bytes(header.tobytes() + ids.tobytes())
    return file


@pytest.mark.parametrize(
    "magic, version, dtype", [(20240520, 1, np.uint16), (20240801, 7, np.uint32)]
)
def test_llm_cs_files_are_read(tmp_path, magic, version, dtype):
    ids = np.array([50256, 1, 2], dtype)
    file = llm_c_file(tmp_path / "train.bin", magic, version, ids)
    np.testing.assert_array_equal(open_tokens(file, vocab_size=50257), ids)
    with pytest.raises(DataError, match=r"in \[0, 256\) .*got 50256 at 0"):
        open_tokens(file, vocab_size=256)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_numpys_files_are_read(tmp_path, dtype):
    np.save(tmp_path / "train.npy", np.array([5, 0, 3], dtype))
    tokens = open_tokens(tmp_path / "train.npy", vocab_size=6)
    assert isinstance(tokens, np.memmap)
    np.testing.assert_array_equal(tokens, [5, 0, 3])


def written(array):
    """An array as numpy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(**arrays):
    """Arrays as numpy zips them."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.bin", written(np.arange(4)), "expected token ids, got numpy's format: call it .npy"),
        ("a.bin", zipped(ids=np.arange(4)), "got a zip, such as PyTorch and numpy write"),
        ("a.bin", np.array([20240326, 3], np.int32).tobytes(), "got a model of llm.c's"),
        ("a.bin", np.array([20240520, 2, 0], np.int32).tobytes(), "expected llm.c's version 1"),
        ("a.npy", b"\1\0\2\0", "expected numpy's format, but "),
        ("a.npy", written(np.ones((2, 2), int)), r"one row of integers, got int64 of shape \[2, 2"),
        ("a.npy", written(np.ones(2)), r"one row of integers, got float64 of shape \[2\]"),
        ("a.npy", written(np.array([1, -2])), r"expected ids in \[0, 50257\) .*, got -2 at 1"),
        ("a.npy", zipped(ids=np.arange(4)), "one row of integers, got npz"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        open_tokens(tmp_path / name, vocab_size=50257)


def test_a_header_that_counts_other_ids_is_named(tmp_path):
    file = llm_c_file(tmp_path / "a.bin", 20240520, 1, np.arange(4, dtype=np.uint16))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a header that counts the ids, got \(1, 4\) with 6 bytes"):
        open_tokens(file, vocab_size=50257)


def test_a_file_of_int32_is_found_by_its_number_of_ids_and_not_by_its_zeros(tmp_path):
    np.array([7, 8, 9], np.int32).tofile(tmp_path / "train.bin")
    # Nobody can tell: these may be six ids, of which every second is 0.
    assert open_tokens(tmp_path / "train.bin", vocab_size=10).tolist() == [7, 0, 8, 0, 9, 0]
    (tmp_path / "meta.json").write_text(json.dumps({"train": {"tokens": 3}}))
    with pytest.raises(
        DataError, match="train.bin: expected 3 uint16 ids, as meta.json says, got 6"
    ):
        open_tokens(tmp_path / "train.bin", vocab_size=10)


def test_bad_ids_are_found_wherever_the_check_divides_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IDS_PER_CHECK", 4)
    np.array([0, 1, 2, 3, 4, 5, 9, 6, 8], np.uint16).tofile(tmp_path / "train.bin")
    assert len(open_tokens(tmp_path / "train.bin", vocab_size=10)) == 9
    with pytest.raises(DataError, match=r"\[0, 8\) \(`vocab_size`\), got 9 at 6"):
        open_tokens(tmp_path / "train.bin", vocab_size=8)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no such file"),
        (b"", "at least one, got 0 bytes"),
        (b"\1\0\2", "whole number of uint16 ids, at least one, got 3 bytes"),
        (b"\1\0\2\0\7\0\1\0", r"expected ids in \[0, 7\) \(`vocab_size`\), got 7 at 2"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"val.bin: .*{message}"):
        open_tokens(tmp_path / "val.bin", vocab_size=7)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_predicts_each_id_at_most_once_and_leaves_little_out(
    count, length, batch_size, seed
):
    tokens = np.arange(count)  # each id is its own place
    if count < length + 1:
        with pytest.raises(
            DataError,
            match=f"Windows of {length} and 1 ids need as many tokens, the file has {count}",
        ):
            Batches(tokens, batch_size=batch_size, length=length, seed=seed)
        return
    batches = Batches(tokens, batch_size=batch_size, length=length, seed=seed)
    rows = np.concatenate([batches(cursor) for cursor in range(2 * batches.windows_per_epoch)])
    assert rows.shape == (2 * batches.windows_per_epoch * batch_size, length + 1)
    np.testing.assert_array_equal(
        rows - rows[:, :1], np.tile(np.arange(length + 1), (len(rows), 1))
    )
    for epoch_rows in (rows[: batches.windows_per_epoch], rows[batches.windows_per_epoch :]):
        targets = epoch_rows[: batches.windows_per_epoch, 1:].ravel()
        assert len(set(targets)) == len(targets)
        assert count - 1 - len(targets) < 2 * length


def test_epochs_differ_in_order_and_phase():
    batches = Batches(np.arange(1000), batch_size=1, length=8, seed=0)
    epochs = np.array([[batches(124 * epoch + i)[0, 0] for i in range(124)] for epoch in range(6)])
    assert batches.windows_per_epoch == 124
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({epoch[0] % 8 for epoch in epochs}) > 2
    assert not np.array_equal(np.sort(epochs[0]), epochs[0])


def test_a_batch_depends_on_seed_and_cursor_alone():
    tokens = np.arange(500, dtype=np.uint16)

    def make(seed=7):
        return Batches(tokens, batch_size=3, length=10, seed=seed)

    first = make()
    drawn = [first(cursor) for cursor in range(40)]
    for cursor in (39, 3, 17, 0):
        np.testing.assert_array_equal(make()(cursor), drawn[cursor])
        np.testing.assert_array_equal(first(cursor), drawn[cursor])
    assert not np.array_equal(make(8)(0), drawn[0])
    assert drawn[0].dtype == np.int32


@pytest.mark.parametrize(
    "meta, message",
    [
        ("[1]", "expected an object, got list"),
        ('{"vocab_size": "many"}', "expected a count as `vocab_size`, got 'many'"),
        ('{"vocab_size": true}', "expected a count as `vocab_size`, got True"),
        ('{"val": [1]}', r"expected an object as `val`, got \[1\]"),
        ('{"val": {"tokens": 3}}', "expected `val.bytes` beside `val.tokens`"),
        ('{"val": {"tokens": 3, "bytes": null}}', "expected a count as `val.bytes`, got None"),
        ('{"dtype": {}}', 'expected the `dtype` "uint16" or "uint32", got {}'),
    ],
)
def test_a_meta_json_of_another_program_is_named(tmp_path, meta, message):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(DataError, match=f"meta.json: {message}"):
        read_meta(tmp_path)


def test_a_batch_that_cannot_be_is_named():
    first = Batches(np.arange(500), batch_size=3, length=10, seed=7)
    with pytest.raises(ValueError, match="`cursor` must not be negative, got -1"):
        first(-1)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 3"):
        Batches(np.arange(500), batch_size=0, length=3, seed=0)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 50])
def test_windows_score_each_id_but_the_first_once(count):
    tokens = np.arange(100, 100 + count, dtype=np.uint16)
    scored = []
    for ids, weights in windows(tokens, batch_size=2, length=3):
        assert ids.shape == weights.shape == (2, 4)
        assert not weights[:, 0].any()
        for row, weight in zip(ids, weights, strict=True):
            places = np.flatnonzero(weight)
            # What is scored follows what is read.
            np.testing.assert_array_equal(np.diff(row[: len(places) + 1]), 1)
            scored += row[places].tolist()
    assert scored == tokens[1:].tolist()


def test_a_fingerprint_is_size_and_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert fingerprint(tmp_path / "a") == {
        "bytes": 3000,
        "sha256": hashlib.sha256(b"abc" * 1000).hexdigest(),
    }
