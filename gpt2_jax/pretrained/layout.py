"""What HF calls the weights of a GPT-2 and what shapes they have, and what we call them.

Knows names and shapes alone; nothing of arrays or of files.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, some
from gpt2_jax.modules import Params
from gpt2_jax.pretrained.foreign.names import OTHER_HEADS
from gpt2_jax.pretrained.foreign.names import bare as bare_name
from gpt2_jax.pretrained.formats import Shape

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
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # in the files of older versions
MAX_MISSING_LAYERS = 1000  # that are listed one by one before the report is cut
MAX_PROBLEMS = 50  # lines in one error, about a screen; a wrong `n_layer` gives twelve a layer


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


# Of files, and of params.


def our_path(bare: str) -> str:
    """`h.0.ln_1.weight` -> `h.0.ln_1.scale`."""
    module_path, leaf = bare.rsplit(".", 1)
    if leaf == "weight":
        module = module_path.split(".")[-1]
        leaf = LEAF[module]
    return f"{module_path}.{leaf}"


def hf_name(path: str) -> str:
    """`h.0.ln_1.scale` -> `transformer.h.0.ln_1.weight`."""
    if path.startswith(HEADS):
        return path.removeprefix(HEADS)  # under its own name all along
    module_path, _, leaf = path.rpartition(".")
    if leaf != "bias":
        leaf = "weight"
    # HF's head stands beside the transformer, not in it.
    prefix = "" if path.startswith("lm_head.") else PREFIX
    return f"{prefix}{module_path}.{leaf}"


def by_hf_name(params: Params) -> dict[str, Any]:
    """Returns the params by HF's names, each array where it lies."""
    return {hf_name(path): leaf for path, leaf in flatten_dict(params, sep=".").items()}


def by_bare_name(names: Iterable[str]) -> dict[str, str]:
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


def largest_first(shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the names in the order of reading.

    The passing copy of a large tensor, on its way to the device, then comes while little else is
    held: the peak of memory is little more than the params'.
    """
    return sorted(shapes, key=lambda name: math.prod(shapes[name]), reverse=True)


# What does not fit.


def check_depth(config: GPT2Config, n_names: int, what: str = "the config") -> None:
    """Raises if a config has far more layers than some names could be of."""
    # Counted before they are named: names of a hundred million layers would fill the memory.
    if config.n_layer > max(n_names, MAX_MISSING_LAYERS):
        expected = f"{config.n_layer} layers (`n_layer`), got {n_names} names"
        raise CheckpointError(f"The weights do not fit {what}: expected {expected}.")


def check_names(
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


def without_other_heads(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], what: str
) -> dict[str, Shape]:
    """Returns names and shapes without heads that stand beside a whole GPT-2."""
    rest = {name: shape for name, shape in found.items() if not OTHER_HEADS.fullmatch(name)}
    # Beside half a model they stay, in a report of problems that they may explain.
    if len(rest) == len(found) or _misfits(rest, expected, what):
        return dict(found)
    return rest
