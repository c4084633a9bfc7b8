"""Measures a GPT-2: `python scripts/evaluate.py --task lambada --data lambada_test.jsonl`. See `gpt2_jax/tasks.py`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from gpt2_jax.evaluation.tasks import TASKS, Figure, Model, fetch
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.loading import load_tokenizer
from gpt2_jax.pretrained.weights import load


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        description="Measure a GPT-2 by the protocols of the published figures.",
        epilog="example: python scripts/evaluate.py --task perplexity --data book.txt --from_pretrained demo",
    )
    out.add_argument(
        "--task", nargs="+", required=True, choices=[*TASKS, "all"], help="what to measure"
    )
    out.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="each task's file in its published format, in the order of the tasks (default: from the hub)",
    )
    out.add_argument(
        "--from_pretrained",
        default="gpt2",
        metavar="MODEL",
        help="hub id, folder or demo (default: gpt2)",
    )
    out.add_argument(
        "--model_name",
        metavar="NAME",
        help="whose tokenizer (default: the model's own, or GPT-2's)",
    )
    out.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
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


def load_model(args: argparse.Namespace) -> Model:
    """Returns what is to be measured."""
    folder = resolve(args.from_pretrained)
    config, params = load(folder, dtype=args.dtype)
    tokenizer = load_tokenizer(folder, args.model_name)

    def progress(title, total):
        return tqdm(total=total, desc=title, disable=args.quiet).update

    return Model(params, config, tokenizer, args.batch_size, args.stride, args.limit, progress)


def show(figure: Figure) -> None:
    """Prints a figure with what is needed to compare it."""
    stderr = "" if figure.stderr is None else f" +- {figure.stderr:.2g}"
    paper = "" if figure.paper is None else f"; the paper has {figure.paper:g}"
    print(f"{figure.task}, {figure.metric}: {figure.value:.4f}{stderr}{paper}")
    print(f"    {figure.protocol}; {figure.count:,} {figure.unit}", flush=True)


def main() -> int:
    """Measures; returns 2 after a user's mistake."""
    args = parser().parse_args()
    tasks = list(TASKS) if "all" in args.task else args.task
    try:
        for name in ("batch_size", "limit", "stride"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if args.data and len(args.data) != len(tasks):
            raise ValueError(
                f"--data must name a file for each of {', '.join(tasks)}, got {len(args.data)}."
            )
        for file in args.data:
            if not Path(file).is_file():
                raise ValueError(f"{file}: there is no such file.")
        model = load_model(args)
        with tempfile.TemporaryDirectory() as folder:
            for number, task in enumerate(tasks):
                file = Path(args.data[number]) if args.data else fetch(task, Path(folder))
                for figure in TASKS[task](model, file):
                    print(json.dumps(figure._asdict()), flush=True) if args.json else show(figure)
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
