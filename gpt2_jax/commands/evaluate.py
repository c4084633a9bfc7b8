"""The command `evaluate`: measures a GPT-2. The protocols are those of `evaluation/tasks.py`."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt2_jax.commands.common import (
    add_mesh_argument,
    add_model_arguments,
    check_numbers,
    mesh_of,
    unwinding,
)
from gpt2_jax.evaluation.tasks import TASKS, Figure, Model, fetch
from gpt2_jax.generation import ranges
from gpt2_jax.pretrained.loading import load_pretrained

COUNTS = {
    "batch_size": ranges.COUNT,
    "limit": ranges.COUNT,
    "stride": ranges.COUNT,
}


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description="Measure a GPT-2 by the protocols of the published figures.",
        epilog=f"example: {program} --task perplexity --data book.txt --from_pretrained demo",
    )
    out.add_argument(
        "--task", nargs="+", required=True, choices=[*TASKS, "all"], help="what to measure"
    )
    out.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="each task's file in its published format, in the order of the tasks (default: from "
        "the hub)",
    )
    add_model_arguments(out)
    add_mesh_argument(out)
    # Without float64, for which JAX would have to be set to 64 bits before anything else.
    out.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "int8"), default="float32"
    )
    out.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="texts at once (default: 8)"
    )
    out.add_argument(
        "--stride", type=int, metavar="N", help="of perplexity's windows (default: half a window)"
    )
    out.add_argument("--limit", type=int, metavar="N", help="take the first N examples of a set")
    out.add_argument("--json", action="store_true", help="print one JSON object per figure")
    out.add_argument("--quiet", action="store_true", help="no progress")
    return out


def run(args: argparse.Namespace) -> int:
    """Measures, and prints each figure as soon as it is there."""
    # In the order of the table, in which --data then names the files.
    tasks = list(TASKS) if "all" in args.task else args.task
    check_numbers(args, COUNTS)
    check_files(args.data, tasks)  # before a model is loaded for minutes of work
    model = load_model(args)
    # `unwinding` is entered first, so that it still holds while the folder is removed.
    # The folder holds what is fetched from the hub; unwinding removes it.
    with unwinding(), tempfile.TemporaryDirectory() as folder:
        for number, task in enumerate(tasks):
            file = Path(args.data[number]) if args.data else fetch(task, Path(folder))
            for figure in TASKS[task](model, file):
                if args.json:
                    # Flushed, as figures take minutes each: whoever reads a pipe has those that are
                    # there.
                    print(json.dumps(as_record(figure)), flush=True)
                else:
                    print_figure(figure)
    return 0


def check_files(files: Sequence[str], tasks: Sequence[str]) -> None:
    """Raises `ValueError` unless there is a file for each task, or none at all."""
    if files and len(files) != len(tasks):
        expected = f"a file for each of {', '.join(tasks)}"
        raise ValueError(f"--data must name {expected}, got {len(files)}.")
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{file}: there is no such file.")


def load_model(args: argparse.Namespace) -> Model:
    """Returns what is to be measured, and how."""

    def progress(title: str, total: int) -> Callable[[int], None]:
        # On standard error, so that figures can be piped.
        bar = tqdm(total=total, desc=title, disable=args.quiet)

        def advance(n_done: int) -> None:
            bar.update(n_done)  # returns whether it has drawn itself, which is no one's business

        return advance

    config, params, tokenizer = load_pretrained(
        args.from_pretrained,
        dtype=args.dtype,
        mesh=mesh_of(args),
        tokenizer_name=args.model_name,
        revision=args.revision,
        missing_bytes=args.missing_bytes,
    )
    return Model(
        params=params,
        config=config,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        stride=args.stride,
        limit=args.limit,
        progress=progress,
    )


def as_record(figure: Figure) -> dict[str, Any]:
    """Returns a figure for JSON, which has no NaN: the standard error of a single question is."""
    record = figure._asdict()
    has_error = figure.stderr is not None and math.isfinite(figure.stderr)
    return record | {"stderr": figure.stderr if has_error else None}


def print_figure(figure: Figure) -> None:
    """Prints a figure with what is needed to compare it."""
    # The standard error with two digits: more would be noise of its own.
    stderr = "" if figure.stderr is None else f" +- {figure.stderr:.2g}"
    paper = "" if figure.paper is None else f"; the paper has {figure.paper:g}"
    print(f"{figure.task}, {figure.metric}: {figure.value:.4f}{stderr}{paper}")
    print(f"    {figure.protocol}; {figure.count:,} {figure.unit}", flush=True)
