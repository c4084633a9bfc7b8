"""Byte-level BPE: text to token ids and back, exactly.

Knows vocabularies and their files, not models or arrays: it can be imported without JAX. The
algorithm is that of openai/gpt-2, src/encoder.py: a pattern cuts the text into pieces, each piece
becomes UTF-8 bytes, and the byte pairs of a piece are merged in the order in which training found
them.
"""

import codecs
import heapq
import json
import re
from collections.abc import Callable, Collection, Iterable
from functools import cache
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import regex

from gpt2_jax.files import listing, read_json_object, replacing

END_OF_TEXT = "<|endoftext|>"  # ends each document of GPT-2's training text
# OpenAI's, to the letter. That "'S" is cut otherwise than "'s" is an oversight there, and GPT-2
# has learned it: anything else gives other ids.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Vocab = dict[str, int]  # token -> id
Pair = tuple[str, str]  # two tokens that become one

# Bounds of what a tokenizer remembers. Full of words of ten letters it takes 52 MB; most texts stay
# far below.
REMEMBERED_PIECES = 2**18
REMEMBERED_LENGTH = 64  # characters; longer pieces seldom come twice

# The files of a tokenizer in a checkpoint's folder, under HF's names and under OpenAI's.
VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
OWN_VOCABULARIES = ("vocab.json", "encoder.json", "tokenizer.json")
FILES = (
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Patterns of files that only tokenizers of other kinds have: WordPiece, and SentencePiece's models.
OTHER_KINDS = ("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "*.spm")
# HF's classes, without "Fast", that cut and merge as GPT-2's does: with one vocabulary,
# `AutoTokenizer` of transformers 5.24 gave equal ids under each name. The last two are HF's names
# for whatever `tokenizer.json` describes.
GPT2_CLASSES = (
    "GPT2Tokenizer",
    "RobertaTokenizer",
    "BartTokenizer",
    "LongformerTokenizer",
    "LEDTokenizer",
    "DebertaTokenizer",
    "CodeGenTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)

GONE = -1  # no id: the place of a token that was merged into the one before it
NO_MERGE = (0, GONE)


class TokenizerKindError(ValueError):
    """A folder holds a tokenizer of another kind than GPT-2's byte-level BPE, or a variant."""


class Tokenizer:
    """A byte-level BPE vocabulary and its merges.

    Args:
      vocab: token -> id, tokens spelled as in `vocab.json`, one printable character for each byte.
      merges: pairs of tokens, in the order of their training.
      special_tokens: token -> id, tokens spelled as they are. In a text they are ordinary text
        unless allowed.

    Raises:
      ValueError: an id is negative or taken twice, or a merge speaks of tokens that the vocabulary
        lacks.
    """

    def __init__(self, vocab: Vocab, merges: Iterable[Pair], special_tokens: Vocab | None = None):
        self.vocab = dict(vocab)
        self.merges = [(left, right) for left, right in merges]
        self.special_tokens = dict(special_tokens or {})
        _check_ids(self.vocab, self.special_tokens)
        _check_merges(self.merges, self.vocab)

        self._bytes: dict[int, bytes] = {}
        for token, id in self.vocab.items():
            self._bytes[id] = _spelled_bytes(token)
        # Special tokens are not spelled by bytes: a "Ġ" in one is the letter itself.
        for token, id in self.special_tokens.items():
            self._bytes[id] = token.encode()
        self._byte_ids: dict[int, int] = {}
        for byte, char in byte_chars().items():
            if char in self.vocab:
                self._byte_ids[byte] = self.vocab[char]
        self._merged: dict[tuple[int, int], tuple[int, int]] = {}  # ids -> (rank, id of the whole)
        for rank, (left, right) in enumerate(self.merges):
            pair = (self.vocab[left], self.vocab[right])
            self._merged[pair] = (rank, self.vocab[left + right])
        self._pieces = _Pieces(self._merge)

    @staticmethod
    @cache
    def gpt2() -> "Tokenizer":
        """Returns GPT-2's own tokenizer, which comes with the package."""
        # One for all callers: parsing takes longer than most texts do, and nothing changes it.
        return Tokenizer.load(Path(__file__).parent / "assets" / "gpt2")

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint's folder.

        That is `vocab.json` with `merges.txt`, or `encoder.json` with `vocab.bpe` (OpenAI's names
        for the same), or `tokenizer.json`.

        Raises:
          FileNotFoundError: the folder has none of these.
          TokenizerKindError: a `ValueError`; the folder describes another kind of tokenizer.
          ValueError: a file is damaged.
        """
        folder = Path(folder)
        vocabulary = _read_vocabulary(folder)
        check_kind(folder)
        settings_file = folder / "tokenizer_config.json"
        if _read_if_there(settings_file).get("add_prefix_space"):
            raise TokenizerKindError(f"{settings_file}: `add_prefix_space` is not supported.")
        special_tokens = vocabulary.added_tokens | _read_if_there(folder / "added_tokens.json")
        # GPT-2's own files list the one special token among the ordinary ones.
        for token in (END_OF_TEXT, *_named_tokens(folder / "special_tokens_map.json")):
            if token in vocabulary.vocab:
                special_tokens[token] = vocabulary.vocab[token]
        try:
            return Tokenizer(vocabulary.vocab, vocabulary.merges, special_tokens)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.json`, `merges.txt` and, with special tokens, `added_tokens.json`."""
        merges = [f"{left} {right}" for left, right in self.merges]
        files = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        }
        if self.special_tokens:
            files["added_tokens.json"] = json.dumps(self.special_tokens, ensure_ascii=False)
        for name, text in files.items():
            with replacing(Path(folder) / name, overwrite=True) as temporary:
                # Without `newline`, Windows would write "\r\n", and the merges would end in "\r".
                temporary.write_text(text, encoding="utf-8", newline="\n")

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: any string that UTF-8 can spell, so without lone surrogates.
          allowed_special: which special tokens to recognise in the text, or "all". The others are
            ordinary text.

        Raises:
          ValueError: a special token that does not exist, a lone surrogate, or a byte that the
            vocabulary lacks.
        """
        known = self.special_tokens.keys()
        allowed = set(known if allowed_special == "all" else allowed_special)
        unknown = sorted(allowed - known)
        if unknown:
            expected = f"among {sorted(known)} or 'all'"
            raise ValueError(f"`allowed_special` must be {expected}, got {unknown}.")
        if not allowed:
            return self._encode_ordinary(text)

        # An alternative takes the first that fits: "<a><b>" must come before "<a>".
        longest_first = sorted(allowed, key=len, reverse=True)
        any_special = "|".join(map(re.escape, longest_first))
        ids = []
        for part in re.split(f"({any_special})", text):  # the parentheses keep what was split at
            if part in allowed:
                ids.append(self.special_tokens[part])
            else:
                ids += self._encode_ordinary(part)
        return ids

    def encode_batch(
        self, texts: Iterable[str], allowed_special: Collection[str] = ()
    ) -> list[list[int]]:
        """Returns the ids of each text: see `encode`."""
        return [self.encode(text, allowed_special) for text in texts]

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """Returns the bytes that ids (Python's, numpy's or JAX's integers) stand for.

        Raises:
          ValueError: an id that no token has.
        """
        # An array becomes a list at once: to iterate over JAX's would fetch id after id.
        to_list = getattr(ids, "tolist", None)
        listed = list(ids) if to_list is None else to_list()
        try:
            return b"".join([self._bytes[index(id)] for id in listed])
        except KeyError as error:
            expected = f"those of tokens, in [0, {self.vocab_size})"
            raise ValueError(f"Ids must be {expected}, got {error}.") from None

    def decode(self, ids: Iterable[SupportsIndex], errors: str = "replace") -> str:
        """Returns the text of ids; `errors` says what to do with bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(
        self, batch: Iterable[Iterable[SupportsIndex]], errors: str = "replace"
    ) -> list[str]:
        """Returns the text of each row of ids."""
        return [self.decode(ids, errors) for ids in batch]

    def stream_decoder(self) -> "StreamDecoder":
        """Returns a decoder that takes ids as they come."""
        return StreamDecoder(self)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: what a model's `vocab_size` must reach."""
        return max(self._bytes, default=-1) + 1

    @property
    def eot_id(self) -> int | None:
        """The id of `<|endoftext|>`, if there is one."""
        return self.special_tokens.get(END_OF_TEXT)

    def _encode_ordinary(self, text: str) -> list[int]:
        try:
            pieces = splitter(text).findall(text)
            # `__getitem__` itself, mapped in C: this line takes most of the time of a text whose
            # pieces are remembered. Those that are not go through `_Pieces.__missing__`.
            return list(chain.from_iterable(map(self._pieces.__getitem__, pieces)))
        except UnicodeEncodeError:
            surrogate = next(re.finditer("[\ud800-\udfff]", text))  # nothing else fails so
            got = f"{surrogate[0]!r} at position {surrogate.start()}"
            raise ValueError(f"`text` must be spellable in UTF-8, got {got}.") from None

    def _merge(self, piece: str) -> list[int]:
        """Returns the ids of a piece: merges its bytes, the earliest merge first, left to right.

        By a heap of candidates, in `O(n log n)`: to look for the earliest pair anew after each
        merge would be quadratic, and a piece may be as long as the text.
        """
        ids = self._ids_of_bytes(piece)
        n_bytes = len(ids)
        if n_bytes == 1:
            return ids
        merged = self._merged

        # What is left is a linked list, as merging removes tokens from the middle. The sentinel is
        # the last token's neighbour and, as `ids[-1]`, the first one's: no pair holds it.
        ids.append(GONE)
        before = list(range(-1, n_bytes))
        after = list(range(1, n_bytes + 1))
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
            for left, right in ((before[place], place), (place, after[place])):
                merge = merged.get((ids[left], ids[right]))
                if merge is not None:
                    heapq.heappush(candidates, (*merge, left))
        return [id for id in ids if id != GONE]

    def _ids_of_bytes(self, piece: str) -> list[int]:
        try:
            return [self._byte_ids[byte] for byte in piece.encode("utf-8")]
        # GPT-2's vocabulary holds all 256 bytes; one that was trained on a small text need not.
        except KeyError as error:
            raise ValueError(
                f"The vocabulary has no token for byte {error} of {piece!r}."
            ) from None


class StreamDecoder:
    """Turns ids into text as they come, and never shows half a character."""

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


class _Pieces(dict[str, list[int]]):
    """Remembers the ids of pieces that were met before, within bounds."""

    def __init__(self, merge: Callable[[str], list[int]]):
        super().__init__()
        self._merge = merge

    def __missing__(self, piece: str) -> list[int]:
        ids = self._merge(piece)
        # Full, it stays as it is: the frequent pieces have come long before.
        if len(piece) <= REMEMBERED_LENGTH and len(self) < REMEMBERED_PIECES:
            self[piece] = ids
        return ids


def _check_ids(vocab: Vocab, special_tokens: Vocab) -> None:
    tokens = vocab | special_tokens
    if len(set(tokens.values())) != len(tokens):
        got = f"{len(tokens)} tokens and fewer ids"
        raise ValueError(f"Each token must have an id of its own, got {got}.")
    smallest = min(vocab.values(), default=0)
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


# Cutting a text into pieces.


def splitter(text: str) -> re.Pattern[str] | regex.Pattern[str]:
    """Returns a compiled `PATTERN` that is right for this text, the fastest of two."""
    return _whole_pattern() if _ASTRAL.search(text) else _bmp_pattern()


_ASTRAL = re.compile("[\U00010000-\U0010ffff]")  # beyond the basic plane: emoji, old scripts


@cache
def _whole_pattern() -> regex.Pattern[str]:
    return regex.compile(PATTERN)


@cache
def _bmp_pattern() -> re.Pattern[str]:
    """Returns `PATTERN` for the standard `re`, with its classes spelled out below U+10000.

    Twice as fast as `regex`. Above U+10000 the classes have so many spans that it would be slower.
    """
    plane = "".join(map(chr, range(0x10000)))

    def spelled_out(name: str) -> str:
        """Returns the characters of a class as spans, for use within brackets."""
        spans = []
        for match in regex.finditer(f"{name}+", plane):
            first = match.start()
            last = match.end() - 1
            spans.append(f"\\u{first:04x}-\\u{last:04x}")
        return "".join(spans)

    letters = spelled_out(r"\p{L}")
    numbers = spelled_out(r"\p{N}")
    spaces = spelled_out(r"\s")  # as `regex` has it: `re` counts U+001C to U+001F as well
    pattern = PATTERN.replace(r"\p{L}+", f"[{letters}]+")
    pattern = pattern.replace(r"\p{N}+", f"[{numbers}]+")
    pattern = pattern.replace(r"[^\s\p{L}\p{N}]", f"[^{spaces}{letters}{numbers}]")
    pattern = pattern.replace(r"(?!\S)", f"(?![^{spaces}])")
    pattern = pattern.replace(r"\s", f"[{spaces}]")
    return re.compile(pattern)


# Bytes and the characters that spell them.


@cache
def byte_chars() -> dict[int, str]:
    """Returns the character that spells each byte in vocabulary files.

    As in openai/gpt-2, src/encoder.py: printable bytes are spelled by themselves, the others by the
    characters from U+0100 on, so that no token holds a space or a control character.
    """
    # The soft hyphen, U+00AD, lies between the last two ranges: it is not printed.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    chars = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in chars]
    for i, byte in enumerate(others):
        chars[byte] = chr(256 + i)
    return chars


@cache
def _char_bytes() -> Vocab:
    return {char: byte for byte, char in byte_chars().items()}


def _spelled_bytes(token: str) -> bytes:
    """Returns the bytes that a token spells; one that is spelled otherwise stands for itself."""
    # Otherwise: tokens that were added by hand, with a space in them, for example.
    try:
        return bytes(map(_char_bytes().__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


# Files.


class _Vocabulary(NamedTuple):
    """What the files of a tokenizer hold."""

    vocab: Vocab
    merges: list[Pair]
    added_tokens: Vocab


def files_in(folder: Path) -> list[str]:
    """Returns the names of a folder's files that belong to a tokenizer of any kind."""
    files = []
    for pattern in (*FILES, *OTHER_KINDS):
        files += folder.glob(pattern)
    return sorted(file.name for file in files)


def _read_vocabulary(folder: Path) -> _Vocabulary:
    """Returns what a folder's files hold."""
    for vocab_name, merges_name in VOCABULARIES:
        vocab_file = folder / vocab_name
        merges_file = folder / merges_name
        if vocab_file.is_file() and merges_file.is_file():
            vocab = read_json_object(vocab_file)
            return _Vocabulary(vocab, merges=_read_merges(merges_file), added_tokens={})
    tokenizer_file = folder / "tokenizer.json"
    if tokenizer_file.is_file():
        return _read_tokenizer_json(tokenizer_file)
    expected = "vocab.json and merges.txt, or tokenizer.json, or encoder.json and vocab.bpe"
    got = listing(folder) if folder.is_dir() else "no such folder"
    raise FileNotFoundError(f"{folder}: expected {expected}, got {got}.")


def _read_merges(file: Path) -> list[Pair]:
    lines = file.read_text(encoding="utf-8").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return [_as_pair(line.split(" "), file) for line in lines if line]


def _read_tokenizer_json(file: Path) -> _Vocabulary:
    """Returns what a file of HF's `tokenizers` holds, if it is a byte-level BPE as GPT-2's."""
    values = read_json_object(file)
    try:
        _check_pipeline(values, file)
        model = values["model"]
        # Merges are lists since `tokenizers` 0.20, and were strings before.
        merges = []
        for merge in model["merges"]:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            merges.append(_as_pair(parts, file))
        added_tokens = {}
        for token in values.get("added_tokens", []):
            added_tokens[token["content"]] = token["id"]
        return _Vocabulary(model["vocab"], merges, added_tokens)
    except (AttributeError, KeyError, TypeError) as error:
        expected = "a vocabulary, merges and added tokens as `tokenizers` writes them"
        raise ValueError(f"{file}: expected {expected}, got {error!r}.") from error


def _check_pipeline(values: dict[str, Any], file: Path) -> None:
    """Raises unless a `tokenizer.json` does with a text what GPT-2's tokenizer does."""
    model = values.get("model") or {}
    pre_tokenizer = values.get("pre_tokenizer") or {}
    got = {
        "model": model.get("type"),
        "pre_tokenizer": pre_tokenizer.get("type"),
        "normalizer": values.get("normalizer"),
    }
    if got != {"model": "BPE", "pre_tokenizer": "ByteLevel", "normalizer": None}:
        expected = "a BPE model, a ByteLevel pre-tokenizer and no normalizer"
        raise TokenizerKindError(f"{file}: expected {expected}, got {got}.")
    # Both change how a text is cut: the ids would be others than those of training.
    if pre_tokenizer.get("add_prefix_space") or not pre_tokenizer.get("use_regex", True):
        variants = "`add_prefix_space` and a ByteLevel without `use_regex`"
        raise TokenizerKindError(f"{file}: {variants} are not supported.")


def _as_pair(parts: list[str], file: Path) -> Pair:
    if len(parts) != 2:
        expected = "a merge of two tokens with a space between"
        raise ValueError(f"{file}: expected {expected}, got {' '.join(parts)!r}.")
    left, right = parts
    return left, right


def check_kind(folder: Path) -> None:
    """Raises `TokenizerKindError` if a folder holds a tokenizer of another kind than GPT-2's.

    That is what its class says, or a file that only other kinds have, with none of ours beside it.
    """
    class_name = _class_name(folder)
    is_other_class = False
    if class_name is not None:
        is_other_class = class_name.removesuffix("Fast") not in GPT2_CLASSES
    # A converter may leave another kind's file beside the byte-level BPE that it has made of it.
    has_own = any((folder / name).is_file() for name in OWN_VOCABULARIES)
    has_other = any(any(folder.glob(name)) for name in OTHER_KINDS)
    if is_other_class or (has_other and not has_own):
        files = ", ".join(files_in(folder)) or "no file of it"
        got = f"the class {class_name or 'unknown'} and {files}"
        raise TokenizerKindError(f"{folder}: expected a byte-level BPE as GPT-2's, got {got}.")


def _class_name(folder: Path) -> str | None:
    """Returns HF's name of a tokenizer's class, if a file says it."""
    # Where `AutoTokenizer` looks for it, in this order.
    for name in ("tokenizer_config.json", "config.json"):
        class_name = _read_if_there(folder / name).get("tokenizer_class")
        if isinstance(class_name, str):  # many files hold null
            return class_name
    return None


def _named_tokens(file: Path) -> list[str]:
    """Returns the tokens that have a role, such as `eos_token`; lists of tokens are passed over."""
    tokens = []
    for token in _read_if_there(file).values():
        if isinstance(token, dict):
            token = token["content"]
        if not isinstance(token, list):
            tokens.append(token)
    return tokens


def _read_if_there(file: Path) -> dict[str, Any]:
    """Returns a file's object; where there is no file, an empty one."""
    return read_json_object(file) if file.is_file() else {}
