"""Several processes: what they agree on, by a store of threads; and two that train one model."""

import contextlib
import dataclasses
import itertools
import random
import signal
import socket
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from gpt2_jax.commands import runtime_notes
from gpt2_jax.training import processes
from gpt2_jax.training.processes import ProcessError, StopAgreement, agree, exchange, together
from gpt2_jax.training.run import fit
from tests.training.runs import SMALL, checkpoint_steps, curve, train, wait_for, write_corpus


class Store:
    """The two calls of JAX's store that are used, for threads."""

    def __init__(self):
        self.texts = {}

    def key_value_set(self, key, text):
        assert key not in self.texts
        self.texts[key] = text

    def key_value_dir_get(self, place):
        return [(key, text) for key, text in list(self.texts.items()) if key.startswith(place)]


class Numbers(threading.local):
    """Counts by itself in each thread, as in each process."""

    def __init__(self):
        self.count = itertools.count()

    def __next__(self):
        return next(self.count)


@pytest.fixture
def in_threads(monkeypatch):
    """Calls a function of the number of a process in threads that take themselves for processes;
    returns what each returned or raised."""
    here = threading.local()

    def run(function, count=3):
        store = Store()
        monkeypatch.setattr(processes, "_client", lambda: store)
        monkeypatch.setattr(processes, "_numbers", Numbers())
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: here.number)
        results: list[Any] = [None] * count

        def start(number):
            here.number = number
            try:
                results[number] = function(number)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=start, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


def test_each_hears_what_all_say_in_order(in_threads):
    assert (
        in_threads(lambda number: exchange(f"of {number}\n"))
        == [["of 0\n", "of 1\n", "of 2\n"]] * 3
    )


def test_who_does_not_come_is_named(in_threads):
    def come(number):
        if number != 1:
            exchange("here", seconds=0.1)

    first, second, third = in_threads(come)
    assert second is None
    for error in (first, third):
        assert str(error) == "Of 3 processes, 1 did not come in 0 s."


def test_what_one_raises_ends_all_and_its_own_is_its_own(in_threads):
    def work(number):
        with together():
            if number == 2:
                raise FileNotFoundError("no train.bin\nsought in data")

    first, second, third = in_threads(work)
    assert isinstance(third, FileNotFoundError)
    for error in (first, second):
        assert isinstance(error, ProcessError) and str(error) == "Process 2: no train.bin"


def test_differences_are_listed_with_both_values(in_threads):
    values = [{"recipe.seed": 0, "mesh": {"data": 4}, "jax": "0.10"} for _ in range(3)]
    assert in_threads(lambda number: agree(values[number])) == [None] * 3
    values[1] = values[1] | {"mesh": None}
    values[2] = values[2] | {"recipe.seed": 7, "bias": True}
    errors = in_threads(lambda number: agree(values[number]))
    expected = (
        "The processes must be started alike:\n"
        "  bias: None in process 0, True in process 2\n"
        "  mesh: {'data': 4} in process 0, None in process 1\n"
        "  recipe.seed: 0 in process 0, 7 in process 2"
    )
    assert [str(error) for error in errors] == [expected] * 3


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_after_one_step_whoever_is_asked_and_however_far_they_are_apart(in_threads, seed):
    rng = random.Random(seed)
    asked = {rng.randrange(3): rng.randrange(1, 6) for _ in range(rng.randrange(1, 4))}
    pauses = [[rng.random() / 200 for _ in range(20)] for _ in range(3)]
    started = [threading.Barrier(3) for _ in range(20)]

    def steps(number):
        step = 0
        stop = StopAgreement(lambda: asked.get(number, 99) <= step)
        for step in range(1, 20):
            time.sleep(pauses[number][step])
            # What a step's loss waits for: that all have started the one before.
            if step > 1:
                started[step - 1].wait()
            if stop(step):
                # Whoever is at the barrier of the step that was started is let go on.
                started[step].wait()
                return step

    assert in_threads(steps) == [min(asked.values()) + 2] * 3


def test_a_program_of_one_process_agrees_with_itself():
    agree({"seed": 1})
    assert exchange("text") == ["text"]
    asked = []
    stop = StopAgreement(lambda: bool(asked))
    assert not stop(1)
    asked.append(1)
    assert stop(1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_processes=2"], "--num_processes, --process_id: --coordinator is missing"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], r"in \[0, 2\), got 2"),
        (
            ["--coordinator=here", "--num_processes=2", "--process_id=1"],
            "10.0.0.1:1234, got 'here'",
        ),
    ],
)
def test_mistakes_in_joining_are_named(tmp_path, monkeypatch, options, message):
    from gpt2_jax.commands.train import parser, run

    monkeypatch.setattr(runtime_notes, "divert", lambda program: None)
    args = parser("train").parse_args([str(tmp_path), "--out", str(tmp_path / "run"), *options])
    with pytest.raises(ValueError, match=message):
        run(args)
    assert not (tmp_path / "run").exists()


def start_two(corpus, run, *options):
    """Starts two processes of one device each that train one model."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", *options]
    return [train(corpus, run, *joined, f"--process_id={number}", devices=1) for number in (0, 1)]


@pytest.fixture
def two(tmp_path):
    """Starts two processes in the folder `run`; none is left behind."""
    started = []

    def start(corpus, *options):
        started.extend(start_two(corpus, tmp_path / "run", *options))
        return started[-2:]

    yield start
    for process in started:
        if process.returncode is None:  # the test has failed
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_end_with_one_that_dies_go_on_bit_for_bit_and_stop_together(tmp_path, two):
    data = tmp_path / "data"
    data.mkdir()
    corpus = write_corpus(data)
    run = tmp_path / "run"
    options = ["--steps=2000", "--decay_steps=8", "--eval_every=10", "--save_every=10", "--quiet"]
    options += ["--dtype=float32", "--dropout=0", "--sample_tokens=0"]
    first, second = two(corpus, *options)
    wait_for(lambda: len(checkpoint_steps(run)) > 0 and len(curve(run)) > 14, second, 180)
    first.send_signal(signal.SIGKILL)  # which keeps the others together
    _, errors = second.communicate(timeout=60)
    first.communicate()
    lines = [line for line in errors.splitlines() if "[Gloo]" not in line]
    # Whether it was a step that found out, or JAX's runtime.
    assert len(lines) == 1
    assert lines[0].startswith("train.py: Another process of this run has ended")
    before = curve(run)
    saved = checkpoint_steps(run)[-1]

    both = two(corpus, *options, "--resume")
    wait_for(lambda: len(curve(run)) > len(before) + 3, both[0], 180)
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 130
    after = curve(run)
    assert checkpoint_steps(run)[-1] == after[-1]["step"]
    # Both those that were made again and those before: none differs in a bit.
    assert after[: len(before)] == before and before[-1]["step"] > saved

    recipe = dataclasses.replace(
        SMALL, steps=2000, decay_steps=8, eval_every=10, dropout=0, sample_tokens=0
    )
    told = []

    def log(step, values):
        told.append({"step": step} | values)
        if step == 12:
            raise KeyError

    with pytest.raises(KeyError):
        fit(recipe, corpus, tmp_path / "alone", log=log, say=lambda text: None)
    assert [line["step"] for line in told] == [line["step"] for line in after[: len(told)]]
    for name in ("loss", "val_loss", "grad_norm"):
        alone = [line[name] for line in told if name in line]
        theirs = [line[name] for line in after[: len(told)] if name in line]
        np.testing.assert_allclose(theirs, alone, rtol=1e-4)
