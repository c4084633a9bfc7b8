"""A run's folder: who may write in it, what describes the run, where it goes on from.

It holds

* `run.json`: the recipe, the model's config, the data's fingerprint, and the mesh;
* `metrics.jsonl`: a line for each logged step, and for each evaluation;
* `checkpoints/`: the latest and the best, each with all that the next step depends on;
* `curves.png`: the losses, where matplotlib is installed;
* `run.lock`: keeps a second trainer out while one is at work;
* the tokenizer's files, where the data came with one.

Knows files and what runs are told apart by; nothing of steps. How checkpoints lie on the disk is
`checkpoint`'s, what a line of metrics holds `log`'s.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import (
    CheckpointError,
    local_path,
    lock,
    read_json_object,
    replacing,
    write_json,
)
from gpt2_jax.training.checkpoint import Checkpoints, DamagedError
from gpt2_jax.training.log import forget_after
from gpt2_jax.training.plan import Beginning, Plan, Position, flat
from gpt2_jax.training.processes import ProcessError, exchange, is_first, together
from gpt2_jax.training.recipes import Recipe, changeable_fields


class RunRecord(NamedTuple):
    """What the `run.json` of a run says of it."""

    recipe: Recipe
    config: GPT2Config
    from_pretrained: str | None


def read_run(out: str | Path) -> RunRecord:
    """Returns what `run.json` in a run's folder says of the run.

    Raises:
      CheckpointError: there is no such file, or it is damaged.
    """
    file = local_path(out) / "run.json"
    if not file.is_file():
        raise CheckpointError(f"{out} holds no run: expected `run.json`.")
    values = read_json_object(file)
    try:
        return RunRecord(
            recipe=Recipe.from_dict(values["recipe"]),
            config=GPT2Config.from_dict(values["config"]),
            from_pretrained=values["from_pretrained"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of whatever else it holds
        got = f"no {error}" if isinstance(error, KeyError) else f"got {error}"
        raise CheckpointError(f"{file}: expected what `fit` writes, {got}.") from error


def write_run(plan: Plan, first_step: int) -> None:
    """Writes what describes the run; takes back the metrics of steps that will be made again."""
    if not is_first():
        return
    # A killed run has logged steps that its last checkpoint does not know. First, as it refuses
    # a file that is none of metrics.
    forget_after(plan.out / "metrics.jsonl", first_step)
    # Again at each resumption: the fields that may change have their present values.
    mesh = None if plan.mesh is None else dict(plan.mesh.shape)
    # For people: a run may go on on another mesh, and in another number of processes.
    devices = {"mesh": mesh, "processes": jax.process_count()}
    with replacing(plan.out / "run.json", overwrite=True) as temporary:
        write_json(temporary, plan.identity | {"devices": devices})
    if plan.corpus.tokenizer:
        plan.corpus.tokenizer.save(plan.out)


# One trainer at a time.


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes a run's folder, and keeps other trainers out of it while the body runs.

    Raises:
      CheckpointError: there is another, or the folder holds another program's `run.json`.
      ProcessError: a process of this program does not see the folder.
    """
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(_locked_alone(out))
        with together():
            if not (out / "run.lock").is_file():
                expected = "a folder that all processes share"
                raise ProcessError(f"{out}: expected {expected}, got none in this process.")
        yield
        exchange("")  # until the last of them is done with the folder


@contextlib.contextmanager
def _locked_alone(out: Path) -> Iterator[None]:
    """Does so for one process."""
    if (out / "run.json").is_file():
        read_run(out)  # raises: what is not a run's is not to be replaced
    out.mkdir(parents=True, exist_ok=True)
    file = out / "run.lock"
    # It is never removed: else two processes could hold locks of two files of this name.
    file.touch()
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(os.close, lock(file))
        except BlockingIOError:
            advice = "wait for it, or give another folder"
            raise CheckpointError(f"{out}: another process trains here: {advice}.") from None
        except OSError:
            pass  # a file system without locks
        yield


