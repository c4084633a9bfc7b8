"""What large models need: a loss by chunks, layers in a stack, recomputation by degrees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import init_state, make_optimizer, next_token_loss, train_step
from gpt2_jax.stack import stack_layers, unstack_layers
from gpt2_jax.training import losses
from tests.reference import TINY

CONFIG = gpt2_jax.GPT2Config(
    **TINY, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, dtype="float64"
)


@pytest.fixture(scope="module")
def params():
    return gpt2_jax.init(jax.random.key(0), CONFIG)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 61, (3, 12))


def equations(jaxpr):
    """Every equation of a program, those of its parts included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for part in jax.tree.leaves(parameter, is_leaf=lambda x: hasattr(x, "eqns")):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from equations(part)


def results(function, *arguments):
    """The shapes of all that a function computes, by the names of operations."""
    program = jax.make_jaxpr(function)(*arguments)
    return [
        (e.primitive.name, out.aval.shape) for e in equations(program.jaxpr) for out in e.outvars
    ]


def test_a_loss_by_chunks_is_the_loss_and_so_are_its_derivatives(params, ids, rng, monkeypatch):
    counts = rng.integers(0, 3, ids.shape)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def loss(params):
        return next_token_loss(params, ids, config=CONFIG, weights=counts)[0]

    def derivatives(params, direction):
        value, slope = jax.jvp(loss, (params,), (direction,))
        gradient, curvature = jax.jvp(jax.grad(loss), (params,), (direction,))
        return value, slope, gradient, curvature

    whole = jax.jit(derivatives)(params, direction)
    # 3 of the 11 columns at a time: the last chunk is filled up.
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 3 * 61 * 3)
    in_chunks = jax.jit(lambda *arguments: derivatives(*arguments))(params, direction)
    chex.assert_trees_all_close(in_chunks, whole, rtol=1e-10, atol=1e-12)


def test_by_chunks_all_logits_are_never_there(params, ids, monkeypatch):
    def loss(params):
        return next_token_loss(params, ids, config=CONFIG)[0]

    def largest(function):
        return max(np.prod(shape) for _, shape in results(function, params) if 61 in shape[2:])

    assert largest(jax.grad(loss)) >= ids[:, 1:].size * 61
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 3 * 61 * 3)
    assert largest(jax.grad(loss)) <= 3 * 61 * 3
    assert largest(loss) <= 3 * 61 * 3


def test_by_chunks_a_frozen_table_costs_no_product(params, ids, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 3 * 61 * 3)

    def loss(trained, frozen):
        return next_token_loss(frozen | {"ln_f": trained}, ids, config=CONFIG)[0]

    product = ("dot_general", params["wte"]["embedding"].shape)
    assert product not in results(jax.grad(loss), params["ln_f"], params)
    assert product in results(jax.grad(loss, argnums=1), params["ln_f"], params)


def test_layers_in_a_stack_learn_the_same(params, ids):
    tx = make_optimizer(1e-2)
    key = jax.random.key(1)
    learn = functools.partial(train_step, config=CONFIG, tx=tx)
    apart = init_state(params, tx)
    stacked = init_state(stack_layers(params), tx)
    for _ in range(3):
        apart, expected = learn(apart, ids, key)
        # The same units are dropped in what is recomputed.
        stacked, metrics = learn(stacked, ids, key, remat="dots")
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-12)
    chex.assert_trees_all_close(unstack_layers(stacked.params), apart.params, atol=1e-11)


def test_muon_sees_the_matrices_of_a_stack(params):
    tx = make_optimizer(1e-2, kind="muon")

    @jax.jit
    def update(params):
        # Any tree of their shapes will do as a gradient.
        updates, _ = tx.update(params, tx.init(params), params)
        return updates

    chex.assert_trees_all_close(
        unstack_layers(update(stack_layers(params))), update(params), atol=1e-12
    )


def test_a_stack_gives_its_layers_back(params):
    chex.assert_trees_all_equal(unstack_layers(stack_layers(params)), params)
    assert stack_layers(params)["h"]["attn"]["c_attn"]["kernel"].shape == (2, 24, 72)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda p, ids: gpt2_jax.prefill(p, ids, config=CONFIG), "`unstack_layers` gives"),
        (
            lambda p, ids: gpt2_jax.capture(p, ids, config=CONFIG, sites="embed"),
            "neither taps nor caches",
        ),
        (
            lambda p, ids: gpt2_jax.apply(
                p, ids, config=CONFIG.replace(scale_attn_by_inverse_layer_idx=True)
            ),
            "scale_attn_by_inverse_layer_idx",
        ),
        (lambda p, ids: stack_layers(p), "are a stack already"),
        (lambda p, ids: unstack_layers(unstack_layers(p)), "must be a stack"),
        (lambda p, ids: gpt2_jax.apply(p, ids, config=CONFIG, remat="some"), '"none", "dots", "fu'),
    ],
)
def test_what_needs_the_layers_apart_refuses_a_stack(params, ids, call, reason):
    with pytest.raises(ValueError, match=reason):
        call(stack_layers(params), ids)


def test_each_degree_of_remat_keeps_less(params, ids):
    def kept(remat):
        def loss(params):
            return next_token_loss(params, ids, config=CONFIG, remat=remat)[0]

        # Shapes tell: nothing need run.
        backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward) if hasattr(leaf, "size"))

    everything = kept("none")
    dots = kept("dots")
    full = kept("full")
    assert full < dots < everything
    assert kept(True) == full
    assert kept(False) == everything
