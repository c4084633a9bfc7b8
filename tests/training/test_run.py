"""Whole training runs: stopped, killed, resumed, exported; and what they refuse."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import gpt2_jax
from gpt2_jax.files import CheckpointError, lock
from gpt2_jax.training import corpus as corpus_module
from gpt2_jax.training import run as run_module
from gpt2_jax.training import run_folder, validation
from gpt2_jax.training import step as step_module
from gpt2_jax.training.data import DataError
from gpt2_jax.training.log import read_metrics
from gpt2_jax.training.run import TrainingError, export, fit
from gpt2_jax.training.run_folder import read_run
from tests.training.runs import (
    SMALL,
    checkpoint_steps,
    curve,
    train,
    wait_for,
    write_corpus,
)


def quiet(text):
    """Takes a message and says nothing."""
    del text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    summary = fit(SMALL, corpus, out, say=quiet)
    assert (summary.finished, summary.step) == (True, 12)
    return out


def test_a_run_learns_and_records_what_it_did(corpus, finished):
    lines = curve(finished)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [6, 12]
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.3
    np.testing.assert_allclose(
        lines[-1]["bits_per_byte"], lines[-1]["val_loss"] / np.log(2), rtol=1e-12
    )
    assert len(lines[-1]["sample"]) == 5
    run = json.loads((finished / "run.json").read_text())
    assert run["recipe"] == dataclasses.asdict(SMALL)


def test_the_exported_model_is_transformers_and_ours_and_has_the_loss_that_was_reported(
    corpus, finished, tmp_path
):
    step = export(finished, tmp_path / "hf")
    ids = np.fromfile(corpus / "val.bin", np.uint16).astype(np.int64)
    reported = {line["step"]: line["val_loss"] for line in curve(finished) if "val_loss" in line}
    assert reported[step] == min(reported.values())
    model = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    total = 0.0
    for start in range(0, len(ids) - 1, 8):  # each id but the first, after at most eight others
        window = torch.tensor(ids[start : start + 9])[None]
        logits = model(window[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    np.testing.assert_allclose(reported[step], total / (len(ids) - 1), rtol=1e-5)
    config, params = gpt2_jax.load(tmp_path / "hf")
    ours = gpt2_jax.apply(params, ids[None, :8], config=config)
    np.testing.assert_allclose(ours, model(torch.tensor(ids[None, :8])).logits.detach(), atol=1e-5)
    tokenizer = gpt2_jax.Tokenizer.load(tmp_path / "hf")
    assert tokenizer.encode("the cat") == ids_of(corpus, "the cat")


def ids_of(corpus, text):
    """The ids of a text, from the vocabulary file."""
    vocab = json.loads((corpus / "vocab.json").read_text())
    return [vocab[char.replace(" ", "\u0120")] for char in text]


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(corpus, tmp_path):
    run = tmp_path / "run"
    process = train(corpus, run, "--steps=100000", "--save_every=100000", "--eval_every=100000")
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(curve(run)) > 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume goes on from there" in errors
    assert "Traceback" not in errors
    assert checkpoint_steps(run) == [curve(run)[-1]["step"]]


def test_resumed_in_one_process_the_curve_is_the_same(corpus, finished, tmp_path, monkeypatch):
    train_step = run_module.train_step
    steps = []

    def stop_after_five(*args, **kwargs):
        steps.append(1)
        if len(steps) > 5:
            raise ValueError("as if the machine had stopped")
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "train_step", stop_after_five)
        with pytest.raises(TrainingError, match="Step 6, batch 5: as if"):
            fit(SMALL, corpus, tmp_path / "run", say=quiet)
    fit(SMALL, corpus, tmp_path / "run", resume=True, say=quiet)
    assert curve(tmp_path / "run") == curve(finished)
    before = curve(tmp_path / "run")
    summary = fit(SMALL, corpus, tmp_path / "run", resume=True, say=quiet)  # nothing is left to do
    assert summary.finished and curve(tmp_path / "run") == before


def test_on_a_mesh_the_curve_is_that_of_one_device_and_a_run_goes_on_on_any(
    corpus, finished, tmp_path, monkeypatch
):
    spread = tmp_path / "spread"
    before = step_module._train_step._cache_size()
    saved = []
    monkeypatch.setattr(run_module, "_advance", stop_after(6, run_module._advance, saved))
    with pytest.raises(TrainingError, match="as if"):
        fit(SMALL, corpus, spread, mesh="data=2,tensor=2", say=quiet)
    monkeypatch.undo()
    # One program for all steps; what lay in the fourth checkpoint is in four parts.
    assert step_module._train_step._cache_size() == before + 1
    kernel = saved[4].params["h"]["0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 32)
    assert json.loads((spread / "run.json").read_text())["devices"] == {
        "mesh": {"data": 2, "fsdp": 1, "tensor": 2},
        "processes": 1,
    }
    fit(SMALL, corpus, spread, resume=True, say=quiet)
    for one, other in zip(curve(spread), curve(finished), strict=True):
        assert one.keys() == other.keys() and one.get("sample") == other.get("sample")
        numbers = [name for name in one if name != "sample"]
        np.testing.assert_allclose(
            [one[name] for name in numbers], [other[name] for name in numbers], rtol=2e-5
        )


def stop_after(n_steps, advance, states):
    """As if the machine stopped after some steps, whose states are kept on the host."""

    def step(plan, position, number):
        if number > n_steps:
            raise TrainingError("as if the machine had stopped")
        position, metrics = advance(plan, position, number)
        states.append(jax.tree.map(jnp.copy, position.state))
        return position, metrics

    return step


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("data=9", "A mesh of data=9,fsdp=1,tensor=1 needs 9 devices, there are 8"),
        ("data=2,fsdp=2", "`batch_size` 4 in `micro_batches` 2 are 2 rows at a time, .* of the 4"),
        ("tensor=3", r"attn.c_attn.kernel \[16, 48\]: axis 0, of 16, must divide by the 3"),
        ("pipeline=2", "axes of data, fsdp, tensor, got 'pipeline'"),
        (jax.make_mesh((2,), ("x",)), r"axes of data, fsdp, tensor, got \['x'\]"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_there_is_a_folder(
    corpus, tmp_path, mesh, message
):
    with pytest.raises(ValueError, match=message):
        fit(SMALL, corpus, tmp_path / "run", mesh=mesh, say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_log_gets_the_metrics_and_what_it_raises_comes_out_behind_a_checkpoint(
    corpus, finished, tmp_path
):
    told = []

    def log(step, values):
        told.append({"step": step} | values)
        if step == 6 and "val_loss" in values:
            raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        fit(SMALL, corpus, tmp_path / "run", log=log, say=quiet)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert told == lines[:7]
    # As after Ctrl-C: the step that had begun is the last, and saved.
    assert checkpoint_steps(tmp_path / "run")[-1] == lines[-1]["step"] == 7
    fit(SMALL, corpus, tmp_path / "run", resume=True, log=lambda step, values: None, say=quiet)
    assert curve(tmp_path / "run") == curve(finished)


def test_a_finished_run_is_not_overwritten(corpus, finished):
    before = curve(finished)
    with pytest.raises(
        CheckpointError, match="holds a run already: resume it, or give another folder"
    ):
        fit(SMALL, corpus, finished, say=quiet)
    assert curve(finished) == before


def test_resuming_something_else_says_what_differs(corpus, finished, tmp_path):
    other = dataclasses.replace(SMALL, learning_rate=2e-2, seed=3, log_every=2)
    with pytest.raises(CheckpointError) as error:
        fit(other, corpus, finished, resume=True, say=quiet)
    assert "recipe.learning_rate: 0.01 then, 0.02 now" in str(error.value)
    assert "recipe.seed: 0 then, 3 now" in str(error.value)
    assert "log_every" not in str(error.value)


def test_a_run_begun_before_a_field_was_there_is_the_same_run(tmp_path):
    now = {"recipe": dataclasses.asdict(SMALL), "data": {}}
    then = {"recipe": now["recipe"] | {"remat": False}, "data": {}}
    del then["recipe"]["stack_layers"]
    run_folder._check_same_run(tmp_path, now, then)
    then["recipe"]["remat"] = True
    with pytest.raises(CheckpointError, match="recipe.remat: 'full' then, 'none' now"):
        run_folder._check_same_run(tmp_path, now, then)


def test_resuming_with_other_data_says_so(corpus, finished, tmp_path):
    changed = tmp_path / "corpus"
    changed.mkdir()
    for file in corpus.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    ids = np.fromfile(changed / "train.bin", np.uint16)
    ids[10] = (ids[10] + 1) % 5
    ids.tofile(changed / "train.bin")
    with pytest.raises(CheckpointError, match=r"data.train.sha256: '\w+' then, '\w+' now"):
        fit(SMALL, changed, finished, resume=True, say=quiet)


def test_data_of_which_a_sample_is_known_is_the_same_when_it_is_indexed(
    corpus, finished, tmp_path, monkeypatch
):
    same = tmp_path / "corpus"
    shutil.copytree(corpus, same)
    monkeypatch.setattr(corpus_module, "WHOLE_BYTES", 1)
    with pytest.raises(CheckpointError, match="is the same, `gpt2-jax prepare --index DATA` tells"):
        fit(SMALL, same, finished, resume=True, say=quiet)
    corpus_module.index(same)
    assert fit(SMALL, same, finished, resume=True, say=quiet).finished


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_checkpoints(corpus, tmp_path):
    run = tmp_path / "run"
    wild = dataclasses.replace(
        SMALL, learning_rate=1e30, warmup_steps=8, min_learning_rate=0, save_every=1
    )
    with pytest.raises(TrainingError, match=r"Step \d+, batch \d+: the loss is (nan|inf)"):
        fit(wild, corpus, run, say=quiet)
    assert checkpoint_steps(run)[-1] == curve(run)[-1]["step"]


def test_fine_tuning_starts_from_the_weights(corpus, finished, tmp_path):
    export(finished, tmp_path / "base")
    gentle = dataclasses.replace(
        SMALL, length=4, steps=1, warmup_steps=0, learning_rate=1e-9, min_learning_rate=0
    )
    summary = fit(
        gentle, corpus, tmp_path / "tuned", from_pretrained=str(tmp_path / "base"), say=quiet
    )
    config, params = gpt2_jax.load(tmp_path / "base")
    export(tmp_path / "tuned", tmp_path / "out", dtype="float16")
    tuned_config, tuned = gpt2_jax.load(tmp_path / "out")
    assert (tuned_config.n_layer, tuned_config.dtype) == (config.n_layer, "float16")
    assert summary.val_loss < 3
    for name in ("wte", "wpe"):
        np.testing.assert_allclose(tuned[name]["embedding"], params[name]["embedding"], atol=1e-3)
    with pytest.raises(CheckpointError, match="from_pretrained: '.*base' then, None now"):
        fit(gentle, corpus, tmp_path / "tuned", resume=True, say=quiet)


def test_a_base_with_another_kind_of_tokenizer_takes_ids_alone(corpus, finished, tmp_path):
    base = tmp_path / "base"
    export(finished, base)
    assert gpt2_jax.Tokenizer.load(base).vocab == gpt2_jax.Tokenizer.load(corpus).vocab
    for file in (*base.glob("*vocab*"), *base.glob("*merges*"), *base.glob("*token*")):
        file.unlink()
    (base / "spiece.model").touch()
    gentle = dataclasses.replace(SMALL, length=4, steps=1, warmup_steps=0)
    with pytest.raises(DataError, match="another kind of tokenizer: .*spiece.model"):
        fit(gentle, corpus, tmp_path / "run", from_pretrained=str(base), say=quiet)
    ids = tmp_path / "ids"
    ids.mkdir()
    for name in ("train.bin", "meta.json"):
        shutil.copy(corpus / name, ids / name)
    fit(gentle, ids, tmp_path / "run", from_pretrained=str(base), say=quiet)
    export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        gpt2_jax.Tokenizer.load(tmp_path / "out")


def test_what_cannot_be_trained_on_is_named(corpus, tmp_path):
    with pytest.raises(DataError, match="expected `train.bin`"):
        fit(SMALL, tmp_path, tmp_path / "run", say=quiet)
    with pytest.raises(DataError, match="Windows of 1024"):
        fit(dataclasses.replace(SMALL, n_positions=1024), corpus, tmp_path / "run", say=quiet)
    with pytest.raises(DataError, match="another vocabulary than demo"):
        fit(SMALL, corpus, tmp_path / "run", from_pretrained="demo", say=quiet)
    with pytest.raises(ValueError, match=r"`length` must be at most 8 \(`n_positions`\), got 9"):
        fit(dataclasses.replace(SMALL, length=9), corpus, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match="holds no run"):
        export(tmp_path, tmp_path / "hf")


@pytest.mark.parametrize("changes", [{"n_embd": 10**9}, {"n_layer": 10**9}, {"n_positions": 10**9}])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(corpus, tmp_path, changes):
    huge = dataclasses.replace(SMALL, length=8, **changes)
    with pytest.raises(ValueError, match=r"parameters need at least [\d,]+ GB of memory"):
        fit(huge, corpus, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_is(finished):
    run = read_run(finished)
    assert run.recipe == SMALL
    assert run.config == SMALL.config(vocab_size=run.config.vocab_size, eot_id=None)
    assert run.from_pretrained is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "run.json: expected JSON, got "),
        ("{}", "run.json: expected what `fit` writes, no 'recipe'"),
        ('{"recipe": {"steps": 0}}', "run.json: expected what `fit` writes, got `steps` must be"),
        ('{"recipe": 3}', "run.json: expected what `fit` writes, got "),
    ],
)
def test_a_damaged_run_json_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path)


@pytest.fixture
def copied(finished, tmp_path):
    """The undisturbed run, to be damaged; and where its damages are reported."""
    return shutil.copytree(finished, tmp_path / "run")


def cut(run, step):
    """Cuts off the largest file of a checkpoint."""
    files = [file for file in (run / "checkpoints" / str(step)).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-9])
    return largest.name


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(
    corpus, finished, copied, capfd
):
    said = []
    name = cut(copied, 12)
    summary = fit(SMALL, corpus, copied, resume=True, say=said.append)
    assert (summary.step, summary.finished) == (12, True)
    assert curve(copied) == curve(finished)
    assert name in said[0] and f"It was moved to {copied}/checkpoints/damaged-12." in said[0]
    assert "steps 8 to 12" in said[1]
    assert (copied / "checkpoints" / "12").is_dir()
    assert "Traceback" not in capfd.readouterr().err


def test_where_no_checkpoint_is_whole_it_says_what_to_delete(corpus, copied, tmp_path):
    steps = checkpoint_steps(copied)
    for step in steps:
        cut(copied, step)
    before = sorted(str(file) for file in copied.rglob("*"))
    message = rf"none of the checkpoints, of steps .*, is whole: delete {copied} to begin anew"
    with pytest.raises(CheckpointError, match=message):
        fit(SMALL, corpus, copied, resume=True, say=quiet)
    said = []
    with pytest.raises(CheckpointError, match=r"none of the checkpoints, of steps \["):
        export(copied, tmp_path / "hf", say=said.append)
    assert len(said) == len(steps)
    # Nothing was moved, so that the next call does not begin anew by itself.
    assert sorted(str(file) for file in copied.rglob("*")) == before
    assert not (tmp_path / "hf").exists()


def test_a_second_trainer_is_kept_out(corpus, copied):
    descriptor = lock(copied / "run.lock")
    try:
        with pytest.raises(CheckpointError, match="run: another process trains here"):
            fit(SMALL, corpus, copied, resume=True, say=quiet)
    finally:
        os.close(descriptor)
    assert fit(SMALL, corpus, copied, resume=True, say=quiet).finished


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_file_of_another_program_is_not_replaced(corpus, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text('{"of": "another program"}\n')
    with pytest.raises(CheckpointError, match=f"{name}.*: expected"):
        fit(SMALL, corpus, run, say=quiet)
    assert (run / name).read_text() == '{"of": "another program"}\n'


def test_a_folder_that_is_deleted_under_a_run_ends_it(corpus, tmp_path, monkeypatch):
    train_step = run_module.train_step

    def step_and_delete(*args, **kwargs):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(run_module, "train_step", step_and_delete)
    with pytest.raises((CheckpointError, TrainingError), match="run/.* is gone"):
        fit(SMALL, corpus, tmp_path / "run", say=quiet)


def test_without_validation_data_nothing_is_measured_and_the_latest_is_exported(corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.bin", "meta.json"):
        (data / name).write_bytes((corpus / name).read_bytes())
    summary = fit(SMALL, data, tmp_path / "run", say=quiet)
    assert (summary.finished, summary.val_loss) == (True, None)
    assert all("val_loss" not in line for line in curve(tmp_path / "run"))
    assert export(tmp_path / "run", tmp_path / "hf") == 12


def test_a_sample_that_fails_is_a_note(corpus, finished, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(validation, "generate", fails)
    said = []
    assert fit(SMALL, corpus, tmp_path / "run", say=said.append).finished
    notes = ["No sample after step 6: out of memory", "No sample after step 12: out of memory"]
    assert said[1:] == notes
    without = [{name: line[name] for name in line if name != "sample"} for line in curve(finished)]
    assert curve(tmp_path / "run") == without


def test_mistakes_on_the_command_line_are_one_line(corpus, tmp_path):
    process = train(corpus, tmp_path / "run", "--from_pretrained=demo")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("train.py: --n_layer, --n_head, --n_embd, --n_positions: ")
    assert len(errors.splitlines()) == 1
