"""Byte-level BPE: text to token ids and back, exactly.

Knows vocabularies, not models or arrays: it can be imported without JAX. What lies in a folder is
read by `tokenizer_files.py`, and tokenizers of other kinds are `hf_tokenizer.py`'s. The
algorithm is that of openai/gpt-2, src/encoder.py: a pattern cuts the text into pieces, each piece
becomes UTF-8 bytes, and the byte pairs of a piece are merged in the order in which training found
them.
"""

import codecs
import heapq
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from operator import add, index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import regex

from gpt2_jax import tokenizer_files
from gpt2_jax.added_tokens import AddedToken, Finder, Part
from gpt2_jax.byte_spelling import byte_chars, spelled_bytes
from gpt2_jax.many_words import Ids, Words
from gpt2_jax.tokenizer_files import Pair, TokenizerFiles
from gpt2_jax.tokenizer_settings import END_OF_TEXT, Vocab
from gpt2_jax.tokenizer_template import NO_TEMPLATE, Template

# OpenAI's, to the letter. That "'S" is cut otherwise than "'s" is an oversight there, and GPT-2
# has learned it: anything else gives other ids.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Bounds of what a tokenizer remembers, of pieces and of words alike. Full of words of ten letters
# it takes 100 MB; most texts stay far below.
REMEMBERED_TEXTS = 2**18
REMEMBERED_LENGTH = 64  # characters; longer pieces seldom come twice

MANY_CHARACTERS = 2**13  # from here on words are looked up all at once

MISSING_BYTES = ("error", "drop")  # what may become of bytes that a vocabulary lacks

SHORT = 32  # bytes of a piece whose pairs are looked through for each merge
GONE = -1  # no id: the place of a token that was merged into the one before it
NO_MERGE = (2**63, GONE)  # later than all others


class EncodedText(NamedTuple):
    """A text's ids, and where each stands in it.

    Examples:
      >>> encoded = gpt2_jax.Tokenizer.gpt2().encode_with_spans("naïve café")
      >>> ["naïve café"[start:stop] for start, stop in encoded.spans]
      ['na', 'ïve', ' café']
    """

    ids: list[int]
    # (first character, last character + 1) of each; a character of several tokens is in the spans
    # of all of them, and what a template adds stands nowhere: (0, 0).
    spans: list[tuple[int, int]]


