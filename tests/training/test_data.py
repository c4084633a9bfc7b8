"""Token files and batches: each id once, never past the end, the same whatever came before."""

import hashlib
import json

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


def test_a_pickle_is_not_opened_and_a_folder_without_meta_says_nothing(tmp_path):
    assert read_meta(tmp_path) == {}
    (tmp_path / "meta.pkl").write_bytes(b"no pickle at all")
    with pytest.raises(DataError, match="meta.pkl is not read, as a pickle can run any code"):
        read_meta(tmp_path)


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
            np.testing.assert_array_equal(
                np.diff(row[: len(places) + 1]), 1
            )  # what is scored follows what is read
            scored += row[places].tolist()
    assert scored == tokens[1:].tolist()


def test_a_fingerprint_is_size_and_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert fingerprint(tmp_path / "a") == {
        "bytes": 3000,
        "sha256": hashlib.sha256(b"abc" * 1000).hexdigest(),
    }
