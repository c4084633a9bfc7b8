"""The checkpoints of a training run: the whole `TrainState`, and what else a run needs to go on as if never stopped.

Knows states and folders; nothing of models or loops. `orbax-checkpoint` does the work: it writes in the background,
and a checkpoint that was not finished does not exist.
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
    """Checkpoints in a folder, by step, of which the latest `keep` and the one of the least loss stay.

    A context manager: leaving it waits for what is still being written.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        best = BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(n=keep), best]),
            cleanup_tmp_directories=True,
        )
        self.folder = Path(folder).expanduser().resolve()
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "meta")
        )

    def save(self, state: TrainState, meta: dict[str, Any], *, loss: float | None = None) -> None:
        """Writes `state` and `meta` (anything JSON can hold) in the background.

        Args:
          state: is copied first, so that the next step may donate it.
          meta: comes back from `restore`.
          loss: on the validation set, if it was measured; the checkpoint of the least loss is kept.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)),
            meta=ocp.args.JsonSave(meta | {"loss": loss}),
        )
        self._manager.save(
            int(state.step),
            args=items,
            metrics=None if loss is None else {"loss": loss},
            force=True,
        )

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, the earliest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the last step that can be restored."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step of the least loss; without any loss, the latest step."""
        losses = {step: self.meta(step)["loss"] for step in self.steps()}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=measured.get) if measured else self.latest()

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of a step, and its `loss`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, like: TrainState, step: int) -> TrainState:
        """Returns the state of a step.

        Args:
          like: a state of the same shapes and dtypes, or their `jax.ShapeDtypeStruct`s.
          step: one of `steps()`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or its shapes are others.
        """
        if step not in self.steps():
            raise CheckpointError(
                f"{self.folder}: expected a checkpoint of step {step}, got {self.steps() or 'none'}."
            )
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            restored = self._manager.restore(step, args=items)["state"]
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be read: {error}"
            ) from error
        return jax.tree.map(jnp.copy, restored)  # memory of its own, which a step may take over

    def wait(self) -> None:
        """Returns when everything is written."""
        self._manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]
