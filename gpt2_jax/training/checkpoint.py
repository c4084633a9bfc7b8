"""The checkpoints of a run: its `TrainState`, and what else it needs to go on as if never stopped.

Knows states and folders; nothing of models or loops. `orbax-checkpoint` does the work: it writes in
the background, and a checkpoint that was not finished does not exist.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.files import CheckpointError
from gpt2_jax.training.step import TrainState

try:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
except ImportError as error:
    raise ImportError(
        f'Checkpoints need orbax-checkpoint: pip install "gpt2_jax[train]" ({error}).'
    ) from None


class Checkpoints:
    """Checkpoints in a folder, by step, of which the latest `n_latest` and the best one stay.

    The best is the one of the least loss on the validation set. A context manager: leaving it waits
    for what is still being written.
    """

    def __init__(self, folder: str | Path, *, n_latest: int = 2):
        # `reverse`: the least loss is the best. What was not measured is no candidate.
        best = BestN(
            get_metric_fn=_loss_of, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(n=n_latest), best]),
            cleanup_tmp_directories=True,  # what a killed run left half written
        )
        self.folder = Path(folder).expanduser().resolve()  # orbax refuses relative paths
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "meta")
        )

    def save(self, state: TrainState, meta: dict[str, Any], *, loss: float | None = None) -> None:
        """Writes a state, and what goes with it, in the background.

        Args:
          state: is copied first, so that the next step may donate it.
          meta: anything that JSON can hold; comes back from `meta`.
          loss: on the validation set, if it was measured; the checkpoint of the least one is kept.
        """
        # A copy on the device, which is fast; to the disk it goes while the next steps run.
        copied = jax.tree.map(jnp.copy, state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(copied),
            meta=ocp.args.JsonSave(meta | {"loss": loss}),  # for `best`, of any later process
        )
        metrics = None if loss is None else {"loss": loss}  # by which orbax keeps the best
        # `force`: orbax has rules of its own for which steps are worth saving. The caller decides.
        self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, the earliest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the last step that can be restored."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the least loss; without any loss, the latest step."""
        # Not orbax's `best_step`: without its option `best_fn`, that is the latest.
        losses: dict[int, float] = {}
        for step in self.steps():
            loss = self.meta(step)["loss"]
            if loss is not None:
                losses[step] = loss
        if not losses:
            return self.latest()
        return min(losses, key=lambda step: losses[step])

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of a step, and its `loss`."""
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["meta"]

    def restore(self, like: TrainState, step: int) -> TrainState:
        """Returns the state of a step.

        Args:
          like: a state of the same shapes and dtypes, or their `jax.ShapeDtypeStruct`s.
          step: one of `steps()`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or its shapes are others.
        """
        if step not in self.steps():
            got = self.steps() or "none"
            raise CheckpointError(
                f"{self.folder}: expected a checkpoint of step {step}, got {got}."
            )
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        try:
            restored = self._manager.restore(step, args=items)["state"]
        except (ValueError, OSError) as error:  # other shapes; damaged or missing files
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be read: {error}"
            ) from error
        # Memory of its own, which a step that donates its state may take over.
        return jax.tree.map(jnp.copy, restored)

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def _loss_of(metrics: dict[str, float]) -> float:
    return metrics["loss"]
