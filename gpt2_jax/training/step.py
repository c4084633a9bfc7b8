"""The training step: loss, optimizer, state, update. Knows the model; nothing of files or loops.

It equals PyTorch's on HF's model, setting for setting:

| here | PyTorch |
|---|---|
| `make_optimizer(lr, b1=, b2=, eps=, weight_decay=)` | `AdamW(lr=, betas=, eps=, weight_decay=)` |
| decay of leaves of two axes | two groups: `p.ndim >= 2`, and the rest with `weight_decay=0` |
| `max_grad_norm` | `clip_grad_norm_(max_norm)`; it divides by `norm + 1e-6`, optax by `norm` |
| `warmup_cosine` | `LambdaLR` over the same formula; PyTorch's steps count from 0 likewise |
| `micro_batches=n` | n times `backward()`, of losses that are sums over the whole batch's weight |
| `dropout_key` | `model.train()`: the same law, other draws |

Axes are those of `modules.py`; here `T` counts one id more than the model reads, as the last one is
only predicted.
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
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import Layout, check_ids
from gpt2_jax.kernels import summed_cross_entropy
from gpt2_jax.model import apply, gathered, head_matrix, hidden_states, unembed
from gpt2_jax.modules import Params, Tap, checked_remat, no_tap, wants, wide_dtype
from gpt2_jax.quantised import refuse_quantised
from gpt2_jax.rebuilt import Watch
from gpt2_jax.sharding import (
    BATCH_AXES,
    automatic,
    automatic_update,
    constrain,
    places,
    put_back,
    together,
)
from gpt2_jax.stack import n_axes

_OPTIMIZERS = Watch(
    "`tx` is a new optimizer at each step, and each compiles its own: make it once, and give the"
    " learning rate as a schedule where it is to change."
)

# Numbers in the logits of a batch, 128 MiB in float32, beyond which its loss is computed by chunks.
# In a step of GPT-2 124M on CPU, over 4 texts of 256 tokens, two chunks took the time of one.
LARGEST_LOGITS = 2**25

Metrics = dict[str, Array]  # scalars by name
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


class _Batch(NamedTuple):
    """What a step learns from, checked."""

    ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]  # how much the prediction of each id counts; the first, never
    layout: Layout
    inputs_embeds: Float[Array, "B T D"] | None  # what the model reads in the place of `ids`


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


@automatic
def next_token_loss(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    weights: Num[ArrayLike, "B T"] | None = None,
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
    tap: Tap = no_tap,
    dropout_key: PRNGKeyArray | None = None,
    remat: str | bool = "none",
) -> tuple[Float[Array, ""], Metrics]:
    """Returns the mean negative log-likelihood of each token after those before it, and metrics.

    The loss of HF's `GPT2LMHeadModel(ids, labels=ids)`, in nats; its `-100` labels are weights of 0
    here. It does not compile itself: `jax.jit` and `jax.grad` are the caller's.

    Args:
      params: the parameters.
      ids: token ids, of which the model reads the first `T - 1` columns and predicts the last
        `T - 1`; so `T` is 2 to `n_positions + 1`.
      config: the model's configuration.
      weights: how much the prediction of each id counts, not negative. The first column is never
        predicted and is ignored. Padding on the right has weight 0.
      positions, mask: see `apply`; with a place for each of `ids`, the last included. A mask says
        what is seen, not what counts.
      segment_ids: several texts to a row: see `apply`. The first token of each is not predicted,
        whatever its weight.
      inputs_embeds: what the model reads in the place of `ids`, which it predicts all the same.
      tap: see `apply`; of the first `T - 1` columns.
      dropout_key: turns dropout on.
      remat: what the backward pass recomputes: see `apply`.

    Returns:
      The loss, float32 (float64 in a float64 model), 0 where all weights are 0; and a dict of
      `loss` and `weight`, the sum of the weights: without them, the number of predictions.

    Raises:
      ValueError: as `apply`; or `ids` has less than 2 columns, or `weights` another shape.

    Examples:
      >>> loss_and_grad = jax.jit(jax.value_and_grad(gpt2_jax.next_token_loss, has_aux=True))
      >>> (loss, metrics), grads = loss_and_grad(params, ids, config=config)
      >>> bool(abs(loss - np.log(config.vocab_size)) < 0.5), float(metrics["weight"])  # untrained
      (True, 3.0)
      >>> jax.tree.structure(grads) == jax.tree.structure(params)
      True
    """
    layout = Layout(positions, mask, segment_ids)
    batch = _make_batch(ids, weights, layout, inputs_embeds, config)
    weight = _predicted_weight(batch)
    loss = _share_of_loss(
        params,
        batch,
        dropout_key,
        whole_weight=weight,
        config=config,
        remat=checked_remat(remat),
        tap=tap,
    )
    return loss, {"loss": loss, "weight": weight}


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
    # Everything is checked before the compiled step, which takes the state's memory away.
    remat = checked_remat(remat)
    if loss_fn is None:
        batch = _make_batch(ids, weights, Layout(segment_ids=segment_ids), None, config)
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
    weight = _predicted_weight(batch) if isinstance(batch, _Batch) else None
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
        loss = _share_of_loss(
            params, part, key, whole_weight=whole_weight, config=config, remat=program.remat
        )
        return loss, {"weight": _predicted_weight(part)}
    loss, metrics = program.loss_fn(params, part, config=config, dropout_key=key)
    # The mean over the parts, which are of one size.
    return jax.tree.map(lambda x: x / program.micro_batches, (loss, metrics))


def _share_of_loss(
    params: Params,
    part: _Batch,
    dropout_key: PRNGKeyArray | None,
    *,
    whole_weight: Float[Array, ""],
    config: GPT2Config,
    remat: str,
    tap: Tap = no_tap,
) -> Float[Array, ""]:
    """Returns what a part of a batch adds to the loss of the whole.

    The divisor is the weight of the whole batch: where parts weigh differently, the mean of their
    means is another number.
    """
    read = part.ids[:, :-1]
    predicted = part.ids[:, 1:]
    embeds = None if part.inputs_embeds is None else part.inputs_embeds[:, :-1]
    layout = part.layout.without_last()
    # Who wants the logits themselves gets those of all tokens.
    gives_logits = wants(tap, "logits")
    run = apply if gives_logits else hidden_states
    out = run(
        params,
        read if embeds is None else None,
        config=config,
        positions=layout.positions,
        mask=layout.mask,
        segment_ids=layout.segment_ids,
        inputs_embeds=embeds,
        tap=tap,
        dropout_key=dropout_key,
        remat=remat,
    )
    weights = part.weights[:, 1:]
    if gives_logits:
        total = _summed_losses_of(out, predicted, weights)
    else:
        total = _summed_losses(params, out, predicted, weights, config=config)
    # Where nothing counts, `total` is 0 and so is the loss; 0 / 0 would make every parameter NaN.
    divisor = jnp.where(whole_weight == 0, 1, whole_weight)
    return total / divisor


def _summed_losses_of(
    logits: Float[Array, "B T V"], predicted: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the weighted sum of the losses that logits make."""
    # Logits are float32 even of a model that computes in bfloat16, and so is all that follows.
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, predicted)
    return (losses * weights).sum()


