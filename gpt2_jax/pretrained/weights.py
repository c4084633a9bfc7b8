"""Checkpoints on disk and params in memory: HF's layout both ways, and single files of our own.

Knows names and shapes; nothing of the forward pass, and of files only what their readers return.
"""

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from gpt2_jax.config import DTYPES, GPT2Config
from gpt2_jax.files import (
    CheckpointError,
    NameFilter,
    local_path,
    replacing,
    some,
    write_json,
)
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.foreign.find import CONFIG, open_checkpoint
from gpt2_jax.pretrained.foreign.names import OTHER_HEADS, upright
from gpt2_jax.pretrained.foreign.names import bare as bare_name
from gpt2_jax.pretrained.formats import (
    SAFETENSORS,
    WEIGHT_FILE,
    ReadPart,
    SafetensorsFile,
    Shape,
    StateDict,
    Tensor,
    TensorReader,
    in_order,
    on_host,
    parts_of,
    save_file,
)
from gpt2_jax.pretrained.hub import naming_download, resolve
from gpt2_jax.quantised import (
    Quantised,
    is_matrix,
    of_kernel,
    of_rows,
    refuse_quantised,
)
from gpt2_jax.sharding import Rules, leaf_sharding, shardings
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import is_tokenizer_file

# A parameter's path is HF's. This table holds the one difference: what a module's `weight` is
# called here. Nothing is transposed, as HF's Conv1D keeps [in, out]. A file's names may lack the
# prefix `transformer.`; mask buffers and a tied `lm_head.weight` are dropped.
LEAF = {
    "wte": "embedding",
    "wpe": "embedding",
    "lm_head": "embedding",
    "ln_1": "scale",
    "ln_2": "scale",
    "ln_f": "scale",
    "c_attn": "kernel",
    "c_proj": "kernel",
    "c_fc": "kernel",
}
HEADS = "heads."  # before the names of other heads, in the tree of params
PREFIX = "transformer."  # before all names of a `GPT2LMHeadModel` but the head's
QUANTISED = "int8"  # the name that asks for matrices of 8 bits
LOADED = (*DTYPES, QUANTISED)  # what checkpoints may be loaded in
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # in the files of older versions
ROWS_AT_ONCE = 8192  # of two tables that are compared
CHECKED_AT_ONCE = 2**18  # numbers, whose answers take no memory from the system and stay in cache
QUANTISED_AT_ONCE = 1024  # rows of a matrix that is brought to 8 bits: few stay in the CPU's cache
MAX_DEPTH = 100  # of a tree in a file of params; a model's is 5
MAX_MISSING_LAYERS = 1000  # that are listed one by one before the report is cut
MAX_PROBLEMS = 50  # lines in one error, about a screen; a wrong `n_layer` gives twelve a layer

# Safetensors' metadata are strings. HF asks for the framework that wrote the file.
HF_METADATA = {"format": "pt"}
OUR_METADATA = {"format": "gpt2_jax"}


class Target(NamedTuple):
    """What becomes of the tensors of a file, and where."""

    # None for the file's own; int8 for matrices of 8 bits, and float32 for what is no matrix.
    dtype: np.dtype | None
    mesh: Mesh | None = None  # None for JAX's default device
    rules: Rules | None = None  # of where params lie on the mesh


# Takes params, as `jax.ShapeDtypeStruct`s, and their config. It is not called where a reader, which
# knows shapes alone, cannot tell what they will be: in the file's own dtype, and with other heads.
Known = Callable[[Params, GPT2Config], None]


# Folders in HF's layout.


