"""Which command a command line means, and how it ends. Knows the commands by name alone.

A command is a module beside this one with two functions: `parser(program)` returns the parser of
its arguments, and `run(args)` does what they ask for. The exit codes, and the one line on standard
error that explains each but the first, are decided here:

* 0: done, or nobody reads the output any more, as behind `| head`;
* 1: a run cannot go on (`CommandFailed`), such as training whose loss is not finite, or a model
  whose logits are not;
* 2: a mistake of the user, which the library reports as a `ValueError`, `OSError` or `ImportError`,
  or too little memory;
* 130: Ctrl-C, which `gpt2_jax_cli` answers, as it must be there before this module is.

Any other exception is a defect here and ends in its traceback.
"""

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from gpt2_jax.commands.common import COMMANDS, CommandFailed
from gpt2_jax.files import readable

DEFAULT = "generate"


def run(arguments: Sequence[str], command: str | None = None, program: str = "gpt2-jax") -> int:
    """Runs a command and returns the exit code.

    Args:
      arguments: of the command line. Where `command` is not given they may begin with its name;
        otherwise it is `generate`, and so `gpt2-jax "train"` is a command and no prompt.
      command: one of `COMMANDS`.
      program: what messages and the help call the program.

    Raises:
      KeyboardInterrupt: a command was interrupted that had something to undo, and has undone it.
    """
    if command is None and arguments and arguments[0] in COMMANDS:
        command = arguments[0]
        arguments = arguments[1:]
        program = f"{program} {command}"
    try:
        with warnings.catch_warnings():  # which puts back what shows them elsewhere
            warnings.showwarning = _shower(program)
            return _run(command or DEFAULT, arguments, program)
    # Before `OSError`, of which it is one.
    except BrokenPipeError:
        return 0
    except (CommandFailed, FloatingPointError) as error:
        _say(program, error)
        return 1
    except (ValueError, OSError, ImportError) as error:
        _say(program, error)
        return 2
    except MemoryError:
        _say(program, "There is not enough memory for this.")
        return 2
    except RuntimeError as error:
        # JAX's, of a device; it is not imported for its name.
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        _say(program, f"There is not enough memory for this: {error}")
        return 2


def _say(program: str, error: object) -> None:
    """Explains an exit code on standard error, without the control characters of a file's names."""
    print(readable(f"{program}: {error}"), file=sys.stderr)


def _shower(program: str) -> Callable[..., None]:
    """Returns what shows a warning in one line, without the place in the library it comes from."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{program}: {message}", file=sys.stderr)

    return show


def _run(command: str, arguments: Sequence[str], program: str) -> int:
    """Runs a command and returns the exit code of what went well."""
    # The one that is run: another may import an extra that is not installed.
    module = importlib.import_module(f"gpt2_jax.commands.{command}")
    # Where `gpt2_jax_cli` has stopped the collector: what was imported stays, and is not looked at.
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    try:
        args = module.parser(program).parse_args(arguments)
    except SystemExit as end:  # `argparse` has printed the help, with 0, or a mistake, with 2
        return int(end.code or 0)
    if getattr(args, "quiet", False):
        # Before the hub's library is imported, which then draws no bars and gives no advice.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_HUB_VERBOSITY"] = "error"
    code = module.run(args)
    if sys.stdout is not None:
        sys.stdout.flush()  # here, where an error is still reported: a full disk, or a closed pipe
    return code
