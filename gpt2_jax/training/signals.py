"""Ctrl-C and SIGTERM as a question that a loop asks between its steps. Knows no training."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came meanwhile.

    A second of either is the caller's own to handle: in Python as it starts, it interrupts or ends
    the process at once.
    Outside of the main thread, the only one in which Python handles signals, the answer is always
    no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    # Before any handler is set: the first signal may come before the next line.
    previous_handlers = {
        signal_number: signal.getsignal(signal_number)
        for signal_number in (signal.SIGINT, signal.SIGTERM)
    }
    received: list[int] = []  # a list, as the handler must change it, not bind a name of its own

    def remember(signal_number: int, frame: FrameType | None) -> None:
        del frame
        # Nothing else: a handler may run between any two instructions, in the middle of a write.
        received.append(signal_number)
        # The caller's, not Python's: a command ends at once, where an exception in the middle of
        # orbax's threads would end in their tracebacks.
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    for signal_number in previous_handlers:
        signal.signal(signal_number, remember)
    try:
        yield lambda: bool(received)
    finally:
        # The caller's own handlers: whoever calls `fit` from a program keeps them.
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)
