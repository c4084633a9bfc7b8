"""What compiles anew at each call is named once."""

import warnings

import jax
import numpy as np
import optax
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, rebuilt
from gpt2_jax.interpretability.taps import Recorder
from gpt2_jax.rebuilt import Watch
from gpt2_jax.training import step

CONFIG = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, eos_token_id=0)
IDS = np.array([[1, 2, 3]])


@pytest.fixture(scope="module")
def params():
    return gpt2_jax.init(jax.random.key(0), CONFIG)


def test_a_tap_made_anew_for_each_call_is_named_once(params, monkeypatch):
    monkeypatch.setattr(rebuilt, "_TAPS", Watch(rebuilt._TAPS.advice))
    options = {"config": CONFIG, "max_new_tokens": 1}

    def calls(count, make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                gpt2_jax.generate(params, IDS, tap=make(), **options)
        return [str(warning.message) for warning in caught]

    def once(site, x):
        return x

    assert calls(12, lambda: once) == []
    (message,) = calls(12, lambda: lambda site, x: x)
    assert "`tap` is a new function at each call" in message
    assert "`make_tap`" in message


def test_an_optimizer_made_anew_for_each_step_is_named_once(params, monkeypatch):
    monkeypatch.setattr(step, "_OPTIMIZERS", Watch(step._OPTIMIZERS.advice))
    tx = optax.sgd(0.1)
    state = gpt2_jax.init_state(params, tx)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in (0.1, 0.1, 0.2, 0.2):  # two of them, each for several steps
            tx = tx if rate == 0.1 else optax.sgd(rate)
            state, _ = gpt2_jax.train_step(state, IDS, config=CONFIG, tx=tx)
        assert not caught
        for _ in range(12):
            tx = optax.sgd(0.1)
            state, _ = gpt2_jax.train_step(state, IDS, config=CONFIG, tx=tx)
    assert len(caught) == 1
    assert "`tx` is a new optimizer at each step" in str(caught[0].message)


def test_an_object_as_a_tap_keeps_what_it_knows():
    recorder = Recorder(
        ("h.0.attn.z",), gpt2_jax.make_tap({"embed": np.ones((2, 1, 8))}, config=CONFIG)
    )
    tap = rebuilt.as_pytree(recorder)
    assert jax.tree.leaves(tap) == []
    assert tap.wants("h.0.attn.z") and tap.wants("embed") and not tap.wants("h.0.attn.pattern")
    assert tap.placed(np.arange(3)[None]).acts is recorder.acts
    assert tap.repeated(3)("embed", np.zeros((6, 3, 8))).sum() == 6 * 3 * 8
    assert jax.tree.structure(tap) == jax.tree.structure(rebuilt.as_pytree(recorder))
