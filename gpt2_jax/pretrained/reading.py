"""From tensors in a file to params on their devices, each checked on its way.

Knows what a reader of a file returns; the files themselves are `formats`' and `foreign`'s, and the
names are `layout`'s.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from gpt2_jax.config import DTYPES, GPT2Config
from gpt2_jax.files import CheckpointError, some
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.formats import (
    ReadPart,
    Shape,
    Tensor,
    TensorReader,
    parts_of,
)
from gpt2_jax.pretrained.layout import (
    HEADS,
    by_bare_name,
    check_depth,
    check_names,
    largest_first,
    our_path,
    param_shapes,
    without_other_heads,
)
from gpt2_jax.quantised import Quantised, is_matrix, of_kernel, of_rows
from gpt2_jax.sharding import Rules, leaf_sharding, shardings

QUANTISED = "int8"  # the name that asks for matrices of 8 bits
LOADED = (*DTYPES, QUANTISED)  # what checkpoints may be loaded in
ROWS_AT_ONCE = 8192  # of two tables that are compared
CHECKED_AT_ONCE = 2**18  # numbers, whose answers take no memory from the system and stay in cache
QUANTISED_AT_ONCE = 1024  # rows of a matrix that is brought to 8 bits: few stay in the CPU's cache


class Target(NamedTuple):
    """What becomes of the tensors of a file, and where."""

    # None for the file's own; int8 for matrices of 8 bits, and float32 for what is no matrix.
    dtype: np.dtype | None
    mesh: Mesh | None = None  # None for JAX's default device
    rules: Rules | None = None  # of where params lie on the mesh


# Takes params, as `jax.ShapeDtypeStruct`s, and their config.
Known = Callable[[Params, GPT2Config], None]


class _Named(NamedTuple):
    """A tensor to be read."""

    name: str  # HF's, without a prefix
    path: str  # in the tree of params
    shape: Shape


def checked_target(
    name_or_path: str | Path, dtype: DTypeLike | None, mesh: Mesh | None, rules: Rules | None
) -> Target:
    """Returns what is to become of a checkpoint's tensors.

    Raises:
      CheckpointError: as `checked_dtype`.
      ValueError: `rules` come without a mesh.
    """
    if rules is not None and mesh is None:
        raise ValueError("`rules` say where params lie on a mesh: give `mesh`, too.")
    return Target(asked_dtype(name_or_path, dtype), mesh, rules)


def asked_dtype(name_or_path: str | Path, dtype: DTypeLike | None) -> np.dtype | None:
    """Returns the dtype to load a checkpoint in, or `None`, which stands for the file's own.

    Raises:
      CheckpointError: as `checked_dtype`.
    """
    # What is loaded by this name may be trained, which in float16 nobody would have asked for.
    if dtype is None and name_or_path == "demo":
        return np.dtype("float32")
    return checked_dtype(dtype, LOADED)


def checked_dtype(dtype: DTypeLike | None, allowed: Sequence[str] = DTYPES) -> np.dtype | None:
    """Returns a dtype of params as numpy's, or `None`, which stands for the file's own.

    Raises:
      CheckpointError: it is none of those that are allowed: the floats that a model computes in.
    """
    if dtype is None:
        return None
    try:
        target = jnp.dtype(dtype)
    except TypeError:  # it names no dtype at all
        target = None
    if target is None or target.name not in allowed:
        expected = f"one of {', '.join(allowed)}"
        raise CheckpointError(f"`dtype` must be {expected}; got {target or dtype!r}.")
    return target


# All tensors.


class _Fit(NamedTuple):
    """Which of a file's tensors are a model's, by HF's names without prefix."""

    names: dict[str, str]  # the file's own names
    expected: dict[str, Shape]  # of the model's parameters, in the tree's order
    zeros: list[str]  # biases that stand for none
    tied_head: str | None  # the file's name of a head that is to be `wte` again
    other_heads: list[str]


