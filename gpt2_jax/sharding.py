"""Where arrays lie on a mesh of devices: rules over the names of params, and one door for placing.

Knows names and shapes; nothing of the forward pass. The partitioning itself is XLA's.

A mesh has up to three axes, of which any may be left out:

| axis | what lies along it |
|---|---|
| `data` | rows of a batch |
| `fsdp` | rows of a batch, and parts of the params, gathered as they are used (ZeRO) |
| `tensor` | parts of the params and of what they compute (arXiv:1909.08053, Megatron) |
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # what the rows of a batch are spread over

Rules = Sequence[tuple[str, P]]  # (pattern of a name, spec): the first whose pattern is found

# Megatron's: a pair of products needs one sum over devices. The first is cut by columns, which are
# heads or neurons, the second by rows. What no rule names is on all devices.
RULES: Rules = (
    (r"attn\.c_attn\.kernel$", P("fsdp", "tensor")),
    (r"attn\.c_attn\.bias$", P("tensor")),
    (r"attn\.c_proj\.kernel$", P("tensor", "fsdp")),
    (r"mlp\.c_fc\.kernel$", P("fsdp", "tensor")),
    (r"mlp\.c_fc\.bias$", P("tensor")),
    (r"mlp\.c_proj\.kernel$", P("tensor", "fsdp")),
    (r"(wte|lm_head)\.embedding$", P("tensor", "fsdp")),
    (r"wpe\.embedding$", P(None, "fsdp")),
    (r"", P()),
)


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of named axes, such as "data=2,fsdp=2,tensor=2" or a dict of these.

    Its axes are automatic: XLA decides how what is computed lies.

    Args:
      sizes: devices along each of `AXES`; those left out have one.
      devices: as many as the product; by default the first of all processes'.

    Raises:
      ValueError: an axis is none of `AXES` or is named twice, a size is no whole number from 1 on,
        or there are fewer devices.
    """
    counts = _read_sizes(sizes) if isinstance(sizes, str) else dict(sizes)
    for axis, size in counts.items():
        if axis not in AXES:
            raise ValueError(f"`mesh` must have axes of {', '.join(AXES)}, got {axis!r}.")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`mesh` must have whole numbers from 1 on, got {axis}={size!r}.")
    shape = tuple(counts.get(axis, 1) for axis in AXES)
    needed = math.prod(shape)
    there = jax.devices() if devices is None else list(devices)
    if needed > len(there):
        axes = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"A mesh of {axes} needs {needed} devices, there are {len(there)}.")
    automatic = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=automatic, devices=there[:needed])


def _read_sizes(text: str) -> dict[str, int]:
    """Returns the sizes of a mesh by its axes."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis in sizes:
            raise ValueError(f"`mesh` must name each axis once, got {axis!r} twice.")
        if not size.strip().isdecimal():
            raise ValueError(f"`mesh` must be such as data=2,tensor=4, got {part.strip()!r}.")
        sizes[axis] = int(size)
    return sizes


def shardings(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Returns where each leaf of a tree lies, `NamedSharding`s in the tree's structure.

    Args:
      tree: params, or what holds trees of their names, such as a `TrainState` with an optimizer's
        moments; of arrays or of `jax.ShapeDtypeStruct`s.
      mesh: the devices, as `make_mesh` returns them. Axes that it lacks are left out of a spec.
      rules: pairs of a pattern and a spec; `RULES` by default. A leaf's name is its path, as in
        "h.3.attn.c_attn.kernel"; the first rule whose pattern is found in it (`re.search`) counts.
        A leaf without axes, or that no rule names, is on all devices.

    Raises:
      ValueError: an axis of a leaf does not divide by the devices that it is to lie on.
    """
    rules = RULES if rules is None else rules

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = keystr(path, simple=True, separator=".")
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        # A scalar of an optimizer may stand under a param's name.
        spec = _present(spec, mesh) if len(spec) <= len(leaf.shape) else P()
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(of_leaf, tree)


def shard(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Returns the tree with each leaf where `shardings` says. Takes and checks its arguments."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a batch lies, whose first axis are rows."""
    return NamedSharding(mesh, _present(P(BATCH_AXES), mesh))


def n_batch_shards(mesh: Mesh) -> int:
    """Returns into how many parts a batch is cut, of which its rows must be a multiple."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns a batch, a pytree of arrays, with its rows spread over the mesh.

    In a program of several processes each gives its own rows, those of its devices, in order.

    Raises:
      ValueError: the rows do not divide.
    """
    sharding = batch_sharding(mesh)
    n_shards = n_batch_shards(mesh)

    def place(rows: Any) -> jax.Array:
        n_rows = len(rows) * jax.process_count()
        if n_rows % n_shards:
            raise ValueError(f"A batch must have a multiple of {n_shards} rows, got {n_rows}.")
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, batch)


def _present(spec: P, mesh: Mesh) -> P:
    """Returns a spec without the axes that a mesh lacks, or has one device along.

    In JAX's own form: a program whose results come back in another would be compiled twice.
    """
    parts = []
    for part in spec:
        axes = (part,) if isinstance(part, str) else tuple(part or ())
        there = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        parts.append(there if len(there) > 1 else (there[0] if there else None))
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def _check_divides(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    """Raises `ValueError` unless each axis of an array divides by its devices."""
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        axes = (part,) if isinstance(part, str) else tuple(part or ())
        n_devices = math.prod(mesh.shape[mesh_axis] for mesh_axis in axes)
        if size % n_devices:
            over = " and ".join(axes)
            raise ValueError(
                f"{name} {list(shape)}: axis {axis}, of {size}, must divide by the {n_devices}"
                f" devices along {over}."
            )
