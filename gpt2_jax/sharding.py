"""Where arrays lie on a mesh of devices: rules over the names of params, and one door for placing.

Knows names and shapes; nothing of the forward pass. The partitioning itself is XLA's; `constrain`
is how a program tells it where an activation lies.

A program finds the mesh in its arrays: what lies on one carries it, inside `jax.jit` too, so that
no `jax.set_mesh` is needed. Inside, all axes are automatic; `automatic` lets a function take arrays
of explicit ones.

A mesh has up to three axes, of which any may be left out:

| axis | what lies along it |
|---|---|
| `data` | rows of a batch |
| `fsdp` | rows of a batch, and parts of the params, gathered as they are used (ZeRO) |
| `tensor` | parts of the params and of what they compute (arXiv:1909.08053, Megatron) |
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from gpt2_jax.stack import is_in_stack

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # what the rows of a batch are spread over
TENSOR = "tensor"  # what heads, neurons and the vocabulary are spread over

# (pattern of a name, spec): the first whose pattern is found. Of several specs, the first by which
# the leaf divides.
Rules = Sequence[tuple[str, P | Sequence[P]]]
Function = TypeVar("Function", bound=Callable[..., Any])

# Megatron's: a pair of products needs one sum over devices. The first is cut by columns, which are
# heads or neurons, the second by rows. What no rule names is on all devices.
RULES: Rules = (
    # By rows: columns are the queries, keys and values of all heads, so that a cut of them would
    # put a head's three parts on three devices. `Attention` has the heads cut all the same.
    (r"attn\.c_attn\.kernel$", P(("tensor", "fsdp"))),
    (r"attn\.c_proj\.kernel$", P("tensor", "fsdp")),
    (r"mlp\.c_fc\.kernel$", P("fsdp", "tensor")),
    (r"mlp\.c_fc\.bias$", P("tensor")),
    (r"mlp\.c_proj\.kernel$", P("tensor", "fsdp")),
    # By width where the vocabulary does not divide: 50,257 tokens divide by 29 and 1,733 alone.
    (
        r"(wte|lm_head)\.embedding(\.values)?$",
        (P("tensor", "fsdp"), P(None, ("tensor", "fsdp"))),
    ),
    # Kernels of 8 bits lie as `[O, I]`, with a scale for each output: see `quantised.Quantised`.
    (r"attn\.c_attn\.kernel\.values$", P(None, ("tensor", "fsdp"))),
    (r"c_proj\.kernel\.values$", P("fsdp", "tensor")),
    (r"mlp\.c_fc\.kernel\.values$", P("tensor", "fsdp")),
    (r"mlp\.c_fc\.kernel\.scale$", P("tensor")),
    (r"(wte|lm_head)\.embedding\.scale$", (P("tensor"), P())),
    (r"wpe\.embedding$", P(None, "fsdp")),
    (r"", P()),
)


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of named axes, such as "data=2,fsdp=2,tensor=2" or a dict of these.

    Its axes are automatic: XLA decides how what is computed lies.

    Args:
      sizes: devices along each of `AXES`; those left out have one.
      devices: as many as the product; by default the first of all processes'.

    Raises:
      ValueError: an axis is none of `AXES` or is named twice, a size is no whole number from 1 on,
        or there are fewer devices.

    Examples:
      >>> dict(gpt2_jax.sharding.make_mesh("data=1").shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
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
      rules: pairs of a pattern and a spec, or of a pattern and several specs, of which the first
        counts by which the leaf divides; `RULES` by default. A leaf's name is its path, as in
        "h.3.attn.c_attn.kernel"; the first rule whose pattern is found in it (`re.search`) counts.
        A leaf without axes, or that no rule names, is on all devices.

    Raises:
      ValueError: an axis of a leaf does not divide by the devices that it is to lie on; or a rule
        of the caller's finds no leaf, or names an axis twice or one that no mesh here has.

    Examples:
      >>> mesh = gpt2_jax.sharding.make_mesh("tensor=1")
      >>> places = gpt2_jax.sharding.shardings(params, mesh)
      >>> jax.tree.structure(places) == jax.tree.structure(params)
      True
    """
    if rules is None:
        rules = RULES
    else:
        _check_rules(rules, [_name(path) for path, _ in jax.tree.leaves_with_path(tree)], mesh)

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        return leaf_sharding(_name(path), leaf.shape, mesh, rules)

    return jax.tree.map_with_path(of_leaf, tree)


