"""Optimizers and schedules of the learning rate, optax's. Knows params by names and axes alone.

They equal PyTorch's, setting for setting:

| here | PyTorch |
|---|---|
| `make_optimizer(lr, b1=, b2=, eps=, weight_decay=)` | `AdamW(lr=, betas=, eps=, weight_decay=)` |
| decay of leaves of two axes | two groups: `p.ndim >= 2`, and the rest with `weight_decay=0` |
| `max_grad_norm` | `clip_grad_norm_(max_norm)`; it divides by `norm + 1e-6`, optax by `norm` |
| `warmup_cosine` | `LambdaLR` over the same formula; PyTorch's steps count from 0 likewise |
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

from gpt2_jax.modules import Params
from gpt2_jax.stack import n_axes


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


# Schedules.


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
