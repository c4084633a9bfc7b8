"""Texts to a folder that can be trained on: token files, what they are, and the tokenizer.

One corpus in memory, or one document after the other, of which many machines may each take a share.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from gpt2_jax.files import local_path, replacing, write_json
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import is_tokenizer_file
from gpt2_jax.tokenizer_template import NO_TEMPLATE
from gpt2_jax.training.encoding import encode
from gpt2_jax.training.manifest import NAME, PARTS, write_manifest
from gpt2_jax.training.shards import shard_name
from gpt2_jax.training.texts import (
    Parts,
    Reading,
    Shard,
    Source,
    find_sources,
    part_of,
    read_documents,
    split,
    stream_documents,
)
from gpt2_jax.training.token_files import DataError, is_our_name
from gpt2_jax.training.vocabularies import make_tokenizer
from gpt2_jax.training.writing import PartWriter

MAX_BPE = 2**24  # tokens of a "bpe", a hundred times the largest in use
SHARD_TOKENS = 2**28  # of a file, 512 MiB of uint16
READING = Reading()  # plain texts, as they are


class Task(NamedTuple):
    """What `prepare` was asked for."""

    inputs: list[str]
    tokenizer: str | Path
    vocab_size: int | None
    val_fraction: float
    reading: Reading
    n_workers: int
    missing_bytes: str
    shard: Shard
    shard_tokens: int | None  # None where each part is one file, and all texts are in memory
    progress: bool


class Written(NamedTuple):
    """What was written of a task."""

    tokenizer: Tokenizer
    dtype: np.dtype
    writers: dict[str, PartWriter]  # "train", "val" -> its files
    settings: dict[str, Any]  # further ones for `meta.json`


class Encoding(NamedTuple):
    """How documents become ids on disk."""

    tokenizer: Tokenizer
    separator: Integer[np.ndarray, " S"]  # what is written after each document
    dtype: np.dtype
    n_workers: int


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
    shard: Shard | None = None,
    shard_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a folder with `train.bin`, `val.bin` and all that goes with them, or nothing.

    The end of a text is marked after each document, if there are several and the vocabulary has a
    token for it; where the tokenizer itself adds tokens to each text, these mark it. So one text
    with `val_fraction=0.1` becomes the very files of nanoGPT's `data/shakespeare` and
    `data/shakespeare_char`.

    A corpus that is larger than memory is read document by document where `shard` or `shard_tokens`
    is given. Then a mark is written after each document; which are for validation, a hash of each
    decides; and each part is many files, `train_00000.bin`, `train_00001.bin`, ... Shards may be
    prepared anywhere, in any order: together they have the documents of all, each in the same part
    as with one shard. `merge` makes one folder of them.

    Args:
      inputs: text files in UTF-8, folders of `*.txt`, or "-" for standard input; or files of
        records (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`) and folders of them. All may be
        packed (`.gz`, `.zst`).
      out: the folder to write.
      tokenizer: "gpt2"; "char", a token for each character of the text; "bpe", trained on the
        training part; or the folder, hub id or "demo" of a model, whose tokenizer it is.
      vocab_size: tokens of a "bpe".
      val_fraction: how much of each file is for validation: its last documents or, of a single
        document, its last characters. 0 writes no `val.bin`. In shards, how many of all documents.
      reading: which field of records is their text; whether the lines of each paragraph are
        joined, as printed books need it; and whether `<|endoftext|>`, which parts the documents of
        a file wherever it stands, is text instead.
      workers: processes; by default one for each core.
      missing_bytes: what becomes of bytes that a model's vocabulary lacks: "error" raises, "drop"
        passes over them, as HF does.
      shard: which of several shares of the documents to write, to `out/shard-003-of-064`. Files go
        to the shards in turn, or documents where there are fewer files than shards.
      shard_tokens: of a token file at the most; 2^28 where only `shard` is given.
      overwrite: replaces the files of an `out` that is not empty.
      progress: shows a bar on standard error.

    Returns:
      The contents of `meta.json`: `dtype`, `vocab_size`, `eot_id`; of `train` and `val` each the
      number of `tokens`, UTF-8 `bytes` and `documents`; and the arguments. `manifest.json` has what
      `FileRecord` says of each file.

    Raises:
      DataError: an input is missing, empty, damaged or not UTF-8, or holds records and
        `reading.field` is none of theirs; or an argument is out of range.
      CheckpointError: `out` is in use, or there is no such tokenizer.
      ImportError: an input is one for `pyarrow`, which is not installed.
      ChildProcessError: a worker has ended before its work, killed for want of memory, say.

    Examples:
      >>> from gpt2_jax.training.prepare import prepare
      >>> written = (folder / "text.txt").write_text("To be, or not to be. " * 20)
      >>> meta = prepare([folder / "text.txt"], folder / "data", tokenizer="char", workers=1)
      >>> meta["vocab_size"]
      10
    """
    if shard is not None and shard_tokens is None:
        shard_tokens = SHARD_TOKENS
    task = Task(
        inputs=[str(name) for name in inputs],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        reading=reading,
        n_workers=(os.cpu_count() or 1) if workers is None else workers,
        missing_bytes=missing_bytes,
        shard=shard or Shard(),
        shard_tokens=shard_tokens,
        progress=progress,
    )
    _check(task)
    target = local_path(out)
    if task.shard.count > 1:
        target = target / shard_name(task.shard)
    with replacing(target, overwrite=overwrite, keep=_is_no_file_of_ours) as folder:
        folder.mkdir()
        write = _write_whole if shard_tokens is None else _write_stream
        written = write(task, folder)
        meta = _meta_of(task, written)
        write_json(folder / "meta.json", meta)
        manifest = {part: writer.records for part, writer in written.writers.items()}
        write_manifest(folder / NAME, manifest)
        written.tokenizer.save(folder)
    return meta


