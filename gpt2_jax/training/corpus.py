"""A corpus in a folder: written from texts with the vocabulary that is asked for; opened for a run.

Alone knows what lies in such a folder: `train.bin` and `val.bin` as `data.py` reads them, a
`meta.json` that describes them, and the files of a tokenizer. Nothing of models or training.
"""

import contextlib
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from gpt2_jax.byte_spelling import byte_chars
from gpt2_jax.files import local_path, replacing, write_json
from gpt2_jax.pretrained.loading import load_tokenizer
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import is_tokenizer_file
from gpt2_jax.tokenizer_settings import END_OF_TEXT
from gpt2_jax.tokenizer_template import NO_TEMPLATE
from gpt2_jax.training.data import DataError, fingerprint, open_tokens, read_meta
from gpt2_jax.training.texts import Parts, Reading, Span, read_documents, spans, split

MAX_BPE = 2**24  # tokens of a "bpe", a hundred times the largest in use
MIN_CHARACTERS_FOR_WORKERS = 2**25  # fewer are encoded sooner than processes start
GPT2_VOCAB_SIZE = 50257
SMALLEST_BPE = 257  # the bytes and the end of a text
READING = Reading()  # plain texts, as they are


class Corpus(NamedTuple):
    """What `prepare`, or a `prepare.py` of nanoGPT's or llm.c's, left in a folder."""

    train: Integer[np.ndarray, " N"]  # ids
    val: Integer[np.ndarray, " M"] | None
    tokenizer: Tokenizer | None
    vocab_size: int
    bytes_per_token: float | None  # of the validation text, where it is known
    identity: dict[str, Any]  # tells this data from other data


class Encoding(NamedTuple):
    """How documents become ids on disk."""

    tokenizer: Tokenizer
    separator: list[int]  # what is written after each document
    dtype: np.dtype
    n_workers: int


class Piece(NamedTuple):
    """A part of a text, encoded."""

    ids: list[int]
    n_characters: int
    ends_text: bool  # whether it is the last one of its text


