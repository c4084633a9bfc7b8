"""What the commands share: their names, the arguments that choose a model, reports, and Ctrl-C."""

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from jax.sharding import Mesh

from gpt2_jax.generation.ranges import Range
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import MISSING_BYTES

# Here and not in `main`: the help of `generate`, which is the default, lists them too.
COMMANDS = {
    "generate": "continue prompts; the default",
    "train": "train on token files, from scratch or from pretrained weights",
    "prepare": "turn texts into token files",
    "evaluate": "measure a model by the protocols of the published figures",
    "inspect": "draw what a model computes for a prompt",
    "convert": "convert weights between formats: HF's, GGUF, nanoGPT's, Flax's, one file of params",
}

DEFAULT_MODEL = "gpt2"
Report = Callable[[str], None]  # takes a line for standard error


class CommandFailed(Exception):
    """A run cannot go on, through no mistake in its arguments."""


# `_ActionsContainer` is what parsers and their groups of arguments have in common.
def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the arguments that choose a model and its tokenizer."""
    parser.add_argument(
        "--from_pretrained",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a Hugging Face hub id (gpt2, gpt2-medium, distilgpt2, user/name, ...), a local "
        "folder or file, or demo, the model in the package (default: gpt2; to continue a prompt "
        "without a network, demo)",
    )
    parser.add_argument(
        "--model_name",
        metavar="NAME",
        help="whose tokenizer to use: a folder, hub id or GPT-2 size (default: the model's own)",
    )
    parser.add_argument(
        "--missing_bytes",
        choices=MISSING_BYTES,
        default="error",
        help="what becomes of bytes that the vocabulary lacks: an error, or drop them as HF does "
        "(default: error)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository")


def add_mesh_argument(parser: argparse._ActionsContainer) -> None:
    """Adds the argument that spreads a model over several devices."""
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="spread the model over devices, such as tensor=4 or data=2,fsdp=4: rows over data and "
        "fsdp, params over fsdp and tensor (default: one device)",
    )


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """Returns the mesh that is asked for.

    Raises:
      ValueError: it cannot be made: see `sharding.make_mesh`.
    """
    if args.mesh is None:
        return None
    try:
        return make_mesh(args.mesh)
    except ValueError as error:
        raise ValueError(f"--mesh {args.mesh}: {error}") from error


def check_numbers(args: argparse.Namespace, ranges: Mapping[str, Range]) -> None:
    """Raises `ValueError` for a number out of its range; one that is not given is in order."""
    for name, expected in ranges.items():
        value = getattr(args, name)
        if value is not None and not expected.contains(value):
            raise ValueError(f"--{name} must be {expected.asked(value)}, got {value}.")


def reporter(quiet: bool) -> Report:
    """Returns what reports a line on standard error, or nothing when `quiet`."""

    def report(line: str) -> None:
        if not quiet:
            # Standard output is for results alone, so that it can be piped.
            print(line, file=sys.stderr, flush=True)

    return report


def as_json(values: Mapping[str, Any]) -> str:
    """Returns an object as a line of JSON that standard output can spell without loss."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return json.dumps(values, ensure_ascii=encoding.lower() not in ("utf-8", "utf8"))


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Lets Ctrl-C raise `KeyboardInterrupt` in the body, so that what it has begun is undone.

    Elsewhere it ends the process at once: see `gpt2_jax_cli`. A second one does so here, too,
    however long the first takes to unwind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    # What stands there is put back, whatever it is: notebooks and tests have handlers of their own.
    outside = signal.getsignal(signal.SIGINT)

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        del signal_number, frame
        # First of all: a second Ctrl-C meets the handler from outside, which ends the process.
        signal.signal(signal.SIGINT, outside)
        raise KeyboardInterrupt

    # Ignored stays ignored, as in jobs that a shell has put in the background.
    if outside is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outside)
