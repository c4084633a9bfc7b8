"""What XLA needs said differently to be fast on one platform.

Knows arrays; nothing of models or of sampling.

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
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Num, Shaped

from gpt2_jax.sharding import BATCH_AXES, TENSOR, constrain

ROW_PARTS = 8  # into how many parts a product with one row divides its sum
FEW_ROWS = 32  # up to so many, a product with a table goes the other way round
QUERY_PARTS = 4  # into how many parts attention divides its queries
SMALLEST_QUERY_PART = 64  # the fewest queries that are worth a part of their own
FEW = 128  # so many of the likeliest tokens are sorted where they hold enough


# Products.


def product(
    x: Num[Array, "N I"], kernel: Num[Array, "I O"], *, precision: str | None
) -> Num[Array, "N O"]:
    """Returns `x @ kernel`.

    One row goes in parts on CPU, where XLA's matrix-vector product slows down, by a third, as the
    sum gets longer.
    """
    one_row = x.shape[0] == 1 and x.shape[1] % ROW_PARTS == 0
    if not one_row or _is_bfloat16(x, kernel):
        return contract(x, kernel, (1, 0), dtype=x.dtype, precision=precision)
    # Chosen when the program is lowered, not by JAX's default device: a call may run on another.
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_row_product_in_parts, precision=precision),
        default=partial(lax.dot, precision=precision),
    )


def _row_product_in_parts(
    row: Num[Array, "1 I"], kernel: Num[Array, "I O"], *, precision: str | None
) -> Num[Array, "1 O"]:
    """Returns `row @ kernel` as the sum of `ROW_PARTS` products over parts of the sum."""
    row_parts = row.reshape(ROW_PARTS, -1)  # [P, I / P]
    kernel_parts = kernel.reshape(ROW_PARTS, -1, kernel.shape[1])  # [P, I / P, O]
    contract_within_parts = (((1,), (1,)), ((0,), (0,)))
    # [P, O], a sum for each part.
    products = lax.dot_general(row_parts, kernel_parts, contract_within_parts, precision=precision)
    return products.sum(axis=0, keepdims=True)


def table_product(
    x: Num[Array, "N D"],
    table: Num[Array, "V D"],
    *,
    dtype: DTypeLike,
    precision: str | None,
) -> Num[Array, "N V"]:
    """Returns `x @ table.T` in `dtype`.

    A few rows, but more than one, go as `table @ x.T` on CPU, where XLA's product is faster so: the
    head of GPT-2 took 4.7, 5.5 and 7.1 ms for 2, 8 and 16 rows, and 6.3, 6.6 and 15.2 as it stands.
    """
    n_rows = x.shape[0]
    is_few = isinstance(n_rows, int) and 1 < n_rows <= FEW_ROWS  # a symbolic number is not
    as_it_stands = partial(contract, axes=(1, 1), dtype=dtype, precision=precision)
    if not is_few or _is_bfloat16(x, table):
        return as_it_stands(x, table)
    turned = partial(_table_product_turned, dtype=dtype, precision=precision)
    return lax.platform_dependent(x, table, cpu=turned, default=as_it_stands)


def _table_product_turned(
    x: Num[Array, "N D"], table: Num[Array, "V D"], *, dtype: DTypeLike, precision: str | None
) -> Num[Array, "N V"]:
    """Returns `x @ table.T` as `(table @ x.T).T`."""
    turned = contract(table, x, (1, 1), dtype=dtype, precision=precision)
    # Behind a barrier: XLA would see that it is the same product, and go back to it.
    return lax.optimization_barrier(turned).T


def contract(
    a: Num[Array, "*n _ _"],
    b: Num[Array, "*n _ _"],
    axes: tuple[int, int],
    *,
    dtype: DTypeLike,
    precision: str | None,
) -> Num[Array, "*n _ _"]:
    """Returns the matrix product of two arrays in `dtype`, summed over one axis of each.

    `axes` are those, of the last two: `(1, 0)` is `a @ b`, `(1, 1)` is `a @ b.T` and `(0, 0)` is
    `a.T @ b`. One axis before them may number matrices. It is `lax.dot_general`, but for bfloat16
    on CPU: see `_bfloat16_on_cpu`.
    """
    if _is_bfloat16(a, b):
        return _BFLOAT16_PRODUCT.bind(a, b, axes=axes, dtype=jnp.dtype(dtype), precision=precision)
    return _dot(a, b, axes=axes, dtype=dtype, precision=precision)


def _is_bfloat16(a: Array, b: Array) -> bool:
    return a.dtype == jnp.bfloat16 and b.dtype == jnp.bfloat16


def _dot(
    a: Array, b: Array, *, axes: tuple[int, int], dtype: DTypeLike, precision: str | None
) -> Array:
    """Returns what `contract` does, in XLA's own words."""
    n_before = a.ndim - 2
    numbering = tuple(range(n_before))
    summed = ((n_before + axes[0],), (n_before + axes[1],))
    return lax.dot_general(
        a,
        b,
        (summed, (numbering, numbering)),
        precision=precision,
        preferred_element_type=dtype,
    )


