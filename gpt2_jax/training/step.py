"""The training step: loss, optimizer, state, update. Knows the model; nothing of files, loops or schedules of saving.

It equals PyTorch's on HF's model, setting for setting:

| here | PyTorch |
|---|---|
| `make_optimizer(lr, b1=, b2=, eps=, weight_decay=)` | `torch.optim.AdamW(lr=, betas=, eps=, weight_decay=)` |
| weight decay on leaves of two axes | two parameter groups: `p.ndim >= 2`, and the rest with `weight_decay=0` |
| `max_grad_norm` | `clip_grad_norm_(max_norm)`, which divides by `norm + 1e-6` where optax divides by `norm` |
| `warmup_cosine` | `LambdaLR` over the same formula; PyTorch's steps count from 0 likewise |
| `micro_batches=n` | n calls of `backward()` on losses that are each a sum divided by the whole batch's weight |
| `dropout_key` | `model.train()`: the same law, other draws |
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import apply, check_ids

Params = dict[str, Any]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """What a step of training changes."""

    step: Array  # int32[], updates made so far
    params: Params  # float32 (float64 in a float64 model), whatever dtype the model computes in
    opt_state: Any  # optax's


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, which holds a copy of the params, as `train_step` donates its state.

    Params of 16 bits become float32: small updates would vanish in them. `config.dtype` says what a step computes in.
    """
    params = jax.tree.map(
        lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params
    )
    return TrainState(jnp.int32(0), params, tx.init(params))


def next_token_loss(
    params: Params,
    ids: Array,
    *,
    config: GPT2Config,
    weights: Array | None = None,
    dropout_key: Array | None = None,
    remat: bool = False,
) -> tuple[Array, Metrics]:
    """Returns the mean negative log-likelihood of each token after its predecessors, in nats, and metrics.

    The loss of HF's `GPT2LMHeadModel(ids, labels=ids)`; its `-100` labels are weights of 0 here.

    Args:
      params: the parameters.
      ids: `int[B, T]`, of which the model reads the first `T - 1` columns and predicts the last `T - 1`; so `T` is
        at most `n_positions + 1`.
      config: the model's configuration.
      weights: `float[B, T]`, not negative: how much the prediction of each id counts. The first column is never
        predicted and is ignored. Padding on the right, or the first token of a packed document, has weight 0.
      dropout_key: turns dropout on.
      remat: recomputes each layer's activations in the backward pass instead of keeping them.

    Returns:
      The loss, float32[] (float64 in a float64 model), 0 where all weights are 0; and a dict of `loss` and `weight`,
      the sum of the weights: without them, the number of predictions.

    Raises:
      ValueError: as `apply`; or `ids` has less than 2 columns, or `weights` another shape.
    """
    ids, weights = _check_batch(ids, weights, config)
    total = _loss_sum(params, ids, weights, config=config, dropout_key=dropout_key, remat=remat)
    weight = weights[:, 1:].sum()
    loss = total / _nonzero(weight)
    return loss, {"loss": loss, "weight": weight}


def train_step(
    state: TrainState,
    ids: Array,
    key: Array | None = None,
    *,
    config: GPT2Config,
    tx: optax.GradientTransformation,
    weights: Array | None = None,
    micro_batches: int = 1,
    remat: bool = False,
) -> tuple[TrainState, Metrics]:
    """Makes one update, compiled; `state` is donated, so use the one that comes back.

    Args:
      state: what `init_state` or the last step returned.
      ids: `int[B, T]`: see `next_token_loss`.
      key: turns dropout on. The step's number is folded in, so that one key serves a whole run.
      config: the model's configuration.
      tx: any optax optimizer, such as `make_optimizer` returns.
      weights: `float[B, T]`: see `next_token_loss`.
      micro_batches: in how many parts the batch passes through the model, one after the other. The update is that of
        the whole batch, the memory that of a part.
      remat: see `next_token_loss`.

    Returns:
      The next state, and a dict of `loss`, `weight` and `grad_norm` (the gradient's global norm before clipping), all
      of the params before the update.

    Raises:
      ValueError: as `next_token_loss`; or `B` is not a multiple of `micro_batches`.
    """
    ids, weights = _check_batch(ids, weights, config)
    if micro_batches < 1 or ids.shape[0] % micro_batches:
        raise ValueError(
            f"The {ids.shape[0]} rows of `ids` must split into `micro_batches`, got {micro_batches}."
        )
    return _train_step(
        state, ids, weights, key, config=config, tx=tx, micro_batches=micro_batches, remat=remat
    )


