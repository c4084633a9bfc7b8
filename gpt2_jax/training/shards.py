"""Shards of a corpus: what their folders are called, and how they become one.

Each is a folder of its own, whole or not there, that any machine can have written. Merging moves no
token: what it writes says which files are the corpus.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_jax.files import MAX_LISTED, check_free, local_path, replacing, some, write_json
from gpt2_jax.tokenizer_files import is_tokenizer_file
from gpt2_jax.training.manifest import (
    NAME,
    PARTS,
    Manifest,
    check_record,
    read_manifest,
    write_manifest,
)
from gpt2_jax.training.texts import Shard
from gpt2_jax.training.token_files import DataError, read_meta, token_file

FOLDER_NAME = re.compile(r"shard-(\d+)-of-(\d+)")

# In `meta.json`, what shards of one corpus need not have in common. The tokenizer's name may be its
# folder on some machine: the files themselves are compared.
OWN_SETTINGS = {"train", "val", "shard", "tokenizer"}


class Prepared(NamedTuple):
    """A shard as it was prepared."""

    path: Path
    meta: dict[str, Any]
    manifest: Manifest


def shard_name(shard: Shard) -> str:
    """Returns what a shard's folder is called."""
    return f"shard-{shard.number:03}-of-{shard.count:03}"


def shard_folders(folder: Path) -> dict[Path, Shard]:
    """Returns the shards in a folder, in their order."""
    found = {}
    inside = folder.iterdir() if folder.is_dir() else []
    for path in inside:
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[path] = Shard(int(match[1]), int(match[2]))
    # By their numbers and not their names, whose zeros may differ; then the same everywhere.
    in_order = sorted(found, key=lambda path: (found[path], path.name))
    return {path: found[path] for path in in_order}


