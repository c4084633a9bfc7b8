"""What tests share: the repository's folders, a tiny model, PyTorch's version and ours of it."""

from pathlib import Path

import chex
import numpy as np
import torch
import transformers

import gpt2_jax
from gpt2_jax.pretrained import weights

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY = {"vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
TINY |= {"bos_token_id": 0, "eos_token_id": 0}


def hf_model(**options):
    """A seeded HF model in float64 of which no parameter, bias or LayerNorm is near trivial."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**options)
    model = (
        transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ours(model, dtype="float64"):
    """The same model as our config and params."""
    config = gpt2_jax.GPT2Config.from_dict(model.config.to_dict()).replace(dtype=dtype)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return config, weights.from_hf(state, config, dtype=dtype)


def assert_near(actual, expected, relative):
    """Asserts the largest difference, relative to the largest expected value."""
    expected = np.asarray(expected)
    chex.assert_trees_all_close(
        np.asarray(actual), expected, rtol=0, atol=relative * np.abs(expected).max()
    )
