"""What a run says of itself: a file of metrics, a bar on the terminal, a picture of its curves.

Knows numbers and files; nothing of models or of how a run goes on. `metrics.jsonl` holds a line for
each logged step (`step, loss, grad_norm, learning_rate, tokens_per_second`) and one for each
evaluation (`step, val_loss`, and where they are known `bits_per_byte` and `sample`).
"""

import contextlib
import json
import math
import operator
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from gpt2_jax.files import CheckpointError, check_content, replacing
from gpt2_jax.training.losses import Metrics

# `(step, values)`: what one line of `metrics.jsonl` holds by name, such as `loss` or `val_loss`.
LogFn = Callable[[int, dict[str, Any]], None]


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the step and the batch. Its checkpoints stay."""


class Pending(NamedTuple):
    """A step that was started, and whose numbers the device may still be computing."""

    step: int  # from 1
    cursor: int  # of its batch
    metrics: Metrics


class Evaluation(NamedTuple):
    """What was measured on the validation set after a step."""

    step: int
    val_loss: float  # nats per token
    bytes_per_token: float | None  # of the validation text, where it is known
    sample: str | None  # a text that the model made up


class Outlets(NamedTuple):
    """Where the metrics of a run go; of a run's second process, nowhere."""

    file: Path | None  # `metrics.jsonl`, to which lines are added
    progress: bool = False  # shows a bar, on standard error
    callback: LogFn | None = None


