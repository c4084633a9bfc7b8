"""A training run in a folder: steps, validation, samples, checkpoints; stopped and resumed.

Knows recipes, corpora and folders; the arithmetic is `step.py`'s. On a mesh, and in several
processes, each of them does all that stands here, but that the first alone writes and speaks; what
a device or a process holds of an array is said in two places, `_beginning` and `_on_mesh`.

A run's folder holds

* `run.json`: the recipe, the model's config, the data's fingerprint, and the mesh;
* `metrics.jsonl`: a line for each logged step, and for each evaluation;
* `checkpoints/`: the latest and the best, each with all that the next step depends on;
* `curves.png`: the losses, where matplotlib is installed;
* `run.lock`: keeps a second trainer out while one is at work;
* the tokenizer's files, where the data came with one.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt2_jax.cache import device_memory
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import (
    CheckpointError,
    local_path,
    lock,
    read_json_object,
    replacing,
    write_json,
)
from gpt2_jax.generation.cuts import Temperature, TopK
from gpt2_jax.generation.generate import generate
from gpt2_jax.generation.sampling import Categorical
from gpt2_jax.generation.transforms import Chain
from gpt2_jax.model import init
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.layout import param_shapes
from gpt2_jax.pretrained.weights import load, save
from gpt2_jax.sharding import AXES, batch_sharding, make_mesh, n_batch_shards, shardings
from gpt2_jax.stack import is_stacked, stack_layers, unstack_layers
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import TokenizerKindError
from gpt2_jax.training.checkpoint import Checkpoints, DamagedError, placed_shape
from gpt2_jax.training.corpus import Corpus, open_corpus
from gpt2_jax.training.data import Batches, Ids, Place, windows
from gpt2_jax.training.log import (
    Evaluation,
    LogFn,
    MetricsLog,
    Outlets,
    Pending,
    TrainingError,
    forget_after,
    plot_curves,
)
from gpt2_jax.training.processes import (
    FAREWELL_SECONDS,
    ProcessError,
    StopAgreement,
    agree,
    exchange,
    is_first,
    together,
)
from gpt2_jax.training.recipes import Recipe, changeable_fields
from gpt2_jax.training.signals import stop_requests
from gpt2_jax.training.step import (
    Metrics,
    TrainState,
    init_state,
    make_optimizer,
    next_token_loss,
    train_step,
    warmup_cosine,
)
from gpt2_jax.training.token_files import DataError

# Of the samples at each evaluation: nanoGPT's `sample.py`.
SAMPLE_TEMPERATURE = 0.8
SAMPLE_TOP_K = 200
TRAINING_BYTES = 12  # of each parameter, at the least: its value, gradient and mean in float32

ReadRows = Callable[[int, int], np.ndarray]  # `(start, stop)` to rows of a batch


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


class Plan(NamedTuple):
    """What a run does: all that stays the same from its first step to its last."""

    out: Path  # the run's folder
    recipe: Recipe
    config: GPT2Config
    corpus: Corpus
    batches: Batches
    tx: optax.GradientTransformation  # `optimizer`'s one object, or each call would compile anew
    identity: dict[str, Any]  # what tells it from other runs; `run.json` holds it
    mesh: Mesh | None  # None: one device. Not part of the identity: a run may go on on another one


class Position(NamedTuple):
    """Where a run is: all that its next step depends on, and so what a checkpoint holds."""

    state: TrainState
    cursor: int  # how many batches were drawn
    key: PRNGKeyArray  # of dropout and samples, one for the whole run: steps are folded in


class Beginning(NamedTuple):
    """The state before a run's first step, not yet made."""

    make: Callable[[], TrainState]
    shapes: TrainState  # `jax.ShapeDtypeStruct`s in the place of arrays; on a mesh, they say where


