"""Many words at once: cut from texts, looked up and merged as arrays. Knows bytes, numbers and ids.

Word by word most of the time goes into waiting for memory, for one object after the other; numpy
asks for many numbers at a time, and makes no objects.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import regex
from jaxtyping import Bool, Int, UInt8, UInt64

Ids = tuple[int, ...]  # as they are remembered: joined sooner than lists are

KEY_BYTES = 15  # of a word that is looked up by its bytes; the sixteenth has their number
WORDS_AT_ONCE = 2**16  # more do not fit into a processor's cache; fewer bring few new ones
MOST_COUNT = 2**4  # above the ids of a word with a key: it has at most one for each byte
NO_MERGE = 2**63 - 1  # a rank later than all others
UNKNOWN = -1

# Multipliers of hashes: odd, with as many ones as zeros, otherwise of no meaning.
MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], np.uint64)

# By how many bytes of a word are in the key's half, what of eight bytes is kept.
KEPT = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)


class Keys(NamedTuple):
    """Keys of 16 bytes, in two halves."""

    low: UInt64[np.ndarray, " N"]
    high: UInt64[np.ndarray, " N"]

    def at(self, places: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> "Keys":
        """Returns some of them."""
        return Keys(self.low[places], self.high[places])


class Table:
    """Numbers from 0 on by keys: a hash table with linear probing, for many keys at a time."""

    def __init__(self):
        self.n_keys = 0
        # Low half, high half, number + 1: a row of zeros is a free slot, and has UNKNOWN for it.
        self._rows = np.zeros((2**12, 3), np.uint64)

    def find(self, keys: Keys) -> Int[np.ndarray, " N"]:
        """Returns the number of each key, or UNKNOWN."""
        slots = self._slots(keys)
        rows = self._rows.take(slots, axis=0)
        is_found = (rows[:, 0] == keys.low) & (rows[:, 1] == keys.high)
        numbers = np.where(is_found, rows[:, 2].view(np.int64) - 1, UNKNOWN)
        # Where another key has the slot: in nearly all cases the first slot is the right one, and
        # each further step is for few.
        sought = np.flatnonzero(~is_found & (rows[:, 2] != 0))
        while sought.size:
            slots[sought] = (slots[sought] + 1) & (len(self._rows) - 1)
            rows = self._rows.take(slots[sought], axis=0)
            is_found = (rows[:, 0] == keys.low[sought]) & (rows[:, 1] == keys.high[sought])
            numbers[sought[is_found]] = rows[is_found, 2].view(np.int64) - 1
            sought = sought[~is_found & (rows[:, 2] != 0)]
        return numbers

    def add(self, keys: Keys, numbers: Int[np.ndarray, " N"]) -> None:
        """Adds keys, none of which is there or comes twice."""
        self.n_keys += len(numbers)
        rows = np.stack([*keys, (numbers + 1).astype(np.uint64)], axis=1)
        if 2 * self.n_keys > len(self._rows):  # half full, few keys are far from their slot
            rows = np.concatenate([self._rows[self._rows[:, 2] != 0], rows])
            n_slots = 2 ** (4 * self.n_keys - 1).bit_length()
            self._rows = np.zeros((n_slots, 3), np.uint64)
        slots = self._slots(Keys(rows[:, 0], rows[:, 1]))
        while len(rows):
            is_free = self._rows[slots, 2] == 0
            # Of several keys that want the same slot one gets it.
            self._rows[slots[is_free]] = rows[is_free]
            is_left = (self._rows[slots] != rows).any(axis=1)
            rows = rows[is_left]
            slots = (slots[is_left] + 1) & (len(self._rows) - 1)

    def _slots(self, keys: Keys) -> Int[np.ndarray, " N"]:
        mixed = (keys.low * MIXERS[0] ^ keys.high * MIXERS[1]) * MIXERS[2]
        n_bits = len(self._rows).bit_length() - 1
        return (mixed >> np.uint64(64 - n_bits)).view(np.int64)


class Words:
    """The ids of words, remembered within bounds.

    A word is what stands between two places of `word_starts`, with the space before it.

    Args:
      encode: returns the ids of words that were not met before.
      n_remembered: words at the most.
      longest: bytes of a word that is remembered.
    """

    def __init__(self, encode: Callable[[list[str]], list[Ids]], n_remembered: int, longest: int):
        self._encode = encode
        self._n_remembered = n_remembered
        self._longest = longest
        self._table = Table()  # word -> the place of its first id, and how many it has
        self._ids = np.zeros(2**12, np.int64)  # of all words of the table, one after the other
        self._n_ids = 0
        self._long: dict[bytes, Ids] = {}  # the words that no key has room for
        # Arrays are read and written without Python's lock: another thread may be at work here.
        self._lock = threading.Lock()

    def encode(self, texts: list[bytes]) -> list[list[int]]:
        """Returns the ids of texts in UTF-8."""
        lengths = np.array([len(text) for text in texts], np.int64)
        ends = lengths.cumsum()
        begins = ends - lengths
        n_bytes = int(lengths.sum())
        # Readable eight bytes at a time, from any place on.
        joined = b"".join([*texts, b"\0" * (24 + -n_bytes % 8)])
        starts = word_starts(joined, n_bytes, begins[lengths > 0])
        all_ids = [np.zeros(0, np.int64)]
        all_counts = [np.zeros(1, np.int64)]
        for first in range(0, len(starts), WORDS_AT_ONCE):
            bounds = starts[first : first + WORDS_AT_ONCE + 1]
            if first + WORDS_AT_ONCE >= len(starts):
                bounds = np.append(bounds, n_bytes)
            ids, counts = self._encode_words(joined, bounds)
            all_ids.append(ids)
            all_counts.append(counts)
        ids = np.concatenate(all_ids)
        if len(texts) == 1:
            return [ids.tolist()]
        places = np.concatenate(all_counts).cumsum()  # of each word's first id
        firsts = places[starts.searchsorted(begins)].tolist()
        lasts = places[starts.searchsorted(ends)].tolist()
        return [ids[first:last].tolist() for first, last in zip(firsts, lasts, strict=True)]

    def _encode_words(
        self, text: bytes, bounds: Int[np.ndarray, " B"]
    ) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " N"]]:
        """Returns the ids of words that follow each other, and how many each has."""
        lengths = np.diff(bounds)
        keys = keys_of(text, bounds[:-1], lengths)
        with self._lock:
            spans = self._table.find(keys)
            remembered = self._ids
        spans[lengths > KEY_BYTES] = UNKNOWN  # whose key is that of their beginning
        unknown = np.flatnonzero(spans == UNKNOWN)
        spans[unknown] = 0
        counts = spans % MOST_COUNT
        encoded: list[Ids] = []
        if unknown.size:
            encoded = self._encode_unknown(text, bounds, keys, unknown)
            counts[unknown] = list(map(len, encoded))
        places = counts.cumsum() - counts
        shifts = np.repeat(spans // MOST_COUNT - places, counts)
        # Of those that were unknown it takes any ids, to be replaced.
        ids = remembered.take(shifts + np.arange(len(shifts)), mode="clip")
        if unknown.size:
            is_unknown = np.zeros(len(counts), bool)
            is_unknown[unknown] = True
            replaced = np.repeat(is_unknown, counts)
            ids[replaced] = list(chain.from_iterable(encoded))
        return ids, counts

    def _encode_unknown(
        self,
        text: bytes,
        bounds: Int[np.ndarray, " B"],
        keys: Keys,
        unknown: Int[np.ndarray, " M"],
    ) -> list[Ids]:
        """Returns the ids of some words, and remembers them."""
        starts = bounds[unknown].tolist()
        ends = bounds[unknown + 1].tolist()
        words = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        places = dict(zip(words, unknown.tolist(), strict=True))  # each word once
        new = [word for word in places if word not in self._long]
        encoded = self._encode([word.decode() for word in new])
        found = dict(zip(new, encoded, strict=True))
        with self._lock:
            short = []
            for word, ids in found.items():
                if len(word) <= KEY_BYTES:
                    short.append(word)
                elif len(word) <= self._longest and len(self._long) < self._n_remembered:
                    self._long[word] = ids
            self._remember(
                keys.at(np.array([places[word] for word in short], np.int64)),
                [found[word] for word in short],
            )
        long = self._long
        return [found[word] if word in found else long[word] for word in words]

    def _remember(self, keys: Keys, encoded: list[Ids]) -> None:
        """Adds words to the table, as long as there is room."""
        # Another thread may have met them at the same time.
        places = np.flatnonzero(self._table.find(keys) == UNKNOWN)
        places = places[: self._n_remembered - self._table.n_keys]
        added = [encoded[place] for place in places.tolist()]
        counts = np.array(list(map(len, added)), np.int64)
        ids = np.array(list(chain.from_iterable(added)), np.int64)
        needed = self._n_ids + len(ids)
        if needed > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(2 * needed, np.int64)])
        self._ids[self._n_ids : needed] = ids
        firsts = self._n_ids + counts.cumsum() - counts
        self._n_ids = needed
        self._table.add(keys.at(places), MOST_COUNT * firsts + counts)


def keys_of(text: bytes, starts: Int[np.ndarray, " N"], lengths: Int[np.ndarray, " N"]) -> Keys:
    """Returns the keys of words: their first 15 bytes, and their length.

    Of words that are not longer these are different ones for different words.
    """
    eights = np.frombuffer(text, "<u8", len(text) // 8)
    places = starts >> 3
    # A word begins within eight bytes: what it has of these, and what of the next.
    shifts = ((starts & 7) << 3).view(np.uint64)
    rest = np.uint64(64) - shifts  # numpy makes 0 of what is shifted by 64
    first = eights[places]
    second = eights[places + 1]
    third = eights[places + 2]
    n_bytes = np.minimum(lengths, KEY_BYTES)
    low = (first >> shifts | second << rest) & KEPT[np.minimum(n_bytes, 8)]
    high = (second >> shifts | third << rest) & KEPT[np.maximum(n_bytes - 8, 0)]
    return Keys(low, high | n_bytes.view(np.uint64) << np.uint64(8 * KEY_BYTES - 64))


# Cutting texts into words.


def word_starts(text: bytes, n_bytes: int, begins: Int[np.ndarray, " B"]) -> Int[np.ndarray, " N"]:
    """Returns where words begin in texts that follow each other.

    That is where a text begins, at the first of some white space, and at the last of it where more
    of the text follows. There a piece of the tokenizer's pattern ends, and what stands behind is
    cut as if it were alone: white space but for its last character is one piece, the last one is a
    piece or the first character of one.

    Args:
      text: texts in UTF-8, and behind them two bytes or more.
      n_bytes: of the texts.
      begins: where they begin; none is empty.
    """
    padded = np.frombuffer(text, np.uint8)
    codes = padded[:n_bytes]
    is_space = (codes == ord(" ")) | (codes - np.uint8(ord("\t")) < 5)  # to "\r"
    wide = np.zeros(0, np.int64)
    if codes.size and codes.max() >= 0x80:
        wide, n_wide = _wide_spaces(padded, n_bytes)
        for place in range(3):
            is_space[(wide + place)[place < n_wide]] = True
    follows = np.zeros(n_bytes, bool)  # whether the character before is white space
    follows[1:] = is_space[:-1]
    follows[begins] = False
    precedes = np.zeros(n_bytes, bool)  # whether the next one is, or the text ends
    precedes[:-1] = is_space[1:]
    precedes[begins - 1] = True  # at -1, too: the last text ends there
    is_start = is_space & ~(follows & precedes)
    if wide.size:
        # Of several bytes the first is where a word may begin, the last has the next character.
        is_start_of_wide = ~(follows[wide] & precedes[wide + n_wide - 1])
        for place in range(3):
            is_start[(wide + place)[place < n_wide]] = False
        is_start[wide] = is_start_of_wide
    is_start[begins] = True
    return np.flatnonzero(is_start)


def _wide_spaces(
    codes: UInt8[np.ndarray, " N"], n_bytes: int
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Returns where white space of several bytes stands, and how many these are."""
    leads = np.flatnonzero((codes[:n_bytes] >= 0xC2) & (codes[:n_bytes] < 0xF0))
    spelled = codes[leads].astype(np.int64) << 16
    spelled |= codes[leads + 1].astype(np.int64) << 8
    spelled |= codes[leads + 2] * (codes[leads] >= 0xE0)
    is_space = np.isin(spelled, _spelled_spaces())
    wide = leads[is_space]
    return wide, np.where(codes[wide] >= 0xE0, 3, 2)


