"""Other losses, leaves that stay, and optimizers that ask for more than gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, init_state, next_token_loss, train_step
from gpt2_jax.training.step import combine, partition
from tests.reference import TINY

CONFIG = GPT2Config(**TINY)
# Smaller still: what is asked of optimizers is no matter of size, and each compiles a step.
LEAST = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=0)
OPTIMIZERS = {
    "acprop": lambda: optax.contrib.acprop(1e-3),
    "adabelief": lambda: optax.adabelief(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "ademamix": lambda: optax.contrib.ademamix(1e-3),
    "adopt": lambda: optax.contrib.adopt(1e-3),
    "cocob": lambda: optax.contrib.cocob(),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(1.0),
    "dog": lambda: optax.contrib.dog(1.0),
    "dowg": lambda: optax.contrib.dowg(1.0),
    "lbfgs": lambda: optax.lbfgs(),
    "lion": lambda: optax.lion(1e-4),
    "mechanize": lambda: optax.contrib.mechanize(optax.adamw(1e-3)),
    "momo": lambda: optax.contrib.momo_adam(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
    "polyak": lambda: optax.polyak_sgd(1e-2),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    "sam": lambda: optax.contrib.sam(
        optax.adam(1e-3), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2
    ),
    "sam_opaque": lambda: optax.contrib.sam(
        optax.adam(1e-3),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        sync_period=2,
        opaque_mode=True,
    ),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "sophia": lambda: optax.contrib.sophia(1e-3),
}
# Those that ask for most, on the model itself; the others on a model that compiles at once.
ON_GPT2 = ("lbfgs", "mechanize", "muon", "sam_opaque")


@pytest.fixture(scope="module")
def params():
    return gpt2_jax.init(jax.random.key(0), CONFIG)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 61, (4, 12))


def bigram_loss(tree, ids, *, config, dropout_key):
    """The least model that there is: each token by the one before it."""
    logits = tree["table"][ids[:, :-1]] @ tree["kernel"] + tree["bias"][None, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses.mean(), {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_ask_for_values_and_functions_make_ten_steps(rng, name):
    ids = rng.integers(0, 16, (2, 8))
    tx = OPTIMIZERS[name]()
    if name in ON_GPT2:
        tree = gpt2_jax.init(jax.random.key(0), LEAST)
        loss_fn = None
    else:
        tree = {"table": rng.normal(size=(16, 8)), "kernel": rng.normal(size=(8, 16))}
        tree = jax.tree.map(np.float32, tree | {"bias": np.zeros(16)})
        loss_fn = bigram_loss
    state = init_state(tree, tx)
    losses = []
    for _ in range(10):
        state, metrics = train_step(state, ids, config=LEAST, tx=tx, loss_fn=loss_fn)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    # Of one batch, over and over: every optimizer must learn some of it.
    assert min(losses[1:]) < losses[0]


def test_a_loss_of_ones_own_is_what_is_minimised(params, ids):
    tx = optax.sgd(0.1)

    def loss_fn(params, batch, *, config, dropout_key):
        assert dropout_key is None
        logits = gpt2_jax.apply(params, batch["text"], config=config)
        scores = logits[:, -1, 7] * batch["sign"]
        return scores.mean(), {"largest": scores.max()}

    batch = {"text": ids, "sign": np.array([1.0, -1.0, 1.0, 1.0])}

    def value(params):
        return loss_fn(params, batch, config=CONFIG, dropout_key=None)[0]

    expected, grads = jax.jit(jax.value_and_grad(value))(params)
    new = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    for n_parts in (1, 2):
        state, metrics = train_step(
            init_state(params, tx),
            batch,
            config=CONFIG,
            tx=tx,
            loss_fn=loss_fn,
            micro_batches=n_parts,
        )
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        assert set(metrics) == {"loss", "grad_norm", "largest"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, new)


def test_the_usual_loss_is_such_a_function(rng):
    ids = rng.integers(0, 16, (2, 8))
    params = gpt2_jax.init(jax.random.key(0), LEAST)
    tx = gpt2_jax.make_optimizer(1e-3)
    key = jax.random.key(1)
    config = LEAST.replace(resid_pdrop=0.2)
    usual, one = train_step(init_state(params, tx), ids, key, config=config, tx=tx)
    given, two = train_step(
        init_state(params, tx), ids, key, config=config, tx=tx, loss_fn=next_token_loss
    )
    assert one == two
    jax.tree.map(np.testing.assert_array_equal, usual.params, given.params)


@pytest.mark.parametrize("patterns", ["h.1.*", ("wpe.*", "*.ln_?.*")])
def test_what_is_not_trained_stays_and_costs_no_gradient(params, ids, patterns):
    tx = gpt2_jax.make_optimizer(1e-3)
    state = init_state(params, tx, trainable=patterns)
    trained, frozen = partition(params, patterns)
    # Adam's moments are those of the trained leaves.
    n_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * n_trained
    new, metrics = train_step(state, ids, config=CONFIG, tx=tx, trainable=patterns)
    new_trained, new_frozen = partition(new.params, patterns)
    jax.tree.map(np.testing.assert_array_equal, new_frozen, frozen)

    def loss(trained):
        return next_token_loss(combine(trained, frozen), ids, config=CONFIG)[0]

    grads = jax.jit(jax.grad(loss))(trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    expected = optax.apply_updates(trained, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new_trained, expected)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)


def test_the_program_of_a_small_part_is_smaller(params, ids):
    def flops(patterns):
        tx = optax.sgd(0.1)
        state = init_state(params, tx, trainable=patterns)
        step = functools.partial(train_step, config=CONFIG, tx=tx, trainable=patterns)
        return jax.jit(step).lower(state, ids).compile().cost_analysis()["flops"]

    # The backward pass of the first layer, and all gradients of kernels but one.
    assert flops("h.1.mlp.c_proj.*") < 0.65 * flops(None)


def test_adapters_are_trained_beside_a_model_that_stays(params, ids):
    tx = optax.adam(1e-2)
    size = CONFIG.n_embd

    def loss_fn(tree, batch, *, config, dropout_key):
        vector = jnp.broadcast_to(tree["soft"], (len(batch), 2, size))
        embeds = tree["model"]["wte"]["embedding"][batch]
        embeds = jnp.concatenate([vector, embeds], axis=1)
        padded = jnp.pad(batch, ((0, 0), (2, 0)))
        weights = jnp.pad(jnp.ones(batch.shape), ((0, 0), (2, 0)))
        return next_token_loss(
            tree["model"], padded, config=config, inputs_embeds=embeds, weights=weights
        )

    tree = {"model": params, "soft": np.zeros((1, 2, size), np.float32)}
    state = init_state(tree, tx, trainable="soft")
    losses = []
    for _ in range(5):
        state, metrics = train_step(
            state, ids, config=CONFIG, tx=tx, loss_fn=loss_fn, trainable="soft"
        )
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], params)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trainable": "h.9.*"}, r"'h.9.\*' matches none. Names are such as h\."),
        ({"loss_fn": next_token_loss, "remat": True}, "`loss_fn` finds what it needs in its batch"),
        ({"micro_batches": 3}, "The 4 rows of `ids` must split into `micro_batches`, got 3"),
    ],
)
def test_what_a_step_cannot_do_is_refused(params, ids, options, message):
    tx = optax.sgd(0.1)
    state = init_state(params, tx)
    with pytest.raises(ValueError, match=message):
        train_step(state, ids, config=CONFIG, tx=tx, **options)
    # Before anything is donated.
    assert float(state.params["wte"]["embedding"][0, 0]) == float(params["wte"]["embedding"][0, 0])


def test_arrays_of_a_batch_have_as_many_rows(params, ids):
    tx = optax.sgd(0.1)
    batch = {"a": ids, "b": ids[:3]}
    with pytest.raises(ValueError, match=r"one number of rows, got \[3, 4\]"):
        train_step(
            init_state(params, tx), batch, config=CONFIG, tx=tx, loss_fn=lambda *_, **__: None
        )
