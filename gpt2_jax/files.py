"""Files on disk: text and JSON read, a file or folder replaced all or nothing, a bad one's error.

Knows no format but JSON, and neither models nor arrays: whoever reads or writes files can import it
without JAX.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# What says that a system, a file system or a container lets no two folders change places.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)

NameFilter = Callable[[str], bool]  # whether a file is meant, by its name

BYTE_ORDER_MARK = "\ufeff"  # Windows' editors begin UTF-8 files with it; it is no part of the text
MAX_LISTED = 20  # names in one line of a message: about two lines of a terminal
MAX_MESSAGE_BYTES = 4000  # about a screen; names in a file may be as long as the file

# An address as fsspec and others have them, also after `Path` has made one of its two slashes. Two
# letters at least: `C:/` is a folder.
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
MAX_JSON_BYTES = 2**30  # a hundred times the largest vocabulary

# First bytes of what often lies in a file's place -> what it is, and what to do about it.
LFS_MAGIC = b"version https://git-lfs"
ZIP_MAGIC = b"PK\x03\x04"
GZIP_MAGIC = b"\x1f\x8b\x08"
STAND_INS = {
    LFS_MAGIC: "a Git LFS pointer, which only names the file: run `git lfs pull`",
    b"<!doctype html": "an HTML page: download the file itself",
    b"<html": "an HTML page: download the file itself",
    ZIP_MAGIC: "a zip archive: unpack it",
    GZIP_MAGIC: "a gzip archive: unpack it",
}
MAX_MAGIC = 64  # bytes read to tell one; white space may come first

# What may lie at a path besides files and folders, by `stat`'s format.
SPECIAL_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what was asked for; the message says what to do.

    Examples:
      >>> try:
      ...     gpt2_jax.load(folder / "nothing")
      ... except gpt2_jax.CheckpointError as error:
      ...     print("nothing" in str(error), isinstance(error, ValueError))
      True True
    """

    def __init__(self, message: object):
        super().__init__(readable(str(message)))


# Messages.