def from_tensors(
    reader: TensorReader,
    config: GPT2Config,
    target: Target,
    what: str = "the config",
    *,
    heads: bool = False,
    known: Known | None = None,
) -> Params:
    """Returns the params that a reader's tensors are.

    `what` is what messages call the config, which may be to blame as well as the weights. `known`
    is called when names and shapes are known to fit, and before any weight is read; not where they
    do not tell what params will be: in the file's own dtype, with other heads, on a mesh.
    """
    # By names and shapes alone: what does not fit is refused before any tensor is read.
    with naming(reader.file):
        fit = _fit(reader.shapes, config, what)
        if fit.other_heads and not heads:
            left_out = some(fit.other_heads)
            warnings.warn(
                f"A GPT-2 with other heads, which are left out: {left_out}.", stacklevel=4
            )
    shapes = _shapes_of_params(fit.expected, target)
    if target.mesh is not None:
        shardings(shapes, target.mesh, target.rules)  # raises where they do not divide
    elif known is not None and target.dtype is not None and not heads:
        dtype = _float_dtype(target).name
        known(unflatten_dict(shapes, sep="."), config.replace(dtype=dtype))
    # Before the weights, as these are small: one that is no zero is told soon.
    for bare in fit.zeros:
        own_name = fit.names[bare]
        with naming(reader.file_of(own_name), bare):
            _check_no_bias(reader.read(own_name), bare)
    params = _read_all(reader, fit, target)
    for bare in fit.other_heads if heads else []:
        own_name = fit.names[bare]
        with naming(reader.file_of(own_name), bare):
            named = _Named(bare, f"{HEADS}{bare}", reader.shapes[own_name])
            params[named.path] = _as_param(parts_of(reader, own_name), named, target)
    return unflatten_dict(params, sep=".")


def _fit(shapes: Mapping[str, Shape], config: GPT2Config, what: str) -> _Fit:
    """Returns how the tensors of a file make a model.

    Raises:
      CheckpointError: they do not.
    """
    names = by_bare_name(shapes)
    check_depth(config, len(names), what)
    expected = param_shapes(config)
    # A tied head is in what PyTorch saved, and not in what HF wrote as safetensors.
    tied_head = names.get("lm_head.weight") if config.tie_word_embeddings else None
    allowed = dict(expected)
    if not config.bias:
        # HF's layout has them all the same, as zeros.
        whole = param_shapes(config.replace(bias=True))
        allowed |= {bare: whole[bare] for bare in names if bare in whole}
    if tied_head is not None:
        allowed["lm_head.weight"] = expected["wte.weight"]
    found = {bare: shapes[name] for bare, name in names.items()}
    rest = without_other_heads(found, allowed, what)
    check_names(rest, allowed, what)
    return _Fit(
        names=names,
        expected=expected,
        zeros=[bare for bare in allowed if bare.endswith(".bias") and bare not in expected],
        tied_head=tied_head,
        other_heads=[bare for bare in found if bare not in rest],
    )


def _shapes_of_params(expected: Mapping[str, Shape], target: Target) -> dict[str, Any]:
    """Returns a model's parameters without their numbers, by their paths."""
    shapes = {}
    for bare, shape in expected.items():
        shapes[our_path(bare)] = _shaped(our_path(bare), shape, target)
    return shapes


def _read_all(reader: TensorReader, fit: _Fit, target: Target) -> dict[str, Any]:
    """Returns a model's parameters by their paths, in the order of the layers."""
    leaves = {}
    # One by one, each checked and on its way before the next is read.
    for bare in largest_first(fit.expected):
        with naming(reader.file_of(fit.names[bare]), bare):
            read_part = parts_of(reader, fit.names[bare])
            named = _Named(bare, our_path(bare), fit.expected[bare])
            leaves[named.path] = _as_param(read_part, named, target)
        # While the table is at hand: kept for later, it would be one more of the largest tensor.
        if bare == "wte.weight" and fit.tied_head is not None:
            with naming(reader.file_of(fit.tied_head), "lm_head.weight"):
                _check_tied(read_part, parts_of(reader, fit.tied_head), fit.expected[bare])
    paths = [our_path(bare) for bare in fit.expected]
    return {path: leaves[path] for path in paths}