def _check_rules(rules: Rules, names: list[str], mesh: Mesh) -> None:
    """Raises `ValueError` for a rule of a caller's that cannot be meant."""
    for pattern, specs in rules:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"`rules` must find leaves of the tree, {pattern!r} finds none of {len(names)}:"
                f" names are such as {', '.join(names[:4])}."
            )
        for spec in (specs,) if isinstance(specs, P) else specs:
            axes = [axis for part in spec for axis in _axes_of(part)]
            unknown = [axis for axis in axes if axis not in (*mesh.axis_names, *AXES)]
            if unknown:
                there = ", ".join(mesh.axis_names)
                raise ValueError(f"`rules` of axes {there} cannot spread {pattern!r} by {spec}.")
            if len(set(axes)) < len(axes):
                raise ValueError(f"`rules` must name each axis once, {pattern!r} has {spec}.")


def leaf_sharding(
    name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules | None = None
) -> NamedSharding:
    """Returns where one leaf lies, by its name and shape: see `shardings`."""
    rules = RULES if rules is None else rules
    found = next((specs for pattern, specs in rules if re.search(pattern, name)), P())
    choices = (found,) if isinstance(found, P) else tuple(found)
    # A stack of layers has one axis more, in front, which a scan goes along.
    if is_in_stack(name):
        choices = tuple(P(None, *spec) for spec in choices)
    # A scalar of an optimizer may stand under a param's name.
    specs = [_present(spec, mesh) if len(spec) <= len(shape) else P() for spec in choices]
    fitting = [spec for spec in specs if _misfit(shape, spec, mesh) is None]
    if not fitting:
        raise ValueError(f"{name} {list(shape)}: {_misfit(shape, specs[0], mesh)}.")
    return NamedSharding(mesh, fitting[0])


def _name(path: Any) -> str:
    """Returns a leaf's path as rules know it."""
    return keystr(path, simple=True, separator=".")


