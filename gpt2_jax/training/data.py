"""Token files to batches. Knows ids and where they lie; nothing of text, models or devices.

Of several files each is a text of its own: no window goes on from one into the next.

Axes: B rows of a batch, T ids of a row, N ids of a file, F files, W windows of an epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from gpt2_jax.training import order
from gpt2_jax.training.token_files import DataError, TokenFile

OPEN_FILES = 256  # mapped at a time: each holds one of the 1,024 handles that most systems give
# Of all files, 64 GiB of uint16: so many a machine may keep in memory. Of more, what the system
# reads around a window is gone before it is wanted: where that was 8 MiB, 480 windows took 3 s.
KEPT_IDS = 2**35
DRAWN_IDS = 2**34  # of one file; more, and an order that is kept would take 128 MiB of each epoch


class Place(NamedTuple):
    """A row of ids in a file."""

    file: int
    start: int
    stop: int


class Tokens:
    """The ids of one or several token files, each mapped into memory when it is first read.

    Args:
      sources: the files, or arrays of ids.
      vocab_size: ids are checked to be below it as they are read; None leaves them unchecked.
    """

    def __init__(
        self,
        sources: Sequence[TokenFile | Integer[np.ndarray, " N"]],
        *,
        vocab_size: int | None = None,
    ):
        self.sources = list(sources)
        self.vocab_size = vocab_size
        self.sizes = np.array([_size_of(source) for source in self.sources], np.int64)  # [F]
        # What has not been read for the longest is closed.
        self._ids_of = lru_cache(maxsize=OPEN_FILES)(self._open)

    def __len__(self) -> int:
        """Returns how many ids there are."""
        return int(self.sizes.sum())

    def read(self, place: Place) -> Integer[np.ndarray, " T"]:
        """Returns a row of ids.

        Raises:
          DataError: an id is outside the vocabulary, or the file is not what it was.
        """
        return self.read_rows([place])[0]

    def read_rows(self, places: Sequence[Place]) -> Integer[np.ndarray, "B T"]:
        """Returns rows of one length.

        Raises:
          DataError: as `read`.
        """
        rows = np.stack([self._ids_of(p.file)[p.start : p.stop] for p in places])
        # As they are read: to look at all before a run begins would read a corpus of terabytes.
        if self.vocab_size is not None and (rows.max() >= self.vocab_size or rows.min() < 0):
            self._refuse(places, rows, self.vocab_size)
        return rows

    def _open(self, number: int) -> Integer[np.ndarray, " N"]:
        source = self.sources[number]
        if isinstance(source, np.ndarray):
            return source
        return source.map(is_random=len(self) > KEPT_IDS)

    def _refuse(
        self, places: Sequence[Place], rows: Integer[np.ndarray, "B T"], vocab_size: int
    ) -> None:
        """Raises `DataError` for the first id that is outside the vocabulary."""
        row, column = divmod(first_outside(rows, vocab_size), rows.shape[1])
        place = places[row]
        source = self.sources[place.file]
        name = "An array of ids" if isinstance(source, np.ndarray) else source.path
        raise outside(name, vocab_size, rows[row, column], place.start + column)


def _size_of(source: TokenFile | Integer[np.ndarray, " N"]) -> int:
    """Returns how many ids a file has, or an array."""
    return len(source) if isinstance(source, np.ndarray) else source.n_ids


Ids = Tokens | Integer[np.ndarray, " N"]  # a single array is as a single file


def first_outside(ids: Integer[np.ndarray, "..."], vocab_size: int) -> int:
    """Returns where the first id stands that is outside the vocabulary, counted through rows."""
    return int(np.argmax((ids >= vocab_size) | (ids < 0)))


def outside(name: object, vocab_size: int, id: np.integer, offset: int) -> DataError:
    """Returns the error for an id that is outside the vocabulary, and where in a file it stands."""
    expected = f"ids in [0, {vocab_size}) (`vocab_size`)"
    return DataError(f"{name}: expected {expected}, got {id} at {offset}.")


def as_tokens(ids: Ids) -> Tokens:
    """Returns token files, or an array as if it were one."""
    return ids if isinstance(ids, Tokens) else Tokens([ids])


def is_order_drawn(tokens: Tokens) -> bool:
    """Returns whether the windows' order is drawn and kept, as ever; else it is computed."""
    # What was trained on before there were several files goes on with the order that it had.
    return len(tokens.sizes) == 1 and len(tokens) <= DRAWN_IDS


# Batches, for training.


class Epoch(NamedTuple):
    """One pass over the files."""

    phases: Int64[np.ndarray, " F"]  # where the first window of each file starts
    order: Callable[[Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]]  # of the windows of all


