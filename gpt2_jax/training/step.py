"""The training step: gradients of a loss, an update, the state. Knows nothing of files or loops.

What is learnt from is `losses`', and how far a step goes `optimizers`'. It equals PyTorch's on HF's
model, setting for setting, as these do:

| here | PyTorch |
|---|---|
| `micro_batches=n` | n times `backward()`, of losses that are sums over the whole batch's weight |
| `key` | `model.train()`: the same law of dropout, other draws |

Axes are those of `losses.py`.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import Layout
from gpt2_jax.memory import give_back_after_compiling
from gpt2_jax.modules import Params, checked_remat
from gpt2_jax.quantised import refuse_quantised
from gpt2_jax.rebuilt import Watch
from gpt2_jax.sharding import (
    BATCH_AXES,
    automatic_update,
    constrain,
    places,
    put_back,
    together,
)
from gpt2_jax.training.losses import Metrics, TextBatch, make_batch, predicted_weight, share_of_loss

_OPTIMIZERS = Watch(
    "`tx` is a new optimizer at each step, and each compiles its own: make it once, and give the"
    " learning rate as a schedule where it is to change."
)

# `(params, batch, *, config, dropout_key) -> (loss, metrics)`
LossFn = Callable[..., tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """What a step of training changes.

    Examples:
      >>> gpt2_jax.TrainState._fields
      ('step', 'params', 'opt_state')
    """

    step: Int[Array, ""]  # int32, how many updates were made
    params: Params  # float32 (float64 in a float64 model), whatever dtype the model computes in
    opt_state: Any  # optax's


class _Program(NamedTuple):
    """What shapes a step's program, beside the config. Static: each other value compiles anew."""

    tx: optax.GradientTransformation  # equal to itself alone, so the caller keeps one object
    micro_batches: int
    remat: str
    loss_fn: Any  # None, or a function, likewise equal to itself alone
    trainable: str | tuple[str, ...] | None  # patterns of names; None for all
    places: Any = None  # where the state lies on a mesh: see `sharding.places`


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    trainable: str | Sequence[str] | None = None,
) -> TrainState:
    """Returns the state before the first step. Does not compile itself.

    It holds a copy of the params, as `train_step` donates its state. Params of 16 bits that are
    trained become float32: small updates would vanish in them. `config.dtype` says what a step
    computes in.

    Args:
      params: the parameters, or any pytree that a `loss_fn` takes.
      tx: the optimizer; it sees, and holds moments of, what is trained alone.
      trainable: patterns of the names of leaves that are trained, such as "h.11.*" or "lora.*"; all
        by default. See `partition`.

    Raises:
      ValueError: a pattern matches no leaf, or params that are trained are quantised.

    Examples:
      >>> tx = gpt2_jax.make_optimizer(1e-3)
      >>> state = gpt2_jax.init_state(params, tx, trainable="h.1.*")
      >>> int(state.step)
      0
    """

    def widened_copy(leaf: Array | np.ndarray) -> Array:
        # `jnp.array`, not `asarray`, which would share the memory of a leaf that is wide already.
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))

    trained, frozen = partition(params, trainable)
    refuse_quantised(trained, "What is trained")
    trained = jax.tree.map(widened_copy, trained)
    frozen = jax.tree.map(jnp.array, frozen)  # copies: these are donated, too
    state = TrainState(
        step=jnp.int32(0), params=combine(trained, frozen), opt_state=tx.init(trained)
    )
    return together(_unshared(state))


def partition(params: Any, patterns: str | Sequence[str] | None) -> tuple[Any, Any]:
    """Returns the leaves of a tree whose names match, and the others: `combine` joins them again.

    Each is the whole tree, with None in the places of the other's leaves.

    Args:
      params: any pytree. A leaf's name is its path, as in "h.3.attn.c_attn.kernel".
      patterns: one or more patterns as in a shell: `*` is any text. None matches all.

    Raises:
      ValueError: a pattern matches no leaf.
    """
    if patterns is None:
        return params, jax.tree.map(lambda leaf: None, params)
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    paths_and_leaves, structure = jax.tree.flatten_with_path(params)
    names = [keystr(path, simple=True, separator=".") for path, _ in paths_and_leaves]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3) or names[:4]
            raise ValueError(
                f"`trainable` must match leaves of the params, {pattern!r} matches none. Names are"
                f" such as {', '.join(near)}."
            )
    trained: list[Any] = []
    frozen: list[Any] = []
    for name, (_, leaf) in zip(names, paths_and_leaves, strict=True):
        is_trained = any(fnmatchcase(name, pattern) for pattern in patterns)
        # None is no leaf to JAX: gradients and optimizers meet the trained ones alone.
        trained.append(leaf if is_trained else None)
        frozen.append(None if is_trained else leaf)
    return jax.tree.unflatten(structure, trained), jax.tree.unflatten(structure, frozen)


