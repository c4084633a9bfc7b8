"""A training run in a folder: its steps, from the first or from a checkpoint, and what comes out.

Knows the order of things. What a run does is settled in `plan`, what lies in its folder is
`run_folder`'s, what is measured on the way `validation`'s; the arithmetic is `step`'s. On a mesh,
and in several processes, each of them does all that stands here, but that the first alone writes
and speaks; what a device or a process holds of an array is said in two places,
`plan.beginning_of` and `devices.on_mesh`.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from gpt2_jax.files import CheckpointError, local_path
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.weights import save
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.checkpoint import Checkpoints, DamagedError
from gpt2_jax.training.corpus import open_corpus
from gpt2_jax.training.devices import connect, on_mesh, read_mesh
from gpt2_jax.training.log import (
    LogFn,
    MetricsLog,
    Outlets,
    Pending,
    TrainingError,
    plot_curves,
)
from gpt2_jax.training.losses import Metrics
from gpt2_jax.training.plan import (
    Plan,
    Position,
    apart,
    beginning_of,
    check_agreement,
    initial_model,
    make_plan,
    schedule,
    state_shapes,
)
from gpt2_jax.training.processes import (
    FAREWELL_SECONDS,
    StopAgreement,
    agree,
    is_first,
    together,
)
from gpt2_jax.training.recipes import Recipe
from gpt2_jax.training.run_folder import (
    RunRecord,
    checkpoint_meta,
    locked,
    read_run,
    starting_position,
    write_run,
)
from gpt2_jax.training.signals import stop_requests
from gpt2_jax.training.step import train_step
from gpt2_jax.training.validation import evaluate, is_evaluated


class Summary(NamedTuple):
    """How a call of `fit` ended.

    Examples:
      >>> from gpt2_jax.training.run import Summary
      >>> Summary(step=2000, finished=True, val_loss=1.6).finished
      True
    """

    step: int
    finished: bool  # False after Ctrl-C, in whichever process
    val_loss: float | None  # the last that was measured, in nats per token


def fit(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    from_pretrained: str | None = None,
    resume: bool = False,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    log: LogFn | None = None,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> Summary:
    """Trains until `recipe.steps`, or until Ctrl-C or SIGTERM, which save and return.

    In a program of several processes (`jax.distributed.initialize`, or `processes.join`) each calls
    it with the same arguments. They must see one folder `out`. Each reads its own rows of a batch;
    the batches are those of one process. A signal to any of them stops all after the same step.

    Args:
      recipe: what to do.
      data: a folder of token files, `train.bin` or many (docs/data.md), and perhaps a tokenizer.
      out: the run's folder.
      from_pretrained: start from these weights, which bring their own shape, instead of fresh ones.
      resume: go on from the last checkpoint in `out`, if there is one, bit for bit as if there had
        been no stop, if the mesh is the same; on another one, from the same numbers. From the one
        before, if the last is damaged, which is then moved aside.
      mesh: the devices that the model and the batches are spread over, such as
        "data=2,fsdp=2,tensor=2": see `make_mesh`. By default one device or, of several processes,
        all devices along `data`.
      log: is called as `log(step, values)` with the values of each line of `metrics.jsonl`, by
        name; of several processes, in the first. What it raises stops the run as Ctrl-C does, with
        a checkpoint, and comes out of `fit` then.
      say: takes messages; of several processes, the first's.
      progress: shows a bar on standard error; of several processes, the first's.

    Raises:
      CheckpointError: `out` holds a run and `resume` is false, or it holds another run than this;
        another process trains there; or a checkpoint cannot be written or none be read.
      DataError: the data cannot be used.
      TrainingError: the loss is not finite, or a batch holds an id outside the vocabulary.
      ValueError: the recipe's windows are longer than the model's positions; or a batch, a part of
        it or a param does not divide by the mesh, or the mesh needs more devices than there are.
      ProcessError: the processes were started with different arguments, or one could not begin.
      LostProcessError: another process has ended.
    """
    say = say if is_first() else _say_nothing
    # Data and model before the folder: what is wrong with them leaves no trace of a run.
    with together():
        mesh = read_mesh(mesh)
        corpus = open_corpus(data)
        config, pretrained = initial_model(recipe, corpus, from_pretrained, mesh)
        plan = make_plan(local_path(out), recipe, config, corpus, from_pretrained, mesh)
        beginning = beginning_of(plan, pretrained)
        del pretrained
    check_agreement(plan, resume)
    connect(plan.mesh)
    with (
        locked(plan.out),
        Checkpoints(plan.out / "checkpoints", n_latest=recipe.keep) as checkpoints,
        stop_requests() as stop_requested,
    ):
        if resume or not checkpoints.steps():
            position = starting_position(plan, beginning, checkpoints, say)
        else:
            advice = "resume it, or give another folder"
            raise CheckpointError(f"{plan.out} holds a run already: {advice}.")
        del beginning  # with the weights in it: `position` has a copy of its own
        first_step = int(position.state.step)
        agree({"first step": first_step})  # differs where each has a folder of its own
        with together():
            write_run(plan, first_step)
        say(_opening_message(plan, position.state.params, first_step))
        # Only behind `write_run`, which replaces its file: it would go on writing to the old one.
        with _open_log(plan, first_step, log, progress) as metrics_log:
            stop = StopAgreement(lambda: stop_requested() or metrics_log.callback_error is not None)
            with together(FAREWELL_SECONDS):
                position = _train(plan, position, checkpoints, metrics_log, stop, say)
    # With all checkpoints written and the lock given back: nothing hangs on a picture.
    if is_first():
        plot_curves(plan.out / "metrics.jsonl", plan.out / "curves.png")
    with together():
        if metrics_log.callback_error is not None:
            raise metrics_log.callback_error
    step = int(position.state.step)
    return Summary(step=step, finished=step >= recipe.steps, val_loss=metrics_log.val_loss)


def _say_nothing(message: str) -> None:
    del message


def _opening_message(plan: Plan, params: Params, first_step: int) -> str:
    """Returns how large the model, the data and the run are."""
    batches = plan.batches
    n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        f"{n_params:,} parameters; {len(plan.corpus.train):,} tokens, "
        f"{batches.windows_per_epoch:,} windows of {batches.length} in an epoch; "
        f"steps {first_step:,} to {plan.recipe.steps:,}"
    )


def _open_log(plan: Plan, first_step: int, callback: LogFn | None, progress: bool) -> MetricsLog:
    """Returns the log of a run's metrics, which goes nowhere in all processes but the first."""
    outlets = Outlets(plan.out / "metrics.jsonl", progress, callback)
    return MetricsLog(
        outlets if is_first() else Outlets(None),
        first_step=first_step,
        last_step=plan.recipe.steps,
        log_every=plan.recipe.log_every,
        tokens_per_step=plan.batches.batch_size * plan.batches.length,
        learning_rate=schedule(plan.recipe),
    )