# Products in bfloat16: a primitive, as `lax.dot_general` is one, for two reasons. The cotangent of
# a product that returns float32 is float32, and JAX would multiply it as such: here it is rounded
# first, as the operands were. And one platform has its own program.
_BFLOAT16_PRODUCT = Primitive("bfloat16_product")


def _bfloat16_on_cpu(
    a: Array, b: Array, *, axes: tuple[int, int], dtype: DTypeLike, precision: str | None
) -> Array:
    """Returns what `_dot` does, as XLA on CPU is fast.

    Processors multiply bfloat16 twice as fast as float32, if they can (AVX512-BF16, AMX). XLA makes
    use of it where three things hold, and else converts to float32 first: the product returns
    float32; `a` is summed over its last axis as it lies in memory; and it has two rows at least.
    Rounding to bfloat16 is a step of its own, then; a gradient of a kernel, `(0, 0)`, turns its
    first operand over in memory; and a row goes twice.

    Of a layer of 3072, with 1024 rows, the product took 5.7 ms where that in float32 took 11.2 and
    one that returned bfloat16 13.2; the gradient of the kernel 8.1, 12.0 and 12.7.
    """
    multiply = partial(_dot, dtype=jnp.float32, precision=precision)
    if axes[0] == 0:
        return multiply(_turned(a), b, axes=(1, axes[1])).astype(dtype)
    if a.shape[-2] != 1:
        return multiply(a, b, axes=axes).astype(dtype)
    # Twice, behind a barrier, so that XLA does not see that it is one row.
    twice = lax.optimization_barrier(jnp.concatenate([a, a], axis=-2))
    return multiply(twice, b, axes=axes)[..., :1, :].astype(dtype)


def _turned(a: Array) -> Array:
    """Returns an array with its last two axes exchanged in memory."""
    # Not the transpose alone: XLA would only read the array in another order. An axis more, and a
    # barrier that it comes from behind, are what makes it write a new one.
    turned = lax.expand_dims(a.swapaxes(-1, -2), (0,))
    return lax.squeeze(lax.optimization_barrier(turned), (0,))


@cache
def _bfloat16_aval(a: Any, b: Any, **options: Any) -> Any:
    """Returns the abstract value of `_dot`, with its place on a mesh."""
    return jax.make_jaxpr(partial(_dot, **options))(a, b).out_avals[0]


def _bfloat16_for_a(cotangent: Array, a: Any, b: Array, *, axes: Any, dtype: Any, precision: Any):
    """Returns the cotangent of `a`, which is not known here."""
    del a, dtype
    cotangent = cotangent.astype(b.dtype)
    if axes[0] == 1:
        return contract(cotangent, b, (1, 1 - axes[1]), dtype=b.dtype, precision=precision)
    return contract(b, cotangent, (1 - axes[1], 1), dtype=b.dtype, precision=precision)


