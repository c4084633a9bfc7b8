"""A tiny model of three layers, two batches of texts, and every activation of both."""

import jax
import numpy as np
import pytest

from gpt2_jax.interpretability.taps import capture
from tests.reference import TINY, hf_model, ours


@pytest.fixture(scope="package")
def model():
    """HF's."""
    return hf_model(**TINY | {"n_layer": 3})


@pytest.fixture(scope="package")
def tiny(model):
    """Ours: config and params."""
    return ours(model)


@pytest.fixture(scope="package")
def texts():
    """Two batches of two rows of five ids: one to work on, and one to take activations from."""
    return np.random.default_rng(0).integers(0, 61, (2, 2, 5))


@pytest.fixture(scope="package")
def acts(tiny, texts):
    """Every activation of both batches."""
    config, params = tiny

    @jax.jit
    def run(ids):
        return capture(params, ids, config=config, sites="*")[1]

    return [jax.device_get(run(ids)) for ids in texts]
