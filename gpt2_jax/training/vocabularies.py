"""The vocabularies that texts are prepared with: GPT-2's, a model's, of characters, or trained."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from gpt2_jax.byte_spelling import byte_chars
from gpt2_jax.pretrained.loading import load_tokenizer
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_settings import END_OF_TEXT
from gpt2_jax.training.texts import Parts, spans
from gpt2_jax.training.token_files import DataError

SMALLEST_BPE = 257  # the bytes and the end of a text


def make_tokenizer(
    kind: str | Path, parts: Parts, vocab_size: int | None, *, missing_bytes: str = "error"
) -> Tokenizer:
    """Returns the tokenizer that `prepare` was asked for: "gpt2", "char", "bpe" or a model's.

    Raises:
      CheckpointError: there is no such model.
      DataError, ImportError: as `train_bpe`.
      FileNotFoundError, ValueError: as `load_tokenizer`, of a model.
    """
    if kind == "gpt2":
        return Tokenizer.gpt2()
    if kind == "char":
        # Of both parts: validation must not meet a character without a token.
        return char_tokenizer(parts.train + parts.val)
    if kind == "bpe":
        if vocab_size is None:
            raise DataError('`vocab_size` must be given for the tokenizer "bpe".')
        # Not of both parts: a vocabulary fitted to the validation text would flatter its loss.
        return train_bpe(parts.train, vocab_size)
    return load_tokenizer(kind, missing_bytes=missing_bytes)


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer with a token for each character of the texts, ids by code point.

    It is a byte-level BPE like any other: the bytes of a character that has several are merged from
    the left. These bytes and the beginnings of such characters get the ids after those of the
    characters.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return tokenizer_of(sorted(characters))


def tokenizer_of(characters: list[str]) -> Tokenizer:
    """Returns a tokenizer with a token for each of some characters, ids in their order."""
    spellings = [_spelling(character) for character in characters]
    vocab: dict[str, int] = {}
    for spelling in spellings:
        vocab["".join(spelling)] = len(vocab)
    merges: dict[tuple[str, str], None] = {}  # a set that keeps its order
    for spelling in spellings:
        for byte in spelling:
            vocab.setdefault(byte, len(vocab))  # one byte alone may be a character, with its id
        prefix = spelling[0]
        for byte in spelling[1:]:
            merges[prefix, byte] = None
            prefix += byte
            vocab.setdefault(prefix, len(vocab))
    return Tokenizer(vocab, merges)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE trained on texts; id 0 is `<|endoftext|>`.

    Raises:
      DataError: `vocab_size` is too small for the 256 bytes.
      ImportError: `tokenizers` is not installed.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(
            f"`vocab_size` must be at least {SMALLEST_BPE}, the bytes and {END_OF_TEXT}; "
            f"got {vocab_size}."
        )
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise ImportError(
            'Training a vocabulary needs `tokenizers`: pip install "gpt2_jax[train]".'
        ) from None
    trained = ByteLevelBPETokenizer()
    # In pieces, which change no count of pairs: whole books would take the library longer.
    pieces = (span.cut() for span in spans(texts))
    trained.train_from_iterator(
        pieces, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    # By way of its files: they are what our tokenizer reads.
    with tempfile.TemporaryDirectory() as folder:
        trained.save_model(folder)
        return Tokenizer.load(folder)


def _spelling(character: str) -> list[str]:
    """Returns the bytes of a character in the letters of a vocabulary file, one for each byte."""
    return [byte_chars()[byte] for byte in character.encode()]