def _check_tied(read_wte: ReadPart, read_head: ReadPart, shape: Shape) -> None:
    """Raises unless the head is `wte` again: by the config, it would be dropped."""
    n_differing = 0
    # Some rows at a time: where parts are read alone, the whole may be more than a host holds.
    for start in range(0, shape[0], ROWS_AT_ONCE):
        # Not beyond the last: safetensors takes no such slice.
        rows = (slice(start, min(start + ROWS_AT_ONCE, shape[0])), slice(None))
        n_differing += np.count_nonzero(read_wte(rows) != read_head(rows))
    if n_differing:
        raise CheckpointError(
            "`tie_word_embeddings` is true, but `lm_head.weight` differs from `wte.weight` in "
            f"{n_differing} of {math.prod(shape)} values: set `tie_word_embeddings` to false in "
            "config.json to keep both."
        )


def _check_no_bias(array: Tensor, name: str) -> None:
    """Raises unless a bias is zero: by the config, it would be dropped."""
    n_others = np.count_nonzero(array)
    if n_others:
        raise CheckpointError(
            f"`bias` is false, but {name} differs from 0 in {n_others} of {array.size} values: set "
            "`bias` to true to keep them."
        )


@contextlib.contextmanager
def naming(file: Path | None, name: str | None = None) -> Iterator[None]:
    """Lets errors in the body name the file, if there is one, and the tensor.

    Raises:
      CheckpointError: instead of any error in the body that is about what was read.
    """
    try:
        yield
        return
    except CheckpointError as error:
        reason = str(error)
        cause = error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:  # of the host, and of the device
        reason = f"Expected room for it in memory, got none ({type(error).__name__})."
        cause = error
    # These contexts stand within each other: each adds what was not yet said.
    if name is not None and name not in reason:
        reason = f"{name}: {reason}"
    if file is not None and str(file) not in reason:
        reason = f"{file}: {reason}"
    raise CheckpointError(reason) from cause


# One of them.


def _as_param(read_part: ReadPart, named: _Named, target: Target) -> Any:
    """Returns a weight on its devices, in the target's dtype or its own, all values finite."""
    if _is_quantised(named.path, target):
        return _place_quantised(_quantised(read_part, named), named, target)
    if target.dtype == QUANTISED:
        target = target._replace(dtype=np.dtype(np.float32))
    if target.mesh is None:
        whole = (slice(None),) * len(named.shape)
        return to_jax(_checked(read_part(whole), named.name, target.dtype), named.name)
    sharding = leaf_sharding(named.path, named.shape, target.mesh, target.rules)
    return _spread(read_part, named, sharding, target.dtype)


def _is_quantised(path: str, target: Target) -> bool:
    """Returns whether a weight, by its path in the tree, becomes a matrix of 8 bits."""
    return target.dtype == QUANTISED and is_matrix(path)


def _shaped(path: str, shape: Shape, target: Target) -> Any:
    """Returns what a weight will be, without its numbers."""
    if not _is_quantised(path, target):
        return jax.ShapeDtypeStruct(shape, _float_dtype(target))
    made = of_kernel if path.endswith(".kernel") else of_rows
    return jax.eval_shape(made, jax.ShapeDtypeStruct(shape, np.float32))


def _float_dtype(target: Target) -> np.dtype:
    """Returns the dtype of what is no matrix of 8 bits; float32 where only the file knows it."""
    if target.dtype is None or target.dtype == QUANTISED:
        return np.dtype(np.float32)
    return target.dtype