@cache
def _spelled_spaces() -> Int[np.ndarray, " S"]:
    """Returns white space beyond ASCII as `regex` knows it, each in three bytes of UTF-8."""
    plane = "".join(map(chr, range(0x80, 0xD800)))
    spelled = [space.encode().ljust(3, b"\0") for space in regex.findall(r"\s", plane)]
    return np.array([int.from_bytes(space, "big") for space in spelled])


# Merging.


class Merges:
    """The merges of a vocabulary, for many pieces at once.

    Args:
      merged: the ids of each pair -> its rank and the id of the whole.
    """

    def __init__(self, merged: Mapping[tuple[int, int], tuple[int, int]]):
        pairs = np.array(list(merged.keys()), np.int64).reshape(-1, 2)
        ranks, wholes = np.array(list(merged.values()), np.int64).reshape(-1, 2).T
        self._ranks = Table()
        self._ranks.add(_pairs(pairs[:, 0], pairs[:, 1]), ranks)
        self._wholes = np.zeros(ranks.max(initial=-1) + 1, np.int64)
        self._wholes[ranks] = wholes

    def merge(self, pieces: Iterable[list[int]]) -> list[Ids]:
        """Returns the ids of pieces, of each of which the ids of its bytes are given.

        Each round makes one merge in each piece that has one left: the earliest, of equal ones the
        leftmost. So all pieces of a round have as many ids, and those that begin with fewer join
        them when it comes to that.
        """
        merged = [tuple(piece) for piece in pieces]
        of_width: dict[int, list[int]] = {}
        for number, piece in enumerate(merged):
            of_width.setdefault(len(piece), []).append(number)
        widest = max(of_width, default=0)
        numbers = np.zeros(0, np.int64)
        ids = np.zeros((0, widest), np.int64)
        ranks = np.zeros((0, widest - 1), np.int64) if widest else ids  # of each with the next
        for width in range(widest, 1, -1):
            if width in of_width:
                joining = np.array([merged[number] for number in of_width[width]], np.int64)
                numbers = np.concatenate([numbers, of_width[width]])
                ids = np.concatenate([ids, joining])
                ranks = np.concatenate([ranks, self._ranks_of(joining[:, :-1], joining[:, 1:])])
            places = ranks.argmin(axis=1)
            has_merge = ranks[np.arange(len(ranks)), places] != NO_MERGE
            _put(merged, numbers[~has_merge], ids[~has_merge])
            numbers = numbers[has_merge]
            ids, ranks = self._merge_at(places[has_merge], ids[has_merge], ranks[has_merge])
        _put(merged, numbers, ids)
        return merged

    def _merge_at(
        self,
        places: Int[np.ndarray, " N"],
        ids: Int[np.ndarray, "N W"],
        ranks: Int[np.ndarray, "N W-1"],
    ) -> tuple[Int[np.ndarray, "N W-1"], Int[np.ndarray, "N W-2"]]:
        """Merges a pair in each piece; returns the ids that are left, and the ranks of pairs."""
        rows = np.arange(len(ids))
        ids[rows, places] = self._wholes[ranks[rows, places]]
        ids = _without(ids, places + 1)
        ranks = _without(ranks, places)
        # Only with its two neighbours has the whole new pairs.
        for shift in (-1, 0):
            lefts = places + shift
            has_pair = (lefts >= 0) & (lefts < ranks.shape[1])
            rows = np.flatnonzero(has_pair)
            lefts = lefts[has_pair]
            ranks[rows, lefts] = self._ranks_of(ids[rows, lefts], ids[rows, lefts + 1])
        return ids, ranks

    def _ranks_of(
        self, lefts: Int[np.ndarray, "*N"], rights: Int[np.ndarray, "*N"]
    ) -> Int[np.ndarray, "*N"]:
        ranks = self._ranks.find(_pairs(lefts.ravel(), rights.ravel()))
        ranks[ranks == UNKNOWN] = NO_MERGE
        return ranks.reshape(lefts.shape)


def _pairs(lefts: Int[np.ndarray, " N"], rights: Int[np.ndarray, " N"]) -> Keys:
    return Keys(lefts.astype(np.uint64), rights.astype(np.uint64))


def _without(
    rows: Int[np.ndarray, "N W"], columns: Int[np.ndarray, " N"]
) -> Int[np.ndarray, "N V"]:
    """Returns rows without one column, another one in each."""
    n_rows, width = rows.shape
    is_kept = np.arange(width) != columns[:, None]
    return rows[is_kept].reshape(n_rows, width - 1)


def _put(merged: list[Ids], numbers: Int[np.ndarray, " N"], ids: Int[np.ndarray, "N W"]) -> None:
    for number, row in zip(numbers.tolist(), ids.tolist(), strict=True):
        merged[number] = tuple(row)
