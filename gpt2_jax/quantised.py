"""Matrices of 8 bits: how they lie in memory, how they are made, what is multiplied with them.

Knows matrices and trees of them; nothing of the forward pass, which asks for a product.

Symmetric, by rows (arXiv:2004.09602, sections 3 and 4): a row of whole numbers from -127 to 127 and
one float32, whose products are the weights. A row belongs to one output: a kernel `[I, O]` lies as
`[O, I]`, and a table of embeddings `[V, D]`, which is the head as well, as it is.

Axes: N tokens; I and O, the input and the output of a product.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from gpt2_jax.config import GPT2Config
from gpt2_jax.products import in_turn
from gpt2_jax.pytrees import dataclass

LARGEST = 127  # -128 is left out: what is symmetric needs no zero point
# By multiplication: numpy and XLA round it alike, where a division by a constant may differ.
STEP = np.float32(1 / LARGEST)
REST_STEPS = 2 * LARGEST  # into how many steps the rest of a rounded number is divided
FEW = 128  # tokens, of which the product is one of whole numbers; more go by floats
BY_INPUTS = (((1,), (1,)), ((), ()))  # what a product of rows by rows contracts
KERNELS = ("c_attn", "c_proj", "c_fc")  # the layers whose kernels are quantised
TABLES = ("wte", "lm_head")  # the tables, of embeddings, whose rows are


@dataclass
class Quantised:
    """A matrix whose row `o` is `values[o] * scale[o]`; in a stack of layers with one axis more.

    Examples:
      >>> table = gpt2_jax.quantize(params, config=config)["wte"]["embedding"]
      >>> table.values.shape, table.scale.shape
      ((4096, 16), (4096,))
    """

    values: Int8[Array, "... O I"]
    scale: Float[Array, "... O"]  # float32


# The matrices of a model.


def quantize(params: dict[str, Any], *, config: GPT2Config) -> dict[str, Any]:
    """Returns the params with 8 bits for each weight of the dense layers and of the embeddings.

    What `load(name, dtype="int8")` returns, for params in memory. Biases, LayerNorms and the table
    of positions stay as they are. It jits, and does not compile itself.

    Args:
      params: the parameters, of any dtype; their layers may be a stack.
      config: their config. It stays as it is: `config.dtype` is what the model computes in, between
        the products.

    Raises:
      ValueError: they are quantised already.

    Examples:
      >>> small = gpt2_jax.quantize(params, config=config)
      >>> small["h"]["0"]["mlp"]["c_fc"]["kernel"].values.shape  # [O, I]
      (64, 16)
      >>> logits = gpt2_jax.apply(params, ids, config=config)
      >>> off = gpt2_jax.apply(small, ids, config=config) - logits
      >>> bool(abs(off).max() < 0.02 * abs(logits).max())
      True
    """
    refuse_quantised(params, "Params that `quantize` takes")
    quantised = dict(params)
    for table in TABLES if not config.tie_word_embeddings else TABLES[:1]:
        quantised[table] = {"embedding": of_rows(params[table]["embedding"])}
    quantised["h"] = _map_kernels(params["h"], of_kernel)
    return quantised


def dequantize(params: dict[str, Any], *, dtype: DTypeLike = "float32") -> dict[str, Any]:
    """Returns params as they were before `quantize` but for what it rounded away, in `dtype`.

    Params that are not quantised stay as they are. It jits, and does not compile itself.

    Examples:
      >>> small = gpt2_jax.quantize(params, config=config)
      >>> plain = gpt2_jax.dequantize(small)["wte"]["embedding"]
      >>> step = small["wte"]["embedding"].scale[:, None]
      >>> bool((abs(plain - params["wte"]["embedding"]) <= 0.51 * step).all())
      True
    """
    plain = dict(params)
    for table in TABLES:
        if table in params:
            plain[table] = {"embedding": rows_of(params[table]["embedding"], dtype)}
    plain["h"] = _map_kernels(params["h"], lambda kernel: kernel_of(kernel, dtype))
    return plain


def _map_kernels(layers: dict[str, Any], change: Any) -> dict[str, Any]:
    """Returns a tree of layers with each kernel changed."""
    changed = {}
    for name, layer in layers.items():
        if name in KERNELS:
            changed[name] = layer | {"kernel": change(layer["kernel"])}
        else:
            changed[name] = _map_kernels(layer, change) if isinstance(layer, dict) else layer
    return changed


def is_quantised(params: Any) -> bool:
    """Returns whether any matrix of a tree is one of 8 bits."""
    # One without leaves stands where another part of a divided tree has them.
    return any(isinstance(node, Quantised) and jax.tree.leaves(node) for node in _nodes(params))


def n_weights(params: Any) -> int:
    """Returns how many weights a tree has, whatever they are stored as."""
    return sum(getattr(node, "values", node).size for node in _nodes(params))


def _nodes(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Quantised))


def refuse_quantised(params: Any, what: str) -> None:
    """Raises `ValueError` for params of 8 bits; `what` is the subject of the sentence."""
    if is_quantised(params):
        raise ValueError(
            f"{what} must be of floats, got quantised params (int8): load the checkpoint in"
            " float32, or take `dequantize(params)`, which has the rounded weights."
        )


def is_matrix(path: str) -> bool:
    """Returns whether `quantize` changes the leaf of this path, as "h.0.mlp.c_fc.kernel"."""
    *_, layer, leaf = path.split(".")
    return leaf == "kernel" or (leaf == "embedding" and layer in TABLES)


# One matrix.


def of_kernel(kernel: Float[Array, "... I O"]) -> Quantised:
    """Returns a kernel in 8 bits, as `[O, I]`: XLA's product on CPU reads it twice as fast so."""
    return of_rows(kernel.swapaxes(-1, -2))


