"""A model without biases: none in the tree, none trained; HF's numbers with zeros for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax.config import GPT2Config
from tests.reference import TINY, assert_near, hf_model

CONFIG = GPT2Config(**TINY, bias=False, dtype="float64", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


@pytest.fixture(scope="module")
def model():
    """HF's, with every bias at zero."""
    model = hf_model(**TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


@pytest.fixture(scope="module")
def params(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if "bias" not in name}
    return gpt2_jax.from_hf(state, CONFIG)


def names_of(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}


def test_the_tree_has_no_bias(params):
    # Shapes alone, which compile nothing.
    fresh = jax.eval_shape(lambda: gpt2_jax.init(jax.random.key(0), CONFIG))
    whole = jax.eval_shape(lambda: gpt2_jax.init(jax.random.key(0), CONFIG.replace(bias=True)))
    assert names_of(fresh) == {name for name in names_of(whole) if "bias" not in name}
    assert jax.tree.structure(fresh) == jax.tree.structure(params)


def test_logits_loss_and_gradients_equal_pytorch(model, params):
    theirs = model(torch.from_numpy(IDS)).logits
    assert_near(gpt2_jax.apply(params, IDS, config=CONFIG), theirs.detach(), 1e-10)
    targets = torch.from_numpy(IDS[:, 1:]).reshape(-1)
    loss = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), targets)
    loss.backward()

    def ours(params):
        return gpt2_jax.next_token_loss(params, IDS, config=CONFIG)[0]

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert_near(value, loss.item(), 1e-10)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in gpt2_jax.to_hf(grads).items():
        assert_near(grad, expected[name], 1e-10)


def test_cached_decoding_equals_the_whole_pass(params):
    logits = gpt2_jax.apply(params, IDS, config=CONFIG)
    last, cache = gpt2_jax.prefill(params, IDS[:, :-1], config=CONFIG, cache_len=12)
    assert_near(last, logits[:, -2], 1e-10)
    last, _ = gpt2_jax.decode_step(params, IDS[:, -1], cache, config=CONFIG)
    assert_near(last, logits[:, -1], 1e-10)


def test_simplified_models_are_equal(params):
    config, folded = gpt2_jax.fold_layer_norm(params, config=CONFIG)
    logits = gpt2_jax.apply(params, IDS, config=CONFIG)
    assert "bias" not in folded["h"]["0"]["mlp"]["c_fc"]
    assert_near(gpt2_jax.apply(folded, IDS, config=config), logits, 1e-10)
    config, centred = gpt2_jax.center_writing_weights(params, config=CONFIG)
    assert_near(gpt2_jax.apply(centred, IDS, config=config), logits, 1e-10)


def test_the_parts_of_a_logit_sum_to_it(params):
    found = gpt2_jax.direct_logit_attribution(params, IDS, IDS, config=CONFIG)
    total = found.wte + found.wpe + found.heads.sum(axis=(0, -1)) + found.mlps.sum(axis=0)
    logits = gpt2_jax.apply(params, IDS, config=CONFIG)
    assert_near(total, jnp.take_along_axis(logits, IDS[..., None], axis=-1)[..., 0], 1e-10)
    assert not found.attn_bias.any() and not found.ln_f_bias.any()


def test_config_json_has_the_field_only_where_it_is_false():
    assert "bias" not in GPT2Config().to_dict()
    assert GPT2Config.from_dict(CONFIG.to_dict()).bias is False
    with pytest.raises(ValueError, match="`bias` must be true or false, got 'no'"):
        GPT2Config(bias="no")
