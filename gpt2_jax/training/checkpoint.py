"""The checkpoints of a run: its `TrainState`, and what else it needs to go on as if never stopped.

Knows states and folders; nothing of models or loops. `orbax-checkpoint` does the work: it writes in
the background, and a checkpoint that was not finished does not exist. A list of checksums is added
to each, as a byte that is wrong would become a number that is wrong.

On a mesh each process writes and reads its own parts, and what was saved on one mesh is restored on
any other. All methods but those of a reader are for every process of a program, at the same time.
"""

import contextlib
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.files import CheckpointError, local_path, read_json_object, some, write_json
from gpt2_jax.training.processes import LostProcessError, exchange, is_first
from gpt2_jax.training.step import TrainState

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
    from orbax.checkpoint.utils import TMP_DIR_SUFFIX
except ImportError as error:
    raise ImportError(
        f'Checkpoints need orbax-checkpoint: pip install "gpt2_jax[train]" ({error}).'
    ) from None


CHECKSUMS = "checksums.json"  # in the folder of each checkpoint: of each file of it
BLOCK = 2**20  # bytes read at a time


class DamagedError(CheckpointError):
    """A checkpoint of a run is not what was written; one of another step may be."""


class Checkpoints:
    """Checkpoints in a folder, by step, of which the latest `n_latest` and the best one stay.

    The best is the one of the least loss on the validation set. A context manager: leaving it waits
    for what is still being written. `is_reader` says that nothing will be saved, and that the other
    processes of the program do not take part.

    Raises:
      CheckpointError: the folder cannot be used; on leaving, what was being written could not be.
    """

    def __init__(self, folder: str | Path, *, n_latest: int = 2, is_reader: bool = False):
        # `reverse`: the least loss is the best. What was not measured is no candidate.
        best = BestN(
            get_metric_fn=_loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(n=n_latest), best]),
            # What a killed run left half written. A reader may be beside a run that is writing.
            cleanup_tmp_directories=not is_reader,
            # Of its parts, that is; the whole is not yet under its name.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            multiprocessing_options=alone if is_reader else ocp.options.MultiprocessingOptions(),
            # Which a reader has none of, and orbax refuses to make for a part of the processes.
            create=not is_reader,
        )
        self._is_shared = jax.process_count() > 1 and not is_reader
        self.folder = local_path(folder).resolve()  # orbax refuses relative paths
        if self.folder.exists() and not self.folder.is_dir():  # which orbax passes over
            raise CheckpointError(f"{self.folder}: expected a folder of checkpoints, got a file.")
        with self._naming("could not be opened"):
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "meta")
            )

    def save(self, state: TrainState, meta: dict[str, Any], *, loss: float | None = None) -> None:
        """Writes a state, and what goes with it, in the background.

        Args:
          state: is copied first, so that the next step may donate it.
          meta: anything that JSON can hold; comes back from `meta`.
          loss: on the validation set, if it was measured; the checkpoint of the least one is kept.

        Raises:
          CheckpointError: this one, or the one before, could not be written.
        """
        # Orbax would make it anew, without the rest of the run.
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: the folder is gone, nothing was saved.")
        # A copy on the device, which is fast; to the disk it goes while the next steps run.
        copied = jax.tree.map(jnp.copy, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(copied),
            meta=ocp.args.JsonSave(meta | {"loss": loss}),  # for `best`, of any later process
        )
        metrics = None if loss is None else {"loss": loss}  # by which orbax keeps the best
        # `force`: orbax has rules of its own for which steps are worth saving. The caller decides.
        with self._naming("could not be written"):
            self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, the earliest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the last step that can be restored."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the least loss; without any loss, the latest step."""
        return next(iter(self.best_first()), None)

    def best_first(self) -> list[int]:
        """Returns the steps whose losses can be read, the least loss first, and then the others.

        Those are in order of the steps, the latest first.
        """
        # Not orbax's `best_step`: without its option `best_fn`, that is the latest.
        losses: dict[int, float] = {}
        for step in self.steps():
            with contextlib.suppress(CheckpointError):  # a damaged one is none of the best
                loss = self.meta(step)["loss"]
                if loss is not None:
                    losses[step] = loss
        others = [step for step in reversed(self.steps()) if step not in losses]
        return sorted(losses, key=lambda step: losses[step]) + others

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of a step, and its `loss`.

        Raises:
          DamagedError: it is damaged.
        """
        self._check(step, "meta")
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with self._naming(f"{step}/meta could not be read", DamagedError):
            return self._manager.restore(step, args=items)["meta"] | {}  # `|`: an object it is

    def restore(self, like: TrainState, step: int) -> TrainState:
        """Returns the state of a step.

        Args:
          like: a state of the same shapes and dtypes, or their `jax.ShapeDtypeStruct`s. Its
            shardings say where each array goes; without, it is the first device.
          step: one of `steps()`.

        Raises:
          CheckpointError: there is no such checkpoint; it is damaged, or its shapes are others
            (`DamagedError`).
        """
        if step not in self.steps():
            got = self.steps() or "none"
            raise CheckpointError(
                f"{self.folder}: expected a checkpoint of step {step}, got {got}."
            )
        # Before orbax reads it: its threads report damages by tracebacks of their own.
        self._check(step, "state")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_placed, like)))
        with self._naming(f"the checkpoint of step {step} could not be read", DamagedError):
            restored = self._manager.restore(step, args=items)["state"]
        # Memory of its own, which a step that donates its state may take over.
        return jax.tree.map(jnp.copy, restored)

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint that is damaged out of the way; returns where it is."""
        place = self.folder / f"damaged-{step}"
        number = 1
        while place.exists():
            number += 1
            place = self.folder / f"damaged-{step}-{number}"
        if is_first():
            # Not deleted: it may be all that is left of a long run. Its name is no step's to orbax.
            (self.folder / str(step)).rename(place)
        if self._is_shared:
            exchange("")  # which waits for the first process
        # It remembers which steps there are, and this one is to be made anew.
        self._manager.reload()
        return place

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          CheckpointError: something could not be.
        """
        with self._naming("could not be written"):
            self._manager.wait_until_finished()

    def _add_checksums(self) -> None:
        """Adds the checksums to the checkpoint that is written, before orbax gives it its name."""
        for folder in self.folder.glob(f"*{TMP_DIR_SUFFIX}*"):
            checksums = {}
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    checksums[file.relative_to(folder).as_posix()] = _checksum(file)
            write_json(folder / CHECKSUMS, checksums)

    def _check(self, step: int, item: str) -> None:
        """Raises `DamagedError` unless the files of an item are those that were written."""
        folder = self.folder / str(step)
        # An earlier version has written none.
        if not (folder / CHECKSUMS).is_file():
            return
        damaged = []
        with self._naming("could not be read", DamagedError):
            checksums = read_json_object(folder / CHECKSUMS)
        names = sorted(name for name in checksums if name.startswith(f"{item}/"))
        # Each process reads some of the files, and tells the others what it found.
        mine = names[jax.process_index() :: jax.process_count()] if self._is_shared else names
        for name in mine:
            file = folder / name
            if not file.is_file() or _checksum(file) != checksums[name]:
                damaged.append(name)
        if self._is_shared:
            damaged = [name for text in exchange(json.dumps(damaged)) for name in json.loads(text)]
        if damaged:
            expected = "expected the files that were written"
            raise DamagedError(f"{folder}: {expected}, got another {some(damaged)}.")

    @contextlib.contextmanager
    def _naming(self, what: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
        """Turns whatever is raised in the body into a `CheckpointError` that names the folder.

        Of orbax's errors there is no list: those of its threads, of JSON and of tensorstore.
        """
        log = logging.getLogger("absl")  # where it tells of the same errors on the way
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            raise kind(f"{self.folder}: {what}: {reason}") from error
        finally:
            log.setLevel(level)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is still being written will never be whole: its other writer is gone.
        if kind is not None and issubclass(kind, LostProcessError):
            return
        with self._naming("could not be written"):
            self._manager.close()


def placed_shape(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns what an array is restored by: its shape, its dtype and where it is to lie."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns it of a leaf that may not say where it lies."""
    # Said even for one device, as the devices on which it was saved may not be there.
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return placed_shape(leaf, getattr(leaf, "sharding", None) or alone)


def _loss_of(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _checksum(file: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with file.open("rb") as opened:
        # In blocks: a checkpoint's files are as large as its model.
        while block := opened.read(BLOCK):
            value = zlib.crc32(block, value)
    return value