@partial(
    jax.jit, static_argnames=("config", "tx", "micro_batches", "remat"), donate_argnames="state"
)
def _train_step(state, ids, weights, key, *, config, tx, micro_batches, remat):
    weight = weights[:, 1:].sum()
    step_key = None if key is None else jax.random.fold_in(key, state.step)

    @jax.value_and_grad
    def share(params, ids, weights, dropout_key):
        """A part's share of the loss of the whole batch."""
        total = _loss_sum(params, ids, weights, config=config, dropout_key=dropout_key, remat=remat)
        return total / _nonzero(weight)

    def accumulate(total, part):
        number, ids, weights = part
        dropout_key = None if key is None else jax.random.fold_in(step_key, number)
        return jax.tree.map(jnp.add, total, share(state.params, ids, weights, dropout_key)), None

    if micro_batches == 1:
        loss, grads = share(state.params, ids, weights, step_key)
    else:
        parts = [x.reshape(micro_batches, -1, x.shape[1]) for x in (ids, weights)]
        zeros = jax.tree.map(jnp.zeros_like, (weight, state.params))
        (loss, grads), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(micro_batches), *parts))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "weight": weight, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def make_optimizer(
    learning_rate: float | Callable[[Array], Array],
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Returns GPT's AdamW: clipping by global norm, then Adam, then decay of matrices and embeddings alone.

    Defaults are nanoGPT's. `learning_rate` is a number or a schedule, such as `warmup_cosine` returns.
    """
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_decayed
        ),
    )


def is_decayed(params: Params) -> Any:
    """Returns the tree of booleans that says which leaves decay: those of two axes; not biases, not LayerNorms."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def warmup_cosine(
    peak: float, *, steps: int, warmup_steps: int = 0, end: float = 0.0
) -> optax.Schedule:
    """Returns nanoGPT's schedule: `peak * (step + 1) / (warmup_steps + 1)`, then a half cosine to `end` at `steps`.

    Raises:
      ValueError: `warmup_steps` is not less than `steps`.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"`warmup_steps` must be in [0, {steps}) (`steps`), got {warmup_steps}.")
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    decay = optax.cosine_decay_schedule(peak, steps - warmup_steps, alpha=end / peak)
    schedule = optax.join_schedules([warmup, decay], [warmup_steps])
    return lambda step: schedule(
        jnp.asarray(step, float)
    )  # of an int32, JAX makes float32 even in a float64 model


def _loss_sum(params, ids, weights, *, config, dropout_key, remat) -> Array:
    """Returns the weighted sum of the negative log-likelihoods."""
    logits = apply(params, ids[:, :-1], config=config, dropout_key=dropout_key, remat=remat)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return (losses * weights[:, 1:]).sum()


def _check_batch(ids: Array, weights: Array | None, config: GPT2Config) -> tuple[Array, Array]:
    """Returns `ids` and float weights; raises `ValueError` if they do not fit."""
    ids = check_ids(ids, config, longest=config.n_positions + 1)
    if ids.shape[1] < 2:
        raise ValueError(
            "`ids` must have at least 2 columns: one to read and one to predict, got 1."
        )
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    if weights is None:
        return ids, np.ones(ids.shape, dtype)
    if weights.shape != ids.shape:
        raise ValueError(
            f"`weights` must have the shape of `ids`, {list(ids.shape)}, got {list(weights.shape)}."
        )
    return ids, jnp.asarray(weights, dtype)


def _nonzero(weight: Array) -> Array:
    return jnp.where(weight == 0, 1, weight)
