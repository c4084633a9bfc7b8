"""Tokens that are found in a text as they are spelled, before the rest is cut into pieces.

Knows where they stand in a text, not what becomes of the text between them. The rules are those of
HF's `tokenizers`, src/tokenizer/added_vocabulary.rs.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import regex

# As Rust's regular expressions have them, which know more than ASCII and, unlike Python's `re`,
# count no U+001C to U+001F among the spaces.
SPACE = regex.compile(r"\s")
WORD = regex.compile(r"\w")


class AddedToken(NamedTuple):
    """A token with HF's rules of where it is found.

    Attributes:
      content: how it is spelled.
      id: its id.
      single_word: not within a word: no letter, digit or "_" stands at either side.
      lstrip: takes the white space before it as well.
      rstrip: takes the white space after it as well.
      normalized: is looked for after those that are not, in what they have left.
      special: is ordinary text unless allowed; others are always found.
    """

    content: str
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


class Part(NamedTuple):
    """Where an added token stands in a text, or the ordinary text between two of them."""

    start: int
    end: int
    id: int | None  # None for ordinary text


class Finder:
    """Parts texts at some added tokens."""

    def __init__(self, tokens: Iterable[AddedToken]):
        # An empty one would be found before every character.
        known = [token for token in tokens if token.content]
        plain = [token for token in known if not token.normalized]
        normalized = [token for token in known if token.normalized]
        # Two searches: where they overlap, one that is not normalized wins though it begins later.
        self._searches = [_Search(group) for group in (plain, normalized) if group]

    def parts(self, text: str) -> list[Part]:
        """Returns the parts of a text in order, none of them empty."""
        parts = [Part(0, len(text), None)] if text else []
        # The second sees what the first has left as ordinary text, and nothing else.
        for search in self._searches:
            refined = []
            for part in parts:
                refined += [part] if part.id is not None else search.parts(text, part)
            parts = refined
        return parts


class _Search:
    """Looks for tokens of one group at once."""

    def __init__(self, tokens: list[AddedToken]):
        self._tokens = {token.content: token for token in tokens}
        # An alternative takes the first that fits: "<a><b>" must come before "<a>".
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def parts(self, text: str, within: Part) -> Iterator[Part]:
        """Yields the parts of ordinary text."""
        done = within.start
        # In the whole text, within bounds: of a slice, all places would have to be moved.
        for match in self._pattern.finditer(text, within.start, within.end):
            token = self._tokens[match[0]]
            start = match.start()
            end = match.end()
            if token.single_word and _is_in_word(text, within, start, end):
                continue
            # Spaces that the token before has taken stay with it; made of these alone, it is gone.
            if token.lstrip:
                start = _first_space(text, start, done)
            if start >= end:
                continue
            while token.rstrip and end < within.end and SPACE.match(text[end]):
                end += 1
            if done < start:
                yield Part(done, start, None)
            yield Part(start, end, token.id)
            done = end
        if done < within.end:
            yield Part(done, within.end, None)


def _first_space(text: str, start: int, done: int) -> int:
    """Returns where the white space before a place begins, at or after `done`."""
    start = max(start, done)
    while start > done and SPACE.match(text[start - 1]):
        start -= 1
    return start


def _is_in_word(text: str, within: Part, start: int, end: int) -> bool:
    """Returns whether a word goes on at either side of a place."""
    # Within the part alone: a token that was found before it is no word, however it is spelled.
    before = start > within.start and WORD.match(text[start - 1])
    after = end < within.end and WORD.match(text[end])
    return bool(before or after)
