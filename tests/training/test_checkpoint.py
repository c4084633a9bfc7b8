"""Checkpoints: bit for bit, atomic, the latest and the best kept."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.files import CheckpointError
from gpt2_jax.training.checkpoint import Checkpoints, DamagedError
from gpt2_jax.training.optimizers import make_optimizer
from gpt2_jax.training.step import TrainState, init_state

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
        message = "c/3: expected the files that were written, got another state/"
        with pytest.raises(DamagedError, match=message):
            checkpoints.restore(state(0), 3)


def test_a_damage_is_found_or_does_no_harm(tmp_path, capfd):
    # 1,200 of them when this was written: 1,036 found, none that changed what came back.
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3, 0.7), {"cursor": 3})
    rng = np.random.default_rng(0)
    n_found = 0
    for number in range(40):
        shutil.copytree(tmp_path / "c", tmp_path / str(number))
        files = [path for path in (tmp_path / str(number) / "3").rglob("*") if path.is_file()]
        file = sorted(files)[rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        at = int(rng.integers(len(content)))
        content[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(content if number % 2 else content[:at])
        try:
            with Checkpoints(tmp_path / str(number)) as checkpoints:
                assert checkpoints.meta(3) == {"cursor": 3, "loss": None}
                restored = checkpoints.restore(state(0), 3)
            chex.assert_trees_all_equal(restored, state(3, 0.7))
        except DamagedError as error:
            n_found += 1
            assert f"{tmp_path / str(number) / '3'}" in str(error)
            assert file.name in str(error)
    assert n_found > 20
    assert capfd.readouterr() == ("", "")  # orbax's threads would print their tracebacks


def test_a_damaged_best_is_not_the_best(tmp_path):
    with Checkpoints(tmp_path / "c", n_latest=3) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, None)):
            checkpoints.save(state(step), {}, loss=loss)
        checkpoints.wait()
        assert checkpoints.best_first() == [2, 1, 3]
        (tmp_path / "c" / "2" / "meta" / "metadata").write_text("{")
        assert checkpoints.best_first() == [1, 3, 2]


def test_one_that_is_set_aside_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {})
        checkpoints.wait()
        assert checkpoints.set_aside(3) == tmp_path / "c" / "damaged-3"
        assert checkpoints.steps() == []
        checkpoints.save(state(3, 0.5), {})
        checkpoints.wait()
        assert checkpoints.set_aside(3) == tmp_path / "c" / "damaged-3-2"


def test_a_reader_does_not_take_what_is_being_written_for_a_leftover(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {})
    unfinished = tmp_path / "c" / "4.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    with Checkpoints(tmp_path / "c", is_reader=True) as checkpoints:
        assert checkpoints.steps() == [3]
    assert unfinished.is_dir()


def test_a_folder_that_is_gone_ends_the_writing(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(CheckpointError, match="c: the folder is gone, nothing was saved"):
            checkpoints.save(state(4), {})
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/c: expected a folder of checkpoints"):
        Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match="expected a path on this machine, got an address"):
        Checkpoints("gs://bucket/run")
