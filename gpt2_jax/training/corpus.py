"""Text to token files: reads documents, divides them, makes a vocabulary where one is asked for, encodes in parallel.

Knows texts, tokenizers and files; `data.py` reads what is written here.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2_jax.files import replacing, write_json
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.tokenizer import END_OF_TEXT, Tokenizer, byte_chars
from gpt2_jax.training.data import DataError

CHUNK = 2**20  # characters that one worker encodes at a time
WORTH_WORKERS = 32 * CHUNK  # fewer characters are encoded sooner than workers start
SAFE_CUT = re.compile(r"\S(?=[ \n])")  # no piece of the tokenizer's pattern goes on from there


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path = "gpt2",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    unwrap: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a folder with `train.bin`, `val.bin`, `meta.json` and the tokenizer's files, all of it or nothing.

    The end of a text is marked after each document, if there are several and the vocabulary has a token for it. So one
    text with `val_fraction=0.1` becomes the very files of nanoGPT's `data/shakespeare` and `data/shakespeare_char`.

    Args:
      inputs: text files in UTF-8, folders of `*.txt`, or "-" for standard input. A line `<|endoftext|>` parts the
        documents of a file.
      out: the folder to write.
      tokenizer: "gpt2"; "char", a token for each character of the text; "bpe", trained on the training part; or the
        folder, hub id or "demo" of a model, whose tokenizer it is.
      vocab_size: tokens of a "bpe".
      val_fraction: how much of each file is for validation: its last documents or, of a single document, its last
        characters. 0 writes no `val.bin`.
      unwrap: joins the lines of each paragraph, as printed books need it.
      workers: processes; by default one for each core.
      overwrite: replaces the files of an `out` that is not empty.
      progress: shows a bar on standard error.

    Returns:
      The contents of `meta.json`: `dtype`, `vocab_size`, `eot_id`; of `train` and `val` each the number of `tokens`,
      UTF-8 `bytes` and `documents`; and the arguments.

    Raises:
      DataError: an input is missing, empty or not UTF-8, or an argument makes no sense.
      CheckpointError: `out` is in use, or there is no such tokenizer.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"`val_fraction` must be in [0, 1), got {val_fraction}.")
    if (tokenizer == "bpe") != (vocab_size is not None):
        raise DataError(
            f'`vocab_size` is for the tokenizer "bpe", which needs it; got {vocab_size} for "{tokenizer}".'
        )
    if workers is not None and workers < 1:
        raise DataError(f"`workers` must be at least 1, got {workers}.")
    names = [str(name) for name in inputs]
    with replacing(out, overwrite=overwrite) as folder:
        files = [documents(text, unwrap) for text in read_texts(names)]
        several = sum(map(len, files)) > 1
        train, val = split(files, val_fraction)
        del files  # a text that was cut is held once
        if not train:
            raise DataError("There is nothing to train on: expected at least one text.")
        made = make_tokenizer(tokenizer, train, train + val, vocab_size)
        mark = [made.eot_id] if made.eot_id is not None and several else []
        dtype = np.dtype("uint16" if made.vocab_size <= 2**16 else "uint32")
        folder.mkdir()
        meta = {"dtype": dtype.name, "vocab_size": made.vocab_size, "eot_id": made.eot_id}
        for name, texts in {"train": train, "val": val}.items():
            if texts:
                pieces = encode(made, texts, workers or os.cpu_count() or 1)
                bar = tqdm(
                    total=sum(map(len, texts)),
                    desc=name,
                    unit="char",
                    unit_scale=True,
                    disable=not progress,
                )
                with (folder / f"{name}.bin").open("wb") as file, bar:
                    for ids, characters, is_last in pieces:
                        file.write(np.array(ids + mark * is_last, dtype).tobytes())
                        bar.update(characters)
                    tokens = file.tell() // dtype.itemsize
                octets = sum(len(text.encode()) for text in texts)
                meta[name] = {"tokens": tokens, "bytes": octets, "documents": len(texts)}
        meta |= {"inputs": [Path(name).name for name in names], "tokenizer": str(tokenizer)}
        meta |= {"val_fraction": val_fraction, "unwrap": unwrap}
        write_json(folder / "meta.json", meta)
        made.save(folder)
    return meta


def read_texts(names: Iterable[str]) -> Iterator[str]:
    """Yields the texts of files, of folders' `*.txt` and, for "-", of standard input; line ends stay as they are.

    Raises:
      DataError: there is no such file, or no text in a folder, or a text is empty or not UTF-8.
    """
    for name in names:
        path = Path(name).expanduser()
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files or (name != "-" and not files[0].is_file()):
            raise DataError(f"{name}: expected a text file, or a folder with *.txt.")
        for file in files:
            content = sys.stdin.buffer.read() if name == "-" else file.read_bytes()
            try:
                text = content.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: expected UTF-8, but {error.reason} at byte {error.start}."
                ) from None
            if not text.strip():
                raise DataError(f"{file}: expected a text, got an empty one.")
            yield text


def documents(text: str, unwrap: bool) -> list[str]:
    """Returns the documents of a text, which lines `<|endoftext|>` part, with their paragraphs unwrapped if asked."""
    found = re.split(rf"^{re.escape(END_OF_TEXT)}[ \t]*(?:\r?\n|$)", text, flags=re.MULTILINE)
    found = [document for document in found if document.strip()]
    return [_unwrapped(document) for document in found] if unwrap else found


def split(files: list[list[str]], val_fraction: float) -> tuple[list[str], list[str]]:
    """Returns the documents for training and for validation: see `prepare`."""
    train, val = [], []
    for texts in files:
        if len(texts) == 1:
            cut = int(len(texts[0]) * (1 - val_fraction))
            texts = [texts[0][:cut], texts[0][cut:]]
        cut = (
            len(texts)
            if val_fraction == 0
            else min(max(int(len(texts) * (1 - val_fraction)), 1), len(texts) - 1)
        )
        train += texts[:cut]
        val += texts[cut:]
    return [text for text in train if text], [text for text in val if text]


def make_tokenizer(
    kind: str | Path, texts: list[str], everything: Iterable[str], vocab_size: int | None
) -> Tokenizer:
    """Returns the tokenizer that `prepare` was asked for; `texts` are for training one."""
    if kind == "gpt2":
        return Tokenizer.gpt2()
    if kind == "char":
        return char_tokenizer(everything)
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    return Tokenizer.load(resolve(kind))


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer with a token for each character of the texts, ids by code point.

    It is a byte-level BPE like any other: the bytes of a character that has several are merged from the left. These
    bytes and the beginnings of such characters get the ids after those of the characters.
    """
    chars = sorted(set().union(*texts))
    spelled = [[byte_chars()[byte] for byte in char.encode()] for char in chars]
    starts = [["".join(char[:end]) for end in range(1, len(char) + 1)] for char in spelled]
    vocab = {start[-1]: id for id, start in enumerate(starts)}
    for char, start in zip(spelled, starts, strict=True):
        for token in (*char, *start):
            vocab.setdefault(token, len(vocab))
    merges = [
        pair
        for char, start in zip(spelled, starts, strict=True)
        for pair in zip(start, char[1:], strict=False)
    ]
    return Tokenizer(vocab, dict.fromkeys(merges))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE trained on texts; id 0 is `<|endoftext|>`.

    Raises:
      DataError: `vocab_size` is too small for the 256 bytes.
      ImportError: `tokenizers` is not installed.
    """
    if vocab_size < 257:
        raise DataError(
            f"`vocab_size` must be at least 257, the bytes and {END_OF_TEXT}; got {vocab_size}."
        )
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise ImportError(
            'Training a vocabulary needs `tokenizers`: pip install "gpt2_jax[train]".'
        ) from None
    trained = ByteLevelBPETokenizer()
    pieces = (
        text[start:end] for text in texts for start, end in _cuts(text)
    )  # sooner done than long texts
    trained.train_from_iterator(
        pieces, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        trained.save_model(folder)
        return Tokenizer.load(folder)


def encode(
    tokenizer: Tokenizer, texts: list[str], workers: int
) -> Iterator[tuple[list[int], int, bool]]:
    """Yields texts piece by piece: the ids, the number of characters, and whether a text ends here."""
    bounds = [(text, start, end) for text in texts for start, end in _cuts(text)]
    pieces = (
        text[start:end] for text, start, end in bounds
    )  # as they are asked for: together they are the corpus
    with contextlib.ExitStack() as stack:
        if workers == 1 or sum(map(len, texts)) < WORTH_WORKERS:
            encoded = map(tokenizer.encode, pieces)
        else:
            parts = tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens
            pool = multiprocessing.get_context("spawn").Pool(
                workers, _start_worker, parts
            )  # a fork of JAX may hang
            encoded = stack.enter_context(pool).imap(_work, pieces)
        for (text, start, end), ids in zip(bounds, encoded, strict=True):
            yield ids, end - start, end == len(text)


def _cuts(text: str) -> Iterator[tuple[int, int]]:
    """Yields the bounds of pieces of about `CHUNK` characters whose ids, put together, are those of the text."""
    start = 0
    while start < len(text):
        cut = SAFE_CUT.search(text, start + CHUNK)
        end = cut.end() if cut else len(text)
        yield start, end
        start = end


def _start_worker(vocab, merges, special_tokens):
    global _tokenizer
    _tokenizer = Tokenizer(vocab, merges, special_tokens)


def _work(text: str) -> list[int]:
    return _tokenizer.encode(text)


def _unwrapped(text: str) -> str:
    paragraphs = re.split(r"\n[ \t\r]*\n\s*", text.strip())
    return "\n\n".join(
        " ".join(line.strip() for line in paragraph.split("\n")) for paragraph in paragraphs
    )