def _is_no_file_of_ours(name: str) -> bool:
    """Returns whether a file may stay where token files are written anew: a text, for one."""
    is_ours = name in ("meta.json", NAME) or is_our_name(name)
    return not is_ours and not is_tokenizer_file(name)


def _check(task: Task) -> None:
    """Raises `DataError` where an argument of `prepare` is out of range."""
    if not 0 <= task.val_fraction < 1:
        raise DataError(f"`val_fraction` must be in [0, 1), got {task.val_fraction}.")
    # Given for another tokenizer, it would be passed over without a word.
    trains_bpe = task.tokenizer == "bpe"
    if trains_bpe != (task.vocab_size is not None):
        raise DataError(
            '`vocab_size` is for the tokenizer "bpe", which needs it; '
            f'got {task.vocab_size} for "{task.tokenizer}".'
        )
    if task.vocab_size is not None and task.vocab_size > MAX_BPE:  # it would be made room for
        raise DataError(f"`vocab_size` must be at most {MAX_BPE}, got {task.vocab_size}.")
    if task.n_workers < 1:
        raise DataError(f"`workers` must be at least 1, got {task.n_workers}.")
    if task.shard_tokens is not None:
        _check_stream(task)


def _check_stream(task: Task) -> None:
    """Raises `DataError` where what is asked for needs the whole corpus at once."""
    number, count = task.shard
    if not 1 <= number <= count:
        raise DataError(
            f"`shard` must be one of 1/{count} to {count}/{count}, got {number}/{count}."
        )
    if task.shard_tokens is not None and task.shard_tokens < 2:
        raise DataError(f"`shard_tokens` must be at least 2, got {task.shard_tokens}.")
    if task.tokenizer in ("char", "bpe"):
        advice = "prepare a part of the texts with it, and name that folder as the tokenizer"
        raise DataError(
            f'Expected a tokenizer that is there already, got "{task.tokenizer}": {advice}.'
        )
    if count > 1 and "-" in task.inputs:
        raise DataError("Expected files, which all shards can read, got standard input.")


def _meta_of(task: Task, written: Written) -> dict[str, Any]:
    """Returns what `meta.json` says."""
    meta: dict[str, Any] = {
        "dtype": written.dtype.name,
        "vocab_size": written.tokenizer.vocab_size,
        "eot_id": written.tokenizer.eot_id,
    }
    for part, writer in written.writers.items():
        if writer.records:
            meta[part] = writer.summary()
    if "train" not in meta and task.shard.count == 1:
        raise DataError("There is nothing to train on: expected at least one text.")
    # Names without folders: what a corpus says of itself is the same on every machine.
    meta["inputs"] = [Path(name).name for name in task.inputs]
    meta["tokenizer"] = str(task.tokenizer)
    meta["missing_bytes"] = task.missing_bytes
    meta["val_fraction"] = task.val_fraction
    meta |= task.reading._asdict()
    return meta | written.settings


# A corpus in memory.