def _summed_losses(
    params: Params,
    hidden: Float[Array, "B T D"],
    predicted: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    config: GPT2Config,
) -> Float[Array, ""]:
    """Returns the weighted sum of the losses, in float32 (float64 in a float64 model)."""
    n_chunks = -(-predicted.size * config.vocab_size // LARGEST_LOGITS)
    if n_chunks == 1:
        return _summed_losses_of(unembed(params, hidden, config=config), predicted, weights)
    table = gathered(head_matrix(params, config=config).astype(config.dtype))
    chunk = -(-predicted.shape[1] // n_chunks)
    return summed_cross_entropy(
        hidden.astype(config.dtype), table, predicted, weights, chunk, config.precision
    )


def _predicted_weight(batch: _Batch) -> Float[Array, ""]:
    """Returns the sum of the weights that count: nothing predicts the first column."""
    return batch.weights[:, 1:].sum()


def _make_batch(
    ids: Int[ArrayLike, "B T"],
    weights: Num[ArrayLike, "B T"] | None,
    layout: Layout,
    inputs_embeds: Float[ArrayLike, "B T D"] | None,
    config: GPT2Config,
) -> _Batch:
    """Returns what a step learns from as arrays that fit each other.

    Raises:
      ValueError: they do not.
    """
    # One more than the model reads: the last id is only predicted.
    ids = check_ids(ids, config, longest=config.n_positions + 1)
    if ids.shape[1] < 2:
        raise ValueError(
            "`ids` must have at least 2 columns: one to read and one to predict, got 1."
        )
    # The dtype of the logits, whatever the weights came in: a mask of integers, say.
    dtype = wide_dtype(config)
    if weights is None:
        weights = jnp.ones(ids.shape, dtype)
    _check_shape("weights", weights, ids)
    weights = jnp.asarray(weights, dtype)
    if inputs_embeds is not None:
        inputs_embeds = jnp.asarray(inputs_embeds)
    if layout.segment_ids is not None:
        _check_shape("segment_ids", layout.segment_ids, ids)
        segment_ids = jnp.asarray(layout.segment_ids)
        layout = layout._replace(segment_ids=segment_ids)
        # Nothing before it says what a text begins with.
        is_first = segment_ids[:, 1:] != segment_ids[:, :-1]
        # Multiplied, not set: where a token counts, the weight that it was given stays.
        weights = weights.at[:, 1:].multiply(~is_first)
    return _Batch(ids, weights, layout, inputs_embeds)


def _check_shape(name: str, given: ArrayLike, ids: Int[Array, "B T"]) -> None:
    if jnp.shape(given) != ids.shape:
        expected = list(ids.shape)
        got = list(jnp.shape(given))
        raise ValueError(f"`{name}` must have the shape of `ids`, {expected}, got {got}.")


# The optimizer.


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    kind: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.95,  # GPT-3's (arXiv:2005.14165, appendix B); PyTorch's own default is 0.999
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Returns GPT's AdamW: clipping by global norm, Adam, decay of matrices and embeddings alone.

    Defaults are nanoGPT's. `learning_rate` is a number or a schedule, such as `warmup_cosine`'s.

    With `kind="muon"` the layers' matrices take Muon's steps (K. Jordan, 2024), scaled to the
    length that Adam's usually have (arXiv:2502.16982), so that one learning rate serves both;
    embeddings, biases and LayerNorms take Adam's, undecayed.

    Raises:
      ValueError: there is no such kind.

    Examples:
      >>> tx = gpt2_jax.make_optimizer(learning_rate=1.0, weight_decay=0.1)
      >>> tree = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
      >>> zeros = jax.tree.map(jnp.zeros_like, tree)
      >>> updates, _ = tx.update(zeros, tx.init(tree), tree)
      >>> updates["kernel"].round(3).tolist(), bool(updates["bias"] == 0)  # matrices decay alone
      ([[-0.1]], True)
    """
    if max_grad_norm is None:
        clip = optax.identity()
    else:
        clip = optax.clip_by_global_norm(max_grad_norm)
    if kind == "adamw":
        update = optax.adamw(
            learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_decayed
        )
    elif kind == "muon":
        adam = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=0.0)
        # By a function of the params, not by their tree: what is trained may be a part of them.
        update = optax.partition({"adam": adam, "muon": _muon(learning_rate, weight_decay)}, _kinds)
    else:
        raise ValueError(f'`kind` must be "adamw" or "muon", got {kind!r}.')
    # Clipping comes first, as in nanoGPT: behind Adam it would bound the update, not the gradient.
    return optax.chain(clip, update)


def is_decayed(params: Params) -> Any:  # a tree of booleans
    """Returns which leaves decay: those of two axes; biases and LayerNorms do not."""
    # By axes, not by names: nanoGPT's rule (`configure_optimizers`), and right for any new layer.
    return jax.tree.map_with_path(lambda path, leaf: n_axes(path, leaf) >= 2, params)


def _muon(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """Returns Muon for matrices: momentum, made orthogonal, then decay."""
    # Not optax.contrib.muon, for which `c_attn` would be one matrix, and no three.
    return optax.chain(
        optax.trace(0.95, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(_orthogonal_update, updates)),
        # Behind the direction and before the rate, as in AdamW: decay is none of the momentum's.
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kinds(params: Params) -> Any:  # a tree of strings
    """Returns whose steps each leaf takes: Muon's are for the layers' kernels."""

    def kind(path: tuple[Any, ...], leaf: Array) -> str:
        del leaf
        return "muon" if path[-1].key == "kernel" else "adam"

    return jax.tree.map_with_path(kind, params)


def _orthogonal_update(path: tuple[Any, ...], update: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """Returns the direction of a kernel's update, with entries of about 0.2 in the mean square."""
    if n_axes(path, update) < update.ndim:  # a stack of layers
        return jax.vmap(partial(_orthogonal_update, path[-2:]))(update)
    # Queries, keys and values are three matrices that stand side by side.
    n_matrices = 3 if path[-2].key == "c_attn" else 1
    directions = []
    for matrix in jnp.split(update, n_matrices, axis=1):
        scale = 0.2 * max(matrix.shape) ** 0.5  # arXiv:2502.16982, equation 4
        directions.append(scale * orthogonalize(matrix))
    return jnp.concatenate(directions, axis=1)


def orthogonalize(matrix: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """Returns about `U V^T` of a matrix `U S V^T`, with singular values between 0.7 and 1.2.

    Muon's Newton-Schulz iteration with its coefficients: five times
    `x <- (a + b x x^T + c (x x^T)^2) x`. The steps are multiplied up on the smaller side's square,
    and reach the matrix once: fewer products than step by step.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    a = 3.4445
    b = -4.7750
    c = 2.0315
    # No singular value exceeds the Frobenius norm, and much above 1 the iteration diverges.
    x = matrix / (jnp.linalg.norm(matrix) + 1e-7)
    identity = jnp.eye(len(x), dtype=x.dtype)
    gram = x @ x.T
    whole = identity
    for _ in range(5):
        step = a * identity + b * gram + c * gram @ gram
        gram = step @ gram @ step
        whole = step @ whole
    return whole @ x


def warmup_cosine(
    peak: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    end: float = 0.0,
) -> optax.Schedule:
    """Returns nanoGPT's schedule (`get_lr` in its `train.py`): a linear warmup, then half a cosine.

    With `step` updates made before, the warmup is `peak * (step + 1) / (warmup_steps + 1)`; the
    cosine falls from `peak` at `warmup_steps` to `end` at `steps`, where the rate stays. With
    `decay_steps` it takes so many steps, the last ones, and the peak is held until then.

    Raises:
      ValueError: `warmup_steps` is not less than `steps`, or `decay_steps` does not fit in.

    Examples:
      >>> schedule = gpt2_jax.warmup_cosine(1.0, steps=100, warmup_steps=9)
      >>> [round(float(schedule(step)), 2) for step in (0, 4, 9, 100)]
      [0.1, 0.5, 1.0, 0.0]
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"`warmup_steps` must be in [0, {steps}) (`steps`), got {warmup_steps}.")
    n_left = steps - warmup_steps
    n_decay = n_left if decay_steps is None else decay_steps
    if not 0 < n_decay <= n_left:
        expected = f"[1, {n_left}] (`steps` less `warmup_steps`)"
        raise ValueError(f"`decay_steps` must be in {expected}, got {decay_steps}.")
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    held = optax.constant_schedule(peak)
    decay = optax.cosine_decay_schedule(peak, n_decay, alpha=end / peak)
    # Each counts its steps from where it begins.
    schedule = optax.join_schedules([warmup, held, decay], [warmup_steps, steps - n_decay])

    def rate(step: Num[ArrayLike, ""]) -> ArrayLike:
        # As JAX's default float: of an int32, optax makes float32 even in a float64 model.
        return schedule(jnp.asarray(step, float))

    return rate