def _bfloat16_for_b(cotangent: Array, a: Array, b: Any, *, axes: Any, dtype: Any, precision: Any):
    """Returns the cotangent of `b`, which is not known here."""
    del b, dtype
    cotangent = cotangent.astype(a.dtype)
    if axes[1] == 0:
        return contract(a, cotangent, (1 - axes[0], 0), dtype=a.dtype, precision=precision)
    return contract(cotangent, a, (0, 1 - axes[0]), dtype=a.dtype, precision=precision)


def _bfloat16_batched(operands: Any, batch_axes: Any, **options: Any) -> tuple[Array, int]:
    """Returns the product of operands with one axis more, and where that is in the result."""
    a, b = operands
    a_axis, b_axis = batch_axes
    if b_axis is None and a.ndim == 3 and options["axes"][0] == 1:
        # Rows of one kernel, as those of a batch.
        a = jnp.moveaxis(a, a_axis, 0)
        out = _BFLOAT16_PRODUCT.bind(a.reshape(-1, a.shape[-1]), b, **options)
        return out.reshape(*a.shape[:2], -1), 0
    return jax.vmap(partial(_dot, **options), in_axes=batch_axes)(a, b), 0


_BFLOAT16_PRODUCT.def_abstract_eval(_bfloat16_aval)
# Outside of `jit`, a program of its own for each of these.
_BFLOAT16_PRODUCT.def_impl(
    jax.jit(_BFLOAT16_PRODUCT.bind, static_argnames=("axes", "dtype", "precision"))
)
ad.defbilinear(_BFLOAT16_PRODUCT, _bfloat16_for_a, _bfloat16_for_b)
batching.primitive_batchers[_BFLOAT16_PRODUCT] = _bfloat16_batched
mlir.register_lowering(_BFLOAT16_PRODUCT, mlir.lower_fun(_dot, multiple_results=False))
mlir.register_lowering(
    _BFLOAT16_PRODUCT, mlir.lower_fun(_bfloat16_on_cpu, multiple_results=False), platform="cpu"
)


def keeps_dense_products(primitive: Any, *operands: Any, **options: Any) -> Any:
    """JAX's policy `dots_with_no_batch_dims_saveable`, which knows bfloat16's products as well."""
    if primitive is _BFLOAT16_PRODUCT:
        return operands[0].ndim == 2
    plain = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return plain(primitive, *operands, **options)


# Matrices of 8 bits.


def in_turn(matrix: Shaped[Array, "..."], x: Num[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns `matrix`, which on CPU is there no sooner than `x`.

    For what is made of a weight alone, and is larger: XLA on CPU makes everything that depends on
    no other result as early as it can, so that all layers' matrices of 8 bits would be floats at
    once. What 8 texts of 32 tokens need besides GPT-2 124M itself was 326 MiB, and is 19. A barrier
    would not do: it is gone before XLA puts the program in order.
    """
    # What is varied in `x` is no concern of the matrix.
    return _in_turn(matrix, lax.stop_gradient(x))


@jax.custom_batching.custom_vmap
def _in_turn(matrix: Array, x: Array) -> Array:
    return lax.platform_dependent(matrix, x, cpu=_plus_nothing, default=lambda matrix, x: matrix)


@_in_turn.def_vmap
def _in_turn_of_batch(size: int, is_batched: Any, matrix: Array, x: Array) -> tuple[Array, bool]:
    # Any row's `x` will do. Batched by the plain rule, there would be a matrix for each.
    del size
    of_matrix, of_x = is_batched
    return _in_turn(matrix, x[0] if of_x else x), of_matrix


def _plus_nothing(matrix: Array, x: Array) -> Array:
    """Returns `matrix` plus a zero that XLA does not see to be one, NaN or not."""
    return matrix + (x[(0,) * x.ndim] < -jnp.inf).astype(matrix.dtype)


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