def combine(one: Any, other: Any) -> Any:
    """Returns the tree of which each has the leaves that the other lacks."""

    def present(a: Any, b: Any) -> Any:
        return b if a is None else a

    return jax.tree.map(present, one, other, is_leaf=lambda leaf: leaf is None)


def _unshared(state: TrainState) -> TrainState:
    """Returns a state of which no two leaves are the same array.

    Some optimizers keep the first params, or one zero in two places; a step donates each leaf, and
    no array can be given away twice.
    """
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if id(leaf) in seen:
            return jnp.array(leaf)  # a copy
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)


def train_step(
    state: TrainState,
    ids: Any,
    key: PRNGKeyArray | None = None,
    *,
    config: GPT2Config,
    tx: optax.GradientTransformation,
    weights: Num[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    micro_batches: int = 1,
    remat: str | bool = "none",
    loss_fn: LossFn | None = None,
    trainable: str | Sequence[str] | None = None,
) -> tuple[TrainState, Metrics]:
    """Makes one update. Compiles itself; `state` is donated, so use the one that comes back.

    Args:
      state: what `init_state` or the last step returned.
      ids: token ids: see `next_token_loss`; with a `loss_fn`, the batch that it takes, a pytree of
        arrays with one number of rows.
      key: turns dropout on. The step's number is folded in, so that one key serves a whole run.
      config: the model's configuration.
      tx: any optax optimizer, such as `make_optimizer` returns. Each object compiles its own step.
      weights, segment_ids: see `next_token_loss`.
      micro_batches: in how many parts the batch passes through the model, one after the other. The
        update is that of the whole batch, the memory that of a part.
      remat: see `next_token_loss`.
      loss_fn: another loss, `loss_fn(params, batch, *, config, dropout_key) -> (loss, metrics)`, as
        `next_token_loss` is one: `dropout_key` is the step's, or None, and metrics are a dict of
        scalars. Of `micro_batches` the loss and the metrics are the mean. Each object compiles its
        own step.
      trainable: what `init_state` was given. The gradient of the other leaves is not computed.

    Returns:
      The next state, and a dict of `loss`, `grad_norm` (the gradient's global norm before clipping)
      and `weight`, or the metrics of `loss_fn`, all of the params before the update.

    Raises:
      ValueError: as `next_token_loss`; or `B` is not a multiple of `micro_batches`, or `weights`,
        `segment_ids` or `remat` stand beside a `loss_fn`, which does not take them.

    Examples:
      >>> tx = gpt2_jax.make_optimizer(1e-2)
      >>> state = gpt2_jax.init_state(params, tx)
      >>> losses = []
      >>> for _ in range(3):
      ...     state, metrics = gpt2_jax.train_step(state, ids, config=config, tx=tx)
      ...     losses.append(float(metrics["loss"]))
      >>> losses[2] < losses[1] < losses[0], int(state.step)
      (True, 3)
    """
    give_back_after_compiling()
    # Everything is checked before the compiled step, which takes the state's memory away.
    remat = checked_remat(remat)
    if loss_fn is None:
        batch = make_batch(ids, weights, Layout(segment_ids=segment_ids), None, config)
    elif weights is not None or segment_ids is not None or remat != "none":
        raise ValueError(
            "`weights`, `segment_ids` and `remat` are the usual loss's: a `loss_fn` finds what it"
            " needs in its batch."
        )
    else:
        batch = jax.tree.map(jnp.asarray, ids)
    _check_parts(batch, micro_batches)
    # A tuple, as `_Program` is static and must be hashable.
    if trainable is not None and not isinstance(trainable, str):
        trainable = tuple(trainable)
    _OPTIMIZERS.see(tx)
    # Not only in `init_state`: a state that a caller has made or restored may share arrays, too.
    state = together(_unshared(state))
    program = _Program(tx, micro_batches, remat, loss_fn, trainable, places(state))
    return _train_step(state, batch, key, config=config, program=program)


def _check_parts(batch: Any, micro_batches: int) -> None:
    """Raises `ValueError` unless all arrays split into as many parts."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"The arrays of a batch must have one number of rows, got {sorted(sizes)}."
        )
    n_rows = sizes.pop()
    if micro_batches < 1 or n_rows % micro_batches:
        raise ValueError(
            f"The {n_rows} rows of `ids` must split into `micro_batches`, got {micro_batches}."
        )


# The step, compiled.


# Donated: with Adam's two moments a state is three times the params, and two states would be six.
@partial(jax.jit, static_argnames="program", donate_argnames="state")
@automatic_update
def _train_step(
    state: TrainState,
    batch: Any,
    key: PRNGKeyArray | None,
    *,
    config: GPT2Config,
    program: _Program,
) -> tuple[TrainState, Metrics]:
    """Returns the state after an update, and what `train_step` measures."""
    # The step is the state's own: a resumed run drops what it would have dropped without a stop.
    step_key = None if key is None else jax.random.fold_in(key, state.step)
    trained, frozen = partition(state.params, program.trainable)
    # A batch of another loss weighs what that loss says.
    weight = predicted_weight(batch) if isinstance(batch, TextBatch) else None
    share = partial(_share, whole_weight=weight, config=config, program=program)

    # Of what is trained alone: the gradient of the rest is never computed.
    def loss_of(trained, part, part_key):
        return share(combine(trained, frozen), part, part_key)

    def value_and_grads(trained: Params) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        of_part = partial(jax.value_and_grad(loss_of, has_aux=True), trained)
        return _summed(of_part, batch, step_key, program.micro_batches)

    # A line search hands on what it does not know itself, and refuses what nobody takes.
    def value_fn(trained: Params, obj_fn: Any = None) -> Float[Array, ""]:
        del obj_fn
        loss, _ = _summed(partial(loss_of, trained), batch, step_key, program.micro_batches)
        return loss

    (loss, metrics), grads = value_and_grads(trained)
    # Before clipping, which is the optimizer's: the norm shows a step that clipping hides.
    grad_norm = optax.tree.norm(grads)
    extras = {
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,  # Sophia's name for it
        "grad_fn": lambda params, _: value_and_grads(params)[1],  # SAM's
    }
    tx = optax.with_extra_args_support(program.tx)
    updates, opt_state = tx.update(grads, state.opt_state, trained, **_asked_for(extras, tx))
    params = combine(optax.apply_updates(trained, updates), frozen)
    next_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    # Where it lay before: elsewhere, the next step would be another program.
    next_state = put_back(next_state, program.places)
    return next_state, metrics | {"loss": loss, "grad_norm": grad_norm}


def _asked_for(extras: dict[str, Any], tx: optax.GradientTransformation) -> dict[str, Any]:
    """Returns what an optimizer takes beside gradients. What it does not use is never traced."""
    parameters = inspect.signature(tx.update).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # SAM's is a gradient at other params: who takes anything has no use for it.
    anything = set(extras) - {"grad_fn"} if takes_any else set()
    return {name: extras[name] for name in extras if name in parameters or name in anything}


def _summed(
    of_part: Callable[[Any, PRNGKeyArray | None], Any],
    batch: Any,
    key: PRNGKeyArray | None,
    n_parts: int,
) -> Any:
    """Returns the sum of what a function gives for each part of a batch, a pytree."""
    if n_parts == 1:
        return of_part(batch, key)

    def add_part(total, numbered_part):  # one step of the scan
        number, part = numbered_part
        # Parts with one and the same key would all drop the same units.
        part_key = None if key is None else jax.random.fold_in(key, number)
        return jax.tree.map(jnp.add, total, of_part(part, part_key)), None

    numbers = jnp.arange(n_parts)
    parts = jax.tree.map(lambda x: x.reshape(n_parts, -1, *x.shape[1:]), batch)  # [N, B / N, ...]
    # Each part is spread over all devices: cut in order, it would lie on a few of them.
    parts = jax.tree.map(lambda x: constrain(x, None, BATCH_AXES), parts)
    # A scan carries one kind of value throughout: its zeros are shaped without running a part.
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(of_part, first, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # A scan, not a Python loop: it is compiled once, and the activations of one part are alive.
    total, _ = jax.lax.scan(add_part, zeros, (numbers, parts))
    return total


def _share(
    params: Params,
    part: Any,
    key: PRNGKeyArray | None,
    *,
    whole_weight: Float[Array, ""] | None,
    config: GPT2Config,
    program: _Program,
) -> tuple[Float[Array, ""], Metrics]:
    """Returns what a part of a batch adds to the loss and the metrics of the whole."""
    if program.loss_fn is None:
        assert whole_weight is not None
        loss = share_of_loss(
            params, part, key, whole_weight=whole_weight, config=config, remat=program.remat
        )
        return loss, {"weight": predicted_weight(part)}
    loss, metrics = program.loss_fn(params, part, config=config, dropout_key=key)
    # The mean over the parts, which are of one size.
    return jax.tree.map(lambda x: x / program.micro_batches, (loss, metrics))
