"""Every number equals PyTorch's: HF's `GPT2LMHeadModel`, eager attention, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import gpt2_jax
from tests.reference import TINY, assert_near, hf_model, ours

GRID = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_10": {"activation_function": "gelu_10"},
    "quick_gelu": {"activation_function": "quick_gelu"},
    "relu": {"activation_function": "relu"},
    "relu2": {"activation_function": "relu2"},
    "silu": {"activation_function": "silu"},
    "mish": {"activation_function": "mish"},
    "tanh": {"activation_function": "tanh"},
    "n_inner": {"n_inner": 37},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "one_head": {"n_head": 1, "n_layer": 3},
    "mistral": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
}


def loss_and_taps(params, ids, config):
    """Mean next-token loss, with the logits and each layer's output on the side."""
    seen = {}

    def tap(site, x):
        seen[site] = x
        return x

    logits = gpt2_jax.apply(params, ids, config=config, tap=tap)
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1).mean(), (logits, seen)


def check_everything(model, config, params, ids, relative):
    """Logits, hidden states, loss and the gradient of every parameter."""
    reference = model(torch.tensor(ids), output_hidden_states=True)
    # HF's own `labels` would round the logits to float32.
    targets = torch.tensor(ids[:, 1:]).reshape(-1)
    reference_loss = torch.nn.functional.cross_entropy(
        reference.logits[:, :-1].flatten(0, 1), targets
    )
    reference_loss.backward()
    step = jax.jit(jax.value_and_grad(loss_and_taps, has_aux=True), static_argnums=2)
    (loss, (logits, seen)), grads = step(params, ids, config)

    assert_near(logits, reference.logits.detach(), relative)
    assert_near(loss, reference_loss.item(), relative)
    sites = ["embed", *(f"h.{i}.resid_post" for i in range(config.n_layer - 1)), "ln_f.out"]
    for site, hidden in zip(sites, reference.hidden_states, strict=True):
        assert_near(seen[site], hidden.detach(), relative)
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for name, grad in gpt2_jax.to_hf(grads).items():
        assert_near(grad, expected.pop(name), relative)
    assert not expected


@pytest.mark.parametrize("name", GRID)
def test_logits_hidden_states_loss_and_gradients_equal_pytorch(name, rng):
    model = hf_model(**TINY | GRID[name])
    dtype, relative = "float64", 1e-10
    # HF's upcast is to float32 and fails in a float64 model.
    if model.config.reorder_and_upcast_attn:
        model, dtype, relative = model.float(), "float32", 1e-5
    config, params = ours(model, dtype)
    check_everything(model, config, params, rng.integers(0, 61, (3, 17)), relative)


def test_reorder_and_upcast_changes_nothing_but_rounding(rng):
    config, params = ours(hf_model(**TINY))
    ids = rng.integers(0, 61, (2, 9))
    other = gpt2_jax.apply(params, ids, config=config.replace(reorder_and_upcast_attn=True))
    chex.assert_trees_all_equal(gpt2_jax.apply(params, ids, config=config), other)


def test_left_padding_equals_pytorch_with_its_mask_and_positions(rng):
    model = hf_model(**TINY)
    config, params = ours(model)
    ids, lengths = rng.integers(0, 61, (3, 10)), np.array([10, 4, 1])
    mask = np.arange(10)[None] >= 10 - lengths[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions)}
    reference = model(torch.tensor(ids), **inputs).logits.detach().numpy()
    logits = gpt2_jax.apply(params, ids, lengths, config=config, padding_side="left")
    assert_near(np.asarray(logits)[mask], reference[mask], 1e-10)


def test_cached_logits_equal_uncached_ones_for_every_row_of_a_ragged_batch(rng):
    model = hf_model(**TINY | {"scale_attn_by_inverse_layer_idx": True})
    config, params = ours(model)
    ids, lengths = rng.integers(0, 61, (3, 15)), np.array([7, 1, 4])
    reference = model(torch.tensor(ids)).logits.detach().numpy()
    step = jax.jit(gpt2_jax.decode_step)
    logits, cache = gpt2_jax.prefill(params, ids[:, :7], lengths, config=config, cache_len=15)
    for t in range(8):
        assert_near(logits, reference[np.arange(3), lengths + t - 1], 1e-10)
        logits, cache = step(params, ids[np.arange(3), lengths + t], cache, config=config)


@pytest.mark.parametrize("stop", [(), (0,), (5, 11, 40)])
def test_greedy_generation_equals_hf_token_for_token(stop, rng):
    model = hf_model(**TINY)
    config, params = ours(model)
    ids, lengths = rng.integers(1, 61, (5, 9)), np.array([9, 1, 4, 9, 6])
    left = np.stack([np.roll(row, 9 - length) for row, length in zip(ids, lengths, strict=True)])
    mask = np.arange(9)[None] >= 9 - lengths[:, None]
    reference = model.generate(
        torch.tensor(left),
        attention_mask=torch.tensor(mask),
        max_new_tokens=14,
        do_sample=False,
        eos_token_id=list(stop) or None,
        pad_token_id=60,
    )[:, 9:].numpy()
    out = gpt2_jax.generate(
        params, ids, lengths, config=config, max_new_tokens=14, stop_ids=stop, pad_id=60
    )
    again = gpt2_jax.generate(
        params,
        left,
        lengths,
        config=config,
        max_new_tokens=14,
        stop_ids=stop,
        pad_id=60,
        padding_side="left",
    )
    width = reference.shape[1]  # HF ends when every row has
    np.testing.assert_array_equal(np.asarray(out.ids)[:, :width], reference)
    assert (np.asarray(out.ids)[:, width:] == 60).all()
    chex.assert_trees_all_equal(out, again)


def test_lower_precisions_stay_near_float64(rng):
    model = hf_model(**TINY)
    ids = rng.integers(0, 61, (2, 12))
    reference = model(torch.tensor(ids)).logits.detach().numpy()
    for dtype, relative in (("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 5e-3)):
        config, params = ours(model, dtype)
        logits = gpt2_jax.apply(params, ids, config=config)
        assert logits.dtype == jnp.float32 and params["wte"]["embedding"].dtype == jnp.dtype(dtype)
        assert_near(logits, reference, relative)


@pytest.mark.slow
def test_124m_equals_pytorch(rng):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel._from_config(
        transformers.GPT2Config(), attn_implementation="eager"
    ).eval()
    ids = rng.integers(0, 50257, (1, 48))
    with torch.no_grad():
        single = model(torch.tensor(ids)).logits.numpy()
    config, params = ours(model, "float32")
    logits = jax.jit(gpt2_jax.apply)(params, ids, config=config)
    np.testing.assert_allclose(logits, single, rtol=0, atol=1e-4)

    model = model.double()
    config, params = ours(model)
    check_everything(model, config, params, ids, 1e-10)
