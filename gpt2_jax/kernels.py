"""What XLA needs said differently to be fast on one platform.

Knows arrays; nothing of models or of sampling. Matrix products are in `products`.

Each function computes what its plain form computes; its docstring gives that form and what was
measured. Readers of the maths may take the plain form for granted and pass this file over.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Key, Num

from gpt2_jax.products import contract
from gpt2_jax.sharding import BATCH_AXES, TENSOR, constrain

QUERY_PARTS = 4  # into how many parts attention divides its queries
SMALLEST_QUERY_PART = 64  # the fewest queries that are worth a part of their own
FEW = 128  # so many of the likeliest tokens are sorted where they hold enough


# Attention.


def query_parts(length: int) -> list[tuple[int, int]]:
    """Returns the parts, `(start, end)`, in which causal queries are best attended to.

    The queries of a part see no key behind its end, so the upper right of the square of scores is
    never computed.
    """
    # Few parts, as each is compiled as an attention of its own.
    count = min(QUERY_PARTS, -(-length // SMALLEST_QUERY_PART))
    bounds = [length * part // count for part in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


# The loss.


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def summed_cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    precision: str | None,
) -> Float[Array, ""]:
    """Returns the weighted sum of `-log_softmax(hidden @ table.T)` at the targets.

    In the dtype of `weights`, and by chunks of so many tokens of each row: the logits of all tokens
    are the largest array of a training step. Where a gradient is wanted, a chunk's is made with its
    logits, which are then forgotten: no product is made twice.

    By `custom_jvp`, not `custom_vjp`: so it has a forward mode, and Hessians.
    """

    def add_chunk(total: Array, part: Any) -> tuple[Array, None]:
        hidden, targets, weights = part
        losses, _ = _losses(_logits(hidden, table, weights.dtype, precision), targets)
        return total + (weights * losses).sum(), None

    parts = _time_chunks((hidden, targets, weights), chunk)
    total, _ = lax.scan(add_chunk, jnp.zeros((), weights.dtype), parts)
    return total


@partial(summed_cross_entropy.defjvp, symbolic_zeros=True)
def _summed_cross_entropy_jvp(
    chunk: int, precision: str | None, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    hidden, table, targets, weights = primals
    hidden_dot, table_dot, _, weights_dot = tangents
    # What nobody varies, as a frozen table, costs no product.
    is_table_varied = not isinstance(table_dot, SymbolicZero)

    def add_chunk(carry: Any, part: Any) -> tuple[Any, Any]:
        total, table_grad = carry
        hidden, targets, weights = part
        losses, probabilities = _losses(_logits(hidden, table, weights.dtype, precision), targets)
        is_target = targets[..., None] == jnp.arange(len(table))[None, None]
        logits_grad = (weights[..., None] * (probabilities - is_target)).astype(hidden.dtype)
        # Flat, as in `modules.Dense`.
        rows = logits_grad.reshape(-1, len(table))
        hidden_grad = contract(rows, table, (1, 0), dtype=hidden.dtype, precision=precision)
        hidden_grad = constrain(hidden_grad.reshape(hidden.shape), BATCH_AXES)
        if is_table_varied:
            # Summed wide over the chunks.
            hidden_rows = hidden.reshape(len(rows), -1)
            table_grad += contract(
                rows, hidden_rows, (0, 0), dtype=weights.dtype, precision=precision
            )
        return (total + (weights * losses).sum(), table_grad), (hidden_grad, losses)

    parts = _time_chunks((hidden, targets, weights), chunk)
    zero = jnp.zeros((), weights.dtype)
    table_zero = jnp.zeros(table.shape if is_table_varied else (), weights.dtype)
    (total, table_grad), (hidden_grad, losses) = lax.scan(add_chunk, (zero, table_zero), parts)

    length = targets.shape[1]
    total_dot = zero
    if not isinstance(hidden_dot, SymbolicZero):
        total_dot += jnp.vdot(_joined(hidden_grad, length), hidden_dot).astype(zero.dtype)
    if is_table_varied:
        total_dot += jnp.vdot(table_grad, table_dot.astype(zero.dtype))
    if not isinstance(weights_dot, SymbolicZero):
        total_dot += jnp.vdot(_joined(losses, length), weights_dot)
    return total, total_dot


def _logits(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], dtype: Any, precision: str | None
) -> Float[Array, "B T V"]:
    """Returns `hidden @ table.T` in `dtype`."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = contract(rows, table, (1, 1), dtype=dtype, precision=precision)
    return constrain(logits.reshape(*hidden.shape[:2], len(table)), BATCH_AXES, None, TENSOR)


