"""Single files of params, of our own: nested dicts of arrays in safetensors, bit for bit.

Knows nothing of what the arrays are: any tree may be saved so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, local_path, replacing
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.formats import SafetensorsFile, save_file
from gpt2_jax.pretrained.layout import largest_first
from gpt2_jax.pretrained.reading import naming, to_jax
from gpt2_jax.quantised import refuse_quantised

MAX_DEPTH = 100  # of a tree in a file of params; a model's is 5
# Safetensors' metadata are strings.
OUR_METADATA = {"format": "gpt2_jax"}


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
    # As in `from_tensors`, for the sake of the peak of memory.
    for name in largest_first(stored.shapes):
        with naming(stored.file, name):
            leaves[name] = to_jax(stored.read(name), name)
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
