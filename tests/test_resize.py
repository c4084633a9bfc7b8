"""Another number of tokens, beside HF's `resize_token_embeddings`."""

import jax
import numpy as np
import pytest

import gpt2_jax
from tests.reference import TINY, assert_near, hf_model, ours

apply = jax.jit(gpt2_jax.apply)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 61, 50])
def test_a_resized_model_is_hfs(rng, tied, size):
    model = hf_model(**TINY, tie_word_embeddings=tied)
    config, params = ours(model)
    ids = rng.integers(0, 50, (2, 9))
    before = apply(params, ids, config=config)
    model.resize_token_embeddings(size, mean_resizing=True)
    new_config, new = gpt2_jax.resize_vocab(params, config, size)
    assert new_config.vocab_size == size
    _, theirs = ours(model)
    names = ["wte"] if tied else ["wte", "lm_head"]
    for name in names:
        # HF's new rows are drawn, a ten-thousandth around the mean.
        assert_near(new[name]["embedding"], theirs[name]["embedding"], 1e-3)
    logits = apply(new, ids, config=new_config)
    known = min(size, 61)
    assert_near(logits[..., :known], np.asarray(before)[..., :known], 1e-12)


def test_new_rows_are_drawn_around_the_mean_of_the_old(rng):
    config, params = ours(hf_model(**TINY))
    old = np.asarray(params["wte"]["embedding"])
    _, new = gpt2_jax.resize_vocab(params, config, 5061, jax.random.key(0))
    rows = np.asarray(new["wte"]["embedding"])[61:]
    centred = (old - old.mean(0)).T
    covariance = 1e-9 * centred @ centred.T / len(old)
    drawn = np.cov((rows - old.mean(0)).T)
    # Of 5,000 draws; five deviations of a variance's estimate.
    np.testing.assert_allclose(np.diag(drawn), np.diag(covariance), rtol=5 * (2 / 5000) ** 0.5)
    assert np.abs(drawn - covariance).max() < 0.1 * np.abs(covariance).max()
    _, again = gpt2_jax.resize_vocab(params, config, 5061, jax.random.key(0))
    np.testing.assert_array_equal(again["wte"]["embedding"], new["wte"]["embedding"])


def test_no_tokens_are_too_few():
    config, params = ours(hf_model(**TINY))
    with pytest.raises(ValueError, match="`size`"):
        gpt2_jax.resize_vocab(params, config, 0)
