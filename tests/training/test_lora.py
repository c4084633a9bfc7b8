"""Adapters: PEFT's formula by hand, and what training them changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, lora, merge_lora
from tests.reference import TINY

CONFIG = GPT2Config(**TINY)


@pytest.fixture(scope="module")
def params():
    return gpt2_jax.init(jax.random.key(0), CONFIG)


def test_fresh_adapters_change_nothing(params):
    adapters = lora(jax.random.key(1), params, rank=2, targets=("*.attn.*", "h.1.mlp.c_fc"))
    layers = sorted(
        jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(adapters)
    )
    attention = [f"h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")]
    assert layers == sorted([*attention, "h.1.mlp.c_fc"] * 2)
    a = adapters["h"]["0"]["attn"]["c_attn"]["lora_A"]
    assert a.shape == (24, 2)
    assert 0.15 < np.abs(a).max() <= 24**-0.5
    assert np.abs(a - adapters["h"]["1"]["attn"]["c_attn"]["lora_A"]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, merge_lora(params, adapters), params)


def test_a_merged_kernel_is_pefts(params, rng):
    # PEFT's matrices, [R, I] and [O, R], and its scale; HF's kernel of a Conv1D is [I, O].
    peft_a = rng.normal(size=(3, 24)).astype(np.float32)
    peft_b = rng.normal(size=(72, 3)).astype(np.float32)
    kernel = np.asarray(params["h"]["1"]["attn"]["c_attn"]["kernel"])
    expected = kernel + 16 / 3 * (peft_b @ peft_a).T
    adapters = {"h": {"1": {"attn": {"c_attn": {"lora_A": peft_a.T, "lora_B": peft_b.T}}}}}
    merged = merge_lora(params, adapters, alpha=16)
    np.testing.assert_allclose(merged["h"]["1"]["attn"]["c_attn"]["kernel"], expected, rtol=1e-5)
    merged["h"]["1"]["attn"]["c_attn"]["kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_adapters_learn_while_the_model_stays(params, rng):
    ids = rng.integers(0, 61, (4, 12))
    tx = optax.adam(1e-2)

    def loss_fn(tree, ids, *, config, dropout_key):
        merged = merge_lora(tree["model"], tree["lora"])
        return gpt2_jax.next_token_loss(merged, ids, config=config, dropout_key=dropout_key)

    tree = {"model": params, "lora": lora(jax.random.key(1), params, rank=4, targets="*.c_*")}
    state = gpt2_jax.init_state(tree, tx, trainable="lora.*")
    losses = []
    for _ in range(20):
        state, metrics = gpt2_jax.train_step(
            state, ids, config=CONFIG, tx=tx, loss_fn=loss_fn, trainable="lora.*"
        )
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], params)
    merged = merge_lora(params, state.params["lora"])
    loss, _ = gpt2_jax.next_token_loss(merged, ids, config=CONFIG)
    assert loss < losses[-1]


def test_what_fits_no_kernel_is_refused(params):
    key = jax.random.key(1)
    with pytest.raises(ValueError, match=r"'\*.ln_1' matches none. Layers are such as h.0.attn"):
        lora(key, params, rank=2, targets="*.ln_1")
    with pytest.raises(ValueError, match="`rank`"):
        lora(key, params, rank=0)
    wrong = {"lora_A": jnp.ones((9, 2)), "lora_B": jnp.ones((2, 72))}
    wrong = {"h": {"0": {"attn": {"c_attn": wrong}}}}
    message = r"of h.0.attn.c_attn needs a kernel \[9, 72\], got \[24, 72\]"
    with pytest.raises(ValueError, match=message):
        merge_lora(params, wrong)