class RunRecord(NamedTuple):
    """What the `run.json` of a run says of it."""

    recipe: Recipe
    config: GPT2Config
    from_pretrained: str | None


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
        mesh = _read_mesh(mesh)
        corpus = open_corpus(data)
        config, pretrained = _initial_model(recipe, corpus, from_pretrained, mesh)
        plan = _make_plan(local_path(out), recipe, config, corpus, from_pretrained, mesh)
        beginning = _beginning(plan, pretrained)
        del pretrained
    _check_agreement(plan, resume)
    _connect(plan.mesh)
    with (
        _locked(plan.out),
        Checkpoints(plan.out / "checkpoints", n_latest=recipe.keep) as checkpoints,
        stop_requests() as stop_requested,
    ):
        if resume or not checkpoints.steps():
            position = _starting_position(plan, beginning, checkpoints, say)
        else:
            advice = "resume it, or give another folder"
            raise CheckpointError(f"{plan.out} holds a run already: {advice}.")
        del beginning  # with the weights in it: `position` has a copy of its own
        first_step = int(position.state.step)
        agree({"first step": first_step})  # differs where each has a folder of its own
        with together():
            _write_run(plan, first_step)
        say(_opening_message(plan, position.state.params, first_step))
        # Only behind `_write_run`, which replaces its file: it would go on writing to the old one.
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
    shapes = _state_shapes(run.recipe, run.config)
    with Checkpoints(out / "checkpoints", is_reader=True) as checkpoints:
        steps = checkpoints.best_first()
        if not steps:
            raise CheckpointError(f"{out} holds no checkpoint yet.")
        for step in steps:
            try:
                return step, _apart(checkpoints.restore(shapes, step).params)
            except DamagedError as error:
                say(str(error))
    raise CheckpointError(f"{out}: none of the checkpoints, of steps {steps}, is whole.")


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


# The optimizer and the losses of a recipe.


def schedule(recipe: Recipe) -> optax.Schedule:
    """Returns a recipe's learning rate as a function of the updates made before."""
    return warmup_cosine(
        recipe.learning_rate,
        steps=recipe.steps,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.decay_steps or None,
        end=recipe.min_learning_rate,
    )


@cache  # one object for each recipe: a step is compiled anew for each optimizer that it meets
def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns a recipe's optimizer, each time the same object."""
    return make_optimizer(
        schedule(recipe),
        kind=recipe.optimizer,
        b1=recipe.b1,
        b2=recipe.b2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )


def validation_loss(
    params: Params,
    tokens: Ids,
    *,
    config: GPT2Config,
    recipe: Recipe,
    mesh: Mesh | None = None,
) -> float:
    """Returns the mean loss over a whole token files in nats per token, without dropout.

    Each token but the first of a file is scored once, after at most a window of others. On a
    mesh the rows are spread over it, and every process has the same result.
    """
    # No more rows at a time than in training, so that no more memory is needed.
    n_rows = recipe.batch_size // recipe.micro_batches
    length = recipe.window_length(config)
    # Means are weighed again, as the last windows are shorter, and summed in Python's float64, as
    # files are long.
    total = 0.0
    count = 0.0
    for batch in windows(tokens, batch_size=n_rows, length=length):
        ids = _on_mesh(partial(_rows_of, batch.ids), batch.ids.shape, mesh)
        weights = _on_mesh(partial(_rows_of, batch.weights), batch.weights.shape, mesh)
        loss, weight = _mean_and_weight(params, ids, weights, config=config)
        total += float(loss) * float(weight)
        count += float(weight)
    return total / count


