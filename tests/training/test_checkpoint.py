"""Checkpoints: bit for bit, atomic, the latest and the best kept."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.files import CheckpointError
from gpt2_jax.training.checkpoint import Checkpoints
from gpt2_jax.training.step import TrainState, init_state, make_optimizer

TX = make_optimizer(1e-3)


def state(step, value=0.0):
    """A state whose every number depends on `value`, of several dtypes."""
    params = {
        "a": {"kernel": jnp.full((3, 2), value + 1 / 3, jnp.float64)},
        "bias": jnp.full(3, value, jnp.float32),
    }
    full = init_state(params, TX)
    return TrainState(
        jnp.int32(step), full.params, jax.tree.map(lambda leaf: leaf + 1, full.opt_state)
    )


def test_what_comes_back_is_what_was_saved_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(5, 0.7), {"cursor": 5, "key": [1, 2**32 - 1]})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(state(0), 5)
        assert checkpoints.meta(5) == {"cursor": 5, "key": [1, 2**32 - 1], "loss": None}
    chex.assert_trees_all_equal(restored, state(5, 0.7))
    chex.assert_trees_all_equal_dtypes(restored, state(5, 0.7))


def test_the_latest_and_the_best_stay(tmp_path):
    with Checkpoints(tmp_path / "c", n_latest=2) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest() is None
        assert checkpoints.best() is None
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0), (6, None)):
            checkpoints.save(state(step), {}, loss=loss)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best() == 2
        assert checkpoints.latest() == 6


def test_without_a_loss_the_latest_is_the_best(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), {})
        checkpoints.wait()
        assert checkpoints.best() == 2


def test_the_next_step_may_donate_the_state_while_it_is_written(tmp_path):
    change = jax.jit(lambda leaf: leaf * 0 - 7, donate_argnums=0)
    large = TrainState(jnp.int32(1), {"w": jnp.arange(2.0**20)}, ())
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(large, {})
        change(large.params["w"]).block_until_ready()
        restored = checkpoints.restore(TrainState(jnp.int32(0), {"w": jnp.zeros(2**20)}, ()), 1)
    np.testing.assert_array_equal(restored.params["w"], np.arange(2.0**20))


def test_a_checkpoint_that_was_not_finished_does_not_exist(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {})
    unfinished = tmp_path / "c" / "4.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    (unfinished / "half").write_text("written")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [3]
        checkpoints.save(state(4), {})  # is not in its way
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]


def test_what_cannot_be_restored_is_named(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"expected a checkpoint of step 4, got \[3\]"):
            checkpoints.restore(state(0), 4)
        other = TrainState(jnp.int32(0), {"a": jnp.zeros(3)}, ())
        with pytest.raises(CheckpointError, match="checkpoint of step 3 could not be read"):
            checkpoints.restore(other, 3)
        for file in (tmp_path / "c" / "3" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="checkpoint of step 3 could not be read"):
            checkpoints.restore(state(0), 3)