def load(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    config: GPT2Config | None = None,
    heads: bool = False,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[GPT2Config, Params]:
    """Returns a checkpoint's config and params.

    Args:
      name_or_path: "demo" (comes with the package), a hub id such as "gpt2", or a folder or file in
        any of the formats that docs/checkpoints.md lists. The format is told by the content.
      dtype: dtype of the params; by default the file's own, but float32 for "demo", whose file is
        float16 to be small. The config's `dtype` follows it. "int8" is `quantize` while reading, a
        tensor at a time: 8 bits for each weight of the matrices, float32 for the rest and the
        config.
      config: to take instead of the checkpoint's own, or where it has none.
      heads: also loads what stands beside a whole GPT-2, such as `score.weight` of a classifier or
        TRL's `v_head`: as `params["heads"]`, under HF's names. `apply` passes over them, `save`
        writes them back. Otherwise they are left out, with a warning.
      mesh: devices to spread the params over, as `sharding.make_mesh` returns them. Of safetensors
        each process reads the parts of its own devices alone; of other formats a tensor at a time.
      rules: where params lie on the mesh: see `sharding.shardings`.
      revision: branch, tag or commit on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.

    Raises:
      CheckpointError: a `ValueError`; what was found is not a sound GPT-2 checkpoint.
      ConnectionError: the hub could not be reached and nothing is cached.
      ValueError: the params do not divide by the mesh's devices, or `rules` come without a mesh.

    Examples:
      >>> config, params = gpt2_jax.load("demo")
      >>> config.n_layer, params["wte"]["embedding"].shape
      (3, (4096, 256))
    """
    # Before a download of gigabytes, not after it.
    target = checked_target(name_or_path, dtype, mesh, rules)
    path = resolve(
        name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return load_from(path, config, target, heads=heads)


def checked_target(
    name_or_path: str | Path, dtype: DTypeLike | None, mesh: Mesh | None, rules: Rules | None
) -> Target:
    """Returns what is to become of the weights; raises what `load` does for its arguments."""
    if rules is not None and mesh is None:
        raise ValueError("`rules` say where params lie on a mesh: give `mesh`, too.")
    return Target(asked_dtype(name_or_path, dtype), mesh, rules)


def load_from(
    path: Path,
    config: GPT2Config | None,
    target: Target,
    *,
    heads: bool = False,
    known: Known | None = None,
) -> tuple[GPT2Config, Params]:
    """Returns what `load` does, of a checkpoint that lies at `path`.

    `known` is called when names and shapes are known to fit, and before any weight is read.
    """
    with naming_download(path):
        # The config with the file: it says what the tensors must be called, and how large they are.
        checkpoint, config = open_checkpoint(path, config)
        config_file = path / CONFIG
        what = str(config_file) if config_file.is_file() else "the config"
        try:
            params = _from_reader(checkpoint.reader, config, target, what, heads=heads, known=known)
        except CheckpointError as error:
            reason = str(error)
            file = checkpoint.reader.file or path
            if checkpoint.kind:
                # What was taken for what, and with which prefix, explains much of it.
                reason = f"{file}, {checkpoint.kind}: {reason.removeprefix(f'{file}: ')}"
            elif str(path) not in reason:  # what speaks of names alone does not say of where
                reason = f"{path}: {reason}"
            raise CheckpointError(reason) from error
    # A model computes in the dtype of its weights unless it is told otherwise.
    return config.replace(dtype=_dtype_of(params)), params


def save(
    folder: str | Path,
    params: Params,
    config: GPT2Config,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load` and HF's `GPT2LMHeadModel.from_pretrained` read, all or nothing.

    HF's models have biases: where this one has none they are zeros, with a warning.

    Args:
      folder: where to; an existing folder must be empty unless `overwrite`, which keeps its other
        files.
      params: the parameters, written bit for bit; those of several devices one array at a time. In
        a program of several processes all call this, and the first one writes.
      config: their config. The file's `dtype` is that of the params.
      tokenizer: is written with them, and takes the place of the one that was there.
      max_shard_size: bytes per weight file, beyond which the weights are split over several.
      overwrite: replaces a checkpoint that is there.

    Raises:
      CheckpointError: the params are not `config`'s, or `folder` is in use.
      ValueError: the params are quantised: nobody else reads them.

    Examples:
      >>> gpt2_jax.save(folder / "saved", params, config, tokenizer=tokenizer)
      >>> again, same = gpt2_jax.load(folder / "saved")
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, same, params))
      True
    """
    refuse_quantised(params, "Params that `save` writes")
    _check_depth(config, len(jax.tree.leaves(params)))
    state = _whole_state(params, config)
    if jax.process_index() > 0:
        _help_to_write(state, max_shard_size)
        return
    # HF's `generate` takes its stop ids from this second file, not from `config.json`.
    special_tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    keep = kept_files(with_tokenizer=tokenizer is not None)
    with replacing(folder, overwrite=overwrite, keep=keep) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", config.to_dict() | {"dtype": _dtype_of(params)})
        write_json(temporary / "generation_config.json", special_tokens)
        _write_weights(temporary, state, max_shard_size)
        if tokenizer is not None:
            tokenizer.save(temporary)
    _wait_for_all()


def _help_to_write(state: Mapping[str, Any], max_shard_size: int | None) -> None:
    """Gathers what the first of several processes writes, in the order in which it does."""
    for names in _shards(state, max_shard_size):
        shard = {name: state[name] for name in names}
        for name in in_order(shard):
            on_host(shard[name])
    _wait_for_all()


def _wait_for_all() -> None:
    """Waits until each process of a program has come this far."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("gpt2_jax: saved")


def kept_files(*, with_tokenizer: bool) -> NameFilter:
    """Returns which files may stay where new weights, and a tokenizer or not, are written."""

    def keep(name: str) -> bool:
        # An old file in a format that comes first would be read instead of the new ones.
        if with_tokenizer and is_tokenizer_file(name):
            return False
        return not WEIGHT_FILE.fullmatch(name)

    return keep


def _write_weights(folder: Path, state: Mapping[str, Any], max_shard_size: int | None) -> None:
    """Writes HF's names and arrays to one file, or to several and their index."""
    shards = _shards(state, max_shard_size)
    # Without an index, which HF has no need of for a single file.
    if len(shards) == 1:
        save_file(folder / SAFETENSORS, state, HF_METADATA)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"  # as HF numbers them
        shard = {name: state[name] for name in names}
        save_file(folder / file, shard, HF_METADATA)
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(array.nbytes for array in state.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / f"{SAFETENSORS}.index.json", index)


def _shards(state: Mapping[str, Any], max_size: int | None) -> list[list[str]]:
    """Returns the names in each shard; a tensor larger than `max_size` has one to itself."""
    shard: list[str] = []
    shards = [shard]
    size = 0
    for name, array in state.items():
        is_full = bool(max_size) and size + array.nbytes > max_size
        if is_full and shard:
            shard = []
            shards.append(shard)
            size = 0
        shard.append(name)
        size += array.nbytes
    return shards


# Single files of params.


def save_params(
    file: str | Path, params: Params, config: GPT2Config | None = None, *, overwrite: bool = True
) -> None:
    """Writes nested dicts of arrays to one safetensors file, bit for bit.

    Args:
      file: where to.
      params: any nested dict of arrays; a leaf's name in the file is its path, joined by ".".
      config: goes into the file's metadata, as JSON.
      overwrite: replaces a file that is there.

    Raises:
      CheckpointError: the file exists and `overwrite` is not set.
      ValueError: the params are quantised.
    """
    refuse_quantised(params, "Params that `save_params` writes")
    leaves = dict(flatten_dict(params, sep="."))
    metadata = dict(OUR_METADATA)
    if config is not None:
        metadata["config"] = json.dumps(config.to_dict())
    with replacing(file, overwrite=overwrite) as temporary:
        save_file(temporary, leaves, metadata)


def load_params(file: str | Path) -> Params:
    """Returns the tree that `save_params` wrote, bit for bit.

    Raises:
      CheckpointError: the file is missing or damaged, or holds float64 while JAX has none.
    """
    stored = SafetensorsFile(local_path(file))
    # Unlike in `load`, nothing is checked: any tree may have been saved, with integers and NaN.
    leaves = {}
    # As in `_from_reader`, for the sake of the peak of memory.
    for name in _largest_first(stored.shapes):
        with naming(stored.file, name):
            leaves[name] = _to_jax(stored.read(name), name)
    # The order of the file is that of the tree.
    return _tree({name: leaves[name] for name in stored.shapes}, stored.file)


def _tree(leaves: Mapping[str, Any], file: Path) -> Params:
    """Returns the nested dicts of paths joined by ".", unless paths contradict each other."""
    for path in leaves:
        parts = path.split(".")
        # Shallow, so that no tree of a hostile file is too deep for Python.
        parents = [".".join(parts[:depth]) for depth in range(1, min(len(parts), MAX_DEPTH + 1))]
        if len(parts) > MAX_DEPTH or not leaves.keys().isdisjoint(parents):
            got = f"{path!r:.100} among them"
            raise CheckpointError(f"{file}: expected the paths of a tree's leaves, got {got}.")
    return unflatten_dict(dict(leaves), sep=".")


def load_config(file: str | Path) -> GPT2Config | None:
    """Returns the config in the metadata of a file of params, or `None`; its `dtype` is theirs.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    stored = SafetensorsFile(local_path(file))
    if "config" not in stored.metadata:
        return None
    try:
        values = json.loads(stored.metadata["config"])
        # `from_dict` passes the `dtype` over, as HF's need not be the weights'; in our files it is.
        return GPT2Config.from_dict(values).replace(dtype=values.get("dtype", "float32"))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        expected = "a config in its metadata"
        raise CheckpointError(f"{stored.file}: expected {expected}, got {error}.") from error


# HF's names and ours.


def from_hf(state: Mapping[str, Any], config: GPT2Config, dtype: DTypeLike | None = None) -> Params:
    """Returns params from HF's names and arrays (numpy, JAX or PyTorch), checked and copied.

    Args:
      state: arrays by HF's names, with or without prefixes such as `transformer.` and `module.`;
        kernels as HF's, or as `nn.Linear` has them.
      config: the config that they should fit.
      dtype: dtype of the params, or "int8", as in `load`; by default that of the arrays.

    Raises:
      CheckpointError: names are missing or unexpected or have another shape (all are reported
        together), a weight is not a finite float, or a tied head differs from `wte`.

    Examples:
      >>> state = gpt2_jax.to_hf(params)
      >>> same = gpt2_jax.from_hf(state, config)
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, same, params))
      True
      >>> gpt2_jax.from_hf({}, config)
      Traceback (most recent call last):
          ...
      gpt2_jax.files.CheckpointError: ...
    """
    return _from_reader(upright(StateDict(state)), config, Target(checked_dtype(dtype, LOADED)))


def to_hf(params: Params) -> dict[str, Tensor]:
    """Returns the state dict that `GPT2LMHeadModel.save_pretrained` writes for these params.

    Raises:
      ValueError: the params are quantised.

    Examples:
      >>> state = gpt2_jax.to_hf(params)
      >>> state["transformer.h.1.attn.c_attn.weight"].shape
      (16, 48)
    """
    refuse_quantised(params, "Params that become HF's")
    return {name: on_host(leaf) for name, leaf in _by_hf_name(params).items()}


def _by_hf_name(params: Params) -> dict[str, Any]:
    """Returns the params by HF's names, each array where it lies."""
    return {_hf_name(path): leaf for path, leaf in flatten_dict(params, sep=".").items()}


def whole_state(params: Params, config: GPT2Config) -> dict[str, Tensor]:
    """Returns the state dict of HF's model: biases that `config` has not are zeros, with a warning.

    Raises:
      CheckpointError: the params are not `config`'s.
    """
    return {name: on_host(array) for name, array in _whole_state(params, config).items()}


def _whole_state(params: Params, config: GPT2Config) -> dict[str, Any]:
    """Returns `whole_state` of arrays that lie where those of the params do.

    Raises:
      CheckpointError: the params are not `config`'s.
    """
    refuse_quantised(params, "Params that become HF's")
    state = _by_hf_name(params)
    heads = _by_hf_name({"heads": params["heads"]}) if "heads" in params else {}
    shapes = {
        name.removeprefix(PREFIX): array.shape for name, array in state.items() if name not in heads
    }
    # Before a file is written: HF fills what it does not find with fresh weights, and only warns.
    _check_names(shapes, param_shapes(config))
    if config.bias:
        return state
    warnings.warn(
        "The model has no biases (`bias` is false), and HF's has: they are written as zeros.",
        stacklevel=3,
    )
    dtype = params["wte"]["embedding"].dtype
    whole = {}
    # In the order of HF's modules.
    for bare, shape in param_shapes(config.replace(bias=True)).items():
        name = bare if bare.startswith("lm_head.") else PREFIX + bare
        whole[name] = state[name] if name in state else np.zeros(shape, dtype)
    return whole | heads


def param_shapes(config: GPT2Config) -> dict[str, Shape]:
    """Returns the shape of every parameter by HF's name, without the prefix `transformer.`."""
    # In the order of HF's modules, which the tree and every file that is written keep.
    width = config.n_embd
    vocabulary = (config.vocab_size, width)
    shapes = {"wte.weight": vocabulary, "wpe.weight": (config.n_positions, width)}
    for layer in range(config.n_layer):
        shapes |= _layer_shapes(f"h.{layer}", config)
    shapes |= _norm_shapes("ln_f", width)
    if not config.bias:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def _layer_shapes(layer: str, config: GPT2Config) -> dict[str, Shape]:
    width = config.n_embd
    mlp_width = config.mlp_width
    shapes = _norm_shapes(f"{layer}.ln_1", width)
    shapes |= _norm_shapes(f"{layer}.ln_2", width)
    # One matrix for queries, keys and values, side by side.
    shapes |= _dense_shapes(f"{layer}.attn.c_attn", width, 3 * width)
    shapes |= _dense_shapes(f"{layer}.attn.c_proj", width, width)
    shapes |= _dense_shapes(f"{layer}.mlp.c_fc", width, mlp_width)
    shapes |= _dense_shapes(f"{layer}.mlp.c_proj", mlp_width, width)
    return shapes


def _norm_shapes(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _dense_shapes(name: str, n_in: int, n_out: int) -> dict[str, Shape]:
    return {f"{name}.weight": (n_in, n_out), f"{name}.bias": (n_out,)}


def _our_path(bare: str) -> str:
    """`h.0.ln_1.weight` -> `h.0.ln_1.scale`."""
    module_path, leaf = bare.rsplit(".", 1)
    if leaf == "weight":
        module = module_path.split(".")[-1]
        leaf = LEAF[module]
    return f"{module_path}.{leaf}"


def _hf_name(path: str) -> str:
    """`h.0.ln_1.scale` -> `transformer.h.0.ln_1.weight`."""
    if path.startswith(HEADS):
        return path.removeprefix(HEADS)  # under its own name all along
    module_path, _, leaf = path.rpartition(".")
    if leaf != "bias":
        leaf = "weight"
    # HF's head stands beside the transformer, not in it.
    prefix = "" if path.startswith("lm_head.") else PREFIX
    return f"{prefix}{module_path}.{leaf}"


# From tensors to params, checked.


def _from_reader(
    reader: TensorReader,
    config: GPT2Config,
    target: Target,
    what: str = "the config",
    *,
    heads: bool = False,
    known: Known | None = None,
) -> Params:
    """Returns the params that a reader's tensors are.

    `what` is what messages call the config, which may be to blame as well as the weights.
    """
    other_heads: list[str] = []
    # By names and shapes alone: what does not fit is refused before any tensor is read.
    with naming(reader.file):
        names = _by_bare_name(reader.shapes)
        _check_depth(config, len(names), what)
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
        found = {bare: reader.shapes[name] for bare, name in names.items()}
        rest = _without_other_heads(found, allowed, what)
        _check_names(rest, allowed, what)
        other_heads = [bare for bare in found if bare not in rest]
        if other_heads and not heads:
            left_out = some(other_heads)
            warnings.warn(
                f"A GPT-2 with other heads, which are left out: {left_out}.", stacklevel=4
            )

    shapes = {}
    for bare, shape in expected.items():
        shapes[_our_path(bare)] = _shaped(_our_path(bare), shape, target)
    if target.mesh is not None:
        shardings(shapes, target.mesh, target.rules)  # raises where they do not fit
    elif known is not None and target.dtype is not None and not heads:
        tree = unflatten_dict(shapes, sep=".")
        known(tree, config.replace(dtype=_dtype_of(tree)))
    # Before the weights, as these are small: one that is no zero is told soon.
    zeros = [bare for bare in allowed if bare.endswith(".bias") and bare not in expected]
    for bare in zeros:
        with naming(reader.file_of(names[bare]), bare):
            _check_no_bias(reader.read(names[bare]), bare)
    # One by one, each checked and on its way before the next is read.
    leaves = {}
    for bare in _largest_first(expected):
        with naming(reader.file_of(names[bare]), bare):
            read_part = parts_of(reader, names[bare])
            path = _our_path(bare)
            leaves[path] = _as_param(read_part, _Named(bare, path, expected[bare]), target)
        # While the table is at hand: kept for later, it would be one more of the largest tensor.
        if bare == "wte.weight" and tied_head is not None:
            with naming(reader.file_of(tied_head), "lm_head.weight"):
                _check_tied(read_part, parts_of(reader, tied_head), expected[bare])
    # They were read by size; the tree is in the order of the layers.
    paths = [_our_path(bare) for bare in expected]
    params = {path: leaves[path] for path in paths}
    for bare in other_heads if heads else []:
        with naming(reader.file_of(names[bare]), bare):
            read_part = parts_of(reader, names[bare])
            path = f"{HEADS}{bare}"
            named = _Named(bare, path, reader.shapes[names[bare]])
            params[path] = _as_param(read_part, named, target)
    return unflatten_dict(params, sep=".")


class _Named(NamedTuple):
    """A tensor to be read."""

    name: str  # HF's, without a prefix
    path: str  # in the tree of params
    shape: Shape


def _by_bare_name(names: Iterable[str]) -> dict[str, str]:
    """Returns a file's own names by HF's names without prefix, mask buffers left out."""
    own_names = {}
    twice = []
    prefix = PREFIX
    for name in names:
        bare = bare_name(name)
        if MASK_BUFFER.fullmatch(bare):
            continue  # a constant that was saved with the weights: the model makes its own
        if bare in own_names:
            twice.append(bare)
            prefix = max(name, own_names[bare], key=len).removesuffix(bare)
        own_names[bare] = name
    if twice:
        got = f"with and without `{prefix}`: {some(twice)}"
        raise CheckpointError(f"Expected each weight once, got {got}.")
    return own_names


def _largest_first(shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the names in the order of reading.

    The passing copy of a large tensor, on its way to the device, then comes while little else is
    held: the peak of memory is little more than the params'.
    """
    return sorted(shapes, key=lambda name: math.prod(shapes[name]), reverse=True)


def _without_other_heads(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str
) -> dict[str, Shape]:
    """Returns names and shapes without heads that stand beside a whole GPT-2."""
    rest = {name: shape for name, shape in found.items() if not OTHER_HEADS.fullmatch(name)}
    # Beside half a model they stay, in a report of problems that they may explain.
    if len(rest) == len(found) or _misfits(rest, expected, what):
        return dict(found)
    return rest


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


def _check_depth(config: GPT2Config, n_names: int, what: str = "the config") -> None:
    """Raises if a config has far more layers than some names could be of."""
    # Counted before they are named: names of a hundred million layers would fill the memory.
    if config.n_layer > max(n_names, MAX_MISSING_LAYERS):
        expected = f"{config.n_layer} layers (`n_layer`), got {n_names} names"
        raise CheckpointError(f"The weights do not fit {what}: expected {expected}.")


def _check_names(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str = "the config"
) -> None:
    """Raises one error for all names that are missing, unexpected or of another shape."""
    misfits = _misfits(found, expected, what)
    if misfits:
        raise CheckpointError(misfits)


def _misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> str:
    """Returns a report of names that do not fit, or ""."""
    # All together: a renamed tensor is both missing and unexpected, and only the pair explains it.
    missing = []
    misshapen = []
    for name, shape in expected.items():
        found_shape = found.get(name)
        if found_shape is None:
            missing.append(f"missing: {name} {list(shape)}")
        elif found_shape != shape:
            misshapen.append(f"{name}: expected {list(shape)}, got {list(found_shape)}")
    unexpected = []
    for name, shape in found.items():
        if name not in expected:
            unexpected.append(f"unexpected: {name} {list(shape)}")

    problems = missing + unexpected + misshapen
    if not problems:
        return ""
    # Before the list is cut: what is cut off may be of another kind.
    lacks_biases_alone = problems == missing and all(".bias [" in line for line in missing)
    n_more = len(problems) - MAX_PROBLEMS
    if n_more > 0:
        problems[MAX_PROBLEMS:] = [f"and {n_more} more"]
    if lacks_biases_alone:
        problems.append("For a model without biases, as nanoGPT's, set `bias` to false.")
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected"
    counts += f", {len(misshapen)} of another shape"
    lines = "\n  ".join(problems)
    return f"The weights do not fit {what}: {counts}.\n  {lines}"


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


# Arrays.


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


def _dtype_of(params: Params) -> str:
    """Returns the dtype of params, by its name: that of `wte`, should they differ.

    That of `wpe` where `wte` is quantised.
    """
    table = params["wte"]["embedding"]
    if isinstance(table, Quantised):
        table = params["wpe"]["embedding"]
    return table.dtype.name


def _is_quantised(path: str, target: Target) -> bool:
    """Returns whether a weight, by its path in the tree, becomes a matrix of 8 bits."""
    return target.dtype == QUANTISED and is_matrix(path)


def _shaped(path: str, shape: Shape, target: Target) -> Any:
    """Returns what a weight will be, without its numbers."""
    if not _is_quantised(path, target):
        is_float32 = target.dtype in (None, QUANTISED)  # None: its size is not what is asked for
        return jax.ShapeDtypeStruct(shape, np.float32 if is_float32 else target.dtype)
    made = of_kernel if path.endswith(".kernel") else of_rows
    return jax.eval_shape(made, jax.ShapeDtypeStruct(shape, np.float32))


def _as_param(read_part: ReadPart, named: _Named, target: Target) -> Any:
    """Returns a weight on its devices, in the target's dtype or its own, all values finite."""
    if _is_quantised(named.path, target):
        return _place_quantised(_quantised(read_part, named), named, target)
    if target.dtype == QUANTISED:
        target = target._replace(dtype=np.dtype(np.float32))
    if target.mesh is None:
        whole = (slice(None),) * len(named.shape)
        return _to_jax(_checked(read_part(whole), named.name, target.dtype), named.name)
    sharding = leaf_sharding(named.path, named.shape, target.mesh, target.rules)
    return _spread(read_part, named, sharding, target.dtype)


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


def _to_jax(array: Tensor, name: str) -> Shaped[Array, "..."]:
    """Returns an array on the device. On CPU it may keep its memory: it must be nobody else's."""
    _check_has_dtype(array, name)
    return jax.device_put(array)


def _check_has_dtype(array: Tensor, name: str) -> None:
    """Raises unless JAX has an array's dtype."""
    # `device_put` would turn float64 into float32 with no more than a warning.
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        advice = "set `jax_enable_x64`, or ask for another `dtype`"
        raise CheckpointError(f"{name} would be {array.dtype.name}: {advice}.")