def _losses(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T V"]]:
    """Returns `-log_softmax` at the targets, and the softmax."""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    losses = jnp.log(total) + largest - chosen
    return losses[..., 0], exponentials / total


def _time_chunks(arrays: Any, chunk: int) -> Any:
    """Returns arrays `[B, T, ...]` as `[N, B, chunk, ...]`, padded with zeros, which weigh 0."""

    def cut(x: Array) -> Array:
        n_rows, length = x.shape[:2]
        n_chunks = -(-length // chunk)
        behind = [(0, 0), (0, n_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        # By columns, not by rows, which may lie on several devices.
        parts = jnp.pad(x, behind).reshape(n_rows, n_chunks, chunk, *x.shape[2:])
        return constrain(parts.swapaxes(0, 1), None, BATCH_AXES)

    return jax.tree.map(cut, arrays)


def _joined(parts: Num[Array, "N B t ..."], length: int) -> Num[Array, "B T ..."]:
    """Undoes `_time_chunks`."""
    n_rows = parts.shape[1]
    joined = parts.swapaxes(0, 1).reshape(n_rows, -1, *parts.shape[3:])
    return constrain(joined, BATCH_AXES)[:, :length]


# Reductions and sorts over a vocabulary.


def argmax(x: Num[Array, "... V"]) -> Int[Array, "..."]:
    """Returns `jnp.argmax(x, axis=-1)`: where the largest is, the first of ties, in int32.

    By two plain reductions: in `jnp.argmax`, a reduction of pairs, XLA's loop on CPU is four times
    slower.
    """
    size = x.shape[-1]
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    # Where all are -inf, or one is NaN, none is less than the largest: the place is 0.
    largest = x.max(axis=-1, keepdims=True)
    return jnp.where(x < largest, size, places).min(axis=-1)


def categorical(keys: Key[Array, " B"], logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns a draw from the softmax of each row by its own key, in int32.

    As `jax.vmap(jax.random.categorical)(keys, logits)`, but in two draws, of a stretch of the
    vocabulary by what it holds and of a token in it: by `2 sqrt(V)` random numbers, not `V`, of
    which 50,257 take 0.7 ms a row on CPU, and these with all sums 0.06 ms. Of infinite logits the
    draw is the first; where all are -inf, or one is NaN, it is 0.
    """
    n_rows, size = logits.shape
    width = math.isqrt(size)
    count = -(-size // width)
    largest = logits.max(axis=-1, keepdims=True)
    # An infinity less itself would be no number.
    offset = jnp.where(jnp.isinf(largest), 0, largest)
    behind = ((0, 0), (0, count * width - size))
    logits = jnp.pad(logits - offset, behind, constant_values=-jnp.inf)
    stretches = logits.reshape(n_rows, count, width)
    held = jnp.log(jnp.exp(stretches).sum(axis=-1))  # [B, count]

    def gumbel(key: Array) -> Float[Array, " N"]:
        return jax.random.gumbel(key, (count + width,), logits.dtype)

    # Row by row, so that a row draws the same in any batch. The largest of Gumbel-perturbed logits
    # is a draw (arXiv:1611.01144, section 2).
    noise = jax.vmap(gumbel)(keys)
    stretch = argmax(held + noise[:, :count])
    within = jnp.take_along_axis(stretches, stretch[:, None, None], axis=1)[:, 0]
    return stretch * width + argmax(within + noise[:, count:])


def smallest_holding(
    x: Float[Array, "B V"], weights: Float[Array, "B V"], mass: Float[Array, "#B #1"]
) -> Float[Array, "B 1"]:
    """Returns the smallest value up to which a row's weights, none negative, hold `mass`.

    The plain form, but for the rounding of sums; where all together hold less, the largest value:

        order = argsort(x)
        x[order][argmax(cumsum(weights[order]) >= mass)]

    By halving the interval in which it lies: 32 sums of a vocabulary take 0.4 ms on CPU, where to
    sort it takes 2 ms, and with its weights 10 ms.
    """
    order = _order(x)
    above = order.max(axis=-1, keepdims=True)
    below = order.min(axis=-1, keepdims=True) - 1

    def is_apart(bounds):
        below, above = bounds
        return (below + 1 < above).any()

    def halve(bounds):
        below, above = bounds
        middle = (below & above) + ((below ^ above) >> 1)  # their mean, which cannot overflow
        held = jnp.where(order <= middle, weights, 0).sum(axis=-1, keepdims=True)
        # What holds nothing, as no number does, lies below.
        holds = held >= mass
        return jnp.where(holds, below, middle), jnp.where(holds, middle, above)

    _, above = lax.while_loop(is_apart, halve, (below, above))
    return _undo_order(above, x.dtype)


def _order(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns integers of the same order as floats, NaN apart."""
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    x = jnp.where(x == 0, 0, x)  # -0.0 is none less than 0.0
    bits = lax.bitcast_convert_type(x, integer)
    # Of negative floats, the larger have the smaller bits.
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def _undo_order(order: Int[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Undoes `_order`."""
    bits = jnp.where(order < 0, order ^ jnp.iinfo(order.dtype).max, order)
    return lax.bitcast_convert_type(bits, dtype)


def kth_largest(x: Float[Array, "... V"], k: int) -> Float[Array, "... 1"]:
    """Returns `jnp.sort(x)[..., -k]`, or the least of all if there are fewer than `k`."""
    if k == 1:
        return x.max(axis=-1, keepdims=True)
    return _largest(x, min(k, x.shape[-1]))[..., -1:]


def _largest(x: Float[Array, "... V"], k: int) -> Float[Array, "... k"]:
    """Returns the `k` largest, in descending order.

    Behind a barrier: were it asked for their places, or were slices of them merged with that of
    `top_k`, XLA on CPU would sort all of the vocabulary.
    """
    largest, _ = lax.top_k(x, k)
    return lax.optimization_barrier(largest)


# Jitted by itself: outside of `jit`, the branches would compile at each call.
@partial(jax.jit, static_argnames="min_tokens_to_keep")
def outside_nucleus(
    logits: Float[Array, "B V"], p: Float[Array, "#B #1"], min_tokens_to_keep: int
) -> Bool[Array, "B V"]:
    """Returns which tokens nucleus sampling removes (arXiv:1904.09751).

    Those that, together with all less likely ones, hold at most `1 - p` of the probability.

    The definition, in the order of a stable ascending sort of the logits, where the last
    `min_tokens_to_keep` always stay:

        removed = cumsum(softmax(sorted_logits)) <= 1 - p

    Of tokens with equal logits the first in the vocabulary go first. At `p = 1` nothing is removed.
    Only the `FEW` likeliest are sorted. Where all others hold too much, `smallest_holding` finds
    the cut among them.
    """
    size = logits.shape[-1]
    n_kept = min(min_tokens_to_keep, size)
    few = min(max(FEW, n_kept), size)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    most_removed = (1 - p) * weights.sum(axis=-1, keepdims=True)
    likeliest = _largest(logits, few)
    in_order = jnp.flip(likeliest, axis=-1)  # [B, few], ascending
    weights_in_order = jnp.exp(in_order - largest)
    # What is not among the few: less likely tokens, and more that tie with the last of them.
    is_less = logits < in_order[..., :1]
    n_more_tied = size - few - is_less.sum(axis=-1, keepdims=True)
    others = jnp.where(is_less, weights, 0).sum(axis=-1, keepdims=True)
    others += n_more_tied * weights_in_order[..., :1]

    def among_few():
        held = others + jnp.cumsum(weights_in_order, axis=-1)
        n_removed = (held <= most_removed).sum(axis=-1, keepdims=True)
        return jnp.take_along_axis(in_order, jnp.minimum(n_removed, few - 1), axis=-1)

    def among_all():
        # The first that stays makes it more than "at most".
        more = jnp.nextafter(most_removed, jnp.inf)
        return smallest_holding(logits, weights, more)

    # The least logit that stays.
    least = lax.cond(((others <= most_removed) | (p >= 1)).all(), among_few, among_all)
    least = jnp.minimum(least, likeliest[..., n_kept - 1, None])
    smaller = logits < least
    tied = logits == least

    def without_some_tied():
        n_smaller = smaller.sum(axis=-1, keepdims=True)
        held = jnp.where(smaller, weights, 0).sum(axis=-1, keepdims=True)
        weight = jnp.where(tied, weights, 0).max(axis=-1, keepdims=True)
        # Of weights that are no numbers, none.
        n_removed = jnp.where(weight > 0, jnp.floor((most_removed - held) / weight), 0)
        n_removed = jnp.minimum(n_removed, size - n_kept - n_smaller)
        return smaller | (tied & (jnp.cumsum(tied, axis=-1) <= n_removed))

    # A sum over what stands before costs more than all the rest: only where there are ties.
    has_ties = (tied.sum(axis=-1) > 1).any()
    removed = lax.cond(has_ties, without_some_tied, lambda: smaller)
    return removed & (p < 1)  # the sum's last digit must not decide at p = 1


# Initialisers.


@cache
def normal(stddev: float) -> Callable[..., Array]:
    """Returns the initializer N(0, stddev), jitted.

    Linen asks it for its shape at every call of a layer: traced anew, that took half a second of a
    start.
    """
    return jax.jit(nn.initializers.normal(stddev), static_argnums=(1, 2))