def readable(text: str) -> str:
    """Returns a message of at most `MAX_MESSAGE_BYTES`, control characters in it escaped.

    Names and values from a file go into messages, and could move a terminal's cursor.
    """
    # No more is encoded than could stay: the rest may be gigabytes.
    start = text[:MAX_MESSAGE_BYTES]
    characters = [c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in start]
    escaped = "".join(characters).encode()
    if len(escaped) <= MAX_MESSAGE_BYTES and len(start) == len(text):
        return escaped.decode()
    # Half a character may stand at the cut.
    return escaped[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."


def some(names: Iterable[object]) -> str:
    """Returns names for a message: the first, and how many more there are."""
    all_names = [f"{name!s:.100}".replace("\n", "\\n") for name in names]
    listed = ", ".join(all_names[:MAX_LISTED])
    n_more = len(all_names) - MAX_LISTED
    return f"{listed} and {n_more} more" if n_more > 0 else listed


def listing(folder: Path) -> str:
    """Returns the names of a folder's first files, for a message that says what was found."""
    names = sorted(file.name for file in folder.iterdir())
    return some(names) or "an empty folder"


# Paths.


def local_path(path: str | Path) -> Path:
    """Returns a path on this machine, with `~` as its user's home.

    Raises:
      CheckpointError: it is the address of something elsewhere, or names a user who is not there.
    """
    if ADDRESS.match(str(path)):
        raise CheckpointError(f"{path}: expected a path on this machine, got an address.")
    if "\0" in str(path):  # the system's own error would be about its argument
        raise CheckpointError(f"{path}: expected a path, got one with a null byte.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # no such user, or one without a home
        raise CheckpointError(f"{path}: expected a path, got an unknown home.") from error


def kind_of(path: Path) -> str | None:
    """Returns what lies at a path, a link as such, if it is neither file nor folder nor nothing."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return SPECIAL_KINDS.get(stat.S_IFMT(mode))


# Reading.


def check_content(file: Path, allowed: tuple[bytes, ...] = ()) -> None:
    """Raises unless a file may be what its name says: not a pointer or a page in its place.

    Args:
      file: the file.
      allowed: the keys of `STAND_INS` that the format itself begins with.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is a device or the like, or by its first bytes something else.
    """
    # Before it is opened: a FIFO would wait for a writer, and a device may have no end.
    if file.exists() and not file.is_file():
        kind = "a folder" if file.is_dir() else kind_of(file.resolve()) or "something else"
        raise CheckpointError(f"{file}: expected a file, got {kind}.")
    with file.open("rb") as opened:
        start = opened.read(MAX_MAGIC).lstrip().lower()
    for magic, description in STAND_INS.items():
        if start.startswith(magic.lower()) and magic not in allowed:
            raise CheckpointError(f"{file}: got {description}.")


def decode_text(content: bytes, source: str | Path) -> str:
    """Returns the text of a file's bytes, in UTF-8, without a byte order mark.

    Raises:
      ValueError: it is not UTF-8, or a Git LFS pointer; the message names the source.
    """
    if content.startswith(LFS_MAGIC):
        raise ValueError(f"{source}: expected a text, got {STAND_INS[LFS_MAGIC]}.")
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


def read_json_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: a `ValueError`; the file is not UTF-8, not JSON, nested too deeply, or holds
        something else than an object.
    """
    check_content(file)
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: expected JSON, got {size:,} bytes, which is too long.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also `UnicodeDecodeError`, which is one
        raise CheckpointError(f"{file}: expected JSON, got {error}.") from error
    except RecursionError as error:  # Python's parser calls itself for every bracket
        got = "one nested too deeply to read"
        raise CheckpointError(f"{file}: expected JSON, got {got}.") from error
    if not isinstance(values, dict):
        got = type(values).__name__
        raise CheckpointError(f"{file}: expected an object, got {got}.")
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

    However the process ends, `target` is the whole old one or the whole new one. Of several writers
    the last wins.

    Args:
      target: the file or folder to write. Folders above it are made.
      overwrite: replaces a file, or a folder that is not empty.
      keep: for a folder that is overwritten: called with the name of each of its files, says
        whether to keep it, unless it is written anew. By default none is kept.

    Raises:
      CheckpointError: `target` is in use and `overwrite` is not set; a folder would replace a file,
        or a file a folder; or a link or a device is there.
      OSError: it cannot be written; the error names a file.
    """
    target = local_path(target)
    # Not `target.resolve()`, which would write to what a link leads to.
    target = target.parent.resolve() / target.name
    check_free(target, overwrite=overwrite, keep=keep)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(target) as workspace:
        new = workspace / "new" / target.name  # its own name, as its ending may say its format
        try:
            yield new
        except OSError as error:
            # A disk that fills up has no name for the file; other errors have that of a place
            # which will be gone.
            name = str(error.filename or new)
            if error.errno is None or not name.startswith(str(new)):
                raise
            shown = str(target) + name.removeprefix(str(new))
            raise type(error)(error.errno, error.strerror, shown) from error
        # Again: another writer may have come first.
        check_free(target, overwrite=overwrite, keep=keep)
        _put(new, target, workspace, keep)


def check_free(
    target: str | Path, *, overwrite: bool = False, keep: NameFilter | None = None
) -> None:
    """Raises `CheckpointError` where `replacing` would, before there is anything to write."""
    target = local_path(target)
    kind = kind_of(target)
    if kind is not None:
        raise CheckpointError(f"{target}: expected a file, a folder or nothing, got {kind}.")
    is_file = target.is_file()
    in_use = is_file or (target.is_dir() and any(target.iterdir()))
    if in_use and not overwrite:
        expected = "a new or empty place, or `overwrite`"
        raise CheckpointError(f"{target} exists already: expected {expected}.")
    if is_file and keep is not None:
        raise CheckpointError(f"Expected a folder to replace, got the file {target}.")


def _put(new: Path, target: Path, workspace: Path, keep: NameFilter | None) -> None:
    """Puts the file or folder `new` in the place of `target`."""
    if not new.is_dir():
        if target.is_dir():
            raise CheckpointError(f"Expected a file to replace, got the folder {target}.")
        new.replace(target)
        return
    if target.is_file():
        raise CheckpointError(f"Expected a folder to replace, got the file {target}.")
    try:
        new.rename(target)  # which an empty folder gives way to
    except OSError:
        if not target.is_dir():
            raise
        _replace_folder(new, target, workspace, keep)


def _replace_folder(new: Path, target: Path, workspace: Path, keep: NameFilter | None) -> None:
    """Puts the folder `new` in the place of a full one, of which it keeps what `keep` wants."""
    # Linked, not moved: until the folders change places, and after it, both are whole.
    _link_kept(target, new, keep)
    try:
        _exchange(new, target)
        old = new
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        # In two steps, where there is no other way. `_discard` goes back from between them.
        old = workspace / "old" / target.name
        old.parent.mkdir()
        target.rename(old)
        new.rename(target)
    _link_kept(old, target, keep)  # what has come since


def _exchange(a: Path, b: Path) -> None:
    """Lets two files or folders change places, in one step: Linux's `renameat2`.

    Raises:
      OSError: `ENOSYS` or `EINVAL` where the system or the file system has no such thing.
    """
    is_linux = sys.platform == "linux"
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if is_linux else None
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    here = -100  # AT_FDCWD; the paths are absolute anyway
    exchange = 2  # RENAME_EXCHANGE, linux/fs.h
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def _link_kept(old: Path, new: Path, keep: NameFilter | None) -> None:
    """Gives the folder `new` those of another's files and folders that `keep` wants."""
    if keep is None:
        return
    for file in old.iterdir():
        if not keep(file.name) or os.path.lexists(new / file.name):
            continue
        if file.is_dir() and not file.is_symlink():
            # Links in it stay links, wherever they lead.
            shutil.copytree(file, new / file.name, symlinks=True, copy_function=_link)
        else:
            _link(file, new / file.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Gives a file a second name or, where the file system cannot, a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        if os.path.lexists(target):
            raise
        shutil.copy2(source, target, follow_symlinks=False)


# Workspaces: hidden folders beside a target, in which what takes its place is made. Beside it, as a
# rename is atomic within one file system only.


@contextlib.contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """Yields a folder of this writer's own, which vanishes afterwards."""
    _sweep(target)
    workspace, descriptor = _claim(target)
    with contextlib.ExitStack() as stack:
        # The last first: it is unlocked when it is gone.
        if descriptor is not None:
            stack.callback(os.close, descriptor)
        stack.callback(_discard, workspace, target)
        (workspace / "new").mkdir()
        yield workspace


def _prefix(target: Path) -> str:
    """Returns how the names of a target's workspaces begin, so that the next writer finds them."""
    # Cut, as a name of 255 bytes leaves no room for more.
    return f".{target.name[:50]}.gpt2_jax-"


def _claim(target: Path) -> tuple[Path, int | None]:
    """Returns a new workspace, and the descriptor that locks it where there are locks."""
    while True:
        workspace = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            descriptor = lock(workspace)
        except (BlockingIOError, FileNotFoundError):
            continue  # before it was locked, another writer took it for one that was left
        except OSError:
            return workspace, None
        if os.path.lexists(workspace):  # which raises nothing
            return workspace, descriptor
        os.close(descriptor)


def _sweep(target: Path) -> None:
    """Removes the workspaces of writers that were killed."""
    for workspace in target.parent.iterdir():
        if not workspace.name.startswith(_prefix(target)):
            continue
        # `OSError`: it is locked by a writer that lives, or is gone.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(os.close, lock(workspace))
            is_ours = workspace.lstat().st_uid == os.getuid()
            # Whoever else calls a folder so has other files in it.
            if is_ours and {file.name for file in workspace.iterdir()} <= {"new", "old"}:
                _discard(workspace, target)


def _discard(workspace: Path, target: Path) -> None:
    """Removes a workspace, after putting back an old target whose place was not taken."""
    old = workspace / "old" / target.name
    if old.exists() and not os.path.lexists(target):
        old.rename(target)  # if that fails, the workspace stays: it holds the only copy
    shutil.rmtree(workspace, ignore_errors=True)


def lock(path: Path) -> int:
    """Locks a file or folder that exists; returns the descriptor, whose closing unlocks it.

    The lock goes with its process, however that ends.

    Raises:
      BlockingIOError: another process or thread has locked it.
      OSError: it cannot be opened, or there are no locks on this system.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path))
    # Over NFS only what may be written can be locked; no folder can be opened for that.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
