"""Shards of a corpus: what their folders are called, and how they become one.

Each is a folder of its own, whole or not there, that any machine can have written. Merging moves no
token: what it writes says which files are the corpus.
"""

import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from gpt2_jax.files import MAX_LISTED, check_free, local_path, replacing, some, write_json
from gpt2_jax.tokenizer_files import is_tokenizer_file
from gpt2_jax.training.manifest import (
    NAME,
    PARTS,
    FileRecord,
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


def shard_name(shard: Shard) -> str:
    """Returns what a shard's folder is called."""
    return f"shard-{shard.number:03}-of-{shard.count:03}"


def shard_folders(folder: Path) -> dict[Path, Shard]:
    """Returns the shards in a folder, in their order."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[path] = Shard(int(match[1]), int(match[2]))
    return dict(sorted(found.items(), key=lambda item: item[1]))


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
    check_free(folder / NAME, overwrite=overwrite)
    shards = shard_folders(folder)
    _check_complete(folder, shards)
    metas = {path: _meta_of(path, shard) for path, shard in shards.items()}
    first = next(iter(shards))
    for path, meta in metas.items():
        _check_agree(first, metas[first], path, meta)
    manifest: Manifest = {part: [] for part in PARTS}
    for path, meta in metas.items():
        for part, records in _checked_records(path, meta).items():
            manifest[part] += records
    meta = _merged_meta(list(metas.values()))
    if not manifest["train"]:
        raise DataError(
            f"{folder}: expected something to train on, got {len(shards)} empty shards."
        )
    # The manifest last: without it the folder is not yet a corpus.
    _copy_tokenizer(first, folder, overwrite=overwrite)
    with replacing(folder / "meta.json", overwrite=overwrite) as temporary:
        write_json(temporary, meta)
    with replacing(folder / NAME, overwrite=overwrite) as temporary:
        write_manifest(temporary, manifest)
    return meta


def _copy_tokenizer(source: Path, folder: Path, *, overwrite: bool) -> None:
    """Copies the files of a tokenizer, in the place of those of another."""
    before = [file for file in folder.iterdir() if is_tokenizer_file(file.name)]
    for file in before:
        check_free(file, overwrite=overwrite)
    for file in sorted(source.iterdir()):
        if is_tokenizer_file(file.name):
            with replacing(folder / file.name, overwrite=overwrite) as temporary:
                shutil.copyfile(file, temporary)
    for file in before:
        # What the other alone has would be read with it.
        if not (source / file.name).is_file():
            file.unlink()


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
            raise DataError(
                f"{folder}: expected shards of one count, got {first.name}, {path.name}."
            )
        if shard.number in by_number:
            twice = f"{by_number[shard.number].name}, {path.name}"
            raise DataError(f"{folder}: expected each shard once, got {twice}.")
        by_number[shard.number] = path
    # By what is there, as a count in a name may be anything.
    if len(by_number) != count or max(by_number) > count or min(by_number) < 1:
        n_missing = count - len(by_number.keys() & range(1, count + 1))
        missing = (number for number in range(1, count + 1) if number not in by_number)
        names = some(shard_name(Shard(number, count)) for number in islice(missing, MAX_LISTED))
        expected = f"{count} shards, got {len(by_number)}"
        raise DataError(f"{folder}: expected {expected}: {n_missing} missing, such as {names}.")


def _meta_of(path: Path, shard: Shard) -> dict[str, Any]:
    """Returns the `meta.json` of a shard, which must be that of the shard its folder is called."""
    meta = read_meta(path)
    expected = f"{shard.number}/{shard.count}"
    if meta.get("shard") != expected:
        got = f"{meta.get('shard')!r:.40}"
        raise DataError(f'{path / "meta.json"}: expected the `shard` "{expected}", got {got}.')
    return meta


def _check_agree(first: Path, ours: dict[str, Any], path: Path, theirs: dict[str, Any]) -> None:
    """Raises `DataError` where two shards are not of one corpus."""
    for name in sorted((ours.keys() | theirs.keys()) - OWN_SETTINGS):
        if ours.get(name) != theirs.get(name):
            values = f"{ours.get(name)!r:.200} in {first.name}, {theirs.get(name)!r:.200}"
            raise DataError(f"{first.parent}: expected one `{name}`, got {values} in {path.name}.")
    names = {file.name for file in (*first.iterdir(), *path.iterdir())}
    for name in sorted(filter(is_tokenizer_file, names)):
        files = [folder / name for folder in (first, path)]
        contents = [file.read_bytes() if file.is_file() else None for file in files]
        if contents[0] != contents[1]:
            where = f"two in {first.name} and {path.name}"
            raise DataError(
                f"{first.parent}: expected one tokenizer, got {where}, by their {name}."
            )


def _checked_records(path: Path, meta: dict[str, Any]) -> Manifest:
    """Returns the files of a shard under the names that they have in the folder of all."""
    manifest = read_manifest(path)
    if manifest is None:
        raise DataError(f"{path}: expected a {NAME}; there is none.")
    renamed = {}
    for part, records in manifest.items():
        for record in records:
            file = token_file(path / record.name, meta.get("dtype", "uint16"))
            check_record(file, record, meta.get("vocab_size", 0))
        renamed[part] = [_renamed(record, path) for record in records]
    return renamed


def _renamed(record: FileRecord, path: Path) -> FileRecord:
    return record._replace(name=f"{path.name}/{record.name}")


def _merged_meta(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what `meta.json` says of several shards as one."""
    merged = {name: value for name, value in metas[0].items() if name not in (*PARTS, "shard")}
    for part in PARTS:
        counts = [meta[part] for meta in metas if part in meta]
        # A part that no shard has is not there.
        if counts:
            merged[part] = {name: sum(each[name] for each in counts) for name in counts[0]}
    return merged | {"shards": len(metas)}
