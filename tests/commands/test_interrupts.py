"""Ctrl-C, at any moment: one line, the exit code 130 and no traceback."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpt2_jax.commands.common import unwinding
from tests.reference import ROOT

# Tests may run in the background, where Ctrl-C is ignored: here it is not.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import gpt2_jax_cli
print("started", flush=True)
gpt2_jax_cli.main()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of compiled programs that the runs share."""
    cache = str(tmp_path_factory.mktemp("cache"))
    paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
    return os.environ | paths


@pytest.fixture
def start(environment):
    """Starts a command that ends before the test does."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        processes.append(process)
        assert process.stdout.readline() == b"started\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# Handling its arguments, importing JAX, loading, waiting for a line: which of them depends on the
# machine, and no answer on which.
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("signals", [1, 2])
def test_at_any_moment_of_a_start_it_is_one_line(start, delay, signals):
    process = start("--interactive", "--from_pretrained", "demo", "--quiet")
    time.sleep(delay)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == b"gpt2-jax: interrupted\n"


def test_a_text_is_kept_as_far_as_it_has_come(start):
    prompt = "Once upon a time"
    process = start(prompt, "--from_pretrained", "demo", "--max_tokens", "240", "--quiet")
    shown = process.stdout.read(len(prompt) + 1)  # the model has begun
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert shown.startswith(prompt.encode())
    assert rest.endswith(b"\n")
    assert process.returncode == 130
    assert errors == b"gpt2-jax: interrupted\n"


def test_in_a_conversation_it_ends_the_turn_and_then_the_talk(start):
    options = ["--from_pretrained", "demo", "--overflow", "error", "--max_tokens", "100000"]
    process = start("--interactive", *options, "Once upon a time")
    process.stdout.read(len("Once upon a time") + 1)
    process.send_signal(signal.SIGINT)
    described = process.stderr.readline()
    turn = process.stderr.readline()
    assert b"parameters" in described
    assert turn.endswith(b" in the context\n")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"gpt2-jax: interrupted\n"


def test_what_was_begun_is_undone(start, tmp_path):
    # Many pieces, so that the signal comes while they are tokenised.
    (tmp_path / "text.txt").write_text("Once upon a time there was a king. " * 400_000)
    out = tmp_path / "out"
    process = start("prepare", str(tmp_path / "text.txt"), "--out", str(out), "--workers", "1")
    while not list(tmp_path.glob(".*")):  # the folder that would take the place of `out`
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.fixture
def outside():
    """Counts the interrupts that reach the handler outside of `unwinding`."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    yield came
    signal.signal(signal.SIGINT, before)


def test_within_unwinding_the_first_raises_and_the_second_does_not(outside):
    with pytest.raises(KeyboardInterrupt), unwinding():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            assert not outside
            signal.raise_signal(signal.SIGINT)
            assert len(outside) == 1


def test_after_unwinding_the_handler_is_what_it_was(outside):
    with unwinding():
        pass
    signal.raise_signal(signal.SIGINT)
    assert len(outside) == 1


def test_unwinding_leaves_ignored_interrupts_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with unwinding():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_unwinding_in_another_thread_changes_nothing():
    handlers = []

    def run():
        with unwinding():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
