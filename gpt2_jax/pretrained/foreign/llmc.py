"""karpathy/llm.c's `.bin` files, as its `train_gpt2.py` and `train_gpt2.cu` write them.

A header of 256 integers, and the tensors one after the other: each kind for all layers in turn,
kernels as `[O, I]`. The vocabulary is padded with rows that no token has; they are left out.
"""

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign.names import Checkpoint, upright
from gpt2_jax.pretrained.foreign.raw import Place, RawTensors

KIND = "a model of llm.c"
MODEL = 20240326  # the first number of a model's file
# Those of llm.c's other files, which are refused by name.
OTHERS = {
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer of llm.c",
    20240520: "tokens of llm.c",
    20240522: "an evaluation set of llm.c",
    20240527: "an optimiser's state of llm.c",
}
N_HEADER = 256
DTYPES = {3: np.dtype("<f4"), 5: np.dtype(jnp.bfloat16)}  # by the version of the format
END_OF_TEXT = 50256


def is_it(head: bytes) -> bool:
    """Returns whether a file that begins so is one of llm.c's."""
    first = int.from_bytes(head[:4], "little")
    return first == MODEL or first in OTHERS


def read(file: Path) -> Checkpoint:
    """Returns what a model's file holds.

    Raises:
      CheckpointError: it is no model's, of another version, or of another length than it says.
    """
    # At least one number is there, which `is_it` has seen; a short file gives fewer than asked for.
    header = np.fromfile(file, "<i4", count=N_HEADER)
    if header[0] in OTHERS:
        raise CheckpointError(f"{file}: expected {KIND}, got {OTHERS[int(header[0])]}.")
    if len(header) < N_HEADER:
        got = f"got {file.stat().st_size} bytes"
        raise CheckpointError(f"{file}: expected a header of {4 * N_HEADER} bytes, {got}.")
    version, *sizes, n_rows = [int(number) for number in header[1:8]]
    if version not in DTYPES:
        # Version 1 and 2 keep the LayerNorms at the end, and no vocabulary of theirs is padded.
        expected = "version 3 (float32) or 5 (bfloat16) of llm.c's format"
        raise CheckpointError(f"{file}: expected {expected}, got version {version}.")
    n_positions, vocab_size, n_layer, n_head, n_embd = sizes
    # The header names none: it is GPT-2's, where the vocabulary reaches that far.
    end = END_OF_TEXT if vocab_size > END_OF_TEXT else None
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=end,
        eos_token_id=end,
    )
    dtype = DTYPES[version]
    # Before anything is laid out by it: a damaged header may speak of a billion layers.
    expected_bytes = 4 * N_HEADER + _n_parameters(config, n_rows) * dtype.itemsize
    n_bytes = file.stat().st_size
    if n_bytes != expected_bytes:
        raise CheckpointError(f"{file}: expected {expected_bytes:,} bytes, got {n_bytes:,}.")
    places = _places(file, config, n_rows=n_rows, dtype=dtype)
    return Checkpoint(KIND, upright(RawTensors(places)), config)


def _n_parameters(config: GPT2Config, n_rows: int) -> int:
    width = config.n_embd
    # Twelve square matrices' worth, nine widths of biases, two LayerNorms.
    per_layer = 12 * width**2 + 9 * width + 4 * width
    tables = (n_rows + config.n_positions) * width
    return tables + config.n_layer * per_layer + 2 * width


def _places(file: Path, config: GPT2Config, *, n_rows: int, dtype: np.dtype) -> dict[str, Place]:
    """Returns where the tensors lie, in the order of the file."""
    width = config.n_embd
    per_layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (3 * width, width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    shapes = {"wte.weight": (n_rows, width), "wpe.weight": (config.n_positions, width)}
    # Kind by kind, not layer by layer: llm.c has one array for all layers of a kind.
    for name, shape in per_layer.items():
        for layer in range(config.n_layer):
            shapes[f"h.{layer}.{name}"] = shape
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}

    places = {}
    offset = 4 * N_HEADER
    for name, shape in shapes.items():
        places[name] = Place(file, offset, shape, dtype)
        offset += math.prod(shape) * dtype.itemsize
    # The rows that no token has are the last.
    table = places["wte.weight"]
    places["wte.weight"] = table._replace(shape=(config.vocab_size, width))
    return places