@jax.jit
def _mean_and_weight(
    params: Params,
    ids: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: GPT2Config,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean loss of some windows, and over how many predictions it is one."""
    loss, metrics = next_token_loss(params, ids, config=config, weights=weights)
    return loss, metrics["weight"]


# Where a run begins.


def _read_mesh(mesh: Mesh | str | Mapping[str, int] | None) -> Mesh | None:
    """Returns the mesh that is meant; None for a single device.

    Raises:
      ValueError: it is none of ours, or a process has no device in it.
    """
    if mesh is None and jax.process_count() == 1:
        return None
    if mesh is None:
        mesh = {"data": jax.device_count()}
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise ValueError(f"`mesh` must have axes of {', '.join(AXES)}, got {unknown}.")
    there = {device.process_index for device in mesh.devices.flat}
    without = sorted(set(range(jax.process_count())) - there)
    if without:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"A mesh of {sizes} has devices of all {jax.process_count()} processes but {without}:"
            f" there are {jax.device_count()} devices."
        )
    # Its axes are the compiler's, as everywhere here, whatever they were made for.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _initial_model(
    recipe: Recipe, corpus: Corpus, from_pretrained: str | None, mesh: Mesh | None
) -> tuple[GPT2Config, Params | None]:
    """Returns the config of a run's model, and the params if these are pretrained."""
    if from_pretrained is not None:
        return _pretrained_model(recipe, corpus, from_pretrained, mesh)
    # The config's ends of a text: what `generate` stops at once the model is exported.
    eot_id = corpus.tokenizer.eot_id if corpus.tokenizer else None
    config = recipe.config(vocab_size=corpus.vocab_size, eot_id=eot_id)
    _check_size(config, mesh)
    return config, None


def _check_size(config: GPT2Config, mesh: Mesh | None) -> None:
    """Raises `ValueError` if a model cannot be trained in the memory that there is."""
    smallest = config.replace(n_layer=1)
    one_layer = _n_parameters(smallest)
    each_layer = _n_parameters(smallest.replace(n_layer=2)) - one_layer
    n_params = one_layer + (config.n_layer - 1) * each_layer  # no names for millions of layers
    needed = TRAINING_BYTES * n_params
    n_parts = 1 if mesh is None else mesh.size // mesh.shape.get("data", 1)
    there = device_memory() * n_parts
    if needed > there:
        sizes = f"{needed / 2**30:,.0f} GB of memory to be trained, there are {there / 2**30:,.0f}"
        raise ValueError(f"{n_params:,} parameters need at least {sizes}: make the model smaller.")


def _n_parameters(config: GPT2Config) -> int:
    """Returns how many numbers the weights of a model are."""
    return sum(math.prod(shape) for shape in param_shapes(config).values())


def _pretrained_model(
    recipe: Recipe, corpus: Corpus, from_pretrained: str, mesh: Mesh | None
) -> tuple[GPT2Config, Params]:
    """Returns a pretrained model's config, with the recipe's dropout and dtype, and its params.

    Raises:
      DataError: the data has another vocabulary, or a larger one.
    """
    folder = resolve(from_pretrained)  # once: both of what follows come from one revision
    # Like fresh ones, whatever dtype the file has: small updates would vanish in 16 bits.
    config, params = load(folder, dtype="float32", mesh=mesh)
    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError:
        tokenizer = None  # then only the vocabularies' sizes can be compared
    except TokenizerKindError as error:
        # Whoever brings ids of his own can go on without.
        if corpus.tokenizer:
            raise DataError(f"The data was made with another kind of tokenizer: {error}") from error
        tokenizer = None
    if tokenizer and corpus.tokenizer and corpus.tokenizer.vocab != tokenizer.vocab:
        raise DataError(
            f"The data was made with another vocabulary than {from_pretrained}'s: prepare it with "
            f"`--tokenizer {from_pretrained}`."
        )
    # Fewer tokens than the model's are fine: its table may be padded to a round number.
    if corpus.vocab_size > config.vocab_size:
        raise DataError(
            f"The data has {corpus.vocab_size} tokens in its vocabulary, "
            f"the model {config.vocab_size}."
        )
    return recipe.adapt(config), params


def _make_plan(
    out: Path,
    recipe: Recipe,
    config: GPT2Config,
    corpus: Corpus,
    from_pretrained: str | None,
    mesh: Mesh | None,
) -> Plan:
    """Returns what a run does.

    Raises:
      ValueError: its windows are longer than the positions, or its batches do not divide.
    """
    length = recipe.window_length(config)
    _check_rows(recipe, mesh)
    batches = Batches(corpus.train, batch_size=recipe.batch_size, length=length, seed=recipe.seed)
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "config": config.to_dict(),
        "data": corpus.identity,
        "from_pretrained": from_pretrained,
    }
    return Plan(
        out=out,
        recipe=recipe,
        config=config,
        corpus=corpus,
        batches=batches,
        tx=optimizer(recipe),
        identity=identity,
        mesh=mesh,
    )


def _check_rows(recipe: Recipe, mesh: Mesh | None) -> None:
    """Raises `ValueError` unless the rows that pass through the model at once divide by a mesh."""
    if mesh is None:
        return
    n_shards = n_batch_shards(mesh)
    n_rows = recipe.batch_size // recipe.micro_batches
    if n_rows % n_shards:
        raise ValueError(
            f"`batch_size` {recipe.batch_size} in `micro_batches` {recipe.micro_batches} are"
            f" {n_rows} rows at a time, which must be a multiple of the {n_shards} devices along"
            " data and fsdp."
        )


