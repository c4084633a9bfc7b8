"""Trains a GPT-2 on token files: `python scripts/train.py DATA --out RUN`. See `gpt2_jax/fit.py`."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from gpt2_jax.training.recipes import RECIPES, SHAPE, Recipe


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line: an option for each field of `Recipe`, and what is no part of one."""
    out = argparse.ArgumentParser(
        description="Train a GPT-2, from scratch or from pretrained weights. Ctrl-C stops it, --resume goes on.",
        epilog="example: python scripts/train.py data/shakespeare --out runs/shakespeare --recipe shakespeare_char",
    )
    out.add_argument("data", help="folder with train.bin, as prepare_data.py or nanoGPT writes it")
    out.add_argument(
        "--out",
        required=True,
        metavar="RUN",
        help="folder of the run: checkpoints, metrics, curves",
    )
    out.add_argument(
        "--recipe", choices=RECIPES, help="where the values below begin (default: gpt2's)"
    )
    out.add_argument(
        "--from_pretrained", metavar="MODEL", help="fine-tune these weights: hub id, folder or demo"
    )
    out.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint, with the run's own recipe",
    )
    out.add_argument(
        "--export", metavar="FOLDER", help="when finished, write the best weights in HF's layout"
    )
    out.add_argument(
        "--export_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of these weights",
    )
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    group = out.add_argument_group("recipe")
    for field in dataclasses.fields(Recipe):
        kind, name = type(field.default), f"--{field.name}"
        help = f"{field.metadata['help']} (default: {field.default})"
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            group.add_argument(name, type=kind, metavar=field.name[0].upper(), help=help)
    return out


def choose(args: argparse.Namespace) -> tuple[Recipe, str | None]:
    """Returns the recipe and the model to start from: the run's own when it is resumed, with what is given on top.

    Raises:
      ValueError: a value is out of range, or the shape of a pretrained model was to be changed.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    recipe, start = RECIPES[args.recipe or "gpt2"], args.from_pretrained
    file = Path(args.out) / "run.json"
    if args.resume and file.is_file():
        run = json.loads(file.read_text(encoding="utf-8"))
        recipe = recipe if args.recipe else Recipe(**run["recipe"])
        start = start or run["from_pretrained"]
    if start and (fixed := [f"--{name}" for name in SHAPE if name in given]):
        raise ValueError(f"{', '.join(fixed)}: {start} brings its own.")
    return dataclasses.replace(recipe, **given), start


def main() -> int:
    """Trains; returns 2 after a user's mistake, 1 after a loss that is not finite, 130 after Ctrl-C."""
    args = parser().parse_args()
    say = (
        (lambda text: None)
        if args.quiet
        else (lambda text: print(text, file=sys.stderr, flush=True))
    )
    try:
        from gpt2_jax.training.run import TrainingError, export, fit
    except ImportError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        recipe, start = choose(args)
        options = {"resume": args.resume, "say": say, "progress": not args.quiet}
        summary = fit(recipe, args.data, args.out, from_pretrained=start, **options)
        if not summary.finished:
            say(
                f"Stopped after step {summary.step} of {recipe.steps}; --resume goes on from there."
            )
            return 130
        if args.export:
            step = export(args.out, args.export, dtype=args.export_dtype)
            say(f"Wrote the weights of step {step} to {args.export}.")
    except TrainingError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
