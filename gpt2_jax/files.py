"""Files on disk: text and JSON read, a file or folder replaced all or nothing, a bad one's error.

Knows no format but JSON, and neither models nor arrays: whoever reads or writes files can import it
without JAX.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

NameFilter = Callable[[str], bool]  # whether a file is meant, by its name

BYTE_ORDER_MARK = "\ufeff"  # Windows' editors begin UTF-8 files with it; it is no part of the text
MAX_LISTED = 20  # names of files in one message: about two lines of a terminal


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what was asked for; the message says what to do."""


# Text.


def decode_text(content: bytes, source: str | Path) -> str:
    """Returns the text of a file's bytes, in UTF-8, without a byte order mark.

    Raises:
      ValueError: it is not UTF-8; the message names the source.
    """
    # Valid UTF-8 all the same: in UTF-16 and UTF-32 the letters of English are letters and zeros.
    if b"\0" in content[:4]:
        raise ValueError(f"{source}: expected UTF-8, got zero bytes, as in UTF-16.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{source}: expected UTF-8, but {where}.") from None
    return text.removeprefix(BYTE_ORDER_MARK)


def lines_of(text: str) -> list[str]:
    r"""Returns the lines of a text without their ends, `\n` or `\r\n`."""
    # Not `splitlines`, which also splits at form feeds and at the line separators of Unicode: JSON
    # and stories may hold those inside a line.
    return [line.removesuffix("\r") for line in text.split("\n")]


# JSON.


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8, not JSON, nested too deeply, or holds something else than
        an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also `UnicodeDecodeError`, which is one
        raise ValueError(f"{file}: expected JSON, got {error}.") from error
    except RecursionError as error:  # Python's parser calls itself for every bracket
        raise ValueError(f"{file}: expected JSON, got one nested too deeply to read.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, got {type(values).__name__}.")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# Replacing.


@contextlib.contextmanager
def replacing(
    target: str | Path, *, overwrite: bool = False, keep: NameFilter | None = None
) -> Iterator[Path]:
    """Yields a fresh path, which takes the place of `target` if the body succeeds, else vanishes.

    Args:
      target: the file or folder to write. Folders above it are made.
      overwrite: replaces a file, or a folder that is not empty.
      keep: called with the name of each file in a folder that is overwritten: whether to keep it,
        unless it is written anew. By default none is kept.

    Raises:
      CheckpointError: `target` is in use and `overwrite` is not set, or a folder would replace a
        file.
    """
    target = Path(target).expanduser().resolve()
    in_use = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if in_use and not overwrite:
        expected = "a new or empty place, or `overwrite`"
        raise CheckpointError(f"{target} exists already: expected {expected}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, not in /tmp: a rename is atomic within one file system only. The process's
    # id keeps two writers apart, and the leading dot keeps half a file out of a shell's `*`.
    temporary = target.with_name(f".{os.getpid()}-new-{target.name}")
    try:
        yield temporary
        if temporary.is_dir() and in_use:
            _replace_folder(target, temporary, keep)
        else:
            # An empty folder gives way to a rename, as a file does.
            temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _replace_folder(target: Path, new: Path, keep: NameFilter | None) -> None:
    """Puts the folder `new` in the place of a full one, of which it keeps what `keep` wants."""
    if target.is_file():
        raise CheckpointError(f"Expected a folder to replace, got the file {target}.")
    # No rename replaces a full folder. Between these two the target is missing, but nothing is
    # lost: whoever is interrupted here finds the old folder beside it.
    old = target.with_name(f".{os.getpid()}-old-{target.name}")
    target.rename(old)
    new.rename(target)
    for file in old.iterdir():
        is_kept = keep is not None and keep(file.name)
        if is_kept and not (target / file.name).exists():
            file.rename(target / file.name)
    shutil.rmtree(old)


def listing(folder: Path) -> str:
    """Returns the names of a folder's first files, for a message that says what was found."""
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:MAX_LISTED]) or "an empty folder"
