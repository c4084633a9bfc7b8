"""The first lines of every command: they answer Ctrl-C before anything slow is imported.

A module of its own beside the package, so that nothing of it, nor JAX, is imported before. What the
commands do, and all their other messages and exit codes, stand in `gpt2_jax.commands`.
"""

import gc
import os
import signal
import sys


def main(command: str | None = None, program: str = "gpt2-jax") -> None:
    """Runs a command on the arguments of this process, and ends the process.

    Ctrl-C ends it with one line and the exit code 130, from the first statement here to the last.

    Args:
      command: a module of `gpt2_jax.commands`, such as "train"; by default the arguments name it.
      program: what messages and the help call the program.
    """

    _open_standard_streams()

    def end_interrupted(*_: object) -> None:
        # No exception: libraries swallow it, and print it as one more traceback, while they are
        # imported or torn down. Those who have something to undo ask for one: see
        # `gpt2_jax.commands.common.unwinding`.
        line_break = "\n" if os.isatty(2) else ""  # a terminal shows ^C
        _write(f"{line_break}{program}: interrupted\n")
        os._exit(130)

    def end_if_interrupted(unraisable: "sys.UnraisableHookArgs") -> None:
        # An exception within a callback, such as a finaliser, goes no further than here.
        if unraisable.exc_type is KeyboardInterrupt:
            end_interrupted()
        sys.__unraisablehook__(unraisable)

    # A shell that starts a job in the background has its Ctrl-C ignored, which is to stay so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end_interrupted)
    sys.unraisablehook = end_if_interrupted
    # Until all is imported: the collector would look through every module's objects again and
    # again, for a tenth of a start, and none of them is ever garbage.
    gc.disable()
    try:
        from gpt2_jax.commands.main import run

        code = run(sys.argv[1:], command, program)
    except KeyboardInterrupt:
        _flush(sys.stdout)
        end_interrupted()
        return
    # Without Python's own end, in which it no longer answers to Ctrl-C, and which would wait for
    # threads whose work nobody wants.
    _flush(sys.stdout)
    _flush(sys.stderr)
    os._exit(code)


class Notes:
    """Standard error, of which the reader may be gone: what is said then is said to nobody.

    Training, for one, is not to end because nobody watches it.
    """

    def __init__(self, stream: object):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, if it can be written."""
        try:
            self._stream.write(text)  # type: ignore
        except (OSError, ValueError):
            pass
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, if it can be written."""
        _flush(self._stream)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _open_standard_streams() -> None:
    """Gives each standard stream that is closed a place to go to: nowhere.

    The next file that is opened would have the number of a closed one, and whatever writes to that
    number, such as XLA's log, would write into the file; `print` to a missing standard error
    writes to standard output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)
    sys.stderr = Notes(sys.stderr)  # type: ignore
    # What a stream's encoding lacks becomes "?", not a traceback in the middle of a text.
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore


def _write(line: str) -> None:
    """Writes to standard error, past its buffer, in which a signal may have interrupted a write."""
    try:
        os.write(2, line.encode())
    except OSError:
        pass  # it is closed


def _flush(stream: object) -> None:
    """Writes what a stream has buffered; an error of it was reported before, or is no matter."""
    try:
        stream.flush()  # type: ignore
    except (AttributeError, OSError, ValueError):
        pass  # there is none, nobody reads it any more, or it is closed
