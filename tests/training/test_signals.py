"""Requests to stop: remembered, not obeyed at once; the second Ctrl-C is."""

import os
import signal
import threading

import pytest

from gpt2_jax.training.signals import stop_requests


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_of_either_is_the_callers(first, second):
    received = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: received.append(number))
        with stop_requests() as stop_requested:
            os.kill(os.getpid(), first)
            assert stop_requested() and not received
            os.kill(os.getpid(), second)
            assert received == [second]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_is_remembered_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_requests() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_interrupts():
    # Python's own handler, which it does not set where a shell runs it in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with stop_requests():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_is_never_asked_to_stop():
    answers = []

    def ask():
        with stop_requests() as stop_requested:
            answers.append(stop_requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]
