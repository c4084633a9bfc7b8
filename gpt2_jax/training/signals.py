"""Ctrl-C and SIGTERM as a question that a loop asks between its steps. Knows no training."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came meanwhile.

    A second Ctrl-C interrupts at once, as it does elsewhere. Outside of the main thread, the only
    one in which Python handles signals, the answer is always no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    received: list[int] = []  # a list, as the handler must change it, not bind a name of its own

    def remember(signal_number: int, frame: FrameType | None) -> None:
        del frame
        # Nothing else: a handler may run between any two instructions, in the middle of a write.
        received.append(signal_number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous_handlers = {}
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        previous_handlers[signal_number] = signal.signal(signal_number, remember)
    try:
        yield lambda: bool(received)
    finally:
        # The caller's own handlers: whoever calls `fit` from a program keeps them.
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)
