"""Several processes that train one model: how they join, what they agree on, how they end.

Knows texts and the numbers of steps; nothing of models or of runs. They speak through the store of
keys and values that JAX's distributed runtime keeps in the first process: no device takes part, so
that they can agree before anything is compiled. A program of one process agrees with itself.
"""

import contextlib
import hashlib
import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # the store has no public door; orbax takes this one, too

HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead; JAX's own default is 100
PATIENCE_SECONDS = 3600.0  # of who waits for others that read data or weights
FAREWELL_SECONDS = 10.0  # of who has failed, before it leaves those that do not answer
# What the error of a step names where another process is gone: that which connects them.
LOST = re.compile(r"Gloo|NCCL|RCCL|[Cc]oordination ?[Ss]ervice|heartbeat")

# Of what is told. Every process tells the same, in the same order, and so counts alike.
_numbers = itertools.count()


class ProcessError(ValueError):
    """Processes that cannot work together; the message has the values of both sides."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, and no step can be made without it."""


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a program, before JAX is used for anything else.

    `jax.distributed.initialize`, with shorter heartbeats. Under Slurm, Open MPI, Kubernetes and on
    TPU pods it finds by itself what is not given.

    Args:
      coordinator: address and port of the first process, the same in all.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: a number is out of range, or nothing says what was not given.
    """
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {num_processes}.")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        expected = f"[0, {num_processes})" if num_processes else "0 or more"
        raise ValueError(f"`process_id` must be in {expected}, got {process_id}.")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"`coordinator` must be such as 10.0.0.1:1234, got {coordinator!r}.")
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise ProcessError(f"The processes could not join: {_first_line(error)}") from error
    # JAX keeps SIGTERM for itself from here on; it is to end a process that is not yet training.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def leave() -> None:
    """Ends with all other processes that come here, so that none takes this for a failure.

    Where some do not come, it returns after `FAREWELL_SECONDS`.
    """
    if distributed.global_state.client is None:
        return
    with contextlib.suppress(ProcessError, LostProcessError, jax.errors.JaxRuntimeError):
        exchange("", FAREWELL_SECONDS)
        jax.distributed.shutdown()


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def exchange(text: str, seconds: float = PATIENCE_SECONDS) -> list[str]:
    """Returns the texts of all processes, in their order, once each has given its own.

    Raises:
      ProcessError: some have given none in time.
      LostProcessError: the first process is gone.
    """
    count = jax.process_count()
    if count == 1:
        return [text]
    place = f"gpt2_jax/{next(_numbers)}/"
    _set(f"{place}{jax.process_index()}", json.dumps(text))
    end = time.monotonic() + seconds
    # Not one of the runtime's barriers, in which no signal would be answered.
    while len(texts := _texts_under(place)) < count:
        if time.monotonic() > end:
            missing = ", ".join(str(number) for number in range(count) if number not in texts)
            raise ProcessError(f"Of {count} processes, {missing} did not come in {seconds:.0f} s.")
        time.sleep(0.02)
    return [json.loads(texts[number]) for number in range(count)]


@contextlib.contextmanager
def together(seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Ends when every process has left the body; raises in all where it raised in one.

    Args:
      seconds: how long one that has failed waits for the others to hear of it.

    Raises:
      ProcessError: the body raised in another process.
      LostProcessError: another process is gone.
    """
    try:
        yield
    except LostProcessError:
        raise
    except Exception as error:
        if jax.process_count() > 1 and LOST.search(str(error)):
            # At once: the runtime ends this process, too, and with many lines.
            raise _lost(error) from error
        # Its own error is the one to raise, even where nobody hears of it.
        with contextlib.suppress(ProcessError, LostProcessError):
            exchange(_first_line(error) or type(error).__name__, seconds)
        raise
    for number, message in enumerate(exchange("")):
        if message:
            raise ProcessError(f"Process {number}: {message}")


def agree(values: Mapping[str, Any]) -> None:
    """Compares what must be the same in all processes.

    Args:
      values: by names that say what they are; anything that JSON can hold.

    Raises:
      ProcessError: some differ; the message lists them, with the values of both sides.
    """
    text = json.dumps(values, sort_keys=True)
    # Digests first: in a large program, all values of all processes would be a lot to send.
    digests = exchange(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyone = [json.loads(theirs) for theirs in exchange(text)]
    differences = []
    for name in sorted({name for theirs in everyone for name in theirs}):
        first = everyone[0].get(name)
        for number, theirs in enumerate(everyone):
            if theirs.get(name) != first:
                got = f"{first!r} in process 0, {theirs.get(name)!r} in process {number}"
                differences.append(f"{name}: {got}")
                break  # one of those that differ is enough to look for
    listed = "\n  ".join(differences)
    raise ProcessError(f"The processes must be started alike:\n  {listed}")


class StopAgreement:
    """Whether to stop after a step, answered alike in every process: between them, none goes on.

    A step is made by all processes at once, and each waits for the one before it; so none is
    further than one step ahead of another. Who is asked to stop names the second step from here,
    which nobody has passed, and which all come to with this in the store.

    Args:
      requested: says whether this process was asked to.
    """

    def __init__(self, requested: Callable[[], bool]):
        self._requested = requested
        self._place = f"gpt2_jax/{next(_numbers)}/stop/"
        self._has_told = False

    def __call__(self, step: int) -> bool:
        """Returns whether all stop after `step`, the number of a step that was started."""
        if jax.process_count() == 1:
            return self._requested()
        if self._requested() and not self._has_told:
            self._has_told = True
            _set(f"{self._place}{jax.process_index()}", str(step + 2))
        # One short request to the first process: a fraction of a millisecond.
        told = _texts_under(self._place)
        # The least, if several were asked: all see that one in time, whatever they see of others.
        return bool(told) and step >= min(int(text) for text in told.values())


def _set(key: str, text: str) -> None:
    """Puts a text into the store, under a key of this process."""
    with _naming_lost():
        _client().key_value_set(key, text)


def _texts_under(place: str) -> dict[int, str]:
    """Returns the texts that are in the store so far, by the processes that put them there."""
    with _naming_lost():
        pairs = _client().key_value_dir_get(place)
    return {int(key.rsplit("/", 1)[1]): text for key, text in pairs}


@contextlib.contextmanager
def _naming_lost() -> Iterator[None]:
    """Turns an error of the store into one that says what it means: its keeper is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from error


def _lost(error: Exception) -> LostProcessError:
    return LostProcessError(
        "Another process of this run has ended, or does not answer: its own messages say why."
        f" Start all of them again, and resume. ({_first_line(error)})"
    )


def _client() -> Any:
    """Returns the door to the store."""
    client = distributed.global_state.client
    if client is None:
        raise ProcessError(
            f"There are {jax.process_count()} processes: `jax.distributed.initialize` must come"
            " first in each, or the options of the command that join them."
        )
    return client


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
