"""Batches: each id once, never past the end of a file, the same whatever came before."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.training import data, order
from gpt2_jax.training.data import Batches, Place, Tokens, windows
from gpt2_jax.training.token_files import DataError, TokenFile


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


def test_one_file_has_the_order_that_it_always_had():
    # Drawn before there were several files: a run that was begun then goes on with it.
    batches = Batches(np.arange(50), batch_size=4, length=6, seed=3)
    assert batches(0)[:, 0].tolist() == [40, 4, 16, 10]
    assert batches(5)[:, 0].tolist() == [23, 7, 37, 31]


def ids_in_files(*sizes):
    """Ids in files, each its own place: the file's number times 1000, and where it stands."""
    return Tokens([1000 * file + np.arange(size) for file, size in enumerate(sizes)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(1, 9), st.integers(0, 3))
def test_no_window_goes_from_one_file_into_the_next(sizes, length, seed):
    sizes = [*sizes, length + 1]  # one at least is long enough
    batches = Batches(ids_in_files(*sizes), batch_size=1, length=length, seed=seed)
    rows = np.concatenate([batches(cursor) for cursor in range(batches.windows_per_epoch)])
    np.testing.assert_array_equal(
        rows - rows[:, :1], np.tile(np.arange(length + 1), (len(rows), 1))
    )
    targets = rows[:, 1:].ravel()
    assert len(set(targets)) == len(targets)
    for file, size in enumerate(sizes):
        n_predicted = np.sum(targets // 1000 == file)
        # A file that is shorter than a window is left out; of another, little.
        left_out = size - 1 - n_predicted
        assert n_predicted == 0 if size < length + 1 else left_out < 2 * length


def test_windows_of_all_files_are_mixed_anew_in_each_epoch():
    tokens = ids_in_files(400, 7, 800)
    batches = Batches(tokens, batch_size=148, length=8, seed=0)
    assert batches.windows_per_epoch == 49 + 99
    epochs = [batches(epoch)[:, 0] for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # A third of each stretch is of the first file, which is a third of all.
    for epoch in epochs:
        assert 4 < np.sum(epoch[:37] < 1000) < 22
        assert len(set(epoch[epoch < 1000] % 8)) == len(set(epoch[epoch > 1000] % 8)) == 1
    assert len({min(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("sizes", [(500,), (130, 250, 90)])
def test_each_process_reads_its_rows_of_the_one_batch(sizes, monkeypatch):
    tokens = ids_in_files(*sizes)
    batches = Batches(tokens, batch_size=12, length=10, seed=7)
    whole = [batches(cursor) for cursor in range(9)]
    read = []
    read_rows = Tokens.read_rows

    def read_and_count(self, places):
        read.extend(places)
        return read_rows(self, places)

    monkeypatch.setattr(Tokens, "read_rows", read_and_count)
    for n_processes in (1, 2, 3, 12):
        n_rows = 12 // n_processes
        for cursor in (8, 0, 3):  # of the third, rows of two epochs
            own = [batches.rows(cursor, i, i + n_rows) for i in range(0, 12, n_rows)]
            np.testing.assert_array_equal(np.concatenate(own), whole[cursor])
    read.clear()
    batches.rows(4, 3, 5)
    assert len(read) == 2
    with pytest.raises(ValueError, match="rows `start` < `stop` of a batch of 12, got 3 and 13"):
        batches.rows(0, 3, 13)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096])
def test_a_computed_order_has_each_number_once(count):
    keys = np.random.default_rng(count).integers(2**64, size=order.ROUNDS, dtype=np.uint64)
    permuted = order.permuted(np.arange(count), count=count, keys=keys)
    assert sorted(permuted) == list(range(count))


def test_a_computed_order_is_as_good_as_a_drawn_one():
    # Where each of twelve numbers goes, and how often two neighbours stay so, over 2,000 orders.
    counts = np.zeros((12, 12))
    n_neighbours = 0
    for seed in range(2000):
        keys = np.random.default_rng(seed).integers(2**64, size=order.ROUNDS, dtype=np.uint64)
        permuted = order.permuted(np.arange(12), count=12, keys=keys)
        counts[np.arange(12), permuted] += 1
        n_neighbours += np.sum(np.diff(permuted) == 1)
    chi_squared = np.sum((counts - 2000 / 12) ** 2 / (2000 / 12), axis=1)
    assert chi_squared.max() < 31.3  # of 11 degrees of freedom, exceeded once in a thousand
    assert abs(n_neighbours / 2000 - 11 / 12) < 0.08


def test_a_computed_order_is_pinned():
    # Another one is another run: it needs another `order.NAME`.
    keys = np.arange(1, 9, dtype=np.uint64)
    assert order.NAME == "feistel-8"
    permuted = order.permuted(np.array([0, 1, 2, 10**9]), count=2 * 10**9, keys=keys)
    assert permuted.tolist() == [1589771194, 1141263444, 916954169, 109185317]


def files_of(folder, n_files, dtype=np.uint16):
    """Files of eight ids each."""
    files = []
    for number in range(n_files):
        path = folder / f"train_{number:05}.bin"
        (number + np.arange(8, dtype=dtype)).tofile(path)
        files.append(TokenFile(path, np.dtype(dtype), 0, 8))
    return files


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OPEN_FILES", 3)
    mapped = []
    map_file = TokenFile.map

    def map_and_count(self, *, is_random):
        mapped.append(self)
        return map_file(self, is_random=is_random)

    monkeypatch.setattr(TokenFile, "map", map_and_count)
    tokens = Tokens(files_of(tmp_path, 5))
    assert len(tokens) == 40 and mapped == []
    for number in (0, 1, 2, 0, 1, 2, 3, 4, 0):
        assert tokens.read(Place(number, 2, 5)).tolist() == [number + 2, number + 3, number + 4]
    assert [file.path.name[10] for file in mapped] == ["0", "1", "2", "3", "4", "0"]


def test_what_memory_cannot_keep_is_read_without_its_surroundings(tmp_path, monkeypatch):
    files = files_of(tmp_path, 2)
    asked = []
    map_file = TokenFile.map

    def map_and_note(self, *, is_random):
        asked.append(is_random)
        return map_file(self, is_random=is_random)

    monkeypatch.setattr(TokenFile, "map", map_and_note)
    for kept in (16, 15):
        monkeypatch.setattr(data, "KEPT_IDS", kept)
        assert Tokens(files).read(Place(1, 0, 3)).tolist() == [1, 2, 3]
    assert asked == [False, True]


@pytest.mark.parametrize("bad, dtype", [(11, np.uint16), (-1, np.int32)])
def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(tmp_path, bad, dtype):
    files = files_of(tmp_path, 3, dtype)
    ids = np.arange(8, dtype=dtype)
    ids[6] = bad
    ids.tofile(files[1].path)
    tokens = Tokens(files, vocab_size=11)
    message = rf"train_00001.bin: expected ids in \[0, 11\) \(`vocab_size`\), got {bad} at 6"
    with pytest.raises(DataError, match=message):
        list(windows(tokens, batch_size=2, length=3))
    batches = Batches(tokens, batch_size=9, length=2, seed=0)
    with pytest.raises(DataError, match=message):
        batches(0)  # a whole epoch


def test_windows_of_several_files_score_all_ids_but_their_first():
    tokens = ids_in_files(7, 1, 2, 12)
    scored = []
    for ids, weights in windows(tokens, batch_size=2, length=3):
        scored += ids[weights > 0].tolist()
        assert np.all((ids[:, 1:] - ids[:, :-1] == 1) | (weights[:, 1:] == 0))
    assert scored == [*range(1, 7), 2001, *range(3001, 3012)]


def test_files_that_are_all_too_short_are_named():
    with pytest.raises(DataError, match="as many tokens, the longest of 3 files has 8"):
        Batches(ids_in_files(4, 8, 1), batch_size=1, length=8, seed=0)
