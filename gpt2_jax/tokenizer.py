"""Byte-level BPE: text to token ids and back, exactly. Knows vocabularies and files; nothing of models or arrays."""

import codecs
import json
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

import regex

# How GPT-2 cuts a text into pieces, which merges never cross (openai/gpt-2, src/encoder.py).
PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
END_OF_TEXT = "<|endoftext|>"
CACHE_SIZE = 2**17  # pieces remembered; English text has far fewer


@cache
def byte_to_char() -> dict[int, str]:
    """Returns the printable character that stands for each byte in vocabulary files (openai/gpt-2, src/encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE vocabulary with its merges, as GPT-2 has it."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: dict[str, int] | None = None
    ):
        self.vocab, self.merges = dict(vocab), [tuple(pair) for pair in merges]
        self.special_tokens = dict(special_tokens or {})
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        to_byte = {char: byte for byte, char in byte_to_char().items()}
        self._bytes = {
            token_id: bytes(to_byte[char] for char in token)
            for token, token_id in vocab.items()
            if token not in self.special_tokens and all(char in to_byte for char in token)
        }
        plain = {token_id: token.encode() for token, token_id in self.vocab.items() if token_id not in self._bytes}
        self._bytes |= plain | {token_id: token.encode() for token, token_id in self.special_tokens.items()}
        self._pieces: dict[str, list[int]] = {}

    @classmethod
    @cache
    def gpt2(cls) -> "Tokenizer":
        """Returns GPT-2's own tokenizer, which the package contains."""
        return cls.load(Path(__file__).parent / "assets" / "gpt2")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads `vocab.json` and `merges.txt`, or `tokenizer.json`, from a checkpoint's folder."""
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            added = {}
        elif (folder / "tokenizer.json").is_file():
            values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            model = values.get("model", {})
            if model.get("type", "BPE") != "BPE" or values.get("normalizer"):
                raise ValueError(f"{folder / 'tokenizer.json'}: expected a byte-level BPE, got {model.get('type')}.")
            vocab = model["vocab"]
            merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
        else:
            raise FileNotFoundError(f"{folder}: expected vocab.json and merges.txt, or tokenizer.json.")
        if (folder / "added_tokens.json").is_file():
            added |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        if END_OF_TEXT in vocab:
            added.setdefault(END_OF_TEXT, vocab[END_OF_TEXT])
        return cls(vocab, merges, added)

    def encode(self, text: str, allowed_special: Collection[str] | str = ()) -> list[int]:
        """Returns the ids of a text; special tokens in it are ordinary text unless allowed, by name or as "all"."""
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        if unknown := allowed - set(self.special_tokens):
            raise ValueError(f"`allowed_special` must be among {list(self.special_tokens)}, got {sorted(unknown)}.")
        ids: list[int] = []
        parts = [text]
        if allowed:
            parts = regex.split("(" + "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True))) + ")", text)
        for part in parts:
            if part in allowed:
                ids.append(self.special_tokens[part])
                continue
            for piece in PATTERN.findall(part):
                ids += self._pieces.get(piece) or self._encode_piece(piece)
        return ids

    def encode_batch(self, texts: Iterable[str], allowed_special: Collection[str] | str = ()) -> list[list[int]]:
        """Returns the ids of each text."""
        return [self.encode(text, allowed_special) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes that ids stand for."""
        try:
            return b"".join([self._bytes[int(token_id)] for token_id in ids])
        except KeyError as error:
            raise ValueError(f"Ids must be in [0, {self.vocab_size}), got {error}.") from None

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Returns the text of ids; `errors` says what becomes of bytes that are no UTF-8, as in `bytes.decode`."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream_decoder(self) -> "StreamDecoder":
        """Returns a decoder that takes ids as they come."""
        return StreamDecoder(self)

    @property
    def vocab_size(self) -> int:
        """The largest id, plus one."""
        return max(self._bytes) + 1

    @property
    def eot_id(self) -> int | None:
        """The id of `<|endoftext|>`, if there is one."""
        return self.special_tokens.get(END_OF_TEXT)

    def _encode_piece(self, piece: str) -> list[int]:
        chars = byte_to_char()
        parts = [chars[byte] for byte in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if i + 1 < len(parts) and (parts[i], parts[i + 1]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids = [self.vocab[part] for part in parts]
        if len(self._pieces) < CACHE_SIZE:
            self._pieces[piece] = ids
        return ids


class StreamDecoder:
    """Turns ids into text as they come, without ever showing half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that the ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Returns what is left, a broken character as U+FFFD."""
        return self._decoder.decode(b"", final=True)
