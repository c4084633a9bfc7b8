"""Checkpoints on disk and params in memory: HF's layout, both ways.

Knows what a checkpoint consists of, and how one is written. What tensors are called is `layout`'s,
how each is read `reading`'s; nothing here knows the forward pass.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import (
    CheckpointError,
    NameFilter,
    replacing,
    write_json,
)
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.foreign.find import CONFIG, open_checkpoint
from gpt2_jax.pretrained.foreign.names import upright
from gpt2_jax.pretrained.formats import (
    SAFETENSORS,
    WEIGHT_FILE,
    StateDict,
    Tensor,
    in_order,
    on_host,
    save_file,
)
from gpt2_jax.pretrained.hub import naming_download, resolve
from gpt2_jax.pretrained.layout import PREFIX, by_hf_name, check_depth, check_names, param_shapes
from gpt2_jax.pretrained.reading import (
    LOADED,
    Known,
    Target,
    checked_dtype,
    checked_target,
    from_tensors,
)
from gpt2_jax.quantised import Quantised, refuse_quantised
from gpt2_jax.sharding import Rules
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import is_tokenizer_file

# Safetensors' metadata are strings. HF asks for the framework that wrote the file.
HF_METADATA = {"format": "pt"}


# Folders.


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


def load_from(
    path: Path,
    config: GPT2Config | None,
    target: Target,
    *,
    heads: bool = False,
    known: Known | None = None,
) -> tuple[GPT2Config, Params]:
    """Returns what `load` does, of a checkpoint at a path; `known` is that of `from_tensors`."""
    with naming_download(path):
        # The config with the file: it says what the tensors must be called, and how large they are.
        checkpoint, config = open_checkpoint(path, config)
        config_file = path / CONFIG
        what = str(config_file) if config_file.is_file() else "the config"
        try:
            params = from_tensors(checkpoint.reader, config, target, what, heads=heads, known=known)
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
    check_depth(config, len(jax.tree.leaves(params)))
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


def _dtype_of(params: Params) -> str:
    """Returns the dtype of params, by its name: that of `wte`, should they differ.

    That of `wpe` where `wte` is quantised.
    """
    table = params["wte"]["embedding"]
    if isinstance(table, Quantised):
        table = params["wpe"]["embedding"]
    return table.dtype.name


# State dicts.


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
    return from_tensors(upright(StateDict(state)), config, Target(checked_dtype(dtype, LOADED)))


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
    return {name: on_host(leaf) for name, leaf in by_hf_name(params).items()}


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
    state = by_hf_name(params)
    heads = by_hf_name({"heads": params["heads"]}) if "heads" in params else {}
    shapes = {
        name.removeprefix(PREFIX): array.shape for name, array in state.items() if name not in heads
    }
    # Before a file is written: HF fills what it does not find with fresh weights, and only warns.
    check_names(shapes, param_shapes(config))
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
