"""Byte-level BPE: text to token ids and back, exactly. It knows vocabularies and their files, not models or arrays.

The algorithm is that of openai/gpt-2, src/encoder.py: a pattern cuts the text into pieces, each piece becomes UTF-8
bytes, and the byte pairs of a piece are merged in the order in which training found them.
"""

import codecs
import heapq
import json
import re
from collections.abc import Collection, Iterable
from functools import cache
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any

import regex

from gpt2_jax.files import replacing

END_OF_TEXT = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REMEMBERED_PIECES, REMEMBERED_LENGTH = (
    2**18,
    64,
)  # bounds of a tokenizer's memory; most texts stay far below


class Tokenizer:
    """A byte-level BPE vocabulary and its merges.

    Args:
      vocab: token -> id, tokens spelled as in `vocab.json`, one printable character for each byte.
      merges: pairs of tokens, in the order of their training.
      special_tokens: token -> id, tokens spelled as they are. In a text they are ordinary text unless allowed.

    Raises:
      ValueError: an id is taken twice, or a merge speaks of tokens that the vocabulary lacks.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Iterable[tuple[str, str]],
        special_tokens: dict[str, int] | None = None,
    ):
        self.vocab, self.special_tokens = dict(vocab), dict(special_tokens or {})
        self.merges = [tuple(pair) for pair in merges]
        tokens = self.vocab | self.special_tokens
        if len(set(tokens.values())) != len(tokens):
            raise ValueError(
                f"Each token must have an id of its own, got {len(tokens)} tokens and fewer ids."
            )
        bad = [pair for pair in self.merges if not {*pair, "".join(pair)} <= self.vocab.keys()]
        if bad:
            raise ValueError(
                f"Both parts of a merge and the whole must be tokens, {len(bad)} are not: {bad[:3]}."
            )
        self._bytes = {id: _spelled_bytes(token) for token, id in self.vocab.items()}
        self._bytes |= {id: token.encode() for token, id in self.special_tokens.items()}
        self._byte_ids = {
            byte: self.vocab[char] for byte, char in byte_chars().items() if char in self.vocab
        }
        self._merged = {  # pair of ids -> (rank, id of the whole)
            (self.vocab[left], self.vocab[right]): (rank, self.vocab[left + right])
            for rank, (left, right) in enumerate(self.merges)
        }
        self._pieces = _Pieces(self._merge)

    @staticmethod
    @cache
    def gpt2() -> "Tokenizer":
        """Returns GPT-2's own tokenizer, which comes with the package."""
        return Tokenizer.load(Path(__file__).parent / "assets" / "gpt2")

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint's folder: `vocab.json` with `merges.txt`, or `tokenizer.json`.

        Raises:
          FileNotFoundError: the folder has neither.
          ValueError: a file is damaged, or describes another kind of tokenizer.
        """
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = _read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [_pair(line) for line in lines[lines[0].startswith("#version") :] if line]
            special = {}
        elif (folder / "tokenizer.json").is_file():
            vocab, merges, special = _read_tokenizer_json(folder / "tokenizer.json")
        else:
            raise FileNotFoundError(
                f"{folder}: expected vocab.json and merges.txt, or tokenizer.json."
            )
        if _read_json(folder / "tokenizer_config.json", {}).get("add_prefix_space"):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: `add_prefix_space` is not supported."
            )
        special |= _read_json(folder / "added_tokens.json", {})
        named = _read_json(folder / "special_tokens_map.json", {}).values()
        named = {
            token["content"] if isinstance(token, dict) else token
            for token in named
            if not isinstance(token, list)
        }
        special |= {token: vocab[token] for token in {END_OF_TEXT, *named} if token in vocab}
        return Tokenizer(vocab, merges, special)

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.json`, `merges.txt` and, where there are special tokens, `added_tokens.json`."""
        files = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]),
        }
        if self.special_tokens:
            files["added_tokens.json"] = json.dumps(self.special_tokens, ensure_ascii=False)
        for name, text in files.items():
            with replacing(Path(folder) / name, overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: any string that UTF-8 can spell, so without lone surrogates.
          allowed_special: which special tokens to recognise in the text, or "all". The others are ordinary text.

        Raises:
          ValueError: a special token that does not exist, a lone surrogate, or a byte that the vocabulary lacks.
        """
        allowed = self.special_tokens.keys() if allowed_special == "all" else set(allowed_special)
        if unknown := allowed - self.special_tokens.keys():
            raise ValueError(
                f"`allowed_special` must be among {sorted(self.special_tokens)} or 'all', got {sorted(unknown)}."
            )
        if not allowed:
            return self._encode_ordinary(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        ids = [
            [self.special_tokens[part]] if part in allowed else self._encode_ordinary(part)
            for part in parts
        ]
        return list(chain.from_iterable(ids))

    def encode_batch(
        self, texts: Iterable[str], allowed_special: Collection[str] = ()
    ) -> list[list[int]]:
        """Returns the ids of each text: see `encode`."""
        return [self.encode(text, allowed_special) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes that ids (Python's, numpy's or JAX's integers) stand for.

        Raises:
          ValueError: an id that no token has.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return b"".join([self._bytes[index(id)] for id in ids])
        except KeyError as error:
            raise ValueError(
                f"Ids must be those of tokens, in [0, {self.vocab_size}), got {error}."
            ) from None

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Returns the text of ids; `errors` is for bytes that are no UTF-8, as in `bytes.decode`."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(self, batch: Iterable[Iterable[int]], errors: str = "replace") -> list[str]:
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
            return list(chain.from_iterable(map(self._pieces.__getitem__, pieces)))
        except UnicodeEncodeError:
            at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise ValueError(
                f"`text` must be spellable in UTF-8, got {text[at]!r} at position {at}."
            ) from None

    def _merge(self, piece: str) -> list[int]:
        """Merges the bytes of a piece, the earliest merge first and from left to right, by a heap of candidates."""
        try:
            ids = [self._byte_ids[byte] for byte in piece.encode("utf-8")]
        except KeyError as error:
            raise ValueError(
                f"The vocabulary has no token for byte {error} of {piece!r}."
            ) from None
        if len(ids) == 1:
            return ids
        merged, end = self._merged, len(ids)
        before, after = (
            list(range(-1, end - 1)),
            list(range(1, end + 1)),
        )  # neighbours of what is left
        heap = [
            (*merged[pair], i)
            for i, pair in enumerate(zip(ids, ids[1:], strict=False))
            if pair in merged
        ]
        heapq.heapify(heap)
        while heap:
            _, whole, i = heapq.heappop(heap)
            j = after[i]
            if j >= end or ids[i] is None or merged.get((ids[i], ids[j]), (0, -1))[1] != whole:
                continue  # one of the two was merged with another meanwhile
            ids[i], ids[j] = whole, None
            after[i] = after[j]
            if after[j] < end:
                before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < end and (ids[left], ids[right]) in merged:
                    heapq.heappush(heap, (*merged[ids[left], ids[right]], left))
        return [id for id in ids if id is not None]


class StreamDecoder:
    """Turns ids into text as they come, and never shows half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Returns what is left: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


class _Pieces(dict):
    """Remembers the ids of pieces that were met before, within bounds."""

    def __init__(self, merge):
        super().__init__()
        self._merge = merge

    def __missing__(self, piece):
        ids = self._merge(piece)
        if len(piece) <= REMEMBERED_LENGTH and len(self) < REMEMBERED_PIECES:
            self[piece] = ids
        return ids


@cache
def byte_chars() -> dict[int, str]:
    """Returns the printable character that spells each byte in vocabulary files (openai/gpt-2, src/encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def splitter(text: str) -> Any:
    """Returns a compiled `PATTERN` that is right for this text, the fastest of two."""
    return _whole_pattern() if _ASTRAL.search(text) else _bmp_pattern()


_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


@cache
def _whole_pattern() -> regex.Pattern:
    return regex.compile(PATTERN)


@cache
def _bmp_pattern() -> re.Pattern:
    """Returns `PATTERN` for the standard `re`, twice as fast, with its classes spelled out below U+10000."""
    plane = "".join(map(chr, range(0x10000)))

    def spelled(name: str) -> str:
        spans = (match.span() for match in regex.finditer(f"{name}+", plane))
        return "".join(f"\\u{first:04x}-\\u{end - 1:04x}" for first, end in spans)

    letters, numbers, spaces = spelled(r"\p{L}"), spelled(r"\p{N}"), spelled(r"\s")
    pattern = PATTERN.replace(r"\p{L}+", f"[{letters}]+").replace(r"\p{N}+", f"[{numbers}]+")
    pattern = pattern.replace(r"[^\s\p{L}\p{N}]", f"[^{spaces}{letters}{numbers}]")
    return re.compile(pattern.replace(r"(?!\S)", f"(?![^{spaces}])").replace(r"\s", f"[{spaces}]"))


def _spelled_bytes(token: str) -> bytes:
    """Returns the bytes that a token of a vocabulary file spells; a token spelled otherwise stands for itself."""
    try:
        return bytes(map(_char_bytes().__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


@cache
def _char_bytes() -> dict[str, int]:
    return {char: byte for byte, char in byte_chars().items()}


def _pair(line: str) -> tuple[str, str]:
    parts = line.split(" ")
    if len(parts) != 2:
        raise ValueError(f"A merge must be two tokens with a space between, got {line!r}.")
    return parts[0], parts[1]


def _read_tokenizer_json(
    file: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """Returns vocabulary, merges and added tokens of a file of HF's `tokenizers`, if it is a byte-level BPE."""
    values = _read_json(file)
    model, splitting = values.get("model") or {}, values.get("pre_tokenizer") or {}
    found = {
        "model": model.get("type"),
        "pre_tokenizer": splitting.get("type"),
        "normalizer": values.get("normalizer"),
    }
    if found != {"model": "BPE", "pre_tokenizer": "ByteLevel", "normalizer": None}:
        raise ValueError(
            f"{file}: expected a BPE model, a ByteLevel pre-tokenizer and no normalizer, got {found}."
        )
    if splitting.get("add_prefix_space") or not splitting.get("use_regex", True):
        raise ValueError(
            f"{file}: `add_prefix_space` and a ByteLevel without `use_regex` are not supported."
        )
    merges = [_pair(pair) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    return model["vocab"], merges, added


def _read_json(file: Path, default: Any = None) -> Any:
    """Returns a file's object; where there is no file, the default, if there is one."""
    if default is not None and not file.is_file():
        return default
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}.")
    return values
