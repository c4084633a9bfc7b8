"""Memory that compiling leaves is given back."""

import ctypes

import jax
import pytest

import gpt2_jax
from gpt2_jax import memory


def generate(config, params):
    gpt2_jax.generate(params, [[1]], config=config, max_new_tokens=1)


def train(config, params):
    tx = gpt2_jax.make_optimizer(1e-3)
    gpt2_jax.train_step(gpt2_jax.init_state(params, tx), [[1, 2]], config=config, tx=tx)


@pytest.mark.parametrize("compiles", [generate, train])
def test_who_compiles_asks_once_for_what_is_left_to_be_given_back(compiles, monkeypatch):
    config = gpt2_jax.GPT2Config(vocab_size=7, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    params = gpt2_jax.init(jax.random.key(0), config)
    asked = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", asked.append)
    memory.give_back_after_compiling.cache_clear()
    for _ in range(2):
        compiles(config, jax.tree.map(jax.numpy.copy, params))
    memory.give_back_after_compiling.cache_clear()
    assert asked == [memory._after]


def test_what_long_compilations_leave_is_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "give_back", lambda: calls.append("given back"))
    memory._after(memory.COMPILED, 0.9 * memory.LONG)
    memory._after("/jax/core/compile/jaxpr_trace_duration", 60.0)
    assert calls == []
    memory._after(memory.COMPILED, memory.LONG)
    assert calls == ["given back"]


def test_jax_tells_of_compiling_by_that_name():
    told = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: told.append(event))
    jax.jit(lambda x: x * 41.5 + 0.25)(1.0)
    assert memory.COMPILED in told


def test_a_c_library_that_cannot_is_passed_over(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()
