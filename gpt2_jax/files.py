"""Writing files all or nothing, and the error for what stands on disk. Knows no format and no array."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what was asked for; the message says which, and what to do."""


@contextlib.contextmanager
def replacing(
    target: str | Path, *, overwrite: bool = False, keep: Callable[[str], bool] | None = None
) -> Iterator[Path]:
    """Yields a fresh path beside `target`, which takes the place of `target` if the body succeeds, else vanishes.

    A folder that is overwritten keeps those of its files that are not rewritten and whose name `keep` wants.
    """
    target = Path(target).expanduser().resolve()
    in_use = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if in_use and not overwrite:
        raise CheckpointError(
            f"{target} exists already: expected a new or empty place, or `overwrite`."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}-new-{target.name}")
    old = target.with_name(f".{os.getpid()}-old-{target.name}")
    try:
        yield temporary
        if temporary.is_dir() and in_use:
            if target.is_file():
                raise CheckpointError(f"Expected a folder to replace, got the file {target}.")
            target.rename(old)
            temporary.rename(target)
            for file in old.iterdir():
                if keep and keep(file.name) and not (target / file.name).exists():
                    file.rename(target / file.name)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      ValueError: the file holds no JSON, or something other than an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}.")
    return values


def listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())[:20]) or "an empty folder"