class Batches:
    """Windows of token files in random order: a pure function from a cursor to a batch.

    An epoch begins at a random phase of each file and passes over it in windows of `length + 1`
    ids; each shares one id with the next, so that each id is predicted once. The windows of all
    files come in one random order. The end of a file is never passed, and a file that is shorter
    than a window is left out. The last batch of an epoch is filled up from the next epoch.

    Nothing is kept for each window, unless there is one file alone of at most `DRAWN_IDS`: then
    their order is drawn, 8 bytes for each.

    Args:
      tokens: the files, or the ids of one.
      batch_size: windows of a batch.
      length: how many ids of a window are predicted.
      seed: of phases and orders.

    Raises:
      DataError: no file has `length + 1` ids.
      ValueError: `batch_size` or `length` is less than 1.

    Examples:
      >>> batches = gpt2_jax.training.data.Batches(np.arange(100), batch_size=2, length=8, seed=0)
      >>> windows = batches(0)
      >>> windows.shape, bool((windows[:, 1:] == windows[:, :-1] + 1).all())
      ((2, 9), True)
    """

    def __init__(self, tokens: Ids, *, batch_size: int, length: int, seed: int):
        if batch_size < 1 or length < 1:
            raise ValueError(
                f"`batch_size` and `length` must be at least 1, got {batch_size} and {length}."
            )
        self.tokens = as_tokens(tokens)
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        sizes = self.tokens.sizes
        longest = int(sizes.max(initial=0))
        if longest < length + 1:
            files = "the file has" if len(sizes) == 1 else f"the longest of {len(sizes)} files has"
            raise DataError(
                f"Windows of {length} and 1 ids need as many tokens, {files} {longest}."
            )
        # One less than would fit: at least `length - 1` ids are left over, so that each phase is
        # possible. (A file of a single window has one phase.)
        n_windows = np.maximum(1, (sizes - length) // length)
        self._n_windows = np.where(sizes > length, n_windows, 0)  # [F]
        self._ends = np.cumsum(self._n_windows)  # counted through all files
        self.windows_per_epoch = int(self._ends[-1])
        n_left_over = sizes - 1 - self._n_windows * length  # the first id is never predicted
        self._n_phases = np.minimum(length, n_left_over + 1)
        # Two: where one epoch ends, a batch needs both. They depend on the seed alone, so nothing
        # that a caller sees depends on what is remembered.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, cursor: int) -> Int32[np.ndarray, "B T"]:
        """Returns the batch after `cursor` others, `T = length + 1` ids a row.

        Raises:
          ValueError: `cursor` is negative.
          DataError: an id is outside the vocabulary, or a file is not what it was.
        """
        return self.rows(cursor, 0, self.batch_size)

    def rows(self, cursor: int, start: int, stop: int) -> Int32[np.ndarray, "R T"]:
        """Returns rows `start` to `stop` of a batch, and reads no others.

        So each of several processes reads its own: together they are the batch, however many there
        are.

        Raises:
          ValueError: `cursor` is negative, or there are no such rows.
          DataError: as for the whole batch, of these rows.
        """
        if cursor < 0:
            raise ValueError(f"`cursor` must not be negative, got {cursor}.")
        if not 0 <= start < stop <= self.batch_size:
            expected = f"rows `start` < `stop` of a batch of {self.batch_size}"
            raise ValueError(f"Expected {expected}, got {start} and {stop}.")
        n_before = cursor * self.batch_size  # windows are counted through all epochs
        places = list(self._places(n_before + start, n_before + stop))
        # JAX's own integer, whichever the files hold.
        return self.tokens.read_rows(places).astype(np.int32)

    def _places(self, first: int, last: int) -> Iterator[Place]:
        """Yields where windows `first` to `last` lie, counted through all epochs."""
        while first < last:
            number, index = divmod(first, self.windows_per_epoch)
            end = min(index + last - first, self.windows_per_epoch)
            epoch = self._epoch(number)
            windows = epoch.order(np.arange(index, end))  # counted through all files
            files = np.searchsorted(self._ends, windows, side="right")
            n_before = self._ends[files] - self._n_windows[files]
            starts = epoch.phases[files] + self.length * (windows - n_before)
            for file, start in zip(files.tolist(), starts.tolist(), strict=True):
                yield Place(file, start, start + self.length + 1)
            # A batch may take in the end of one epoch, all of the next, and so on.
            first += end - index

    def _draw_epoch(self, number: int) -> Epoch:
        """Returns where the windows of an epoch start, and their order."""
        # Seeded by both numbers: their sum would give epoch 1 of seed 0 the order of epoch 0 of 1.
        rng = np.random.default_rng((self.seed, number))
        phases = rng.integers(self._n_phases)
        count = self.windows_per_epoch
        if is_order_drawn(self.tokens):
            return Epoch(phases, rng.permutation(count).__getitem__)
        keys = rng.integers(2**64, size=order.ROUNDS, dtype=np.uint64)
        return Epoch(phases, partial(order.permuted, count=count, keys=keys))


# Windows, for validation.


class Windows(NamedTuple):
    """Some windows of the files, and how much each of their ids counts."""

    ids: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]  # 1 where an id is predicted, else 0


def windows(tokens: Ids, *, batch_size: int, length: int) -> Iterator[Windows]:
    """Yields whole files in order, `batch_size` rows of `length + 1` ids at a time.

    Each id but a file's first is predicted once, with weight 1. What fills up the last row of a
    file, and the last rows of all, has weight 0.

    Raises:
      DataError: an id is outside the vocabulary, or a file is not what it was.
    """
    tokens = as_tokens(tokens)
    places_left = _places_in_order(tokens, length)
    while places := list(islice(places_left, batch_size)):
        # Every batch has one shape, the last one too: one program scores them all.
        ids = np.zeros((batch_size, length + 1), np.int32)
        weights = np.zeros((batch_size, length + 1), np.float32)
        for row, place in enumerate(places):
            window = tokens.read(place)
            ids[row, : len(window)] = window
            weights[row, 1 : len(window)] = 1  # a window's first id was the last of the one before
        yield Windows(ids, weights)


def _places_in_order(tokens: Tokens, length: int) -> Iterator[Place]:
    """Yields where the windows of all files lie, the last of each perhaps a short one."""
    for file, size in enumerate(tokens.sizes.tolist()):
        for start in range(0, size - 1, length):
            yield Place(file, start, min(start + length + 1, size))