def _beginning(plan: Plan, pretrained: Params | None) -> Beginning:
    """Returns the state before the first step, on the devices where it belongs.

    Raises:
      ValueError: a param does not divide by the devices that it is to lie on.
    """

    def make_fresh(key: PRNGKeyArray) -> TrainState:
        # In float32 whatever the model computes in, as the recipe's `dtype` promises.
        return _first_state(init(key, plan.config.replace(dtype="float32")), plan.recipe)

    if pretrained is None:
        make = make_fresh
        source = jax.random.key(plan.recipe.seed)
    else:
        make = partial(_first_state, recipe=plan.recipe)
        source = pretrained
    shapes = jax.eval_shape(make, source)
    if plan.mesh is None:
        return Beginning(partial(make, source), shapes)
    places = shardings(shapes, plan.mesh)
    # Under `jit` each device makes its own parts: none holds the whole.
    make = partial(jax.jit(make, out_shardings=places), source)
    return Beginning(make, jax.tree.map(placed_shape, shapes, places))


def _first_state(params: Params, recipe: Recipe) -> TrainState:
    """Returns the state before the first step."""
    if recipe.stack_layers:
        params = stack_layers(params)
    return init_state(params, optimizer(recipe))


def _apart(params: Params) -> Params:
    """Returns params with their layers apart, as all but the step takes them."""
    return unstack_layers(params) if is_stacked(params) else params


def _on_mesh(read: ReadRows, shape: tuple[int, ...], mesh: Mesh | None) -> Array | np.ndarray:
    """Returns a batch with its rows spread over a mesh; each process reads those of its devices.

    Without a mesh the whole is read, and stays on the host.
    """
    n_rows = shape[0]
    if mesh is None:
        return read(0, n_rows)

    def read_part(index: Any) -> np.ndarray:  # slices of rows and columns
        start, stop, _ = index[0].indices(n_rows)
        return read(start, stop)

    return jax.make_array_from_callback(shape, batch_sharding(mesh), read_part)


def _check_agreement(plan: Plan, resume: bool) -> None:
    """Raises `ProcessError` where the processes of a program were started differently."""
    mesh = None if plan.mesh is None else dict(plan.mesh.shape)
    others = {"jax": jax.__version__, "mesh": mesh, "resume": resume}
    agree(_flat(plan.identity) | others)


def _connect(mesh: Mesh | None) -> None:
    """Lets the devices of several processes find each other, along all axes of a mesh.

    On CPUs they give up after 30 seconds, and where each compiles at its own speed their first step
    may be further apart. Here all begin at once, and what is compiled is next to nothing.
    """
    if mesh is None or jax.process_count() == 1:
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(1, len(axes) + 1) for group in combinations(axes, n)]

    def sums(x: Array) -> list[Array]:
        return [jax.lax.psum(x, group) for group in groups]

    everywhere = PartitionSpec()
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    compiled = jax.jit(mapped).lower(np.float32(1)).compile()
    with together():
        exchange("")  # which waits for all to have compiled
        jax.block_until_ready(compiled(np.float32(1)))