def _quantised(read_part: ReadPart, named: _Named) -> Quantised:
    """Returns a matrix of 8 bits on the host, made of some of its rows after the others."""
    if named.path.endswith(".kernel"):
        whole = read_part((slice(None), slice(None)))
        n_rows = named.shape[1]
        n_columns = named.shape[0]

        def read_rows(rows: slice) -> Tensor:
            return np.ascontiguousarray(whole[:, rows].T)
    else:
        n_rows, n_columns = named.shape

        def read_rows(rows: slice) -> Tensor:
            return read_part((rows, slice(None)))

    # Numpy's arrays, for now, which the type does not know.
    values: Any = np.empty((n_rows, n_columns), np.int8)
    scale: Any = np.empty(n_rows, np.float32)
    for start in range(0, n_rows, QUANTISED_AT_ONCE):
        rows = slice(start, min(start + QUANTISED_AT_ONCE, n_rows))
        read: Any = _checked(read_rows(rows), named.name, np.dtype(np.float32))
        part = of_rows(read)
        values[rows] = part.values
        scale[rows] = part.scale
    return Quantised(values, scale)


def _place_quantised(matrix: Quantised, named: _Named, target: Target) -> Quantised:
    """Returns a matrix of 8 bits on its devices."""
    mesh = target.mesh
    if mesh is None:
        return jax.device_put(matrix)

    def place(field: str, array: Any) -> Array:
        sharding = leaf_sharding(f"{named.path}.{field}", array.shape, mesh, target.rules)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return Quantised(place("values", matrix.values), place("scale", matrix.scale))


def _spread(
    read_part: ReadPart, named: _Named, sharding: NamedSharding, dtype: np.dtype | None
) -> Shaped[Array, "..."]:
    """Returns a weight of which each device holds a part, read part by part."""
    last: list[Any] = [None, None]

    def part(index: Any) -> Tensor:
        # JAX asks for the part of each device; those that have the same one come together.
        if last[0] != index:
            array = _checked(read_part(index), named.name, dtype)
            _check_has_dtype(array, named.name)
            last[:] = [index, array]
        return last[1]

    return jax.make_array_from_callback(named.shape, sharding, part)


def _checked(array: Tensor, name: str, target: np.dtype | None) -> Tensor:
    """Returns an array in the dtype `target` or its own, with every value finite."""
    if array.dtype.name not in DTYPES:
        expected = f"one of {', '.join(DTYPES)}"
        raise CheckpointError(f"{name}: expected {expected}, got {array.dtype.name}.")
    # Before the cast too: the message then says whether the file or the dtype is to blame.
    _check_finite(array, name)
    if target is not None and target != array.dtype:
        with np.errstate(over="ignore"):  # numpy would warn; the next line says which and how many
            array = array.astype(target)
        _check_finite(array, f"{name} cast to {target.name}")
    return array


def _check_finite(array: Tensor, name: str) -> None:
    flat = array.ravel(order="K")  # no copy, whatever the order
    n_bad = 0
    for start in range(0, flat.size, CHECKED_AT_ONCE):
        part = flat[start : start + CHECKED_AT_ONCE]
        n_bad += part.size - np.count_nonzero(np.isfinite(part))
    if n_bad:
        got = f"{n_bad} NaN or infinite of {array.size}"
        raise CheckpointError(f"{name}: expected finite weights, got {got}.")


def to_jax(array: Tensor, name: str) -> Shaped[Array, "..."]:
    """Returns an array on the device. On CPU it may keep its memory: it must be nobody else's."""
    _check_has_dtype(array, name)
    return jax.device_put(array)


def _check_has_dtype(array: Tensor, name: str) -> None:
    """Raises unless JAX has an array's dtype."""
    # `device_put` would turn float64 into float32 with no more than a warning.
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        advice = "set `jax_enable_x64`, or ask for another `dtype`"
        raise CheckpointError(f"{name} would be {array.dtype.name}: {advice}.")
