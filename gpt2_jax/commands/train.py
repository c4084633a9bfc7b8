"""The command `train`: trains a GPT-2 on token files. The run itself is `training/run.py`'s."""

import argparse
import dataclasses
from typing import NamedTuple

from gpt2_jax.commands import runtime_notes
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
        "data", help="folder of token files, as the command prepare, nanoGPT or llm.c write them"
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
    out.set_defaults(program=program)
    _add_devices(out.add_argument_group("devices"))
    _add_recipe(out.add_argument_group("recipe"))
    return out


def _add_devices(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say what a run is spread over."""
    group.add_argument(
        "--mesh",
        metavar="SIZES",
        help="devices along data, fsdp and tensor, such as data=2,fsdp=4 (default: one device, or "
        "of several processes all devices along data)",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="join other processes of this command: the address of the first of them, the same in "
        "all",
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="how many these are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join them by what Slurm, Open MPI, Kubernetes or a TPU pod says of them",
    )


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


def _check_processes(args: argparse.Namespace) -> bool:
    """Returns whether other processes are to be joined.

    Raises:
      ValueError: some of what names them is missing.
    """
    given = {
        "--coordinator": args.coordinator,
        "--num_processes": args.num_processes,
        "--process_id": args.process_id,
    }
    missing = [option for option, value in given.items() if value is None]
    if args.distributed:
        return True  # what is not given is found
    if missing and len(missing) < len(given):
        raise ValueError(f"Processes are joined by {', '.join(given)}: {missing[0]} is missing.")
    return not missing


def run(args: argparse.Namespace) -> int:
    """Trains, and exports if asked to; returns 130 after Ctrl-C, which has saved a checkpoint.

    Raises:
      CommandFailed: the loss is not finite, or another process of the run has ended.
    """
    # Not at the top: the help is there without orbax, which is an extra.
    from gpt2_jax.training import processes
    from gpt2_jax.training.run import TrainingError, export, fit

    recipe, from_pretrained = choose_start(args)
    if args.export:
        check_free(args.export)  # now, not after days of training
    if _check_processes(args):
        runtime_notes.divert(args.program)
        processes.join(args.coordinator, args.num_processes, args.process_id)
    report = reporter(args.quiet or not processes.is_first())
    # Not `unwinding`: `fit` answers Ctrl-C itself, by saving a checkpoint.
    try:
        summary = fit(
            recipe,
            args.data,
            args.out,
            from_pretrained=from_pretrained,
            resume=args.resume,
            mesh=args.mesh,
            say=report,
            progress=not args.quiet,
        )
    except processes.LostProcessError as error:
        runtime_notes.settle()
        raise CommandFailed(error) from error
    except TrainingError as error:
        processes.leave()
        raise CommandFailed(error) from error
    except Exception:
        processes.leave()
        raise
    if not summary.finished:
        where = f"Stopped after step {summary.step} of {recipe.steps}"
        report(f"{where}; --resume goes on from there.")
    # Only of a finished run: what --resume goes on with is not yet the result.
    elif args.export and processes.is_first():
        step = export(args.out, args.export, dtype=args.export_dtype, say=report)
        report(f"Wrote the weights of step {step} to {args.export}.")
    processes.leave()
    return 0 if summary.finished else 130