# Where a run goes on.


def starting_position(
    plan: Plan, beginning: Beginning, checkpoints: Checkpoints, say: Callable[[str], None]
) -> Position:
    """Returns the position of the last checkpoint that is whole, or before the first step.

    Damaged ones are moved aside, or they would stand in the way of those to come.

    Raises:
      CheckpointError: there are checkpoints, and none is whole; or they are of another run.
    """
    damaged: dict[int, DamagedError] = {}
    position = None
    for step in reversed(checkpoints.steps()):
        try:
            position = _restored_position(plan, beginning, checkpoints, step)
            break
        except DamagedError as error:
            # On to the one before. An error of another kind ends the search: this is not our run.
            damaged[step] = error
    if position is None and not damaged:
        # Also where a run is resumed that was killed before its first checkpoint. Folded, as the
        # key of the seed itself made the initial weights.
        key = jax.random.fold_in(jax.random.key(plan.recipe.seed), 1)
        return Position(state=beginning.make(), cursor=0, key=key)
    if position is None:
        steps = ", ".join(str(step) for step in damaged)
        advice = f"delete {plan.out} to begin anew"
        reason = next(iter(damaged.values()))
        raise CheckpointError(
            f"{checkpoints.folder}: none of the checkpoints, of steps {steps}, is whole: {advice}. "
            f"Of the last: {reason}"
        ) from reason
    for step, error in damaged.items():
        say(f"{error} It was moved to {checkpoints.set_aside(step)}.")
    return position


def _restored_position(
    plan: Plan, beginning: Beginning, checkpoints: Checkpoints, step: int
) -> Position:
    """Returns the position of a checkpoint.

    Raises:
      DamagedError: it is damaged.
      CheckpointError: it is of another run.
    """
    meta = checkpoints.meta(step)
    try:
        identity = meta["identity"]
        cursor = int(meta["cursor"])
        key = jax.random.wrap_key_data(jnp.array(meta["key"], jnp.uint32))
    except (KeyError, TypeError, ValueError) as error:
        got = f"got {error!r} from that of step {step}"
        raise DamagedError(f"{checkpoints.folder}: expected what `fit` saves, {got}.") from error
    _check_same_run(checkpoints.folder, plan.identity, identity)
    # Shapes alone: a fresh state beside the restored one would double the memory.
    state = checkpoints.restore(beginning.shapes, step)
    return Position(state=state, cursor=cursor, key=key)


def checkpoint_meta(plan: Plan, position: Position) -> dict[str, Any]:
    """Returns what is saved beside the state of a position."""
    key_data = jax.random.key_data(position.key).tolist()  # JSON has no keys
    return {"identity": plan.identity, "cursor": position.cursor, "key": key_data}


def _check_same_run(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises `CheckpointError`, naming it all, where two runs differ in what shapes the curve."""
    now = flat(ours)
    then = flat(theirs | {"recipe": _as_of_now(theirs.get("recipe"))})
    free = {f"recipe.{name}" for name in changeable_fields()}
    differences = []
    # Of both: a field that a version before or after this one knows is a difference too.
    for name in sorted(now.keys() | then.keys()):
        if name not in free and now.get(name) != then.get(name):
            differences.append(f"{name}: {then.get(name)!r} then, {now.get(name)!r} now")
    if differences and "data.train.sha256" in then and "data.train.sample" in now:
        # Versions before this one read data of any size at every start.
        differences.append("whether the data is the same, `gpt2-jax prepare --index DATA` tells")
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(f"{folder} is of another run:\n  {listed}")


def _as_of_now(recipe: Any) -> Any:
    """Returns a saved recipe in today's fields: one that it lacks did what its default does."""
    try:
        return dataclasses.asdict(Recipe.from_dict(recipe))
    # Of another version, with fields that are none of ours: these are differences.
    except (AttributeError, TypeError, ValueError):
        return recipe