def shard(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Returns the tree with each leaf where `shardings` says. Takes and checks its arguments.

    Examples:
      >>> mesh = gpt2_jax.sharding.make_mesh("fsdp=1")
      >>> placed = gpt2_jax.sharding.shard(params, mesh)
      >>> placed["wte"]["embedding"].sharding.mesh == mesh
      True
    """
    return jax.device_put(tree, shardings(tree, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns where a batch lies, whose first axis are rows."""
    return NamedSharding(mesh, _present(P(BATCH_AXES), mesh))


def n_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts a batch is cut, of which its rows must be a multiple."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns a batch, a pytree of arrays, with its rows spread over the mesh.

    In a program of several processes each gives its own rows, those of its devices, in order.

    Raises:
      ValueError: the rows do not divide.

    Examples:
      >>> mesh = gpt2_jax.sharding.make_mesh("data=1")
      >>> gpt2_jax.sharding.shard_batch(ids, mesh).shape
      (1, 4)
    """
    sharding = batch_sharding(mesh)
    n_shards = n_batch_shards(mesh)

    def place(rows: Any) -> jax.Array:
        n_rows = len(rows) * jax.process_count()
        if n_rows % n_shards:
            raise ValueError(f"A batch must have a multiple of {n_shards} rows, got {n_rows}.")
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, batch)


# Inside programs.


def mesh_of(x: Any) -> AbstractMesh:
    """Returns the mesh that an array lies on, traced or not; an empty one for a single device."""
    return jax.typeof(x).sharding.mesh


def n_parts(x: Any, axis: str, size: int) -> int:
    """Returns in how many parts `size` things lie along an axis of an array's mesh; 1 where they
    do not divide."""
    n_devices = mesh_of(x).shape.get(axis, 1)
    return 1 if size % n_devices else n_devices


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
    """Returns an array that XLA is told the place of, in the parts of a `PartitionSpec`.

    Axes that the mesh lacks are left out, and so are those by which an axis of the array does not
    divide; without `spec` it is on all devices. On one device, outside of `jit`, under
    `jax.shard_map` or on a mesh with other axes than `AXES`, of which nothing is known here, it
    returns `x`.

    Examples:
      >>> gpt2_jax.sharding.constrain(jnp.ones(2), "data").tolist()  # no mesh: the array as it is
      [1.0, 1.0]
    """
    mesh = mesh_of(x)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    known = all(axis in AXES and kinds[axis] == AxisType.Auto for axis in sizes)
    if not sizes or not known or not _is_staged(x):
        return x
    fitting = _fitting(P(*spec), x.shape, mesh)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, fitting))


def _is_staged(x: Any) -> bool:
    """Returns whether an array is a part of a program, and not one that is there already.

    What `jax.grad` and `jax.vmap` put around an array counts for nothing.
    """
    while isinstance(x, Tracer):
        inside = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(inside, Tracer):
            return not isinstance(inside, jax.Array)
        x = inside
    return False


def places(tree: Any) -> tuple[P, ...] | None:
    """Returns the specs of a tree's arrays, for `put_back`; None where they lie on no mesh.

    Hashable, to be a static argument of the program that updates the tree.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves or not all(_is_on_mesh(leaf) for leaf in leaves):
        return None
    return tuple(leaf.sharding.spec for leaf in leaves)


def put_back(tree: Any, specs: tuple[P, ...] | None) -> Any:
    """Returns a tree of traced arrays where `places` found the ones before."""
    if specs is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    mesh = next(mesh_of(leaf) for leaf in leaves if not mesh_of(leaf).empty)
    put = [
        lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    return jax.tree.unflatten(structure, put)


def automatic(function: Function) -> Function:
    """Lets a function take arrays on a mesh of explicit axes: inside it, axes are automatic.

    What it returns is explicit again: its first axis lies along the batch's axes where it divides,
    or as a node's property `spread` says. To arrays of other meshes, and on one device, it does
    nothing.
    """

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        explicit = _explicit_mesh((args, kwargs))
        if explicit is None:
            return function(*args, **kwargs)
        out = _run_automatic(function, args, kwargs, explicit)
        return _leave(out, explicit)

    return inside  # type: ignore[return-value]


def automatic_update(function: Function) -> Function:
    """As `automatic`, for a function of a state first: the first result is the next state, and lies
    as the state does."""

    @functools.wraps(function)
    def inside(state: Any, *args: Any, **kwargs: Any) -> Any:
        explicit = _explicit_mesh((state, args, kwargs))
        if explicit is None:
            return function(state, *args, **kwargs)
        next_state, *rest = _run_automatic(function, (state, *args), kwargs, explicit)
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, state)
        return (jax.sharding.reshard(next_state, specs), *_leave(rest, explicit))

    return inside  # type: ignore[return-value]


def _run_automatic(function: Any, args: tuple, kwargs: dict[str, Any], explicit: AbstractMesh):
    """Returns what a function does to arrays of automatic axes, from those of explicit ones."""
    types = dict.fromkeys(explicit.axis_names, AxisType.Auto)
    auto = explicit.update_axis_types(types)
    with jax.sharding.use_abstract_mesh(auto):
        args, kwargs = jax.tree.map(functools.partial(_enter, mesh=auto), (args, kwargs))
        tap = kwargs.get("tap")
        # What is no pytree is the caller's function, which may keep what it sees.
        if tap is not None and jax.tree_util.all_leaves([tap]):
            kwargs["tap"] = _CallersTap(tap, explicit, auto)
        return function(*args, **kwargs)


class _CallersTap:
    """A tap of a caller whose arrays are on explicit axes: it meets the model's as such."""

    def __init__(self, tap: Any, explicit: AbstractMesh, auto: AbstractMesh):
        self.tap = tap
        self.explicit = explicit
        self.auto = auto

    def __call__(self, site: str, x: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(self.explicit):
            out = self.tap(site, _leave(x, self.explicit))
        return _enter(out, self.auto)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.tap, name)
        if name not in ("placed", "repeated"):
            return found
        # These make other taps: see `modules.placed`.
        return lambda *args: _CallersTap(found(*args), self.explicit, self.auto)


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh of explicit axes that an array of a tree lies on, or the context's, if any.

    A mesh of which some axes are manual, under `jax.shard_map`, is the caller's to see to.
    """
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    meshes = [mesh_of(array) for array in arrays]
    meshes.append(jax.sharding.get_abstract_mesh())
    for mesh in meshes:
        if AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types:
            return mesh
    return None


def _enter(leaf: Any, mesh: AbstractMesh) -> Any:
    """Returns an array of explicit axes as one of automatic axes, and anything else as it is."""
    if not isinstance(leaf, jax.Array) or mesh_of(leaf).empty:
        return leaf
    whole = P(*[None] * leaf.ndim)
    return jax.sharding.reshard(leaf, NamedSharding(mesh, whole))


def _leave(out: Any, mesh: AbstractMesh) -> Any:
    """Returns arrays of automatic axes as ones of explicit axes."""

    def has_spread(node: Any) -> bool:
        return hasattr(type(node), "spread")

    def leave(node: Any) -> Any:
        first = node.spread if has_spread(node) else BATCH_AXES

        def of_leaf(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            place: Any = None if isinstance(leaf, Tracer) else leaf.sharding
            if isinstance(place, NamedSharding):
                spec = place.spec  # it is there already, and stays
            elif place is not None:
                return leaf  # on no mesh, and so welcome beside arrays of any
            else:
                spec = _fitting(P(first), leaf.shape, mesh)
            return jax.sharding.reshard(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(of_leaf, node)

    return jax.tree.map(leave, out, is_leaf=has_spread)


# From the host.


def own_values(array: Any) -> np.ndarray:
    """Returns an array's numbers; in a program of several processes, in one row, those that this
    process has."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    parts = [np.asarray(shard.data).ravel() for shard in array.addressable_shards]
    return np.concatenate(parts)


def together(tree: Any) -> Any:
    """Returns a tree of which all arrays lie on one mesh, if any does: the others on all devices.

    A program would put them there itself, but it would be another program.
    """
    leaves = jax.tree.leaves(tree)
    meshes = [leaf.sharding.mesh for leaf in leaves if _is_on_mesh(leaf)]
    if not meshes or len(meshes) == len(leaves):
        return tree
    everywhere = NamedSharding(meshes[0], P())
    return jax.tree.map(
        lambda leaf: leaf if _is_on_mesh(leaf) else jax.device_put(leaf, everywhere), tree
    )


def _is_on_mesh(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


# Specs.


def _axes_of(part: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh in one part of a spec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _present(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """Returns a spec without the axes that a mesh lacks, or has one device along.

    In JAX's own form: a program whose results come back in another would be compiled twice.
    """
    parts = [_part(axis for axis in _axes_of(part) if mesh.shape.get(axis, 1) > 1) for part in spec]
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def _part(axes: Any) -> Any:
    """Returns some axes of a mesh as a part of a spec, in the form that JAX gives it itself."""
    axes = tuple(axes)
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes


def _fitting(spec: P, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """Returns a spec without the axes by which an array does not divide, with all its parts."""
    parts: list[Any] = [None] * len(shape)
    for axis, part in enumerate(_present(spec, mesh)[: len(shape)]):
        n_devices = 1
        chosen = []
        for mesh_axis in _axes_of(part):
            n_devices *= mesh.shape[mesh_axis]
            if shape[axis] % n_devices:
                break
            chosen.append(mesh_axis)
        parts[axis] = _part(chosen)
    return P(*parts)


def _misfit(shape: tuple[int, ...], spec: P, mesh: Mesh) -> str | None:
    """Returns which axis of an array does not divide by its devices, if any."""
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        axes = _axes_of(part)
        n_devices = math.prod(mesh.shape[mesh_axis] for mesh_axis in axes)
        if size % n_devices:
            over = " and ".join(axes)
            return f"axis {axis}, of {size}, must divide by the {n_devices} devices along {over}"
    return None
