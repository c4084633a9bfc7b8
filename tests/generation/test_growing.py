"""Caches that grow change no text: small ones that grow give what one of full size gives."""

from functools import partial

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, cache
from gpt2_jax.generation import growing

CONFIG = GPT2Config(
    vocab_size=61,
    n_positions=128,
    n_embd=24,
    n_layer=1,
    n_head=3,
    eos_token_id=None,
    dtype="float64",
)
PARAMS = jax.tree.map(lambda x: 5 * x, gpt2_jax.init(jax.random.key(0), CONFIG))
PROMPTS = np.random.default_rng(0).integers(0, 61, (2, 9))
WISHES = {"config": CONFIG, "max_new_tokens": 70, "stop_ids": ()}


@pytest.mark.parametrize(
    "find",
    [gpt2_jax.speculate, partial(gpt2_jax.beam_search, num_beams=2)],
    ids=["guesses", "beams"],
)
def test_a_cache_that_grows_gives_the_texts_of_a_full_one(find, monkeypatch):
    whole = find(PARAMS, PROMPTS, **WISHES)  # one cache, of all that is needed
    sizes = []
    lengthened = growing.lengthened

    def watched(state, *, slots):
        sizes.append(slots)
        return lengthened(state, slots=slots)

    monkeypatch.setattr(growing, "lengthened", watched)
    monkeypatch.setattr(cache, "SMALLEST_CACHE", 32)
    grown = find(PARAMS, PROMPTS, **WISHES)
    assert sizes
    assert grown.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(grown.logprobs, whole.logprobs, atol=1e-10)
