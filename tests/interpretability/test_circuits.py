"""Circuits are what a head computes; simplified models have the same probabilities; in float64."""

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.interpretability import circuits
from gpt2_jax.interpretability.taps import capture
from tests.interpretability.hooks import near
from tests.reference import TINY, hf_model, ours

HEADS = 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    """Config and params of a model whose head is its embeddings, or its own."""
    return ours(hf_model(**TINY | {"tie_word_embeddings": request.param}))


def log_probabilities(params, ids, config):
    return jax.nn.log_softmax(jax.jit(gpt2_jax.apply)(params, ids, config=config))


def test_folded_layer_norms_only_normalise(pair, texts):
    config, params = pair
    folded_config, folded = circuits.fold_layer_norm(params, config=config)
    expected = log_probabilities(params, texts[0], config)
    near(log_probabilities(folded, texts[0], folded_config), expected)
    for block in folded["h"].values():
        for norm in (block["ln_1"], block["ln_2"]):
            assert (norm["scale"] == 1).all()
            assert not norm["bias"].any()
    assert (folded["ln_f"]["scale"] == 1).all()


def test_centred_weights_write_nothing_along_the_mean(pair, texts):
    config, params = pair
    centred_config, centred = circuits.center_writing_weights(params, config=config)
    expected = log_probabilities(params, texts[0], config)
    near(log_probabilities(centred, texts[0], centred_config), expected)
    run = jax.jit(capture, static_argnames="sites")
    _, acts = run(centred, texts[0], config=centred_config, sites="h.*.resid_post")
    for site, x in acts.items():
        np.testing.assert_allclose(x.mean(axis=-1), 0, atol=1e-12, err_msg=site)


def test_a_centred_head_gives_logits_of_mean_zero(pair, texts):
    config, params = pair
    centred_config, centred = circuits.center_unembed(params, config=config)
    expected = log_probabilities(params, texts[0], config)
    near(log_probabilities(centred, texts[0], centred_config), expected)
    logits = gpt2_jax.apply(centred, texts[0], config=centred_config)
    np.testing.assert_allclose(logits.mean(axis=-1), 0, atol=1e-12)


def test_the_simplifications_compose(pair, texts):
    config, params = pair
    expected = log_probabilities(params, texts[0], config)
    config, params = circuits.fold_layer_norm(params, config=config)
    config, params = circuits.center_writing_weights(params, config=config)
    config, params = circuits.center_unembed(params, config=config)
    near(log_probabilities(params, texts[0], config), expected)


def test_a_weight_of_zero_in_the_last_layer_norm_stays(texts):
    config, params = ours(hf_model(**TINY))
    ln_f = params["ln_f"] | {"scale": params["ln_f"]["scale"].at[3].set(0.0)}
    params = params | {"ln_f": ln_f}
    folded_config, folded = circuits.fold_layer_norm(params, config=config)
    run = jax.jit(gpt2_jax.apply)
    near(run(folded, texts[0], config=folded_config), run(params, texts[0], config=config))
    assert folded["ln_f"]["scale"][3] == 0


@pytest.mark.parametrize("head", range(HEADS))
def test_the_circuits_of_a_head_are_its_scores_and_its_output(tiny, acts, head):
    config, params = tiny
    weights = jax.device_get(params["h"]["1"]["attn"])
    qk = np.asarray(circuits.qk_circuit(params, 1, head, config=config))
    ov = np.asarray(circuits.ov_circuit(params, 1, head, config=config))
    x = acts[0]["h.1.ln_1.out"]
    q_bias, k_bias, v_bias = weights["c_attn"]["bias"].reshape(3, HEADS, 8)[:, head]
    wq, wk = (weights["c_attn"]["kernel"][:, 24 * i + 8 * head :][:, :8] for i in (0, 1))

    scores = x @ qk @ x.swapaxes(1, 2) + q_bias @ k_bias
    scores = scores + (x @ wq @ k_bias)[:, :, None] + (x @ wk @ q_bias)[:, None]
    near(scores / np.sqrt(8), acts[0]["h.1.attn.scores"][:, head])

    mixed = acts[0]["h.1.attn.pattern"][:, head] @ x
    out = mixed @ ov + v_bias @ weights["c_proj"]["kernel"][8 * head : 8 * head + 8]
    near(out, acts[0]["h.1.attn.result"][:, :, head])
    for name, circuit in (("qk", qk), ("ov", ov)):
        found = circuits.circuit_svd(params, 1, head, config=config, circuit=name)
        near((found.u * found.s[None]) @ found.vh, circuit)
        near(found.s, np.linalg.svd(circuit, compute_uv=False)[:8])
        near(found.u.T @ found.u, np.eye(8))
    assert np.linalg.matrix_rank(qk) == np.linalg.matrix_rank(ov) == 8


def test_composition_is_a_ratio_of_norms_of_whole_circuits(tiny):
    config, params = tiny
    found = jax.device_get(jax.jit(circuits.composition_scores)(params, config=config))
    norm = np.linalg.norm
    for writer in ((0, 1), (1, 2)):
        ov = np.asarray(circuits.ov_circuit(params, *writer, config=config))
        for reader in ((1, 0), (2, 2)):
            qk = np.asarray(circuits.qk_circuit(params, *reader, config=config))
            of_reader = np.asarray(circuits.ov_circuit(params, *reader, config=config))
            expected = [
                norm(ov @ reads) / norm(ov) / norm(reads) if reader[0] > writer[0] else 0
                for reads in (qk, qk.T, of_reader)
            ]
            near([scores[(*writer, *reader)] for scores in found], expected)
