"""What JAX's distributed runtime writes on standard error, in one line.

Where another process of a program ends, the runtime ends this one from a thread of its own, with
thirty lines of its log and a stack, and lets no Python code have a say. So what it writes goes by
way of a small process, this file, which knows what it means. Python's own standard error does not.
"""

import os
import re
import subprocess
import sys

LOST = (
    "Another process of this run has ended: its own messages say why."
    " Start all of them again, and resume."
)
SETTLED = b"\0"  # begins a line after which nothing is to be said any more
# Lines of its log that tell of other processes; and what it says last of all.
OF_RUNTIME = re.compile(rb"[WEF]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)")
FATAL = b"because the JAX distributed service detected fatal errors"


def divert(program: str) -> None:
    """Sends what is not Python's on standard error by way of the process."""
    from gpt2_jax_cli import Notes  # not at the top: the process has no path to the package

    sys.stderr.flush()
    shown = os.dup(2)
    reader, writer = os.pipe()
    command = [sys.executable, "-I", __file__, program]
    # A session of its own: Ctrl-C in a terminal goes to all processes of this one.
    subprocess.Popen(command, stdin=reader, stderr=shown, start_new_session=True)
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    sys.stderr = Notes(open(shown, "w", buffering=1, errors="replace"))  # type: ignore


def settle() -> None:
    """Says that this process tells of its end itself."""
    os.write(2, SETTLED + b"\n")


def _pass_on(program: str) -> None:
    """Writes what comes in, but for the runtime's log, which ends in one line if it is fatal."""
    held: list[bytes] = []
    for line in sys.stdin.buffer:
        if line.startswith(SETTLED):
            return
        # All that follows its first line, too, as its messages have many.
        if held or OF_RUNTIME.match(line):
            held.append(line)
        else:
            _write(line)
    log = b"".join(held)
    _write(f"{program}: {LOST}\n".encode() if FATAL in log else log)


def _write(text: bytes) -> None:
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()


if __name__ == "__main__":
    _pass_on(sys.argv[1])
