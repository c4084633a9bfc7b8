"""The command `train`: trains a GPT-2 on token files. The run itself is `training/run.py`'s."""

import argparse
import dataclasses
from typing import NamedTuple

from gpt2_jax.commands.common import CommandFailed, reporter
from gpt2_jax.files import check_free, local_path, read_json_object
from gpt2_jax.training.recipes import RECIPES, SHAPE, Recipe


class Start(NamedTuple):
    """What a run begins with."""

    recipe: Recipe
    from_pretrained: str | None


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser: an option for each field of `Recipe`, and what is no part of one."""
    out = argparse.ArgumentParser(
        prog=program,
        description="Train a GPT-2, from scratch or from pretrained weights. Ctrl-C stops it, "
        "--resume goes on.",
        epilog=f"example: {program} data/shakespeare --out runs/shakespeare "
        "--recipe shakespeare_char",
    )
    out.add_argument(
        "data", help="folder with train.bin, as the command prepare or nanoGPT writes it"
    )
    out.add_argument(
        "--out",
        required=True,
        metavar="RUN",
        help="folder of the run: checkpoints, metrics, curves",
    )
    # None unless given, by which a resumed run is known to go on with its own.
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
    _add_recipe(out.add_argument_group("recipe"))
    return out


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    """Adds an option for each field of a recipe, None unless it is given."""
    for field in dataclasses.fields(Recipe):
        option = f"--{field.name}"
        # By the default, as an annotation need not be a class; `Recipe` checks types by it too.
        kind = type(field.default)
        text = f"{field.metadata['help']} (default: {field.default})"
        # `type=bool` would take "False" for true, as any text that is not empty.
        if kind is bool:
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            group.add_argument(option, type=kind, metavar=field.name[0].upper(), help=text)


def choose_start(args: argparse.Namespace) -> Start:
    """Returns what to begin with: a resumed run's own, with what is given on top.

    Raises:
      ValueError: a value is out of range, or the shape of a pretrained model was to be changed.
    """
    given = {}
    for field in dataclasses.fields(Recipe):
        value = getattr(args, field.name)
        # 0 and False were given, too.
        if value is not None:
            given[field.name] = value
    recipe = RECIPES[args.recipe or "gpt2"]
    from_pretrained = args.from_pretrained
    description = local_path(args.out) / "run.json"
    # Without the file the run was stopped before it wrote anything, and begins anew.
    if args.resume and description.is_file():
        run = read_json_object(description)
        try:
            # Named, a recipe is what is meant: `fit` says where the run was another.
            recipe = recipe if args.recipe else Recipe.from_dict(run["recipe"])
            from_pretrained = from_pretrained or run["from_pretrained"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"no {error}" if isinstance(error, KeyError) else f"got {error}"
            raise ValueError(f"{description}: expected what this command writes, {got}.") from error
    fixed = [f"--{name}" for name in SHAPE if name in given]
    # Rather than to pass it over: who asks for another shape wants another model.
    if from_pretrained and fixed:
        raise ValueError(f"{', '.join(fixed)}: {from_pretrained} brings its own.")
    return Start(dataclasses.replace(recipe, **given), from_pretrained)


def run(args: argparse.Namespace) -> int:
    """Trains, and exports if asked to; returns 130 after Ctrl-C, which has saved a checkpoint.

    Raises:
      CommandFailed: the loss is not finite.
    """
    # Not at the top: the help is there without orbax, which is an extra.
    from gpt2_jax.training.run import TrainingError, export, fit

    report = reporter(args.quiet)
    recipe, from_pretrained = choose_start(args)
    if args.export:
        check_free(args.export)  # now, not after days of training
    # Not `unwinding`: `fit` answers Ctrl-C itself, by saving a checkpoint.
    try:
        summary = fit(
            recipe,
            args.data,
            args.out,
            from_pretrained=from_pretrained,
            resume=args.resume,
            say=report,
            progress=not args.quiet,
        )
    except TrainingError as error:
        raise CommandFailed(error) from error
    if not summary.finished:
        where = f"Stopped after step {summary.step} of {recipe.steps}"
        report(f"{where}; --resume goes on from there.")
        return 130
    # Only of a finished run: what --resume goes on with is not yet the result.
    if args.export:
        step = export(args.out, args.export, dtype=args.export_dtype, say=report)
        report(f"Wrote the weights of step {step} to {args.export}.")
    return 0
