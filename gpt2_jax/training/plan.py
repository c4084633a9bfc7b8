"""What a run does, settled before its first step: the model, the optimizer, the first state.

Knows recipes, corpora and weights to start from. What does not fit together is refused here, before
anything is written.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from gpt2_jax.cache import device_memory
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import init
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.layout import param_shapes
from gpt2_jax.pretrained.weights import load
from gpt2_jax.sharding import n_batch_shards, shardings
from gpt2_jax.stack import is_stacked, stack_layers, unstack_layers
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import TokenizerKindError
from gpt2_jax.training.checkpoint import placed_shape
from gpt2_jax.training.corpus import Corpus
from gpt2_jax.training.data import Batches
from gpt2_jax.training.optimizers import make_optimizer, warmup_cosine
from gpt2_jax.training.processes import agree
from gpt2_jax.training.recipes import Recipe
from gpt2_jax.training.step import TrainState, init_state
from gpt2_jax.training.token_files import DataError

TRAINING_BYTES = 12  # of each parameter, at the least: its value, gradient and mean in float32


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


def make_plan(
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


def check_agreement(plan: Plan, resume: bool) -> None:
    """Raises `ProcessError` where the processes of a program were started differently."""
    mesh = None if plan.mesh is None else dict(plan.mesh.shape)
    others = {"jax": jax.__version__, "mesh": mesh, "resume": resume}
    agree(flat(plan.identity) | others)


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of nested dicts by names like "recipe.seed", as JSON gives them back."""
    # JSON makes lists of tuples: so what comes from a file equals what never was in one.
    from_json = json.loads(json.dumps(identity))
    return flatten_dict(from_json, sep=".")


# The optimizer of a recipe.


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


# The model to begin with.


def initial_model(
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


# The state to begin with.


def beginning_of(plan: Plan, pretrained: Params | None) -> Beginning:
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


def state_shapes(recipe: Recipe, config: GPT2Config) -> TrainState:
    """Returns the shapes and dtypes of a run's state, without its memory."""

    def make_state(key: PRNGKeyArray) -> TrainState:
        return _first_state(init(key, config), recipe)

    return jax.eval_shape(make_state, jax.random.key(0))


def apart(params: Params) -> Params:
    """Returns params with their layers apart, as all but the step takes them."""
    return unstack_layers(params) if is_stacked(params) else params