def _starting_position(
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


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
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


def _check_same_run(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises `CheckpointError`, naming it all, where two runs differ in what shapes the curve."""
    now = _flat(ours)
    then = _flat(theirs | {"recipe": _as_of_now(theirs.get("recipe"))})
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


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of nested dicts by names like "recipe.seed", as JSON gives them back."""
    # JSON makes lists of tuples: so what comes from a file equals what never was in one.
    from_json = json.loads(json.dumps(identity))
    return flatten_dict(from_json, sep=".")


def _state_shapes(recipe: Recipe, config: GPT2Config) -> TrainState:
    """Returns the shapes and dtypes of a run's state, without its memory."""

    def make_state(key: PRNGKeyArray) -> TrainState:
        return _first_state(init(key, config), recipe)

    return jax.eval_shape(make_state, jax.random.key(0))


def _write_run(plan: Plan, first_step: int) -> None:
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
        if _is_evaluated(plan, step):
            log.settle()  # the step's line comes before its evaluation's
            evaluation = _evaluate(plan, position, step, say)
            log.evaluated(evaluation)
            val_loss = evaluation.val_loss
        # Wherever a loss was measured, so that the checkpoint of the least one can be kept.
        if is_last or val_loss is not None or step % recipe.save_every == 0:
            log.settle()  # raises: a state whose loss is not finite is never saved
            checkpoints.save(position.state, _checkpoint_meta(plan, position), loss=val_loss)
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
    return _on_mesh(partial(_read_rows, plan.batches, cursor), shape, plan.mesh)


def _read_rows(batches: Batches, cursor: int, start: int, stop: int) -> np.ndarray:
    """Returns rows `start` to `stop` of the batch at a cursor."""
    return batches.rows(cursor, start, stop)


def _rows_of(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _checkpoint_meta(plan: Plan, position: Position) -> dict[str, Any]:
    """Returns what is saved beside the state of a position."""
    key_data = jax.random.key_data(position.key).tolist()  # JSON has no keys
    return {"identity": plan.identity, "cursor": position.cursor, "key": key_data}


def _is_evaluated(plan: Plan, step: int) -> bool:
    """Returns whether the validation set is read after a step: at intervals, and at the end."""
    if plan.corpus.val is None:
        return False
    return step % plan.recipe.eval_every == 0 or step == plan.recipe.steps


def _evaluate(plan: Plan, position: Position, step: int, say: Callable[[str], None]) -> Evaluation:
    """Returns the loss on the validation set after a step, and a text of the model's own."""
    assert plan.corpus.val is not None, "`_is_evaluated` said so"
    params = position.state.params
    val_loss = validation_loss(
        params, plan.corpus.val, config=plan.config, recipe=plan.recipe, mesh=plan.mesh
    )
    return Evaluation(
        step=step,
        val_loss=val_loss,
        bytes_per_token=plan.corpus.bytes_per_token,
        sample=_sample_or_note(plan, position, step, say),
    )


def _sample_or_note(
    plan: Plan, position: Position, step: int, say: Callable[[str], None]
) -> str | None:
    """Returns a text of the model's own; where there is none to be had, says why."""
    if _n_sampled(plan) == 0:
        return None
    params = _gathered(position.state.params, plan.mesh)
    if params is None:  # in all processes but the first
        return None
    try:
        return _sample_text(plan, _apart(params), position.key)
    # Whatever it was, memory for a cache of keys and values included: people look at samples, and
    # no step of a run of days depends on one.
    except Exception as error:
        say(f"No sample after step {step}: {error}")
        return None


def _gathered(params: Params, mesh: Mesh | None) -> Params | None:
    """Returns params whole on the first process's first device, and None in the other processes.

    All processes take part in this, so that the first can go on with them alone.
    """
    if mesh is None:
        return params
    whole = NamedSharding(mesh, PartitionSpec())

    # One after the other: no device but the first ever holds more than one of them.
    def gather(leaf: Array) -> Array | None:
        everywhere = jax.device_put(leaf, whole)
        return everywhere.addressable_data(0) if is_first() else None

    gathered = jax.tree.map(gather, params)
    return gathered if is_first() else None


def _n_sampled(plan: Plan) -> int:
    """Returns how many tokens a sample has; 0 where there is nothing to read it with."""
    if plan.corpus.tokenizer is None or plan.corpus.val is None:
        return 0
    return min(plan.recipe.sample_tokens, plan.config.n_positions - 1)  # one for the prompt


def _sample_text(plan: Plan, params: Params, key: PRNGKeyArray) -> str:
    """Returns a text that the model makes up.

    It goes on from the end of a text or, in a vocabulary without one, from a token of the data.
    """
    tokenizer = plan.corpus.tokenizer
    assert tokenizer is not None and plan.corpus.val is not None, "`_n_sampled` said so"
    first_id = tokenizer.eot_id
    if first_id is None:
        first_id = plan.corpus.val.read(Place(0, 0, 1))[0]
    # A vocabulary of characters has fewer tokens than 200.
    top_k = TopK(min(SAMPLE_TOP_K, plan.config.vocab_size))
    sampled = generate(
        params,
        np.array([[first_id]]),
        None,
        key,  # the same each time: samples differ by what was learnt between them
        config=plan.config,
        max_new_tokens=_n_sampled(plan),
        sampler=Categorical(Chain((Temperature(SAMPLE_TEMPERATURE), top_k))),
    )
    length = int(sampled.lengths[0])
    return tokenizer.decode(sampled.ids[0, :length])
