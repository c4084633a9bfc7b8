"""Checkpoints on disk and params in memory: HF's layout in both directions, and single files of our own names.

Knows names and shapes; nothing of the forward pass, and of files only what `files.py` returns.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import DTYPES, GPT2Config
from gpt2_jax.files import CheckpointError, listing, replacing, write_json
from gpt2_jax.pretrained.formats import (
    SAFETENSORS,
    WEIGHT_FILE,
    SafetensorsFile,
    open_folder,
    save_file,
    to_numpy,
)
from gpt2_jax.pretrained.hub import resolve

Params = dict[str, Any]

# A parameter's path is HF's. This table holds the one difference: what a module's `weight` is called here. Nothing is
# transposed, as HF's Conv1D keeps [in, out]. A file's names may lack the prefix `transformer.`; mask buffers and a
# tied `lm_head.weight` are dropped.
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
PREFIX = "transformer."
LISTED = 50  # lines of names in one error
BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def load(
    name_or_path: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[GPT2Config, Params]:
    """Returns a checkpoint's config and params.

    Args:
      name_or_path: "demo" (comes with the package), a folder in HF's layout, or a hub id such as "gpt2".
      dtype: dtype of the params; by default the file's own. The config's `dtype` follows it.
      revision: branch, tag or commit on the hub.
      cache_dir: where downloads are kept; by default the hub's own cache.
      local_files_only: never touch the network.

    Raises:
      CheckpointError: a `ValueError`; what was found is not a sound GPT-2 checkpoint.
      ConnectionError: the hub could not be reached and nothing is cached.
    """
    target = _dtype(dtype)
    folder = resolve(
        name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    try:
        config = GPT2Config.from_json_file(folder / "config.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: expected `config.json` in this folder, got {listing(folder)}."
        ) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        params = _from_hf(*open_folder(folder), config, target)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(
            text if text.startswith(str(folder)) else f"{folder}: {text}"
        ) from error
    return config.replace(dtype=params["wte"]["embedding"].dtype.name), params


def save(
    folder: str | Path,
    params: Params,
    config: GPT2Config,
    *,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load` and HF's `GPT2LMHeadModel.from_pretrained` read, all of it or nothing.

    Args:
      folder: where to; an existing folder must be empty unless `overwrite`, which keeps its other files.
      params: the parameters, written bit for bit.
      config: their config. The file's `dtype` is that of the params.
      max_shard_size: bytes per weight file, beyond which the weights are split over several.
      overwrite: replaces a checkpoint that is there.

    Raises:
      CheckpointError: the params are not `config`'s, or `folder` is in use.
    """
    state = to_hf(params)
    _check_names(
        {name.removeprefix(PREFIX): array.shape for name, array in state.items()},
        param_shapes(config),
    )
    dtype = params["wte"]["embedding"].dtype.name
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    with replacing(
        folder, overwrite=overwrite, keep=lambda name: not WEIGHT_FILE.fullmatch(name)
    ) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", config.to_dict() | {"dtype": dtype})
        write_json(temporary / "generation_config.json", special)
        shards = _shards(state, max_shard_size or math.inf)
        if len(shards) == 1:
            return save_file(temporary / SAFETENSORS, state, {"format": "pt"})
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(temporary / file, {name: state[name] for name in names}, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        size = sum(array.nbytes for array in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(temporary / f"{SAFETENSORS}.index.json", index)


def save_params(
    file: str | Path, params: Params, config: GPT2Config | None = None, *, overwrite: bool = True
) -> None:
    """Writes nested dicts of arrays to one safetensors file, names joined by ".", with `config` in its metadata."""
    flat = {name: np.asarray(leaf) for name, leaf in _flatten(params)}
    metadata = {"format": "gpt2_jax"} | (
        {} if config is None else {"config": json.dumps(config.to_dict())}
    )
    with replacing(file, overwrite=overwrite) as temporary:
        save_file(temporary, flat, metadata)


def load_params(file: str | Path) -> Params:
    """Returns the tree that `save_params` wrote, bit for bit."""
    stored = SafetensorsFile(Path(file))
    largest_first = sorted(stored.shapes, key=lambda name: -math.prod(stored.shapes[name]))
    leaves = {name: _to_jax(stored.read(name), name) for name in largest_first}
    return _unflatten({name: leaves[name] for name in stored.shapes})


def load_config(file: str | Path) -> GPT2Config | None:
    """Returns the config in the metadata of a file of params, or `None`; its `dtype` is the params'."""
    stored = SafetensorsFile(Path(file))
    if "config" not in stored.metadata:
        return None
    values = json.loads(stored.metadata["config"])
    return GPT2Config.from_dict(values).replace(dtype=values.get("dtype", "float32"))


def param_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by HF's name, without the prefix `transformer.`."""
    D, F, V = config.n_embd, config.mlp_width, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (V, D),
        "wpe.weight": (config.n_positions, D),
    }
    for layer in (f"h.{i}" for i in range(config.n_layer)):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{name}.weight": (D,), f"{layer}.{name}.bias": (D,)}
        for name, rows, columns in (
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, F),
            ("mlp.c_proj", F, D),
        ):
            shapes |= {
                f"{layer}.{name}.weight": (rows, columns),
                f"{layer}.{name}.bias": (columns,),
            }
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (V, D)}


