"""The devices of a run: which they are, how they find each other, what lies on which.

Knows meshes, batches and params as arrays; nothing of recipes or of folders.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gpt2_jax.modules import Params
from gpt2_jax.sharding import AXES, batch_sharding, make_mesh
from gpt2_jax.training.processes import exchange, is_first, together

ReadRows = Callable[[int, int], np.ndarray]  # `(start, stop)` to rows of a batch


def read_mesh(mesh: Mesh | str | Mapping[str, int] | None) -> Mesh | None:
    """Returns the mesh that is meant; None for a single device.

    Raises:
      ValueError: it is none of ours, or a process has no device in it.
    """
    if mesh is None and jax.process_count() == 1:
        return None
    if mesh is None:
        mesh = {"data": jax.device_count()}
    if not isinstance(mesh, Mesh):
        mesh = make_mesh(mesh)
    unknown = [axis for axis in mesh.axis_names if axis not in AXES]
    if unknown:
        raise ValueError(f"`mesh` must have axes of {', '.join(AXES)}, got {unknown}.")
    there = {device.process_index for device in mesh.devices.flat}
    without = sorted(set(range(jax.process_count())) - there)
    if without:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(
            f"A mesh of {sizes} has devices of all {jax.process_count()} processes but {without}:"
            f" there are {jax.device_count()} devices."
        )
    # Its axes are the compiler's, as everywhere here, whatever they were made for.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def connect(mesh: Mesh | None) -> None:
    """Lets the devices of several processes find each other, along all axes of a mesh.

    On CPUs they give up after 30 seconds, and where each compiles at its own speed their first step
    may be further apart. Here all begin at once, and what is compiled is next to nothing.
    """
    if mesh is None or jax.process_count() == 1:
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(1, len(axes) + 1) for group in combinations(axes, n)]

    def sums(x: Array) -> list[Array]:
        return [jax.lax.psum(x, group) for group in groups]

    everywhere = PartitionSpec()
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    compiled = jax.jit(mapped).lower(np.float32(1)).compile()
    with together():
        exchange("")  # which waits for all to have compiled
        jax.block_until_ready(compiled(np.float32(1)))


def on_mesh(read: ReadRows, shape: tuple[int, ...], mesh: Mesh | None) -> Array | np.ndarray:
    """Returns a batch with its rows spread over a mesh; each process reads those of its devices.

    Without a mesh the whole is read, and stays on the host.
    """
    n_rows = shape[0]
    if mesh is None:
        return read(0, n_rows)

    def read_part(index: Any) -> np.ndarray:  # slices of rows and columns
        start, stop, _ = index[0].indices(n_rows)
        return read(start, stop)

    return jax.make_array_from_callback(shape, batch_sharding(mesh), read_part)


def gathered(params: Params, mesh: Mesh | None) -> Params | None:
    """Returns params whole on the first process's first device, and None in the other processes.

    All processes take part in this, so that the first can go on with them alone.
    """
    if mesh is None:
        return params
    whole = NamedSharding(mesh, PartitionSpec())

    # One after the other: no device but the first ever holds more than one of them.
    def gather(leaf: Array) -> Array | None:
        everywhere = jax.device_put(leaf, whole)
        return everywhere.addressable_data(0) if is_first() else None

    gathered = jax.tree.map(gather, params)
    return gathered if is_first() else None