# Writing.


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path = "gpt2",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    reading: Reading = READING,
    workers: int | None = None,
    missing_bytes: str = "error",
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a folder with `train.bin`, `val.bin`, `meta.json` and the tokenizer, all or nothing.

    The end of a text is marked after each document, if there are several and the vocabulary has a
    token for it; where the tokenizer itself adds tokens to each text, these mark it. So one text
    with `val_fraction=0.1` becomes the very files of nanoGPT's `data/shakespeare` and
    `data/shakespeare_char`.

    Args:
      inputs: text files in UTF-8, folders of `*.txt`, or "-" for standard input; or files of
        records (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) and folders of them. All may be
        packed (`.gz`, `.zst`).
      out: the folder to write.
      tokenizer: "gpt2"; "char", a token for each character of the text; "bpe", trained on the
        training part; or the folder, hub id or "demo" of a model, whose tokenizer it is.
      vocab_size: tokens of a "bpe".
      val_fraction: how much of each file is for validation: its last documents or, of a single
        document, its last characters. 0 writes no `val.bin`.
      reading: which field of records is their text; whether the lines of each paragraph are
        joined, as printed books need it; and whether `<|endoftext|>`, which parts the documents of
        a file wherever it stands, is text instead.
      workers: processes; by default one for each core.
      missing_bytes: what becomes of bytes that a model's vocabulary lacks: "error" raises, "drop"
        passes over them, as HF does.
      overwrite: replaces the files of an `out` that is not empty.
      progress: shows a bar on standard error.

    Returns:
      The contents of `meta.json`: `dtype`, `vocab_size`, `eot_id`; of `train` and `val` each the
      number of `tokens`, UTF-8 `bytes` and `documents`; and the arguments.

    Raises:
      DataError: an input is missing, empty, damaged or not UTF-8, or holds records and
        `reading.field` is none of theirs; or an argument is out of range.
      CheckpointError: `out` is in use, or there is no such tokenizer.
      ImportError: an input is one for `pyarrow`, which is not installed.
    """
    _check_arguments(tokenizer, vocab_size, val_fraction, workers)
    names = [str(name) for name in inputs]
    with replacing(out, overwrite=overwrite, keep=_is_no_file_of_ours) as folder:
        files = list(read_documents(names, reading))
        # Before the split: both files mark the ends of documents, or neither does.
        n_documents = sum(len(texts) for texts in files)
        # File by file, so that each is in both parts.
        parts = split(files, val_fraction)
        del files  # a document that was cut in two is held once from here on
        if not parts.train:
            raise DataError("There is nothing to train on: expected at least one text.")
        made = make_tokenizer(tokenizer, parts, vocab_size, missing_bytes=missing_bytes)
        encoding = _make_encoding(made, n_documents, workers or os.cpu_count() or 1)

        folder.mkdir()
        meta: dict[str, Any] = {
            "dtype": encoding.dtype.name,
            "vocab_size": made.vocab_size,
            "eot_id": made.eot_id,
        }
        meta["train"] = _write_part(folder / "train.bin", parts.train, encoding, progress)
        if parts.val:
            meta["val"] = _write_part(folder / "val.bin", parts.val, encoding, progress)
        # Names without folders: what a corpus says of itself is the same on every machine.
        meta["inputs"] = [Path(name).name for name in names]
        meta["tokenizer"] = str(tokenizer)
        meta["val_fraction"] = val_fraction
        meta |= reading._asdict()
        write_json(folder / "meta.json", meta)
        made.save(folder)
    return meta


def encode(tokenizer: Tokenizer, texts: list[str], n_workers: int) -> Iterator[Piece]:
    """Yields texts piece by piece, in order. Short ones are encoded here, without workers."""
    # Bounds alone, no text is copied.
    if tokenizer.is_seamless:
        pieces = list(spans(texts))
    else:
        pieces = [Span(text, 0, len(text)) for text in texts]
    # A generator: pieces are cut out as workers ask for them, since together they are the corpus.
    cut_out = (piece.cut() for piece in pieces)
    n_characters = sum(len(text) for text in texts)
    with contextlib.ExitStack() as stack:
        if n_workers == 1 or n_characters < MIN_CHARACTERS_FOR_WORKERS:
            encoded = map(partial(tokenizer.encode, add_special_tokens=False), cut_out)
        else:
            # Not forked: JAX, which `import gpt2_jax` brings, has threads, and a fork may hang.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(n_workers, _start_worker, (tokenizer,)))
            # In order, and as they come: `map` would wait for the whole corpus and hold it.
            encoded = pool.imap(_encode_in_worker, cut_out)
        for piece, ids in zip(pieces, encoded, strict=True):
            ends_text = piece.end == len(piece.text)
            if piece.start == 0:
                ids = [*tokenizer.template.before, *ids]
            if ends_text:
                ids = [*ids, *tokenizer.template.after]
            yield Piece(ids=ids, n_characters=piece.end - piece.start, ends_text=ends_text)


def _is_no_file_of_ours(name: str) -> bool:
    """Returns whether a file may stay where token files are written anew: a text, for one."""
    return name not in ("train.bin", "val.bin", "meta.json") and not is_tokenizer_file(name)


def _check_arguments(
    tokenizer: str | Path, vocab_size: int | None, val_fraction: float, workers: int | None
) -> None:
    """Raises `DataError` where an argument of `prepare` is out of range."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"`val_fraction` must be in [0, 1), got {val_fraction}.")
    # Given for another tokenizer, it would be passed over without a word.
    trains_bpe = tokenizer == "bpe"
    if trains_bpe != (vocab_size is not None):
        raise DataError(
            '`vocab_size` is for the tokenizer "bpe", which needs it; '
            f'got {vocab_size} for "{tokenizer}".'
        )
    if vocab_size is not None and vocab_size > MAX_BPE:  # it would be made room for at once
        raise DataError(f"`vocab_size` must be at most {MAX_BPE}, got {vocab_size}.")
    if workers is not None and workers < 1:
        raise DataError(f"`workers` must be at least 1, got {workers}.")


def _make_encoding(tokenizer: Tokenizer, n_documents: int, n_workers: int) -> Encoding:
    """Returns how documents are written with a tokenizer."""
    separator = []
    # A single text gets no mark, as in nanoGPT: nothing follows that it would be parted from.
    is_marked = tokenizer.template != NO_TEMPLATE  # by the tokenizer
    if n_documents > 1 and tokenizer.eot_id is not None and not is_marked:
        separator = [tokenizer.eot_id]
    # `vocab_size` is the largest id plus one, so that 2^16 itself still fits.
    fits_16_bits = tokenizer.vocab_size <= 2**16
    dtype = np.dtype("uint16" if fits_16_bits else "uint32")
    return Encoding(tokenizer, separator, dtype, n_workers)