def from_hf(state: Mapping[str, Any], config: GPT2Config, dtype: Any = None) -> Params:
    """Returns params from HF's names and arrays (numpy, JAX or PyTorch), checked and copied.

    Raises:
      CheckpointError: names are missing or unexpected or have another shape (all are reported together), a weight
        is not a finite float, or a tied head differs from `wte`.
    """
    shapes = {name: tuple(array.shape) for name, array in state.items()}
    return _from_hf(shapes, lambda name: np.array(to_numpy(state[name])), config, _dtype(dtype))


def to_hf(params: Params) -> dict[str, np.ndarray]:
    """Returns the state dict that `GPT2LMHeadModel.save_pretrained` writes for these params."""
    return {_theirs(path): np.asarray(leaf) for path, leaf in _flatten(params)}


def _shards(state: Mapping[str, np.ndarray], limit: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in state.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


# Names and shapes.


def _from_hf(
    shapes: Mapping[str, tuple], read: Callable, config: GPT2Config, target: np.dtype | None
) -> Params:
    """`from_hf`, where `read(name)` returns an array that nothing else refers to, and is called once for a name."""
    names = {
        bare: name for name in shapes if not BUFFER.fullmatch(bare := name.removeprefix(PREFIX))
    }
    if twice := [bare for bare in names if bare in shapes and PREFIX + bare in shapes]:
        raise CheckpointError(
            f"Expected each weight once, got with and without `{PREFIX}`: {', '.join(twice)}."
        )
    expected = param_shapes(config)
    tied_head = names.get("lm_head.weight") if config.tie_word_embeddings else None
    allowed = expected | ({"lm_head.weight": expected["wte.weight"]} if tied_head else {})
    _check_names({bare: shapes[name] for bare, name in names.items()}, allowed)
    leaves = {}
    # The largest first: the passing copy of a tensor then comes while little else is held.
    for bare in sorted(expected, key=lambda bare: -math.prod(expected[bare])):
        array = read(names[bare])
        if bare == "wte.weight" and tied_head:
            _check_tied(array, read(tied_head))
        leaves[bare] = _leaf(array, bare, target)
    return _unflatten({_ours(bare): leaves[bare] for bare in expected})


def _ours(bare: str) -> str:
    """`h.0.ln_1.weight` -> `h.0.ln_1.scale`."""
    *modules, leaf = bare.split(".")
    return ".".join((*modules, LEAF[modules[-1]] if leaf == "weight" else leaf))


def _theirs(path: str) -> str:
    """`h.0.ln_1.scale` -> `transformer.h.0.ln_1.weight`."""
    *modules, leaf = path.split(".")
    bare = ".".join((*modules, "bias" if leaf == "bias" else "weight"))
    return bare if modules[:1] == ["lm_head"] else PREFIX + bare


def _flatten(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _flatten(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _unflatten(leaves: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, leaf in leaves.items():
        *modules, last = path.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    return tree


def _check_names(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    unexpected = [
        f"unexpected: {name} {list(found[name])}" for name in found if name not in expected
    ]
    misshapen = [
        f"{name}: expected {list(shape)}, got {list(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems := missing + unexpected + misshapen:
        if len(problems) > LISTED:
            problems[LISTED:] = [f"and {len(problems) - LISTED} more"]
        raise CheckpointError(
            f"The weights do not fit the config: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(misshapen)} of another shape.\n  " + "\n  ".join(problems)
        )


def _check_tied(wte: np.ndarray, head: np.ndarray) -> None:
    if differing := np.count_nonzero(wte != head):
        raise CheckpointError(
            f"`tie_word_embeddings` is true, but `lm_head.weight` differs from `wte.weight` in {differing} of "
            f"{wte.size} values: set `tie_word_embeddings` to false in config.json to keep both."
        )


# Arrays.


def _dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        target = jnp.dtype(dtype)
    except TypeError:
        target = None
    if target is None or target.name not in DTYPES:
        raise CheckpointError(
            f"`dtype` must be one of {', '.join(DTYPES)}; got {target or dtype!r}."
        )
    return target


def _leaf(array: np.ndarray, name: str, target: np.dtype | None) -> jax.Array:
    if array.dtype.name not in DTYPES:
        raise CheckpointError(
            f"{name}: expected one of {', '.join(DTYPES)}, got {array.dtype.name}."
        )
    _check_finite(array, name)
    if target is not None and target != array.dtype:
        with np.errstate(over="ignore"):
            array = array.astype(target)
        _check_finite(array, f"{name} cast to {target.name}")
    return _to_jax(array, name)


def _check_finite(array: np.ndarray, name: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        bad = array.size - np.count_nonzero(finite)
        raise CheckpointError(
            f"{name}: expected finite weights, got {bad} NaN or infinite of {array.size}."
        )


def _to_jax(array: np.ndarray, name: str) -> jax.Array:
    """Returns `array` on the device. On CPU the two may share memory, so `array` must be nobody else's."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise CheckpointError(
            f"{name} would be {array.dtype.name}: set `jax_enable_x64`, or ask for another `dtype`."
        )
    return jax.device_put(array)