class Tokenizer:
    """A byte-level BPE vocabulary and its merges.

    Args:
      vocab: token -> id, tokens spelled as in `vocab.json`, one printable character for each byte.
      merges: pairs of tokens, in the order of their training.
      special_tokens: token -> id, or `AddedToken`s, spelled as they are. In a text they are
        ordinary text unless allowed; those that are not `special` are always found.
      roles: HF's names for what tokens are for, such as "eos_token" -> "</s>".
      template: the ids that stand before and after each text.
      add_prefix_space: whether a text that does not begin with a space is read as if it did.
      missing_bytes: what becomes of bytes that the vocabulary lacks: "error" raises, "drop" passes
        over them, as HF does.

    Raises:
      ValueError: an id is negative or taken twice, a merge speaks of tokens that the vocabulary
        lacks, or `missing_bytes` is neither.

    Examples:
      >>> gpt2 = gpt2_jax.Tokenizer.gpt2()
      >>> gpt2.encode("Hello, world!")
      [15496, 11, 995, 0]
      >>> gpt2.decode([15496, 11, 995, 0])
      'Hello, world!'
      >>> gpt2.encode("<|endoftext|>", allowed_special="all"), len(gpt2.encode("<|endoftext|>"))
      ([50256], 7)
    """

    def __init__(
        self,
        vocab: Vocab,
        merges: Iterable[Pair],
        special_tokens: Mapping[str, int] | Iterable[AddedToken] | None = None,
        *,
        roles: Mapping[str, str] | None = None,
        template: Template = NO_TEMPLATE,
        add_prefix_space: bool = False,
        missing_bytes: str = "error",
    ):
        self.vocab = dict(vocab)
        self.merges = [(left, right) for left, right in merges]
        self.add_prefix_space = add_prefix_space
        self.missing_bytes = _checked_missing_bytes(missing_bytes)
        self._set_special(_as_added_tokens(special_tokens), dict(roles or {}), template)
        _check_ids(self.vocab, self.added_tokens)
        self._bytes = _Bytes(self.vocab, self.added_tokens)
        self._byte_ids: dict[int, int] = {}
        for byte, char in byte_chars().items():
            if char in self.vocab:
                self._byte_ids[byte] = self.vocab[char]
        self._merged = _merged(self.merges, self.vocab)
        self._pieces = _Remembered(self._merge)
        self._words = _Remembered(self._encode_word)
        self._many_words = Words(split, self._merge, self._merged, self._byte_ids)

    def _set_special(
        self, added_tokens: Sequence[AddedToken], roles: dict[str, str], template: Template
    ) -> None:
        """Takes what tokenizers of every kind have: added tokens, roles and a template."""
        self.added_tokens = tuple(added_tokens)
        self.special_tokens: Vocab = {}
        for token in added_tokens:
            if token.special:
                self.special_tokens[token.content] = token.id
        self.roles = roles
        self.template = template
        self._all_special = frozenset(self.special_tokens)
        self._finders: dict[frozenset[str], Finder | None] = {}  # by the tokens allowed

    @staticmethod
    @cache
    def gpt2() -> "Tokenizer":
        """Returns GPT-2's own tokenizer, which comes with the package."""
        # One for all callers: parsing takes longer than most texts do, and nothing changes it.
        return Tokenizer.load(Path(__file__).parent / "assets" / "gpt2")

    @staticmethod
    def load(folder: str | Path, *, missing_bytes: str = "error") -> "Tokenizer":
        """Reads the tokenizer of a checkpoint's folder.

        That is `tokenizer.json`, or `vocab.json` with `merges.txt`, or `encoder.json` with
        `vocab.bpe` (OpenAI's names for the same), with the added tokens and settings in the files
        beside them. Of another kind than GPT-2's it is read by the library `tokenizers`: any
        `tokenizer.json`, and BERT's `vocab.txt`.

        Args:
          folder: where the files lie.
          missing_bytes: as for `Tokenizer`; other kinds have their own token for what they lack.

        Raises:
          FileNotFoundError: the folder has no file of a tokenizer, or half of one.
          ImportError: it is of another kind, and `tokenizers` is not installed.
          TokenizerKindError: a `ValueError`; it is of a kind that cannot be read.
          ValueError: a file is damaged.
        """
        # For every kind, though only GPT-2's has a use for it, and before any file is read.
        _checked_missing_bytes(missing_bytes)
        files = tokenizer_files.read(Path(folder))
        if files.pipeline is not None:
            # Here: that module imports this one, and an extra that most folders do not need.
            from gpt2_jax.hf_tokenizer import HFTokenizer

            return HFTokenizer.from_files(files)
        try:
            return Tokenizer(
                files.vocab,
                files.merges,
                files.added_tokens,
                roles=files.roles,
                template=files.template,
                add_prefix_space=files.add_prefix_space,
                missing_bytes=missing_bytes,
            )
        except ValueError as error:
            names = ", ".join(map(str, files.files))
            raise ValueError(f"{names}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make this one again, in another process, say."""
        # Not by its attributes, among which are all the pieces that it remembers.
        return _remade, (self.__class__, self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "vocab": self.vocab,
            "merges": self.merges,
            "special_tokens": self.added_tokens,
            "roles": self.roles,
            "template": self.template,
            "add_prefix_space": self.add_prefix_space,
            "missing_bytes": self.missing_bytes,
        }

    def save(self, folder: str | Path) -> None:
        """Writes all of it, as HF reads it, and removes the files of another in the folder.

        That is `vocab.json`, `merges.txt` and `tokenizer_config.json`, and a `tokenizer.json` where
        these cannot say what is added to a text.
        """
        files = TokenizerFiles(
            vocab=self.vocab,
            merges=self.merges,
            added_tokens=list(self.added_tokens),
            roles=self.roles,
            template=self.template,
            add_prefix_space=self.add_prefix_space,
        )
        tokenizer_files.write(Path(folder), files)

    def encode(
        self,
        text: str,
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: any string. Surrogates are read as tiktoken reads them: a pair as its character, a
            lone one as U+FFFD.
          allowed_special: which special tokens to recognise in the text, or "all". The others are
            ordinary text.
          disallowed_special: which special tokens must not be in the text, or "all", which means
            those that are not allowed.
          add_special_tokens: whether to add what the tokenizer's template has before and after a
            text. GPT-2's own adds nothing.

        Raises:
          ValueError: a special token that does not exist, or one in the text that is disallowed, or
            a byte that the vocabulary lacks.
        """
        # The quick way is that of nearly all texts.
        if allowed_special or disallowed_special:
            self._check_special(text, allowed_special, disallowed_special)
        finder = self._finder(allowed_special)
        if finder is None:
            ids = self._encode_ordinary(text)
        else:
            (ids,) = self._encode_parts([text], finder)
        # GPT-2's own template is empty, and then the ids need not be copied.
        if not add_special_tokens or self.template == NO_TEMPLATE:
            return ids
        return [*self.template.before, *ids, *self.template.after]

    def encode_with_spans(
        self,
        text: str,
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> EncodedText:
        """Returns the ids of a text, as `encode` does, with the characters that each stands for.

        They are HF's `offsets_mapping`, untrimmed: a token's space is part of it.

        Raises:
          ValueError: as `encode`, or the text has surrogates, whose places would shift.
        """
        self._check_special(text, allowed_special, disallowed_special)
        check_no_surrogates(text)
        # One that finds nothing gives the text as one part: places are counted in one way alone.
        finder = self._finder(allowed_special) or Finder(())
        ids = []
        spans = []
        for part in finder.parts(text):
            part_ids = self._encode_part(text, part)
            ids += part_ids
            spans += self._spans(text, part, part_ids)
        if not add_special_tokens:
            return EncodedText(ids, spans)
        before, after = self.template
        return EncodedText(
            ids=[*before, *ids, *after],
            spans=[*[(0, 0)] * len(before), *spans, *[(0, 0)] * len(after)],
        )

    def encode_batch(
        self,
        texts: Iterable[str],
        allowed_special: Collection[str] = (),
        *,
        disallowed_special: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Returns the ids of each text: see `encode`.

        Words of all texts are looked up at once, so that many short texts take no longer than a
        long one.

        Raises:
          ValueError: as `encode`, with the number of the text.
        """
        texts = list(texts)
        encode = partial(
            self.encode,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            add_special_tokens=add_special_tokens,
        )
        try:
            if allowed_special or disallowed_special:
                for text in texts:
                    self._check_special(text, allowed_special, disallowed_special)
            finder = self._finder(allowed_special) or Finder(())
            batch = self._encode_parts(texts, finder)
        except ValueError:
            return one_by_one(encode, texts)  # which knows the text
        if not add_special_tokens or self.template == NO_TEMPLATE:
            return batch
        before, after = self.template
        return [[*before, *ids, *after] for ids in batch]

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Returns the bytes that ids (Python's, numpy's or JAX's integers) stand for.

        Ids that no token has stand for nothing, as with HF: a model's table may be padded to a
        round number of rows.

        Raises:
          ValueError: an id is negative.
        """
        listed = as_list(ids)
        try:
            # Nearly all ids are known: whether one is negative is asked only where one is not.
            return b"".join([self._bytes[index(id)] for id in listed])
        except KeyError:
            check_not_negative(listed)
            return b"".join([self._bytes.of(index(id)) for id in listed])

    def decode(self, ids: Iterable[SupportsIndex], errors: str = "replace") -> str:
        """Returns the text of ids; `errors` says what to do with bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(
        self, batch: Iterable[Iterable[SupportsIndex]], errors: str = "replace"
    ) -> list[str]:
        """Returns the text of each row of ids."""
        return [self.decode(ids, errors) for ids in batch]

    def stream_decoder(self, context: Sequence[int] = ()) -> "StreamDecoder":
        """Returns a decoder that takes ids as they come.

        Args:
          context: the ids before them. GPT-2's kind does not need these; with others a word's first
            token has a space before it only where another word stands there.
        """
        del context
        return StreamDecoder(self)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: what a model's `vocab_size` must reach."""
        return max(self._bytes.tokens, default=-1) + 1

    @property
    def eot_token(self) -> str | None:
        """What ends a text: the "eos_token", or else `<|endoftext|>`, where it is a token."""
        return self._token_of("eos_token")

    @property
    def eot_id(self) -> int | None:
        """The id of `eot_token`."""
        return self._id_of(self.eot_token)

    @property
    def bot_id(self) -> int | None:
        """The id of what begins a text: of the token named "bos_token", or else `eot_id`."""
        return self._id_of(self._token_of("bos_token") or self.eot_token)

    @property
    def is_seamless(self) -> bool:
        """Whether a text cut before spaces has the ids of its pieces, one after the other."""
        # A token that is always found may hold a space, and be cut in two.
        return not self.add_prefix_space and all(token.special for token in self.added_tokens)

    def _token_of(self, role: str) -> str | None:
        """Returns the token that has a role, GPT-2's own where none is said to have it."""
        token = self.roles.get(role, END_OF_TEXT)
        return None if self._id_of(token) is None else token

    def _id_of(self, token: str | None) -> int | None:
        for known in self.added_tokens:
            if known.content == token:
                return known.id
        # One that is named in the files need not be listed among the added ones.
        return None if token is None else self.vocab.get(token)

    def _check_special(
        self, text: str, allowed_special: Collection[str], disallowed_special: Collection[str]
    ) -> None:
        """Raises `ValueError` for special tokens that do not exist, or that must not be there."""
        known = self.special_tokens.keys()
        allowed = set(known if allowed_special == "all" else allowed_special)
        disallowed = set(known - allowed if disallowed_special == "all" else disallowed_special)
        for name, tokens in (("allowed", allowed), ("disallowed", disallowed)):
            unknown = sorted(tokens - known)
            if unknown:
                expected = f"among {sorted(known)} or 'all'"
                raise ValueError(f"`{name}_special` must be {expected}, got {unknown}.")
        found = [token for token in disallowed if token in text]
        if found:
            first = min(found, key=text.index)
            got = f"{first!r} at position {text.index(first)}"
            raise ValueError(
                f"`text` must hold no special token of `disallowed_special`, got {got}."
            )

    def _finder(self, allowed_special: Collection[str]) -> Finder | None:
        """Returns what looks for the tokens that are found in a text, or None if there are none."""
        is_all = allowed_special == "all"
        allowed = self._all_special if is_all else frozenset(allowed_special)
        if allowed not in self._finders:
            found = []
            for token in self.added_tokens:
                if token.content in allowed or not token.special:
                    found.append(token)
            self._finders[allowed] = Finder(found) if found else None
        return self._finders[allowed]

    def _encode_part(self, text: str, part: Part) -> list[int]:
        """Returns the ids of a part: one of an added token, any number of ordinary text."""
        if part.id is not None:
            return [part.id]
        return self._encode_ordinary(text[part.start : part.end])

    def _spans(self, text: str, part: Part, ids: list[int]) -> Iterator[tuple[int, int]]:
        """Yields which characters each id of a part stands for."""
        if part.id is not None:
            yield part.start, part.end
            return
        # Which character each byte belongs to, without the bytes that are dropped.
        owners = []
        for place in range(part.start, part.end):
            known = [byte for byte in text[place].encode() if byte in self._byte_ids]
            owners += [place] * len(known)
        n_bytes = sum(len(self._bytes[id]) for id in ids)
        # The space before the text is none of its characters, and goes with the first of them.
        owners[:0] = [part.start] * (n_bytes - len(owners))
        done = 0
        for id in ids:
            first = done
            done += len(self._bytes[id])
            yield owners[first], owners[done - 1] + 1

    def _encode_parts(self, texts: list[str], finder: Finder) -> list[list[int]]:
        """Returns the ids of texts that are parted at added tokens."""
        parted = [finder.parts(text) for text in texts]
        ordinary = []
        for text, parts in zip(texts, parted, strict=True):
            ordinary += [text[part.start : part.end] for part in parts if part.id is None]
        if sum(map(len, ordinary)) < MANY_CHARACTERS:
            encoded = iter([self._encode_ordinary(text) for text in ordinary])
        else:
            encoded = iter(self._many_words.encode(list(map(self._spelled, ordinary))))
        batch = []
        for parts in parted:
            ids = [next(encoded) if part.id is None else [part.id] for part in parts]
            batch.append(ids[0] if len(ids) == 1 else list(chain.from_iterable(ids)))
        return batch

    def _spelled(self, text: str) -> bytes:
        """Returns the UTF-8 of ordinary text."""
        if self.add_prefix_space and not text.startswith(" "):
            text = f" {text}"
        try:
            return text.encode()
        except UnicodeEncodeError:  # of surrogates: nothing else fails so
            return without_surrogates(text).encode()

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) >= MANY_CHARACTERS:
            (ids,) = self._many_words.encode([self._spelled(text)])
            return ids
        if self.add_prefix_space and not text.startswith(" "):
            text = f" {text}"
        try:
            ids = []
            done = 0
            # Within a run of three or more spaces, and where a text ends with some, it is not
            # indifferent where one cuts: all but the last are one piece, at the end all of them.
            for run in LONG_RUN.finditer(text):
                ids += self._encode_words(text[done : run.start()])
                ids += self._pieces[run[0]]
                done = run.end()
            ids += self._encode_words(text[done:])
            return ids
        except UnicodeEncodeError:
            return self._encode_ordinary(without_surrogates(text))

    def _encode_words(self, text: str) -> list[int]:
        """Returns the ids of a text without long runs of spaces, cut before each space and line.

        No piece goes on across such a place: a space is the first of its piece or, in a run of two,
        a piece of its own. So a word with all that is written onto it is looked up at once, which
        takes a third of the time of matching its pieces.
        """
        # A word loses the space before it, and what begins a line has none to lose.
        words = text.replace("\n", " \n").split(" ")
        ids = [*self._encode_pieces(words[0])]
        # `__getitem__` itself, mapped in C: this line takes most of the time of a text whose words
        # are remembered. Those that are not go through `_Remembered.__missing__`.
        ids.extend(chain.from_iterable(map(self._words.__getitem__, words[1:])))
        return ids

    def _encode_word(self, word: str) -> Ids:
        """Returns the ids of a line's first word, or of any other with the space before it."""
        return self._encode_pieces(word if word.startswith("\n") else f" {word}")

    def _encode_pieces(self, text: str) -> Ids:
        """Returns the ids of the pieces that the pattern cuts a text into."""
        pieces = split(text)
        if len(pieces) == 1:
            return self._pieces[text]  # the same object: it is remembered by either name
        return tuple(chain.from_iterable(map(self._pieces.__getitem__, pieces)))

    def _merge(self, piece: str) -> Ids:
        """Returns the ids of a piece: merges its bytes, the earliest merge first, left to right."""
        ids = self._ids_of_bytes(piece)
        if len(ids) > SHORT:
            return self._merge_long(ids)
        merged = self._merged
        # Of each token with the next one. The least is the leftmost of the earliest.
        merges = [merged.get(pair, NO_MERGE) for pair in pairwise(ids)]
        while merges:
            earliest = min(merges)
            if earliest is NO_MERGE:
                break
            place = merges.index(earliest)
            ids[place : place + 2] = [earliest[1]]
            del merges[place]
            if place > 0:
                merges[place - 1] = merged.get((ids[place - 1], ids[place]), NO_MERGE)
            if place < len(merges):
                merges[place] = merged.get((ids[place], ids[place + 1]), NO_MERGE)
        return tuple(ids)

    def _merge_long(self, ids: list[int]) -> Ids:
        """Returns what `_merge` does, by a heap of candidates, in `O(n log n)`.

        To look for the earliest pair anew after each merge is quadratic, and a piece may be as long
        as the text.
        """
        n_bytes = len(ids)
        merged = self._merged

        # What is left is a linked list, as merging removes tokens from the middle. The sentinel is
        # the last token's neighbour and, as `ids[-1]`, the first one's: no pair holds it.
        ids.append(GONE)
        before = list(range(-1, n_bytes))
        after = list(range(1, n_bytes + 1))
        # Behind the rank the place counts: as in OpenAI's loop, the leftmost of equal pairs is
        # merged first.
        candidates = []  # (rank, id of the whole, place of the left one)
        for place in range(n_bytes - 1):
            merge = merged.get((ids[place], ids[place + 1]))
            if merge is not None:
                candidates.append((*merge, place))
        heapq.heapify(candidates)

        while candidates:
            _, whole, place = heapq.heappop(candidates)
            following = after[place]
            pair = (ids[place], ids[following])
            _, now_whole = merged.get(pair, NO_MERGE)
            if now_whole != whole:
                continue  # one of the two was merged with another meanwhile
            ids[place] = whole
            ids[following] = GONE
            after[place] = after[following]
            before[after[following]] = place
            # Only with its two neighbours are there new pairs: all other candidates stand as they
            # were.
            for left, right in ((before[place], place), (place, after[place])):
                merge = merged.get((ids[left], ids[right]))
                if merge is not None:
                    heapq.heappush(candidates, (*merge, left))
        return tuple(id for id in ids if id != GONE)

    def _ids_of_bytes(self, piece: str) -> list[int]:
        spelled = piece.encode("utf-8")
        try:
            return [self._byte_ids[byte] for byte in spelled]
        # GPT-2's vocabulary holds all 256 bytes; one that was trained on a small text need not.
        except KeyError as error:
            if self.missing_bytes == "drop":
                return [self._byte_ids[byte] for byte in spelled if byte in self._byte_ids]
            advice = '`missing_bytes="drop"` passes over such bytes, as HF does'
            raise ValueError(
                f"The vocabulary has no token for byte {error} of {piece!r}; {advice}."
            ) from None


class StreamDecoder:
    """Turns ids into text as they come, and never shows half a character.

    Examples:
      >>> gpt2 = gpt2_jax.Tokenizer.gpt2()
      >>> decoder = gpt2.stream_decoder()
      >>> [decoder.push([i]) for i in gpt2.encode("🙂 ok")]
      ['', '🙂', ' ok']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Holds back the bytes of a character that is not whole yet: tokens need not end where
        # characters do.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Returns what is left: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


class _Remembered(dict[str, Ids]):
    """Remembers the ids of what was met before, within bounds."""

    def __init__(self, encode: Callable[[str], Ids]):
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> Ids:
        ids = self._encode(text)
        # Full, it stays as it is: what is frequent has come long before.
        if len(text) <= REMEMBERED_LENGTH and len(self) < REMEMBERED_TEXTS:
            self[text] = ids
        return ids


class _Bytes(dict[int, bytes]):
    """The bytes of each id, spelled when they are first asked for: a text has few of all tokens."""

    def __init__(self, vocab: Vocab, added_tokens: Iterable[AddedToken]):
        super().__init__()
        self.tokens = dict(zip(vocab.values(), vocab.keys(), strict=True))
        # Added tokens are not spelled by bytes: a "Ġ" in one is the letter itself.
        for token in added_tokens:
            self.tokens[token.id] = token.content
            self[token.id] = token.content.encode()

    def __missing__(self, id: int) -> bytes:
        spelled = spelled_bytes(self.tokens[id])
        self[id] = spelled
        return spelled

    def of(self, id: int) -> bytes:
        """Returns the bytes of an id; none where no token has it."""
        return self[id] if id in self.tokens else b""


def _merged(merges: list[Pair], vocab: Vocab) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns the ids of each pair -> (its rank, the id of the whole).

    Raises:
      ValueError: a merge speaks of tokens that the vocabulary lacks.
    """
    lefts = [left for left, _ in merges]
    rights = [right for _, right in merges]
    id_of = vocab.__getitem__
    try:
        # Mapped in C, as every start waits for it.
        pairs = zip(map(id_of, lefts), map(id_of, rights), strict=True)
        wholes = map(id_of, map(add, lefts, rights))
        return dict(zip(pairs, enumerate(wholes), strict=True))
    except KeyError:
        _check_merges(merges, vocab)  # names the merges, not a token
        raise


# `__reduce__` has no place for keywords, and pickle finds a function by its name in a module.
def _remade(kind: Callable[..., Tokenizer], arguments: dict[str, Any]) -> Tokenizer:
    return kind(**arguments)


def _as_added_tokens(tokens: Mapping[str, int] | Iterable[AddedToken] | None) -> list[AddedToken]:
    added_tokens = []
    if isinstance(tokens, Mapping):
        for content, id in tokens.items():
            added_tokens.append(AddedToken(str(content), id))
    else:
        added_tokens += tokens or ()
    return added_tokens


def _checked_missing_bytes(missing_bytes: str) -> str:
    if missing_bytes not in MISSING_BYTES:
        expected = " or ".join(map(repr, MISSING_BYTES))
        raise ValueError(f"`missing_bytes` must be {expected}, got {missing_bytes!r}.")
    return missing_bytes


def one_by_one(encode: Callable[[str], list[int]], texts: Iterable[str]) -> list[list[int]]:
    """Returns the ids of each text.

    Raises:
      ValueError: as `encode`, with the number of the text.
    """
    encoded = []
    for number, text in enumerate(texts):
        try:
            encoded.append(encode(text))
        except ValueError as error:
            raise ValueError(f"`texts[{number}]`: {error}") from error
    return encoded


def as_list(ids: Iterable[SupportsIndex]) -> list[SupportsIndex]:
    """Returns ids as a list."""
    # An array becomes one at once: to iterate over JAX's would fetch id after id.
    to_list = getattr(ids, "tolist", None)
    return list(ids) if to_list is None else to_list()


def check_not_negative(ids: list[SupportsIndex]) -> None:
    """Raises `ValueError` for an id below 0."""
    smallest = min(map(index, ids), default=0)
    if smallest < 0:
        raise ValueError(f"Ids must be 0 or greater, got {smallest}.")


def _check_ids(vocab: Vocab, added_tokens: Sequence[AddedToken]) -> None:
    owners: dict[int, str] = {}
    # By spelling: a token of the vocabulary may be listed among the added ones as well.
    all_tokens = vocab | {token.content: token.id for token in added_tokens}
    ids = all_tokens.values()
    if len(set(ids)) == len(all_tokens) and min(ids, default=0) >= 0:
        return  # nearly always, and at once
    for token, id in all_tokens.items():
        if id in owners:
            got = f"{id} for {owners[id]!r} and {token!r}"
            raise ValueError(f"Each token must have an id of its own, got {got}.")
        owners[id] = token
    smallest = min(owners, default=0)
    if smallest < 0:
        raise ValueError(f"Ids must be 0 or greater, got {smallest}.")


def _check_merges(merges: list[Pair], vocab: Vocab) -> None:
    unknown = []
    for left, right in merges:
        is_known = left in vocab and right in vocab and left + right in vocab
        if not is_known:
            unknown.append((left, right))
    if unknown:
        got = f"{len(unknown)} are not: {unknown[:3]}"
        raise ValueError(f"Both parts of a merge and the whole must be tokens, {got}.")


# Surrogates: halves of characters, which UTF-8 cannot spell.


def without_surrogates(text: str) -> str:
    """Returns a text in which pairs of surrogates are characters, and lone ones U+FFFD."""
    # As tiktoken, tiktoken/core.py, `Encoding.encode`.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_no_surrogates(text: str) -> None:
    """Raises `ValueError` for a text that UTF-8 cannot spell."""
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate:
        got = f"{surrogate[0]!r} at position {surrogate.start()}"
        raise ValueError(f"`text` must be spellable in UTF-8, got {got}.")


# Cutting a text into pieces.


# What `regex` calls white space. `re` counts U+001C to U+001F as well.
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# White space of which not only the last is a piece of its own, or begins one.
LONG_RUN = re.compile(rf"[{SPACES}]{{2,}}(?:(?=[{SPACES}][^{SPACES}])|\Z)")


def split(text: str) -> list[str]:
    """Returns the pieces that the pattern cuts a text into."""
    return splitter(text).findall(text)


def splitter(text: str) -> re.Pattern[str] | regex.Pattern[str]:
    """Returns a compiled `PATTERN` that is right for this text, the fastest of three."""
    if text.isascii():
        return _ascii_pattern()
    return _whole_pattern() if _ASTRAL.search(text) else _bmp_pattern()


_ASTRAL = re.compile("[\U00010000-\U0010ffff]")  # beyond the basic plane: emoji, old scripts


@cache
def _whole_pattern() -> regex.Pattern[str]:
    return regex.compile(PATTERN)


@cache
def _ascii_pattern() -> re.Pattern[str]:
    return _spelled_out("a-zA-Z", "0-9")


@cache
def _bmp_pattern() -> re.Pattern[str]:
    """Returns `PATTERN` for texts below U+10000.

    Above it the classes have so many spans that `re` would be slower than `regex`.
    """
    # Not at import: it takes a look at each of 65,536 characters.
    plane = "".join(map(chr, range(0x10000)))

    def spans(name: str) -> str:
        """Returns the characters of a class as spans, for use within brackets."""
        found = []
        # By the tables of `regex`, so that both patterns know the same letters, whatever Unicode
        # `re` has.
        for match in regex.finditer(f"{name}+", plane):
            first = match.start()
            last = match.end() - 1
            found.append(f"\\u{first:04x}-\\u{last:04x}")
        return "".join(found)

    return _spelled_out(spans(r"\p{L}"), spans(r"\p{N}"))


def _spelled_out(letters: str, numbers: str) -> re.Pattern[str]:
    """Returns `PATTERN` for the standard `re`, twice as fast as `regex`, with its classes given."""
    pattern = PATTERN.replace(r"\p{L}+", f"[{letters}]+")
    pattern = pattern.replace(r"\p{N}+", f"[{numbers}]+")
    pattern = pattern.replace(r"[^\s\p{L}\p{N}]", f"[^{SPACES}{letters}{numbers}]")
    pattern = pattern.replace(r"(?!\S)", f"(?![^{SPACES}])")
    pattern = pattern.replace(r"\s", f"[{SPACES}]")
    return re.compile(pattern)
