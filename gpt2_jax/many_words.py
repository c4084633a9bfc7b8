"""Many words at once: cut from texts, looked up and merged as arrays. Knows bytes, numbers and ids.

Word by word most of the time goes into waiting for memory, for one object after the other; numpy
asks for many numbers at a time, and makes no objects. What was met before is remembered, words and
the pieces of words.
"""

import threading
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import regex
from jaxtyping import Bool, Int, UInt8, UInt64

Ids = tuple[int, ...]  # as they are remembered: joined sooner than lists are

REMEMBERED = 2**18  # words, and pieces, at the most
REMEMBERED_BYTES = 64  # longer ones seldom come twice
WORDS_AT_ONCE = 2**16  # more do not fit into a processor's cache; fewer bring few new ones
PADDING = 24  # bytes behind a text, so that eight can be read from any place on, three times

KEY_BYTES = 15  # of a string that is looked up by its bytes; the sixteenth has their number
# The second halves of other keys: of strings that a dictionary numbers, for good or for one call.
# That of no string of 15 bytes is so large.
LONG = np.uint64(2**63)
PASSING = np.uint64(2**63 + 1)

SHORT = 32  # bytes of a piece that is merged with others
FEW = 2**9  # pieces that are merged sooner one by one
NO_MERGE = 2**63 - 1  # a rank later than all others
UNKNOWN = -1

# Multipliers of hashes: odd, with as many ones as zeros, otherwise of no meaning.
MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], np.uint64)

# By how many bytes of a string are in the key's half, what of eight bytes is kept.
KEPT = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)


class Strings(NamedTuple):
    """Strings that follow each other in a text in UTF-8, behind which there are PADDING bytes."""

    text: bytes
    bounds: Int[np.ndarray, " B"]  # where they begin, and where the last one ends

    def lengths(self) -> Int[np.ndarray, " N"]:
        """Returns how many bytes each has."""
        return np.diff(self.bounds)

    def listed(self, numbers: Int[np.ndarray, " M"]) -> list[bytes]:
        """Returns some of them."""
        starts = self.bounds[numbers].tolist()
        ends = self.bounds[numbers + 1].tolist()
        return [self.text[start:end] for start, end in zip(starts, ends, strict=True)]

    def taken(self, numbers: Int[np.ndarray, " M"]) -> "Strings":
        """Returns some of them, in a text of their own."""
        lengths = self.lengths()[numbers]
        codes = np.frombuffer(self.text, np.uint8)[_runs(self.bounds[numbers], lengths)]
        bounds = np.concatenate([[0], lengths.cumsum()])
        return Strings(padded(codes.tobytes()), bounds)


class Encoded(NamedTuple):
    """The ids of strings, one after the other, and how many each string has."""

    ids: Int[np.ndarray, " M"]
    counts: Int[np.ndarray, " N"]


def padded(text: bytes) -> bytes:
    """Returns a text with bytes behind it, and a multiple of eight in all."""
    return text + b"\0" * (PADDING + -len(text) % 8)