def merge(folder: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Makes a corpus of the shards in a folder: writes its `manifest.json`, `meta.json`, tokenizer.

    The token files stay where they are, and are read by their first bytes and a sample alone.

    Args:
      folder: with `shard-001-of-064` and so on, all of them.
      overwrite: replaces what was merged before.

    Returns:
      The contents of `meta.json`.

    Raises:
      DataError: a shard is missing or there twice; or two were made of other inputs, with other
        settings or another tokenizer; or a file is not what its shard says.
      CheckpointError: the folder is merged already, and `overwrite` is not set.
    """
    folder = local_path(folder)
    # Before shards are read, which there may be thousands of.
    check_free(folder / NAME, overwrite=overwrite)
    shards = shard_folders(folder)
    _check_complete(folder, shards)
    prepared = [_read_shard(path, shard) for path, shard in shards.items()]
    first = prepared[0]
    for other in prepared[1:]:
        _check_settings(first, other)
        _check_tokenizer(first, other)
    manifest: Manifest = {part: [] for part in PARTS}
    for each in prepared:
        for part in PARTS:
            manifest[part] += each.manifest[part]
    if not manifest["train"]:
        expected = "something to train on"
        raise DataError(f"{folder}: expected {expected}, got {len(shards)} empty shards.")
    meta = _merged_meta([each.meta for each in prepared])
    _copy_tokenizer(first.path, folder, overwrite=overwrite)
    with replacing(folder / "meta.json", overwrite=overwrite) as temporary:
        write_json(temporary, meta)
    # The manifest last: without it the folder is not yet a corpus.
    with replacing(folder / NAME, overwrite=overwrite) as temporary:
        write_manifest(temporary, manifest)
    return meta


# Reading.


def _check_complete(folder: Path, shards: dict[Path, Shard]) -> None:
    """Raises `DataError` where shards are missing, there twice, or of two divisions."""
    if not shards:
        expected = "folders such as shard-001-of-064, which `prepare --shard 1/64` writes"
        raise DataError(f"{folder}: expected {expected}; there is none.")
    first = next(iter(shards))
    count = shards[first].count
    by_number: dict[int, Path] = {}
    for path, shard in shards.items():
        if shard.count != count:
            names = f"{first.name}, {path.name}"
            raise DataError(f"{folder}: expected shards of one count, got {names}.")
        # Numbers may be spelled with more zeros and with fewer.
        if shard.number in by_number:
            names = f"{by_number[shard.number].name}, {path.name}"
            raise DataError(f"{folder}: expected each shard once, got {names}.")
        by_number[shard.number] = path
    n_there = sum(1 <= number <= count for number in by_number)
    if n_there == len(by_number) == count:
        return
    # The first few alone, as the count in a name may be anything.
    missing = (number for number in range(1, count + 1) if number not in by_number)
    names = some(shard_name(Shard(number, count)) for number in islice(missing, MAX_LISTED))
    expected = f"{count} shards, got {len(by_number)}"
    n_missing = count - n_there
    raise DataError(f"{folder}: expected {expected}: {n_missing} missing, such as {names}.")


def _read_shard(path: Path, shard: Shard) -> Prepared:
    """Returns what a shard says of itself, its files under their names in the folder of all.

    Raises:
      DataError: it is another shard than its folder is called, or a file is not what it says.
    """
    meta = read_meta(path)
    expected = f"{shard.number}/{shard.count}"
    # A folder that was copied to another name would be read twice.
    if meta.get("shard") != expected:
        got = f"{meta.get('shard')!r:.40}"
        raise DataError(f'{path / "meta.json"}: expected the `shard` "{expected}", got {got}.')
    manifest = read_manifest(path)
    if manifest is None:
        raise DataError(f"{path}: expected a {NAME}; there is none.")
    dtype = meta.get("dtype", "uint16")
    vocab_size = meta.get("vocab_size", 0)
    renamed: Manifest = {part: [] for part in PARTS}
    for part in PARTS:
        for record in manifest[part]:
            file = token_file(path / record.name, dtype)
            check_record(file, record, vocab_size)
            name = f"{path.name}/{record.name}"
            renamed[part].append(record._replace(name=name))
    return Prepared(path, meta, renamed)


def _check_settings(first: Prepared, other: Prepared) -> None:
    """Raises `DataError` where two shards were not made of one corpus in one way."""
    names = first.meta.keys() | other.meta.keys()
    for name in sorted(names - OWN_SETTINGS):
        ours = first.meta.get(name)
        theirs = other.meta.get(name)
        if ours != theirs:
            got = f"{ours!r:.200} in {first.path.name}, {theirs!r:.200} in {other.path.name}"
            raise DataError(f"{first.path.parent}: expected one `{name}`, got {got}.")


def _check_tokenizer(first: Prepared, other: Prepared) -> None:
    """Raises `DataError` where two shards have not one tokenizer."""
    ours = _tokenizer_files(first.path)
    theirs = _tokenizer_files(other.path)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            got = f"two in {first.path.name} and {other.path.name}, by their {name}"
            raise DataError(f"{first.path.parent}: expected one tokenizer, got {got}.")


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Returns the files of a tokenizer by their names."""
    files = [file for file in folder.iterdir() if is_tokenizer_file(file.name)]
    return {file.name: file.read_bytes() for file in files}


# Writing.


def _merged_meta(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what `meta.json` says of several shards as one."""
    common = metas[0].keys() - {*PARTS, "shard"}
    merged = {name: value for name, value in metas[0].items() if name in common}
    for part in PARTS:
        counts = [meta[part] for meta in metas if part in meta]
        # A part that no shard has is not there.
        if counts:
            merged[part] = {name: sum(each[name] for each in counts) for name in counts[0]}
    return merged | {"shards": len(metas)}


def _copy_tokenizer(source: Path, folder: Path, *, overwrite: bool) -> None:
    """Copies the files of a tokenizer, in the place of those of another."""
    copied = _tokenizer_files(source)
    before = [file for file in folder.iterdir() if is_tokenizer_file(file.name)]
    for file in before:
        check_free(file, overwrite=overwrite)
    for name, content in copied.items():
        with replacing(folder / name, overwrite=overwrite) as temporary:
            temporary.write_bytes(content)
    for file in before:
        # What the other alone has would be read with it.
        if file.name not in copied:
            file.unlink()
