"""A corpus in a folder, opened for a run; looked through, and described for later openings.

Knows what lies in such a folder: token files, a `meta.json` that says how they were made, a
`manifest.json` that says what they are, the files of a tokenizer. Nothing of models or training.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gpt2_jax.files import local_path, replacing, some
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training import order
from gpt2_jax.training.data import Tokens, is_order_drawn
from gpt2_jax.training.manifest import (
    NAME,
    PARTS,
    FileRecord,
    Manifest,
    check_record,
    check_same,
    identity_of,
    read_manifest,
    record_of,
    sample_of,
    scan,
    write_manifest,
)
from gpt2_jax.training.shards import shard_folders
from gpt2_jax.training.token_files import (
    DataError,
    TokenFile,
    find_token_files,
    read_meta,
    token_file,
)
from gpt2_jax.training.vocabularies import tokenizer_of

GPT2_VOCAB_SIZE = 50257
WHOLE_BYTES = 2**30  # files of up to so many are read at the start; larger ones by a sample


class Corpus(NamedTuple):
    """What `prepare`, or a `prepare.py` of nanoGPT's or llm.c's, left in a folder."""

    train: Tokens
    val: Tokens | None
    tokenizer: Tokenizer | None
    vocab_size: int
    bytes_per_token: float | None  # of the validation text, where it is known
    identity: dict[str, Any]  # tells this data from other data


class Description(NamedTuple):
    """What a folder says of its token files."""

    folder: Path
    meta: dict[str, Any]
    manifest: Manifest | None
    tokenizer: Tokenizer | None
    vocab_size: int


class Part(NamedTuple):
    """The token files of training or of validation, opened."""

    tokens: Tokens
    identity: dict[str, Any]


# Opening.


def open_corpus(folder: str | Path) -> Corpus:
    """Opens a folder's `train.bin` and, where there are, its `val.bin`, `meta.json` and tokenizer.

    Each part may be many files, `train_00000.bin`, `train_00001.bin`, ...; they may also be numpy's
    or llm.c's, under names such as `fineweb_train_000001.npy`. nanoGPT's `meta.pkl` is read too,
    and its characters are the tokenizer.

    Where there is a `manifest.json`, no file is read but for its first bytes and a sample, which
    must be what the manifest says. Without one, files of together at most `WHOLE_BYTES` are read
    through; of larger ones a sample tells this data from other data, and ids are checked as they
    are read.

    Raises:
      DataError: there is no `train.bin` or the like, or files of several kinds, or a number is
        missing; or a file is damaged, too short, of another kind, not what `manifest.json` or
        `meta.json` says, or holds ids outside the vocabulary.

    Examples:
      >>> from gpt2_jax.training.corpus import open_corpus
      >>> np.arange(90, dtype=np.uint16).tofile(folder / "train.bin")
      >>> corpus = open_corpus(folder)
      >>> corpus.train.sizes.tolist(), corpus.val is None
      ([90], True)
    """
    folder = local_path(folder)
    described = _described(folder, read_manifest(folder))
    train = _open_part(described, "train")
    if train is None:
        raise DataError(_nothing_to_train_on(folder))
    val = _open_part(described, "val")
    identity = {"train": train.identity}
    if val is not None:
        identity["val"] = val.identity
        _check_predicts(folder, val.tokens)
    # Only where it is new: a run that was begun before there were others goes on.
    if not is_order_drawn(train.tokens):
        identity["order"] = {"name": order.NAME}
    return Corpus(
        train=train.tokens,
        val=val.tokens if val else None,
        tokenizer=described.tokenizer,
        vocab_size=described.vocab_size,
        bytes_per_token=_bytes_per_token(described.meta),
        identity=identity,
    )


def _described(folder: Path, manifest: Manifest | None) -> Description:
    """Returns what a folder says of its token files."""
    meta = read_meta(folder)
    tokenizer = _tokenizer_in(folder, meta)
    vocab_size = meta.get("vocab_size", GPT2_VOCAB_SIZE)
    # Of characters, the bytes of some have ids too, which a model must have for its tokenizer's
    # sake.
    if "itos" in meta and tokenizer is not None:
        vocab_size = max(vocab_size, tokenizer.vocab_size)
    return Description(folder, meta, manifest, tokenizer, vocab_size)


def _nothing_to_train_on(folder: Path) -> str:
    """Returns what to say of a folder without a training part."""
    shards = shard_folders(folder)
    if shards:
        advice = f"`gpt2-jax prepare --merge {folder}`"
        return f"{folder}: expected `train.bin`, got {len(shards)} shards: merge them, {advice}."
    return f"{folder}: expected `train.bin`, which `prepare_data.py` writes; it is not there."


def _open_part(described: Description, part: str) -> Part | None:
    """Returns a part of a corpus, or None where there is none."""
    files = _files_of(described, part)
    if not files:
        return None
    tokens = Tokens(files, vocab_size=described.vocab_size)
    records = _records_of(described, part)
    n_bytes = [file.path.stat().st_size for file in files]
    if records:
        for file, record in zip(files, records, strict=True):
            check_record(file, record, described.vocab_size)
        return Part(tokens, identity_of("sha256", n_bytes, [r.sha256 for r in records]))
    # Whole where that takes a second or two: a bad id is found now, not days later in its batch.
    if sum(n_bytes) <= WHOLE_BYTES:
        digests = [scan(file, described.vocab_size).sha256 for file in files]
        return Part(tokens, identity_of("sha256", n_bytes, digests))
    return Part(tokens, identity_of("sample", n_bytes, [sample_of(file.path) for file in files]))


def _records_of(described: Description, part: str) -> list[FileRecord]:
    """Returns what the manifest says of the files of a part; nothing without one."""
    return described.manifest[part] if described.manifest else []


def _files_of(described: Description, part: str) -> list[TokenFile]:
    """Returns the files of a part and how ids lie in them.

    Raises:
      DataError: they are not all there, not of one dtype, or hold another number of ids than
        `meta.json` says.
    """
    folder = described.folder
    dtype = described.meta.get("dtype", "uint16")
    files = [token_file(path, dtype) for path in _paths_of(described, part)]
    for file in files:
        if file.dtype != files[0].dtype:
            first = f"{files[0].dtype.name} as in {files[0].path.name}"
            raise DataError(f"{file.path}: expected ids of {first}, got {file.dtype.name}.")
    n_ids = sum(file.n_ids for file in files)
    said = described.meta.get(part, {}).get("tokens", n_ids)
    # A file of int32 has twice as many uint16, and would be trained on all the same.
    if files and said != n_ids:
        where = files[0].path if len(files) == 1 else f"{folder}, {len(files)} files of {part}"
        kind = files[0].dtype.name
        raise DataError(f"{where}: expected {said} {kind} ids, as meta.json says, got {n_ids}.")
    return files


def _paths_of(described: Description, part: str) -> list[Path]:
    """Returns the files of a part, which the manifest lists or, without one, their names tell."""
    folder = described.folder
    meant = find_token_files(folder, part)
    if described.manifest is None:
        return meant
    listed = [record.name for record in described.manifest[part]]
    known = set(listed)
    # What came after it was written would be passed over without a word.
    others = [path.name for path in meant if path.name not in known]
    if others:
        advice = f"`gpt2-jax prepare --index {folder} --overwrite` writes it anew"
        raise DataError(
            f"{folder}: expected the files of {NAME}, got {some(others)} too: {advice}."
        )
    return [folder / name for name in listed]


def _check_predicts(folder: Path, tokens: Tokens) -> None:
    """Raises `DataError` where a validation part has no id to predict."""
    longest = int(tokens.sizes.max())
    if longest < 2:
        source = tokens.sources[0]
        where = source.path if isinstance(source, TokenFile) else folder
        raise DataError(f"{where}: expected at least 2 ids, to predict one, got {longest}.")


# Looking through.


def verify(folder: str | Path, *, progress: bool = False) -> dict[str, int]:
    """Reads all files of a corpus and compares them with its `manifest.json` and `meta.json`.

    Without a manifest it is the ids and their numbers that are checked.

    Args:
      folder: of token files.
      progress: shows a bar on standard error.

    Returns:
      How many `files`, `tokens` and `bytes` there are.

    Raises:
      DataError: something differs; the message names all files that do, and both values.
    """
    folder = local_path(folder)
    described = _described(folder, read_manifest(folder))
    problems = []
    found = []
    for part in PARTS:
        try:
            # All that names and sizes tell: numbers, dtypes, what `meta.json` says of all files.
            files = _files_of(described, part)
            if part == "train" and not files:
                raise DataError(_nothing_to_train_on(folder))
        except DataError as error:
            problems.append(str(error))
        for looked_at in _verified(described, part, progress):
            if isinstance(looked_at, DataError):
                problems.append(str(looked_at))
            else:
                found.append(looked_at)
    if problems:
        # What is wrong with a file alone is found by both ways of looking.
        raise DataError("\n".join(dict.fromkeys(problems)))
    return counts_of(found)


def _verified(
    described: Description, part: str, progress: bool
) -> Iterator[FileRecord | DataError]:
    """Yields what each file of a part is, or what is wrong with it."""
    try:
        paths = _paths_of(described, part)
    except DataError as error:
        yield error
        return
    dtype = described.meta.get("dtype", "uint16")
    # Without a manifest there is nothing to compare with, and the ids are what is checked.
    said = _records_of(described, part) or [None] * len(paths)
    for path, record in zip(_watched(paths, part, progress), said, strict=True):
        try:
            file = token_file(path, dtype)
            found = record_of(file, _name(described, path), scan(file, described.vocab_size))
            if record is not None:
                check_same(path, record, found)
        except DataError as error:
            yield error
        else:
            yield found


def index(folder: str | Path, *, overwrite: bool = False, progress: bool = False) -> dict[str, int]:
    """Reads all token files of a folder and writes its `manifest.json`.

    For files that others made, nanoGPT's or llm.c's: opened with it, they are not read again. A run
    on a single file remembers the same of it with and without.

    Args:
      folder: of token files.
      overwrite: replaces a manifest that is there.
      progress: shows a bar on standard error.

    Returns:
      How many `files`, `tokens` and `bytes` there are.

    Raises:
      DataError: as `open_corpus`.
      CheckpointError: there is a manifest, and `overwrite` is not set.
    """
    folder = local_path(folder)
    described = _described(folder, None)  # what one says that is there is no matter
    manifest: Manifest = {}
    with replacing(folder / NAME, overwrite=overwrite) as temporary:
        for part in PARTS:
            files = _files_of(described, part)
            if part == "train" and not files:
                raise DataError(_nothing_to_train_on(folder))
            manifest[part] = []
            for looked_at in _verified(described, part, progress):
                if isinstance(looked_at, DataError):
                    raise looked_at
                manifest[part].append(looked_at)
        write_manifest(temporary, manifest)
    return counts_of([record for records in manifest.values() for record in records])


def counts_of(records: list[FileRecord]) -> dict[str, int]:
    """Returns how many `files`, `tokens` and `bytes` there are."""
    return {
        "files": len(records),
        "tokens": sum(record.tokens for record in records),
        "bytes": sum(record.bytes for record in records),
    }


def _name(described: Description, path: Path) -> str:
    """Returns how a manifest calls a file."""
    return path.relative_to(described.folder).as_posix()


def _watched(paths: list[Path], part: str, progress: bool) -> Iterator[Path]:
    """Yields files, and shows on standard error how far they are."""
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    bar = tqdm(total=sum(sizes), desc=part, unit="B", unit_scale=True, disable=not progress)
    with bar:
        for path, size in zip(paths, sizes, strict=True):
            yield path
            bar.update(size)


# What goes with the files.


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