class MetricsLog:
    """The metrics of a run as they come: lines in a file, a bar on the terminal.

    It reads a step's numbers while the next one runs: to ask for them at once would leave the
    device without work. A context manager; leaving it closes file and bar.

    Args:
      outlets: where they go.
      first_step: how many steps were made before.
      last_step: the run's last.
      log_every: steps between lines.
      tokens_per_step: how many ids a step predicts.
      learning_rate: as a function of the updates made before.
    """

    val_loss: float | None = None  # the last that was measured
    callback_error: Exception | None = None  # what the callback raised, which ended its calls

    def __init__(
        self,
        outlets: Outlets,
        *,
        first_step: int,
        last_step: int,
        log_every: int,
        tokens_per_step: int,
        learning_rate: Callable[[int], Any],
    ):
        self._path = outlets.file
        # Without a buffer: whoever watches the file, and a run that is killed, has all of it.
        self._file = outlets.file.open("ab", buffering=0) if outlets.file else None
        self._callback = outlets.callback
        self._bar = tqdm(
            total=last_step,
            initial=first_step,  # a resumed run's bar goes on where it was
            unit="step",
            disable=not outlets.progress,
            dynamic_ncols=True,
        )
        self._log_every = log_every
        self._tokens_per_step = tokens_per_step
        self._learning_rate = learning_rate
        self._pending: Pending | None = None
        self._restart_clock()

    def started(self, pending: Pending) -> None:
        """Takes a step that was started, and settles the one before."""
        self.settle()
        self._pending = pending

    def settle(self) -> None:
        """Waits for the last step and logs it.

        Raises:
          TrainingError: its loss or its gradient is not finite.
        """
        if self._pending is None:
            return
        pending = self._pending
        self._pending = None  # before anything is raised: a bad step is reported once
        loss = float(pending.metrics["loss"])
        grad_norm = float(pending.metrics["grad_norm"])
        _check_finite(pending, loss, grad_norm)
        self._bar.update()  # now, not when the step was started: the bar shows what is done
        self._n_timed_steps += 1
        if pending.step % self._log_every == 0:
            self._write_step(pending.step, loss, grad_norm)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Takes what was measured on the validation set after a step."""
        self.val_loss = evaluation.val_loss
        line: dict[str, Any] = {"step": evaluation.step, "val_loss": evaluation.val_loss}
        text = f"step {evaluation.step}: validation loss {evaluation.val_loss:.4f} nats per token"
        if evaluation.bytes_per_token:
            nats_per_byte = evaluation.val_loss / evaluation.bytes_per_token
            line["bits_per_byte"] = nats_per_byte / math.log(2)
            text += f", {line['bits_per_byte']:.4f} bits per byte"
        if evaluation.sample is not None:
            line["sample"] = evaluation.sample
            text += f"\n{evaluation.sample}\n"
        self._write(line)
        if self._file is not None:
            self._bar.write(text, file=sys.stderr)  # above the bar, which a print would break
        self._restart_clock()  # the time that evaluating takes is not the steps'

    def _write_step(self, step: int, loss: float, grad_norm: float) -> None:
        """Writes a step's line, with the speed of the steps since the last one."""
        n_tokens = self._n_timed_steps * self._tokens_per_step
        tokens_per_second = n_tokens / (time.perf_counter() - self._clock_start)
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self._learning_rate(step - 1)),  # schedules count from 0
            "tokens_per_second": tokens_per_second,
        }
        self._write(line)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
        self._restart_clock()

    def _write(self, line: dict[str, Any]) -> None:
        """Adds a line to the file, and tells the callback of it."""
        self._write_to_file(line)
        if self._callback is None or self.callback_error is not None:
            return
        values = {name: value for name, value in line.items() if name != "step"}
        try:
            self._callback(line["step"], values)
        # Whatever it is: the run's owner saves a checkpoint first, and raises it then.
        except Exception as error:
            self.callback_error = error

    def _write_to_file(self, line: dict[str, Any]) -> None:
        if self._file is None or self._path is None:
            return
        if not self._path.exists():  # what is written to a deleted file is nowhere
            raise TrainingError(f"{self._path} is gone: the run cannot go on without its folder.")
        try:
            self._file.write(f"{json.dumps(line)}\n".encode())
        except OSError as error:  # a full disk, which does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _restart_clock(self) -> None:
        self._n_timed_steps = 0
        self._clock_start = time.perf_counter()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics; a last one that was cut off is left out.

    Raises:
      CheckpointError: the file holds something else; the message says in which line.
    """
    if not file.exists():
        return []
    check_content(file)
    # What a killed run wrote half has no end. `splitlines` would part a line at other characters.
    *whole, torn = file.read_bytes().split(b"\n")
    lines = [_read_line(line, f"{file}, line {n}") for n, line in enumerate(whole, start=1)]
    with contextlib.suppress(CheckpointError):
        lines.append(_read_line(torn, str(file)))
    return lines


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    """Returns what a line of metrics holds; raises `CheckpointError` if it is none."""
    expected = "a line of metrics with its `step`"
    try:
        values = json.loads(line)
        operator.index(values["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected {expected}, got {line[:60]!r}.") from error
    return values


def forget_after(file: Path, step: int) -> None:
    """Takes back the metrics of later steps, which a resumed run will make again."""
    # Through `read_metrics`: a line that was cut off would spoil the one that is added to it.
    kept = [line for line in read_metrics(file) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    with replacing(file, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plot_curves(metrics: Path, target: Path) -> None:
    """Draws the losses of a run's metrics as a PNG, where matplotlib is installed."""
    try:
        # Not pyplot, which looks for a screen and keeps its figures.
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_metrics(metrics)
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    _draw(axes, lines, "loss", label="training batch", marker=None)
    _draw(axes, lines, "val_loss", label="validation set", marker="o")  # few points: each is seen
    if axes.lines:  # a run that was stopped at its start has none, and matplotlib would warn
        axes.legend()
    axes.grid(alpha=0.3)
    with replacing(target, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw(
    axes: Any, lines: list[dict[str, Any]], name: str, *, label: str, marker: str | None
) -> None:
    """Draws one curve, of the lines that have a value of that name."""
    points = [line for line in lines if name in line]
    if not points:
        return
    steps = [point["step"] for point in points]
    values = [point[name] for point in points]
    axes.plot(steps, values, label=label, marker=marker, markersize=3)


def _check_finite(pending: Pending, loss: float, grad_norm: float) -> None:
    """Raises `TrainingError` unless both are finite numbers."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise TrainingError(
        f"Step {pending.step}, batch {pending.cursor}: the loss is {loss} and the gradient's norm "
        f"{grad_norm}, expected finite numbers. The checkpoints are as they were: a smaller "
        "learning rate may help, or a look at the batch."
    )
