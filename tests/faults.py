"""Faults at system calls: each call of Python's `os` fails once, or kills the process there.

Run as a program, it replaces a folder again and again in processes that kill themselves, the first
before the first call, the next after it, and so on; it prints how many there were, and what was
found wrong.
"""

import errno
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

CALLS = ("rename", "replace", "link", "mkdir", "rmdir", "unlink", "open", "close", "stat", "lstat")
CALLS += ("scandir", "listdir", "chmod", "utime")


class Faults:
    """A context manager in which `act` is called at the `at`-th system call, counted from 0."""

    def __init__(self, at, act):
        self.at = at
        self.act = act
        self.n_calls = 0
        self.real = {}

    def __enter__(self):
        for name in CALLS:
            self.real[name] = getattr(os, name)
            setattr(os, name, self._counted(name))
        return self

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(os, name, function)

    def _counted(self, name):
        function = self.real[name]

        def call(*args, **options):
            self.n_calls += 1
            if self.n_calls == self.at + 1:
                if name == "close":
                    function(*args)  # Linux closes a file whatever it says
                self.act(name)
            return function(*args, **options)

        if function in os.supports_follow_symlinks:  # where `shutil` looks whom it may ask
            os.supports_follow_symlinks.add(call)
        return call


def failing(code):
    """Returns what raises the system's error of a code."""

    def fail(name):
        raise OSError(code, os.strerror(code), name)

    return fail


def no_exchange(*_):
    """Stands for the exchange of a system that has none."""
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


# A folder with weights, which are replaced, and files of the user's, which are not.

KEPT = {"notes.txt": "mine", "runs/log.txt": "mine too", "link": "-> notes.txt"}
OLD = {"weights": "old", "weights-2": "old"} | KEPT
NEW = {"weights": "new"} | KEPT


def make(folder):
    """Writes the old folder."""
    (folder / "runs").mkdir(parents=True)
    (folder / "link").symlink_to("notes.txt")
    for name, text in OLD.items():
        if name != "link":
            (folder / name).write_text(text)


def contents(folder):
    """Returns a folder's files by their names."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = f"-> {os.readlink(file)}"
        elif file.is_file():
            found[name] = file.read_text()
    return found


def replace(files, folder):
    """Replaces it, by the module `files`."""
    keep = lambda name: not name.startswith("weights")  # noqa: E731
    with files.replacing(folder, overwrite=True, keep=keep) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")


def found_wrong(files, folder, after_repair=False):
    """Returns what is wrong after a fault, "" if nothing; and writes once more, which repairs."""
    wrong = ""
    found = contents(folder)
    # Where folders cannot change places, what was killed between two steps is found by the next.
    if found not in (OLD, NEW) and not after_repair:
        wrong = f"after the fault: {found}"
    replace(files, folder)
    if contents(folder) != NEW:
        wrong += f"after the next: {contents(folder)}"
    left = [file.name for file in folder.parent.iterdir() if file != folder]
    if left:
        wrong += f"left behind: {left}"
    return wrong


def kill_everywhere(files, every, after_repair):
    """Kills a process at every so many of its system calls; returns how many were, and faults."""
    n_killed = 0
    wrongs = []
    at = 0
    while True:
        root = Path(tempfile.mkdtemp())
        make(root / "model")
        child = os.fork()
        if child == 0:
            with Faults(at, lambda _: os.kill(os.getpid(), signal.SIGKILL)):
                replace(files, root / "model")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        wrong = found_wrong(files, root / "model", after_repair)
        shutil.rmtree(root)
        if wrong:
            wrongs.append(f"call {at}: {wrong}")
        if status == 0:
            return n_killed, wrongs
        n_killed += 1
        at += every


if __name__ == "__main__":
    # By its path, without the package: JAX's threads do not survive a fork.
    spec = importlib.util.spec_from_file_location("files", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    has_exchange = sys.argv[3] == "exchange"
    if not has_exchange:
        module._exchange = no_exchange
    n, problems = kill_everywhere(module, int(sys.argv[2]), after_repair=not has_exchange)
    print(n, *problems, sep="\n")