def _write_part(file: Path, texts: list[str], encoding: Encoding, progress: bool) -> dict[str, int]:
    """Writes a token file; returns what `meta.json` says of it."""
    n_tokens = 0
    bar = tqdm(  # counts characters: how many tokens there will be, nobody knows before
        total=sum(len(text) for text in texts),
        desc=file.stem,
        unit="char",
        unit_scale=True,
        disable=not progress,
    )
    with file.open("wb") as opened, bar:
        for piece in encode(encoding.tokenizer, texts, encoding.n_workers):
            ids = piece.ids
            if piece.ends_text:
                ids = ids + encoding.separator
            opened.write(np.array(ids, encoding.dtype).tobytes())
            n_tokens += len(ids)
            bar.update(piece.n_characters)
    # Text by text: the corpus as bytes would be one more corpus in memory.
    n_bytes = sum(len(text.encode()) for text in texts)
    return {"tokens": n_tokens, "bytes": n_bytes, "documents": len(texts)}


# What a worker does. It gets the tokenizer once, when its process starts, not with each piece.


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(text: str) -> list[int]:
    return _worker_tokenizer.encode(text, add_special_tokens=False)


# Tokenizers.


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


# Opening.


def open_corpus(folder: str | Path) -> Corpus:
    """Opens a folder's `train.bin` and, where there are, its `val.bin`, `meta.json` and tokenizer.

    The token files may also be numpy's or llm.c's, under names such as `fineweb_train_000001.npy`.
    nanoGPT's `meta.pkl` is read too, and its characters are the tokenizer.

    Raises:
      DataError: there is no `train.bin` or the like, or there are several; or a file is damaged,
        too short, of another kind, or holds ids outside the vocabulary.
    """
    folder = local_path(folder)
    meta = read_meta(folder)
    train_file = _token_file(folder, "train")
    if train_file is None:
        raise DataError(
            f"{folder}: expected `train.bin`, which `prepare_data.py` writes; it is not there."
        )
    tokenizer = _tokenizer_in(folder, meta)
    vocab_size = meta.get("vocab_size", GPT2_VOCAB_SIZE)
    # Of characters, the bytes of some have ids too, which a model must have for its tokenizer's
    # sake.
    if "itos" in meta and tokenizer is not None:
        vocab_size = max(vocab_size, tokenizer.vocab_size)
    train = open_tokens(train_file, vocab_size=vocab_size)
    identity = {"train": fingerprint(train_file)}
    val = None
    val_file = _token_file(folder, "val")
    if val_file is not None:
        val = open_tokens(val_file, vocab_size=vocab_size)
        if len(val) < 2:
            raise DataError(f"{val_file}: expected at least 2 ids, to predict one, got {len(val)}.")
        identity["val"] = fingerprint(val_file)
    return Corpus(
        train=train,
        val=val,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        bytes_per_token=_bytes_per_token(meta),
        identity=identity,
    )


def _token_file(folder: Path, part: str) -> Path | None:
    """Returns the token file of a part, "train" or "val".

    That is `train.bin`, `train.npy`, or a name such as llm.c's `tiny_shakespeare_train.bin`.

    Raises:
      DataError: several files may be it.
    """
    # The plain names first: among other files, one of these is what is meant.
    for name in (f"{part}.bin", f"{part}.npy"):
        if (folder / name).is_file():
            return folder / name
    pattern = re.compile(rf".*_{part}(_\d+)?\.(bin|npy)")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [file.name for file in files if pattern.fullmatch(file.name)]
    if len(names) > 1:
        raise DataError(f"{folder}: expected one file of tokens for {part}, got {names[:10]}.")
    return folder / names[0] if names else None


def _tokenizer_in(folder: Path, meta: dict[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer in a folder of token files; without one, GPT-2's if it may be that."""
    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError:
        return _implied_tokenizer(meta)
    vocab_size = meta.get("vocab_size", GPT2_VOCAB_SIZE)
    if tokenizer.vocab_size > vocab_size:
        expected = f"a tokenizer of ids below {vocab_size}, the data's `vocab_size`"
        got = f"ids up to {tokenizer.vocab_size - 1}"
        raise DataError(f"{folder}: expected {expected}, got {got}.")
    return tokenizer


def _implied_tokenizer(meta: dict[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer of a folder that holds none: of nanoGPT's characters, or GPT-2's."""
    tokens = meta.get("itos")
    if tokens is not None:
        # Tokens that are words or the like have no tokenizer here: their ids can be trained on.
        is_characters = all(len(token) == 1 for token in tokens)
        is_distinct = len(set(tokens)) == len(tokens)
        return tokenizer_of(tokens) if is_characters and is_distinct else None
    is_gpt2s = meta.get("vocab_size", GPT2_VOCAB_SIZE) == GPT2_VOCAB_SIZE
    return Tokenizer.gpt2() if is_gpt2s else None


def _bytes_per_token(meta: dict[str, Any]) -> float | None:
    """Returns how many bytes of UTF-8 a token of the validation text stands for, if known."""
    val = meta.get("val", {})
    if not val.get("tokens"):
        return None
    return val["bytes"] / val["tokens"]