def _write_whole(task: Task, folder: Path) -> Written:
    """Writes a file for each part, divided within each file of texts."""
    files = list(read_documents(task.inputs, task.reading))
    # Before the split: both files mark the ends of documents, or neither does.
    n_documents = sum(len(texts) for texts in files)
    # File by file, so that each is in both parts.
    parts = split(files, task.val_fraction)
    del files  # a document that was cut in two is held once from here on
    if not parts.train:
        raise DataError("There is nothing to train on: expected at least one text.")
    made = make_tokenizer(task.tokenizer, parts, task.vocab_size, missing_bytes=task.missing_bytes)
    encoding = _make_encoding(made, task.n_workers, has_several=n_documents > 1)
    writers = {}
    for part, texts in parts._asdict().items():
        # Counts characters: how many tokens there will be, nobody knows before.
        n_characters = sum(len(text) for text in texts)
        with closing(PartWriter(folder, part, encoding.dtype)) as writer:
            with _bar(part, n_characters, task.progress and n_characters > 0) as bar:
                _write(texts, encoding, lambda text, writer=writer: writer, bar)
        writers[part] = writer
    return Written(made, encoding.dtype, writers, {})


# A corpus that is read once, document by document.


def _write_stream(task: Task, folder: Path) -> Written:
    """Writes the files of a shard."""
    sources = list(find_sources(task.inputs, task.reading))
    no_parts = Parts([], [])
    made = make_tokenizer(task.tokenizer, no_parts, None, missing_bytes=task.missing_bytes)
    # What other shards have is not known: even of a single document the end is marked.
    encoding = _make_encoding(made, task.n_workers, has_several=True)
    texts = stream_documents(sources, task.reading, task.shard)
    writers = {part: PartWriter(folder, part, encoding.dtype, task.shard_tokens) for part in PARTS}

    def writer_of(text: str) -> PartWriter:
        return writers[part_of(text, task.val_fraction)]

    with ExitStack() as stack:
        for writer in writers.values():
            stack.enter_context(closing(writer))
        bar = stack.enter_context(_bar("texts", None, task.progress))
        _write(texts, encoding, writer_of, bar)
    return Written(made, encoding.dtype, writers, _settings_of(task, sources))


def _settings_of(task: Task, sources: list[Source]) -> dict[str, Any]:
    """Returns by what shards are known to be of one corpus, beside the common settings."""
    sizes = [source.name.stat().st_size for source in sources if isinstance(source.name, Path)]
    settings: dict[str, Any] = {"shard_tokens": task.shard_tokens}
    if task.shard.count > 1:
        settings["shard"] = f"{task.shard.number}/{task.shard.count}"
    # A machine that sees fewer files than another deals them out otherwise.
    settings["input_files"] = len(sources)
    settings["input_bytes"] = sum(sizes)
    return settings


# Both.


def _make_encoding(tokenizer: Tokenizer, n_workers: int, *, has_several: bool) -> Encoding:
    """Returns how documents are written with a tokenizer."""
    separator = np.zeros(0, np.uint32)
    # A single text gets no mark, as in nanoGPT: nothing follows that it would be parted from.
    is_marked = tokenizer.template != NO_TEMPLATE  # by the tokenizer
    if has_several and tokenizer.eot_id is not None and not is_marked:
        separator = np.array([tokenizer.eot_id], np.uint32)
    # `vocab_size` is the largest id plus one, so that 2^16 itself still fits.
    fits_16_bits = tokenizer.vocab_size <= 2**16
    dtype = np.dtype("uint16" if fits_16_bits else "uint32")
    return Encoding(tokenizer, separator, dtype, n_workers)


def _bar(what: str, total: int | None, shown: bool) -> tqdm:
    return tqdm(total=total, desc=what, unit="char", unit_scale=True, disable=not shown)


def _write(
    texts: Iterable[str], encoding: Encoding, writer_of: Callable[[str], PartWriter], bar: tqdm
) -> None:
    """Writes texts, each by the writer that is meant for it."""
    writer = None
    for piece in encode(encoding.tokenizer, texts, encoding.n_workers):
        if piece.starts_text or writer is None:
            writer = writer_of(piece.span.text)
        ids = np.append(piece.ids, encoding.separator) if piece.ends_text else piece.ids
        # Piece by piece: the corpus as bytes would be one more corpus in memory. Half a character,
        # as JSON may spell it, is read as the three bytes of one.
        n_bytes = len(piece.span.cut().encode("utf-8", "surrogatepass"))
        writer.write(ids, n_bytes=n_bytes, starts_document=piece.starts_text)
        bar.update(piece.span.end - piece.span.start)
