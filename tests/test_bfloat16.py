"""Products in bfloat16: exact but for one rounding, forward and backward, in the fast form."""

import re
from functools import partial
from itertools import product as pairs

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config
from gpt2_jax.products import contract
from gpt2_jax.training import losses

ROUNDING = 2.0**-8  # the most that a number changes, relatively, when it becomes bfloat16
AXES = list(pairs((0, 1), repeat=2))
TINY = GPT2Config(
    vocab_size=61,
    n_positions=32,
    n_embd=24,
    n_layer=2,
    n_head=3,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    dtype="float64",
)
PARAMS = gpt2_jax.init(jax.random.key(0), TINY)
ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))


def operands(axes, rows=5, n_matrices=None):
    """Returns arrays of bfloat16 whose product is `[rows, 3]`, over 64 terms."""
    rng = np.random.default_rng(1)
    before = () if n_matrices is None else (n_matrices,)
    a = rng.normal(size=(*before, rows, 64))
    b = rng.normal(size=(*before, 64, 3))
    a = a if axes[0] == 1 else a.swapaxes(-1, -2)
    b = b if axes[1] == 0 else b.swapaxes(-1, -2)
    return jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)


def exact(a, b, axes):
    """Returns the product in float64 by NumPy."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    a = a if axes[0] == 1 else a.swapaxes(-1, -2)
    b = b if axes[1] == 0 else b.swapaxes(-1, -2)
    return a @ b


def narrow(axes):
    return partial(contract, axes=axes, dtype=jnp.bfloat16, precision="highest")


def assert_rounded_once(found, expected):
    # What float32 loses in 64 terms is far less than the rounding.
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=1.01 * ROUNDING, atol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("n_matrices", [None, 2])
@pytest.mark.parametrize("axes", AXES)
def test_a_product_is_rounded_once(axes, n_matrices, rows):
    a, b = operands(axes, rows, n_matrices)
    expected = exact(a, b, axes)
    assert_rounded_once(narrow(axes)(a, b), expected)
    wide = contract(a, b, axes, dtype=jnp.float32, precision="highest")
    np.testing.assert_allclose(wide, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("axes", AXES)
def test_its_cotangents_are_products_rounded_once(axes, dtype):
    a, b = operands(axes)
    out, pull = jax.vjp(partial(contract, axes=axes, dtype=dtype, precision="highest"), a, b)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=out.shape), dtype)
    rounded = cotangent.astype(jnp.bfloat16)
    a_bar, b_bar = pull(cotangent)
    _, exact_pull = jax.vjp(
        lambda a, b: jnp.matmul(a if axes[0] else a.T, b.T if axes[1] else b),
        a.astype(jnp.float64),
        b.astype(jnp.float64),
    )
    expected_a, expected_b = exact_pull(rounded.astype(jnp.float64))
    assert_rounded_once(a_bar, expected_a)
    assert_rounded_once(b_bar, expected_b)


def test_forward_and_reverse_mode_agree_and_so_do_curvatures():
    axes = (1, 0)
    a, b = operands(axes)

    def loss(a, b, multiply):
        return jnp.square(multiply(jnp.tanh(a), b).astype(jnp.float64)).sum()

    def in_float64(a, b):
        return a.astype(jnp.float64) @ b.astype(jnp.float64)

    direction = (jnp.sin(a), jnp.cos(b))
    for function in (loss, jax.grad(loss)):
        _, found = jax.jvp(partial(function, multiply=narrow(axes)), (a, b), direction)
        _, expected = jax.jvp(partial(function, multiply=in_float64), (a, b), direction)
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float64), np.asarray(expected, np.float64), atol=0.03 * scale
        )
    _, slope = jax.jvp(partial(loss, multiply=narrow(axes)), (a, b), direction)
    grads = jax.grad(partial(loss, multiply=narrow(axes)), (0, 1))(a, b)
    by_grads = sum(
        jnp.vdot(g.astype(jnp.float64), d.astype(jnp.float64))
        for g, d in zip(grads, direction, strict=True)
    )
    np.testing.assert_allclose(slope, by_grads, rtol=0.02)


@pytest.mark.parametrize("in_axes", [(1, None), (None, 0), (0, 2)])
def test_a_mapped_product_is_the_products_one_by_one(in_axes):
    a, b = operands((1, 0))
    many_a = a if in_axes[0] is None else jnp.stack([a, 2 * a], axis=in_axes[0])
    many_b = b if in_axes[1] is None else jnp.stack([b, 4 * b], axis=in_axes[1])
    found = jax.vmap(narrow((1, 0)), in_axes)(many_a, many_b)
    factor = (1 if in_axes[0] is None else 2) * (1 if in_axes[1] is None else 4)
    # By powers of two, which change no digit.
    expected = exact(a, b, (1, 0))
    assert_rounded_once(found, np.stack([expected, factor * expected]))


def dots(lowered):
    """Returns the products of a program: what they sum over, and the types."""
    found = re.findall(
        r"dot_general.*contracting_dims = \[(\d)\] x \[\d\].*"
        r": \(tensor<([\dx]+)x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>",
        lowered.as_text(),
    )
    assert len(found) == lowered.as_text().count("contracting_dims = [") - lowered.as_text().count(
        "contracting_dims = []"  # multiples of an array, no sums
    )
    return found


@pytest.mark.parametrize("chunked", [False, True])
def test_all_products_of_a_training_step_have_the_fast_form_on_cpu(chunked, monkeypatch):
    # XLA uses the processor's instructions for bfloat16 alone if operands are, if the result is
    # float32, and if the first operand is summed over its last axis.
    config = TINY.replace(dtype="bfloat16")
    if chunked:
        monkeypatch.setattr(losses, "LARGEST_LOGITS", 200)
    loss = partial(gpt2_jax.next_token_loss, config=config)
    gradient = jax.jit(jax.grad(lambda params, ids: loss(params, ids)[0]))
    found = dots(gradient.lower(PARAMS, ids))
    # Of a layer, forward, six: four kernels, scores and values; and two cotangents of each.
    assert len(found) == 3 * (6 * config.n_layer + 1)
    for axis, shape, *types in found:
        assert types == ["bf16", "bf16", "f32"]
        assert int(axis) == shape.count("x")


def test_a_backward_pass_that_keeps_dense_products_makes_none_of_them_again():
    config = TINY.replace(dtype="bfloat16")

    def n_products(remat):
        loss = partial(gpt2_jax.next_token_loss, config=config, remat=remat)
        gradient = jax.jit(jax.grad(lambda params, ids: loss(params, ids)[0]))
        return len(dots(gradient.lower(PARAMS, ids)))

    # Of a layer, attention's scores and values; with "full", the kernels as well, but for the last.
    assert n_products("dots") == n_products("none") + 2 * config.n_layer
    assert n_products("full") > n_products("dots")


def test_elsewhere_products_return_bfloat16():
    def multiply(x, kernel):
        return narrow((1, 0))(x, kernel)

    traced = jax.jit(multiply).trace(*operands((1, 0)))
    for platform in ("cuda", "tpu"):
        ((_, _, *types),) = dots(traced.lower(lowering_platforms=(platform,)))
        assert types == ["bf16", "bf16", "bf16"]


def test_a_cache_on_cpu_is_wide_and_decoding_stays_near_one_pass():
    config = TINY.replace(dtype="bfloat16")
    apply = jax.jit(gpt2_jax.apply)
    prefill = jax.jit(gpt2_jax.prefill)
    exact_logits = apply(PARAMS, ids, config=TINY)
    logits = apply(PARAMS, ids, config=config)
    _, cache = prefill(PARAMS, ids[:, :-1], config=config)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("float32")}
    last, _ = jax.jit(gpt2_jax.decode_step)(PARAMS, ids[:, -1], cache, config=config)
    error = np.abs(np.asarray(last) - exact_logits[:, -1]).max()
    assert error < 1.5 * np.abs(np.asarray(logits) - exact_logits).max()
