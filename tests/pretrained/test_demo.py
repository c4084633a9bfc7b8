"""The model in the package, on a page that it was not trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import gpt2_jax
from tests.reference import DATA

PAGE = (DATA / "held-out.txt").read_text(encoding="utf-8")
BITS_PER_BYTE = 2.795  # of the page, as the weights in the package have it


def tokenizer():
    """The model's own tokenizer."""
    return gpt2_jax.load_tokenizer("demo")


@pytest.fixture(scope="module")
def windows():
    """The page in rows of 128 tokens."""
    ids = tokenizer().encode(PAGE)
    return np.array(ids[: len(ids) // 128 * 128]).reshape(-1, 128)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_perplexity_of_a_held_out_page_equals_pytorchs(windows, dtype, tolerance):
    model = transformers.GPT2LMHeadModel.from_pretrained(
        gpt2_jax.resolve("demo"), attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.to(getattr(torch, dtype)).eval()(torch.tensor(windows)).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(windows[:, 1:]).flatten()
    ).exp()

    config, params = gpt2_jax.load("demo", dtype=dtype)
    targets = windows[:, 1:]
    logp = jax.nn.log_softmax(jax.jit(gpt2_jax.apply)(params, windows, config=config))
    perplexity = jnp.exp(-jnp.take_along_axis(logp[:, :-1], targets[..., None], axis=-1).mean())
    np.testing.assert_allclose(perplexity, expected.item(), rtol=tolerance)
    n_bytes = len(tokenizer().decode_bytes(targets.ravel()))
    np.testing.assert_allclose(
        np.log2(perplexity) * targets.size / n_bytes, BITS_PER_BYTE, atol=0.005
    )


def test_its_stories_are_hfs(windows):
    model = transformers.GPT2LMHeadModel.from_pretrained(
        gpt2_jax.resolve("demo"), attn_implementation="eager"
    ).float()
    config, params = gpt2_jax.load("demo", dtype="float32")
    expected = model.generate(
        torch.tensor(windows[:2, :20]), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    out = gpt2_jax.generate(params, windows[:2, :20], config=config, max_new_tokens=40)
    np.testing.assert_array_equal(out.ids, expected[:, 20:])