# The loop.


def _train(
    plan: Plan,
    position: Position,
    checkpoints: Checkpoints,
    log: MetricsLog,
    stop: Callable[[int], bool],
    say: Callable[[str], None],
) -> Position:
    """Makes steps until the run is finished or is to stop; returns where it ended."""
    recipe = plan.recipe
    first_step = int(position.state.step)
    # Steps are counted here: to read `state.step` would wait for the device at every step.
    for step in range(first_step + 1, recipe.steps + 1):
        cursor = position.cursor
        # The state's memory goes over to the next one: nobody else may hold it from here on.
        position, metrics = _advance(plan, position, step)
        log.started(Pending(step, cursor, metrics))

        # A request to stop is answered here, between steps, where the state is whole.
        is_last = stop(step) or step == recipe.steps
        val_loss = None
        if is_evaluated(plan, step):
            log.settle()  # the step's line comes before its evaluation's
            evaluation = evaluate(plan, position, step, say)
            log.evaluated(evaluation)
            val_loss = evaluation.val_loss
        # Wherever a loss was measured, so that the checkpoint of the least one can be kept.
        if is_last or val_loss is not None or step % recipe.save_every == 0:
            log.settle()  # raises: a state whose loss is not finite is never saved
            checkpoints.save(position.state, checkpoint_meta(plan, position), loss=val_loss)
        if is_last:
            break
    return position


def _advance(plan: Plan, position: Position, step: int) -> tuple[Position, Metrics]:
    """Makes one step; returns the position after it, and metrics that may not be computed yet.

    Raises:
      TrainingError: the step refuses its batch.
    """
    try:
        state, metrics = train_step(
            position.state,
            _batch(plan, position.cursor),
            position.key,
            config=plan.config,
            tx=plan.tx,
            micro_batches=plan.recipe.micro_batches,
            remat=plan.recipe.remat,
        )
    except ValueError as error:  # whose message knows neither of the two numbers
        raise TrainingError(f"Step {step}, batch {position.cursor}: {error}") from error
    return Position(state, position.cursor + 1, position.key), metrics


def _batch(plan: Plan, cursor: int) -> Array | np.ndarray:
    """Returns the batch at a cursor, `[B, T]`, on the plan's mesh if there is one."""
    shape = (plan.batches.batch_size, plan.batches.length + 1)
    return on_mesh(partial(plan.batches.rows, cursor), shape, plan.mesh)


# What comes out.


def export(
    out: str | Path,
    target: str | Path,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Writes the best checkpoint of a run as a folder in HF's layout, and returns its step.

    The tokenizer comes with it, and where the best checkpoint is damaged it is the next best.

    Args:
      out: the run's folder.
      target: the folder to write, which `load` and transformers read.
      dtype: of the weights; float32 by default.
      overwrite: replaces a checkpoint that is there.
      say: takes messages.

    Raises:
      CheckpointError: `out` holds no checkpoint, or none that is whole; or `target` is in use.
    """
    out = local_path(out)
    run = read_run(out)
    step, params = _best_params(out, run, say)
    # Cast last: a checkpoint is restored in the dtypes that it was saved in.
    params = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)
    tokenizer = None
    with contextlib.suppress(FileNotFoundError):  # data need not come with one
        tokenizer = Tokenizer.load(out)
    save(target, params, run.config, tokenizer=tokenizer, overwrite=overwrite)
    return step


def _best_params(out: Path, run: RunRecord, say: Callable[[str], None]) -> tuple[int, Params]:
    """Returns the step and the params of the best checkpoint that is whole.

    Not the latest: what was trained too long knows its data by heart and other texts less.
    """
    shapes = state_shapes(run.recipe, run.config)
    with Checkpoints(out / "checkpoints", is_reader=True) as checkpoints:
        steps = checkpoints.best_first()
        if not steps:
            raise CheckpointError(f"{out} holds no checkpoint yet.")
        for step in steps:
            try:
                return step, apart(checkpoints.restore(shapes, step).params)
            except DamagedError as error:
                say(str(error))
    raise CheckpointError(f"{out}: none of the checkpoints, of steps {steps}, is whole.")
