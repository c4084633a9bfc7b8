"""Matrix products, as XLA is fast with them on one platform.

Knows arrays; nothing of models. What else XLA needs said differently is in `kernels`.

Each function computes what its plain form computes; its docstring gives that form and what was
measured. Readers of the maths may take the plain form for granted and pass this file over.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Num, Shaped

ROW_PARTS = 8  # into how many parts a product with one row divides its sum
FEW_ROWS = 32  # up to so many, but more than one or two, a product may go another way round


def product(
    x: Num[Array, "N I"], kernel: Num[Array, "I O"], *, precision: str | None
) -> Num[Array, "N O"]:
    """Returns `x @ kernel`.

    One row goes in parts on CPU, where XLA's matrix-vector product slows down, by a third, as the
    sum gets longer. A few rows go as columns where a processor has AVX2 and no AVX-512, whose other
    product of XLA's is faster for them: there GPT-2 124M decodes 4, 8 and 16 texts 1.2, 1.4 and 1.2
    times as fast.
    """
    n_rows = x.shape[0]
    in_one_way = partial(contract, axes=(1, 0), dtype=x.dtype, precision=precision)
    if not isinstance(n_rows, int) or _is_bfloat16(x, kernel):  # a symbolic number is no `int`
        return in_one_way(x, kernel)
    if n_rows == 1 and x.shape[1] % ROW_PARTS == 0:
        on_cpu = _row_product_in_parts
    elif 2 < n_rows <= FEW_ROWS and _has_avx2_alone():
        on_cpu = _product_of_columns
    else:
        return in_one_way(x, kernel)
    # Chosen when the program is lowered, not by JAX's default device: a call may run on another.
    return lax.platform_dependent(
        x, kernel, cpu=partial(on_cpu, precision=precision), default=in_one_way
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


def _product_of_columns(
    rows: Num[Array, "N I"], kernel: Num[Array, "I O"], *, precision: str | None
) -> Num[Array, "N O"]:
    """Returns `rows @ kernel`, of rows that are turned in memory first."""
    # Behind a barrier: XLA would see that it is the same product.
    columns = lax.optimization_barrier(rows.T)
    return contract(columns, kernel, (0, 0), dtype=rows.dtype, precision=precision)


@cache
def _has_avx2_alone() -> bool:
    """Returns whether this processor has AVX2 and no AVX-512, as Linux tells it."""
    try:
        facts = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx2" in facts and "avx512f" not in facts


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