def _runs(firsts: Int[np.ndarray, " N"], counts: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Returns first, first + 1, ... of each, so many as its count."""
    places = counts.cumsum() - counts
    shifts = np.repeat(firsts - places, counts)
    return shifts + np.arange(len(shifts))


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
        """Adds keys, none of which is there; of equal ones one counts."""
        self.n_keys += len(numbers)
        rows = np.stack([*keys, (numbers + 1).astype(np.uint64)], axis=1)
        if 2 * self.n_keys > len(self._rows):  # half full, few keys are far from their slot
            rows = np.concatenate([self._rows[self._rows[:, 2] != 0], rows])
            n_slots = 2 ** (2 * self.n_keys).bit_length()
            self._rows = np.zeros((n_slots, 3), np.uint64)
        slots = self._slots(Keys(rows[:, 0], rows[:, 1]))
        while len(rows):
            is_free = self._rows[slots, 2] == 0
            # Of several keys that want the same slot one gets it.
            self._rows[slots[is_free]] = rows[is_free]
            there = self._rows.take(slots, axis=0)
            is_left = (there[:, 0] != rows[:, 0]) | (there[:, 1] != rows[:, 1])
            rows = rows[is_left]
            slots = (slots[is_left] + 1) & (len(self._rows) - 1)

    def _slots(self, keys: Keys) -> Int[np.ndarray, " N"]:
        mixed = (keys.low * MIXERS[0] ^ keys.high * MIXERS[1]) * MIXERS[2]
        n_bits = len(self._rows).bit_length() - 1
        return (mixed >> np.uint64(64 - n_bits)).view(np.int64)


class Memory:
    """The ids of strings, remembered within bounds.

    Args:
      encode: returns the ids of strings that were not met before, each of which comes once.
    """

    def __init__(self, encode: Callable[[Strings], Encoded]):
        self._encode = encode
        self._table = Table()  # string -> its span among the ids: see `_span`
        self._ids = np.zeros(2**12, np.int64)
        self._n_ids = 0
        self._long: dict[bytes, int] = {}  # numbers of strings that no key has room for
        # Arrays are read and written without Python's lock: another thread may be at work here.
        self._lock = threading.Lock()

    def encode(self, strings: Strings) -> Encoded:
        """Returns the ids of strings."""
        with self._lock:
            keys = self._keys(strings)
            spans = self._table.find(keys)
            ids = self._ids[: self._n_ids]
        unknown = np.flatnonzero(spans == UNKNOWN)
        if unknown.size:
            # Each of them once: the table says which of equal ones that is.
            sought = keys.at(unknown)
            numbers = np.arange(len(unknown))
            distinct = Table()
            distinct.add(sought, numbers)
            owners = distinct.find(sought)
            is_first = owners == numbers
            new = unknown[is_first]
            encoded = self._encode(strings.taken(new))
            spans[new] = _spans(encoded.counts, len(ids))
            spans[unknown] = spans[unknown[owners]]
            ids = np.concatenate([ids, encoded.ids])
            with self._lock:
                self._remember(keys.at(new), encoded)
        counts = spans & 0xFFFFFFFF
        return Encoded(ids.take(_runs(spans >> 32, counts)), counts)

    def _keys(self, strings: Strings) -> Keys:
        """Returns the keys of strings."""
        lengths = strings.lengths()
        keys = keys_of(strings.text, strings.bounds[:-1], lengths)
        long = np.flatnonzero(lengths > KEY_BYTES)
        passing: dict[bytes, int] = {}
        for place, string in zip(long.tolist(), strings.listed(long), strict=True):
            has_room = len(self._long) < REMEMBERED and len(string) <= REMEMBERED_BYTES
            is_kept = has_room or string in self._long
            numbers = self._long if is_kept else passing
            keys.low[place] = numbers.setdefault(string, len(numbers))
            keys.high[place] = LONG if is_kept else PASSING
        return keys

    def _remember(self, keys: Keys, encoded: Encoded) -> None:
        """Adds strings to the table, as long as there is room."""
        # Another thread may have met them at the same time.
        is_new = (self._table.find(keys) == UNKNOWN) & (keys.high != PASSING)
        kept = np.flatnonzero(is_new)[: REMEMBERED - self._table.n_keys]
        counts = encoded.counts[kept]
        firsts = encoded.counts.cumsum() - encoded.counts
        ids = encoded.ids[_runs(firsts[kept], counts)]
        needed = self._n_ids + len(ids)
        if needed > len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(2 * needed, np.int64)])
        self._ids[self._n_ids : needed] = ids
        self._table.add(keys.at(kept), _spans(counts, self._n_ids))
        self._n_ids = needed


def _spans(counts: Int[np.ndarray, " N"], start: int) -> Int[np.ndarray, " N"]:
    """Returns the place of each string's first id and, in the lower half, the number of its ids."""
    return (start + counts.cumsum() - counts) << 32 | counts


class Words:
    """The ids of texts, by way of their words and the pieces of these.

    Args:
      split: returns the pieces of a word.
      merge: returns the ids of a piece.
      merged: the ids of each pair -> its rank and the id of the whole.
      byte_ids: the id of each byte that has one.
    """

    def __init__(
        self,
        split: Callable[[str], list[str]],
        merge: Callable[[str], Ids],
        merged: Mapping[tuple[int, int], tuple[int, int]],
        byte_ids: Mapping[int, int],
    ):
        self._split = split
        self._merge = merge
        self._merged = merged
        self._byte_ids = np.array([byte_ids.get(byte, UNKNOWN) for byte in range(256)], np.int64)
        self._words = Memory(self._encode_words)
        self._pieces = Memory(self._encode_pieces)

    @cached_property
    def _merges(self) -> "Merges":
        # When it is first needed: by then a text has many new words, and it takes less than these.
        return Merges(self._merged)

    def encode(self, texts: list[bytes]) -> list[list[int]]:
        """Returns the ids of texts in UTF-8."""
        lengths = np.array([len(text) for text in texts], np.int64)
        ends = lengths.cumsum()
        begins = ends - lengths
        n_bytes = int(lengths.sum())
        joined = padded(b"".join(texts))
        bounds = np.append(word_starts(joined, n_bytes, begins[lengths > 0]), n_bytes)
        all_ids = [np.zeros(0, np.int64)]
        all_counts = [np.zeros(1, np.int64)]
        for first in range(0, len(bounds) - 1, WORDS_AT_ONCE):
            words = Strings(joined, bounds[first : first + WORDS_AT_ONCE + 1])
            ids, counts = self._words.encode(words)
            all_ids.append(ids)
            all_counts.append(counts)
        ids = np.concatenate(all_ids)
        if len(texts) == 1:
            return [ids.tolist()]
        places = np.concatenate(all_counts).cumsum()  # of each word's first id
        firsts = places[bounds.searchsorted(begins)].tolist()
        lasts = places[bounds.searchsorted(ends)].tolist()
        return [ids[first:last].tolist() for first, last in zip(firsts, lasts, strict=True)]

    def _encode_words(self, words: Strings) -> Encoded:
        """Returns the ids of new words."""
        starts = words.bounds[:-1]
        is_start, is_odd = piece_starts(words)
        odd = np.flatnonzero(is_odd)
        is_start[_runs(starts[odd], words.lengths()[odd])] = False
        found: list[int] = []
        for start, word in zip(starts[odd].tolist(), words.listed(odd), strict=True):
            *lengths, _ = [len(piece.encode()) for piece in self._split(word.decode())]
            found += accumulate(lengths, initial=start)
        is_start[found] = True
        bounds = np.append(np.flatnonzero(is_start), words.bounds[-1])
        ids, counts = self._pieces.encode(Strings(words.text, bounds))
        return Encoded(ids, np.add.reduceat(counts, bounds.searchsorted(starts)))

    def _encode_pieces(self, pieces: Strings) -> Encoded:
        """Returns the ids of new pieces."""
        starts = pieces.bounds[:-1]
        widths = pieces.lengths()
        bytes_ = self._byte_ids[np.frombuffer(pieces.text, np.uint8, pieces.bounds[-1])]
        has_unknown = np.minimum.reduceat(bytes_, starts) == UNKNOWN
        is_apart = (widths > SHORT) | has_unknown | (len(widths) < FEW)
        counts = np.zeros(len(widths), np.int64)
        apart = np.flatnonzero(is_apart)
        merged = [self._merge(piece.decode()) for piece in pieces.listed(apart)]
        counts[apart] = list(map(len, merged))
        groups = []
        if not is_apart.all():
            by_width = {}
            for width in np.flatnonzero(np.bincount(widths[~is_apart])).tolist():
                numbers = np.flatnonzero((widths == width) & ~is_apart)
                columns = starts[numbers][:, None] + np.arange(width)
                by_width[width] = Group(numbers, bytes_[columns])
            groups = self._merges.merge(by_width)
        for numbers, ids in groups:
            counts[numbers] = ids.shape[1]
        firsts = counts.cumsum() - counts
        all_ids = np.zeros(counts.sum(), np.int64)
        all_ids[_runs(firsts[apart], counts[apart])] = list(chain.from_iterable(merged))
        for numbers, ids in groups:
            all_ids[firsts[numbers][:, None] + np.arange(ids.shape[1])] = ids
        return Encoded(all_ids, counts)


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


# Cutting texts into words, and words into pieces.


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
    spaces = _spelled_spaces()
    is_space = spaces[spaces.searchsorted(spelled)] == spelled
    wide = leads[is_space]
    return wide, np.where(codes[wide] >= 0xE0, 3, 2)


@cache
def _spelled_spaces() -> Int[np.ndarray, " S"]:
    """Returns white space beyond ASCII as `regex` knows it, each in three bytes of UTF-8.

    Behind it stands a number above all of these.
    """
    plane = "".join(map(chr, range(0x80, 0xD800)))
    spelled = [space.encode().ljust(3, b"\0") for space in regex.findall(r"\s", plane)]
    return np.array([*(int.from_bytes(space, "big") for space in spelled), 2**24])


SPACE, LETTER, DIGIT, OTHER, ODD = range(5)


@cache
def _kinds() -> UInt8[np.ndarray, " 256"]:
    """Returns what each byte is to the tokenizer's pattern; ODD where that takes a closer look."""
    kinds = np.full(256, OTHER, np.uint8)
    for code in range(128):
        char = chr(code)
        if char.isalpha():
            kinds[code] = LETTER
        elif char.isdigit():
            kinds[code] = DIGIT
    kinds[list(b"\t\n\v\f\r ")] = SPACE
    kinds[ord("'")] = ODD
    kinds[128:] = ODD
    return kinds


def piece_starts(words: Strings) -> tuple[Bool[np.ndarray, " M"], Bool[np.ndarray, " N"]]:
    """Returns at which bytes of words pieces begin, and of which words that is not known.

    That is where letters, digits or other signs begin, but a space goes with what follows. Beyond
    ASCII, and where an apostrophe may make a piece of letters behind it, it is not so simple.
    """
    starts = words.bounds[:-1]
    kinds = _kinds()[np.frombuffer(words.text, np.uint8, words.bounds[-1])]
    is_start = np.ones(len(kinds), bool)
    is_start[1:] = kinds[1:] != kinds[:-1]
    spaced = starts[np.frombuffer(words.text, np.uint8)[starts] == ord(" ")]
    # Behind the last word there may be no further byte.
    is_start[np.minimum(spaced + 1, len(kinds) - 1)] = False
    is_start[starts] = True
    return is_start, np.maximum.reduceat(kinds, starts) == ODD


# Merging.


class Group(NamedTuple):
    """Pieces that have as many ids."""

    numbers: Int[np.ndarray, " N"]  # among all
    ids: Int[np.ndarray, "N W"]


class Merges:
    """The merges of a vocabulary, for many pieces at once.

    Args:
      merged: the ids of each pair -> its rank and the id of the whole.
    """

    def __init__(self, merged: Mapping[tuple[int, int], tuple[int, int]]):
        # Not `np.array`, which looks at each pair first: this takes a quarter of the time.
        pairs = np.fromiter(chain.from_iterable(merged), np.int64).reshape(-1, 2)
        values = np.fromiter(chain.from_iterable(merged.values()), np.int64).reshape(-1, 2)
        ranks, wholes = values.T
        self._ranks = Table()
        self._ranks.add(_pairs(pairs[:, 0], pairs[:, 1]), ranks)
        self._wholes = np.zeros(ranks.max(initial=-1) + 1, np.int64)
        self._wholes[ranks] = wholes

    def merge(self, by_width: Mapping[int, Group]) -> list[Group]:
        """Returns the ids of pieces, of each of which the ids of its bytes are given.

        Each round makes one merge in each piece that has one left: the earliest, of equal ones the
        leftmost. So all pieces of a round have as many ids, and those that begin with fewer join
        them when it comes to that.
        """
        groups = []
        widest = max(by_width)
        numbers = np.zeros(0, np.int64)
        ids = np.zeros((0, widest), np.int64)
        ranks = np.zeros((0, widest - 1), np.int64)  # of each with the next
        for width in range(widest, 0, -1):
            if width in by_width:
                joining = by_width[width]
                numbers = np.concatenate([numbers, joining.numbers])
                ids = np.concatenate([ids, joining.ids])
                new_ranks = self._ranks_of(joining.ids[:, :-1], joining.ids[:, 1:])
                ranks = np.concatenate([ranks, new_ranks])
            if width == 1:
                groups.append(Group(numbers, ids))
                break
            places = ranks.argmin(axis=1)
            has_merge = ranks[np.arange(len(ranks)), places] != NO_MERGE
            groups.append(Group(numbers[~has_merge], ids[~has_merge]))
            numbers = numbers[has_merge]
            ids, ranks = self._merge_at(places[has_merge], ids[has_merge], ranks[has_merge])
        return groups

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