def of_rows(matrix: Float[Array, "... O I"]) -> Quantised:
    """Returns a matrix in 8 bits, with a scale for each row. Of numpy's arrays it is numpy's."""
    # Wide enough whatever came, and no wider: a scale is a float32.
    matrix = matrix.astype(np.float32)
    scale = abs(matrix).max(axis=-1, keepdims=True) * STEP
    # A row of zeros has the scale 0, by which nothing can be divided.
    values = (matrix / (scale + (scale == 0))).round()
    return Quantised(values.astype(np.int8), scale[..., 0])


def kernel_of(kernel: Quantised | Array, dtype: DTypeLike = "float32") -> Float[Array, "... I O"]:
    """Returns a dense layer's kernel as floats: in `dtype` where it was quantised."""
    if not isinstance(kernel, Quantised):
        return kernel
    return rows_of(kernel, dtype).swapaxes(-1, -2)


def rows_of(matrix: Quantised | Array, dtype: DTypeLike = "float32") -> Float[Array, "... O I"]:
    """Returns a matrix of rows as floats: in `dtype` where it was quantised."""
    if not isinstance(matrix, Quantised):
        return matrix
    return (matrix.values * matrix.scale[..., None]).astype(dtype)


def take(table: Quantised, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns the rows of some ids, in float32; an id beyond the table reads NaN."""
    # Their scales are NaN, as `jnp.take` has it.
    return jnp.take(table.values, ids, axis=0) * jnp.take(table.scale, ids)[..., None]


# Products.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "N I"], matrix: Quantised, precision: str | None = None
) -> Float[Array, "N O"]:
    """Returns `x @ rows_of(matrix).T`, in float32 or wider, with its derivatives.

    A few tokens are brought to 16 bits each, as two rows of 8: the rounded numbers, and what the
    rounding left. The product is then one of whole numbers, exact in int32, and differs from the
    plain form by a part in 50,000 of a token's largest number. One row of 8 bits would do for
    tokens whose numbers are alike, and GPT-2's are not: with it the perplexity of a model of 125M
    parameters rises by 40 % (arXiv:2208.07339, table 1, "absmax vector-wise"). On CPU the second
    row is free for one token, whose product XLA would do in a naive loop; twelve layers' `c_fc`
    took 1.2, 2.9, 6.9 and 22.6 ms for 1, 8, 32 and 128 tokens, and in float32 2.9, 5.6, 8.2 and
    20.1 ms.
    """
    is_many = isinstance(x.shape[0], int) and x.shape[0] > FEW  # a symbolic number counts as few
    form = _float_product if is_many else _integer_product
    return form(x, matrix, precision)


@product.defjvp
def _product_jvp(precision: str | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Rounding has no slope: without this rule all gradients were zero, in silence.
    plain = partial(_float_product, precision=precision)
    _, out_dot = jax.jvp(plain, primals, tangents)
    return product(*primals, precision), out_dot


def _float_product(
    x: Float[Array, "N I"], matrix: Quantised, precision: str | None
) -> Float[Array, "N O"]:
    """Returns the product in the dtype of `x`, in which whole numbers of 8 bits are exact."""
    values = in_turn(matrix.values, x).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = lax.dot_general(x, values, BY_INPUTS, precision=precision, preferred_element_type=wide)
    return sums * matrix.scale[None].astype(wide)


def _integer_product(
    x: Float[Array, "N I"], matrix: Quantised, precision: str | None
) -> Float[Array, "N O"]:
    """Returns the product of a few tokens, by one of whole numbers: see `product`."""
    del precision  # it is exact
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # NaN in a token stays NaN, by way of its step.
    step = jnp.abs(x).max(axis=-1, keepdims=True) * STEP.astype(x.dtype)  # [N, 1]
    steps = x / jnp.where(step == 0, 1, step)
    rounded = jnp.round(steps)
    rest = jnp.round((steps - rounded) * REST_STEPS)  # from -127 to 127, as the rounded
    rows = jnp.concatenate([rounded, rest]).astype(jnp.int8)  # [2 N, I]
    sums = lax.dot_general(rows, matrix.values, BY_INPUTS, preferred_element_type=jnp.int32)
    of_rounded, of_rest = jnp.split(sums.astype(x.dtype), 2)
    return (of_rounded + of_rest / REST_STEPS) * step * matrix.scale[None].astype(x.dtype)
