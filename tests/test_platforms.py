"""The programs lower for every platform, without one at hand."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import export

import gpt2_jax
from gpt2_jax import GPT2Config
from gpt2_jax.generation.decode import Start, advance, begin
from gpt2_jax.generation.request import make_request, read_endings, read_prompts

TINY = GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=1, n_head=3)
PLATFORMS = ("cpu", "cuda", "tpu")


def programs():
    """Jitted functions and arguments for them, by their names."""
    config = TINY.replace(dtype="bfloat16")
    params = gpt2_jax.init(jax.random.key(0), TINY)
    ids = np.ones((2, 32), np.int32)
    tx = gpt2_jax.make_optimizer(1e-3)
    step = partial(gpt2_jax.train_step, config=config.replace(resid_pdrop=0.1), tx=tx)
    sampler = gpt2_jax.sampler_from_options(
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, do_sample=True
    )
    one = ids[:1]  # whose products are made in parts on one of the platforms
    request = make_request(
        read_prompts(one, None, "right", config=config),
        read_endings((3,), 0, config=config),
        jax.random.key(0),
        sampler,
    )

    def generate(params, request):
        state, first = begin(
            params, request, Start(), config=config, cache_len=64, num_return_sequences=1
        )
        return first, advance(params, state, request.rules, 7, config=config, chunk=8)

    return {
        "int8": (
            jax.jit(partial(gpt2_jax.apply, config=config)),
            (gpt2_jax.quantize(params, config=config), one),
        ),
        "apply": (jax.jit(partial(gpt2_jax.apply, config=config)), (params, ids)),
        "generate": (jax.jit(generate), (params, request)),
        "train_step": (jax.jit(step), (gpt2_jax.init_state(params, tx), ids, jax.random.key(0))),
    }


@pytest.mark.parametrize("name", ["apply", "int8", "generate", "train_step"])
def test_one_program_serves_all_platforms(name):
    function, arguments = programs()[name]
    exported = export.export(function, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    found = jax.tree.leaves(exported.call(*arguments))
    for ours, expected in zip(found, jax.tree.leaves(function(*arguments)), strict=True):
        np.testing.assert_allclose(
            jax.device_get(ours), jax.device_get(expected), rtol=1e-5, atol=1e-7
        )
