"""Memory that compiling leaves is given back."""

import ctypes

import jax
import pytest

from gpt2_jax import memory


@pytest.mark.parametrize("package", ["generation.decode", "training.step"])
def test_what_compiles_has_it_given_back_after_each_long_compilation(package, monkeypatch):
    __import__(f"gpt2_jax.{package}")
    calls = []
    monkeypatch.setattr(memory, "give_back", lambda: calls.append("given back"))
    jax.monitoring.record_event_duration_secs(memory.COMPILED, 0.9 * memory.LONG)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 60.0)
    assert calls == []
    jax.monitoring.record_event_duration_secs(memory.COMPILED, memory.LONG)
    assert calls == ["given back"]  # once, however often it was asked for


def test_jax_tells_of_compiling_by_that_name():
    told = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: told.append(event))
    jax.jit(lambda x: x * 41.5 + 0.25)(1.0)
    assert memory.COMPILED in told


def test_a_c_library_that_cannot_is_passed_over(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()
