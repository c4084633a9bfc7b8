"""Low-rank adapters on disk, as PEFT has them: `adapter_model.safetensors` and its config.

Its matrices are `[R, I]` and `[O, R]`; ours (`training/lora.py`) are the transposes, under the
names of the layers.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from gpt2_jax.files import CheckpointError, local_path, read_json_object, replacing, write_json
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.formats import SafetensorsFile, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model.transformer."
# PEFT leaves out `.default`, its name of the adapter, where it saves; other codes do not.
NAME = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?"
    r"(h\.\d+\.\w+\.\w+)\.lora_(A|B)(?:\.default)?\.weight"
)
# What else PEFT's LoRA can do, by the field that asks for it and the value that does not.
ELSEWHERE = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
}


class Lora(NamedTuple):
    """Adapters, and the `alpha` of `merge_lora` that they were trained with.

    Examples:
      >>> gpt2_jax.pretrained.peft.Lora._fields
      ('adapters', 'alpha')
    """

    adapters: Params
    alpha: float


def load_lora(folder: str | Path) -> Lora:
    """Returns the adapters in a folder of PEFT's, for `merge_lora`.

    Raises:
      CheckpointError: there are none, they are of another kind than LoRA, or need what
        `merge_lora` does not do, such as DoRA.

    Examples:
      >>> adapters = gpt2_jax.lora(jax.random.key(0), params, rank=2)
      >>> gpt2_jax.save_lora(folder / "adapters", adapters, alpha=4.0)
      >>> found = gpt2_jax.load_lora(folder / "adapters")
      >>> found.alpha, jax.tree.all(jax.tree.map(jnp.array_equal, found.adapters, adapters))
      (4.0, True)
    """
    folder = local_path(folder)
    config_file = folder / CONFIG
    try:
        config = read_json_object(config_file)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: expected `{CONFIG}` in this folder.") from None
    rank = _check_config(config_file, config)
    # PEFT's own default, where a config leaves it out.
    alpha = config.get("lora_alpha", 8)
    # Its scale is `alpha / sqrt(rank)`, and `merge_lora`'s `alpha / rank`.
    if config.get("use_rslora"):
        alpha *= rank**0.5
    adapters = {}
    stored = SafetensorsFile(folder / WEIGHTS)
    for name in stored.shapes:
        match = NAME.fullmatch(name)
        # Not passed over: without it the merged model would not be the one that was trained.
        if match is None:
            expected = "adapters of GPT-2's layers, such as `h.0.attn.c_attn.lora_A.weight`"
            raise CheckpointError(f"{stored.file}: expected {expected}, got {name}.")
        adapters[f"{match[1]}.lora_{match[2]}"] = np.ascontiguousarray(stored.read(name).T)
    _check_pairs(stored.file, adapters)
    return Lora(traverse_util.unflatten_dict(adapters, sep="."), alpha)


def save_lora(
    folder: str | Path,
    adapters: Params,
    *,
    alpha: float = 8.0,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters as a folder that PEFT's `PeftModel.from_pretrained` reads, all or nothing.

    Args:
      folder: where to; an existing folder must be empty unless `overwrite`.
      adapters: what `lora` made, trained.
      alpha: the one of `merge_lora` that they were trained with.
      base_model: name or path of the model that they belong to, for the reader's information.
      overwrite: replaces a folder that is there.

    Raises:
      CheckpointError: the adapters are not in pairs or not of one rank, or `folder` is in use.

    Examples:
      >>> adapters = gpt2_jax.lora(jax.random.key(0), params, rank=2)
      >>> gpt2_jax.save_lora(folder / "written", adapters)
      >>> sorted(file.name for file in (folder / "written").iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(adapters, sep=".")
    # More than one would need a `rank_pattern`, which `load_lora` could not read back.
    ranks = sorted({_check_pairs(None, flat)[name] for name in _layers(flat)})
    if len(ranks) != 1:
        raise CheckpointError(f"PEFT's config has one rank, got adapters of {ranks}.")
    state = {}
    for name, matrix in flat.items():
        state[f"{PREFIX}{name}.weight"] = np.ascontiguousarray(np.asarray(matrix).T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks[0],
        "lora_alpha": alpha,
        # Of training alone, and `merge_lora` has none: it adds matrices, not activations.
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole names, as PEFT matches by their ends: `c_proj` would be the MLP's as well.
        "target_modules": _layers(flat),
        "fan_in_fan_out": True,  # HF's GPT-2 keeps kernels as `[I, O]`
        # As PEFT itself saves: adapters that are loaded are not trained unless one asks for it.
        "inference_mode": True,
    }
    with replacing(folder, overwrite=overwrite) as temporary:
        temporary.mkdir()
        write_json(temporary / CONFIG, config)
        save_file(temporary / WEIGHTS, state, {"format": "pt"})


def _check_config(file: Path, config: dict[str, Any]) -> int:
    """Returns the rank; raises for what is no plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: expected adapters of the kind LORA, got {kind!r}.")
    for name, plain in ELSEWHERE.items():
        # Files hold null for what nobody asked for, whatever the field's default is.
        value = config.get(name)
        if value is not None and value not in plain:
            expected = f"`{name}` to be {json.dumps(plain[0])}"
            raise CheckpointError(f"{file}: expected {expected}, got {json.dumps(value)}.")
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{file}: expected a rank `r` of at least 1, got {rank!r}.")
    return rank


def _layers(flat: dict[str, Any]) -> list[str]:
    """Returns the names of the layers that have adapters."""
    return sorted({name.rpartition(".")[0] for name in flat})


def _check_pairs(file: Path | None, flat: dict[str, Any]) -> dict[str, int]:
    """Returns the rank of each layer's adapter; raises where one of its two matrices is missing."""
    place = "" if file is None else f"{file}: "
    if not flat:
        raise CheckpointError(f"{place}expected adapters, got none.")
    ranks = {}
    # By layers, not by matrices: so a pair is found out that lacks either of its halves.
    for layer in _layers(flat):
        a = flat.get(f"{layer}.lora_A")
        b = flat.get(f"{layer}.lora_B")
        if a is None or b is None or a.shape[1] != b.shape[0]:
            shapes = [None if matrix is None else list(matrix.shape) for matrix in (a, b)]
            expected = f"`lora_A` and `lora_B` of one rank for {layer}"
            raise CheckpointError(f"{place}expected {expected}, got {shapes[0]} and {shapes[1]}.")
        ranks[layer] = int(a.shape[1])
    return ranks
