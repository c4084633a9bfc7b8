"""GGUF, the files of llama.cpp, of architecture `gpt2`: read and written by the package `gguf`.

Names and layout are those of llama.cpp's `convert_hf_to_gguf.py` for GPT-2: kernels `[O, I]`, and
what has one axis in float32, as are the positions. Fields that GGUF has no name for are kept in one
of our own, so that what was written here is read back as it was.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign.damage import naming
from gpt2_jax.pretrained.foreign.names import DENSE_WEIGHT, Checkpoint, Renamed, bare, upright
from gpt2_jax.pretrained.foreign.raw import Place, RawTensors
from gpt2_jax.pretrained.formats import Shape, Tensor
from gpt2_jax.tokenizer import Tokenizer

KIND = "a GGUF file"
MAGIC = b"GGUF"
ARCHITECTURE = "gpt2"
OUR_CONFIG = "gpt2_jax.config"
TOKENIZER = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
# GGUF's names of dtypes that are no quantisation.
PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": jnp.bfloat16}

# GGUF's names of modules -> HF's, outside the layers and in them.
MODULES = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)")
# The tanh approximation, the only GELU that llama.cpp has for this architecture.
LLAMA_CPP_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast")


class Packed(NamedTuple):
    """How a tensor's bytes are to be read."""

    type: Any  # `gguf.GGMLQuantizationType`
    shape: Shape


class GGUFTensors:
    """Tensors of a GGUF file, dequantised by `gguf`.

    Args:
      raw: their bytes.
      packed: what the bytes of each mean.
      dtype: of all, or `None` for the file's own: float32 for what is quantised.
    """

    def __init__(self, raw: RawTensors, packed: Mapping[str, Packed], dtype: np.dtype | None):
        self.raw = raw
        self.packed = dict(packed)
        self.dtype = dtype
        self.shapes: dict[str, Shape] = {name: each.shape for name, each in packed.items()}

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        packed = self.packed[name]
        array = _unpacked(self.raw.read(name), packed)
        return array if self.dtype is None else array.astype(self.dtype)

    @property
    def file(self) -> Path | None:
        """See `TensorReader`."""
        return self.raw.file

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        return self.raw.file_of(name)


def _unpacked(data: Tensor, packed: Packed) -> Tensor:
    """Returns what bytes hold."""
    import gguf

    if packed.type.name in PLAIN:
        return data.view(PLAIN[packed.type.name]).reshape(packed.shape)
    # A row is a whole number of blocks, each with a scale of its own.
    rows = data.reshape(*packed.shape[:-1], -1)
    return gguf.dequantize(rows, packed.type)


def is_it(head: bytes) -> bool:
    """Returns whether a file that begins so is GGUF."""
    return head.startswith(MAGIC)


def read(file: Path) -> Checkpoint:
    """Returns what a GGUF file holds.

    Raises:
      CheckpointError: the package is not installed, the file is damaged, or it holds another
        architecture, or lacks a field.
    """
    opened = _open(file)
    fields = {}
    for name, field in opened.fields.items():
        if name not in TOKENIZER:  # tens of thousands of texts, which nobody wants here
            fields[name] = field.contents()
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        expected = f'the architecture "{ARCHITECTURE}"'
        raise CheckpointError(f'{file}: expected {expected}, got "{architecture}".')
    tensors = {tensor.name: tensor for tensor in opened.tensors}
    # Many files hold the table of a tied head twice.
    if _is_same(tensors.get("output.weight"), tensors.get("token_embd.weight")):
        del tensors["output.weight"]
    config = _config(file, fields, tensors)
    dtype = None
    # One dtype for all, and float32 is what stands beside quantised tensors anyway.
    if any(tensor.tensor_type.name not in PLAIN for tensor in tensors.values()):
        dtype = np.dtype(np.float32)
    elif OUR_CONFIG in fields:  # also what llama.cpp wants in float32 was once in the model's dtype
        dtype = np.dtype(jnp.dtype(config.dtype))
    names = {_hf_name(name): name for name in tensors}
    reader = Renamed(_reader(file, tensors, dtype), names)
    return Checkpoint(KIND, upright(reader), config)


def _reader(file: Path, tensors: Mapping[str, Any], dtype: np.dtype | None) -> GGUFTensors:
    """Returns a reader of the tensors that `gguf` has found in a file."""
    places = {}
    packed = {}
    for name, tensor in tensors.items():
        n_bytes = int(tensor.n_bytes)
        places[name] = Place(file, int(tensor.data_offset), (n_bytes,), np.dtype(np.uint8))
        shape = tuple(int(length) for length in tensor.shape[::-1])  # the last axis comes first
        packed[name] = Packed(tensor.tensor_type, shape)
    return GGUFTensors(RawTensors(places), packed, dtype)


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        advice = "which is not installed. Install `gpt2_jax[gguf]`."
        raise CheckpointError(f"{file}: reading it needs the package gguf, {advice}") from None
    with naming(file):
        return gguf.GGUFReader(file)


def _is_same(head: Any, table: Any) -> bool:
    """Returns whether two tensors of a file are equal, bit for bit."""
    if head is None or table is None or head.tensor_type != table.tensor_type:
        return False
    return np.array_equal(head.data, table.data)


def _config(file: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> GPT2Config:
    """Returns the config that a file's fields give."""
    # Written here, a file has all of it.
    if OUR_CONFIG in fields:
        values = json.loads(fields[OUR_CONFIG])
        return GPT2Config.from_dict(values).replace(dtype=values["dtype"])
    named = {
        "n_positions": "gpt2.context_length",
        "n_embd": "gpt2.embedding_length",
        "n_layer": "gpt2.block_count",
        "n_head": "gpt2.attention.head_count",
        "layer_norm_epsilon": "gpt2.attention.layer_norm_epsilon",
    }
    missing = [name for name in named.values() if name not in fields]
    if missing or "token_embd.weight" not in tensors:
        expected = ", ".join(missing or ["the tensor token_embd.weight"])
        raise CheckpointError(f"{file}: expected {expected}, which {KIND} of a GPT-2 has.")
    values = {name: fields[own_name] for name, own_name in named.items()}
    return GPT2Config(
        # GGUF counts the axes from the last one on.
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        # Not among those that must be there: without it HF's default holds, four widths.
        n_inner=fields.get("gpt2.feed_forward_length"),
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        **values,
    )


def _hf_name(name: str) -> str:
    """`blk.0.attn_qkv.weight` -> `h.0.attn.c_attn.weight`; a name that GPT-2 has not stays."""
    module, _, leaf = name.rpartition(".")
    layer = LAYER.fullmatch(module)
    if layer and layer[2] in LAYER_MODULES:
        return f"h.{layer[1]}.{LAYER_MODULES[layer[2]]}.{leaf}"
    return f"{MODULES.get(module, module)}.{leaf}"


def _gguf_name(name: str) -> str:
    """`h.0.attn.c_attn.weight` -> `blk.0.attn_qkv.weight`."""
    module, _, leaf = bare(name).rpartition(".")
    own_names = {ours: own for own, ours in MODULES.items()}
    if module in own_names:
        return f"{own_names[module]}.{leaf}"
    _, layer, rest = module.split(".", 2)
    own_names = {ours: own for own, ours in LAYER_MODULES.items()}
    return f"blk.{layer}.{own_names[rest]}.{leaf}"


def read_tokenizer(file: Path) -> Tokenizer:
    """Returns the tokenizer in a GGUF file.

    Raises:
      CheckpointError: as `read`.
      ValueError: there is none of GPT-2's kind.
    """
    import gguf

    fields = _open(file).fields
    names = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    if any(name not in fields for name in names) or fields[names[0]].contents() != "gpt2":
        raise ValueError(f'{file}: expected a tokenizer of the model "gpt2", got another or none.')
    tokens = fields["tokenizer.ggml.tokens"].contents()
    # Where a file says nothing of kinds, no token is special.
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in fields:
        kinds = fields["tokenizer.ggml.token_type"].contents()
    vocab = {}
    special_tokens = {}
    for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        # Both are spelled as they stand in a text, and not in the letters for bytes.
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special_tokens[token] = id
        elif kind != gguf.TokenType.UNUSED:  # a row that pads the table
            vocab[token] = id
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"].contents()]
    return Tokenizer(vocab, merges, special_tokens)


# Writing.


def write(
    file: Path, state: Mapping[str, Tensor], config: GPT2Config, tokenizer: Tokenizer
) -> None:
    """Writes HF's names and arrays, all biases among them, as a file that llama.cpp runs.

    Raises:
      CheckpointError: the package is not installed, or llama.cpp computes something else.
    """
    try:
        import gguf
    except ImportError:
        advice = "which is not installed. Install `gpt2_jax[gguf]`."
        raise CheckpointError(f"Writing GGUF needs the package gguf, {advice}") from None
    dtype_name = state["transformer.wte.weight"].dtype.name
    _check_llama_cpp_computes(config, dtype_name)
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype_name]])
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    # A field of our own, which llama.cpp passes over as it does all that it does not know.
    writer.add_string(OUR_CONFIG, json.dumps(config.to_dict() | {"dtype": dtype_name}))
    _add_tokenizer(writer, config, tokenizer)
    for name, array in state.items():
        own_name = _gguf_name(name)
        upright = np.ascontiguousarray(array.T) if DENSE_WEIGHT.fullmatch(name) else array
        # llama.cpp adds what has one axis, and the positions, in float32 alone.
        if array.ndim == 1 or own_name == "position_embd.weight":
            upright = upright.astype(np.float32)
        _add_tensor(writer, own_name, upright)
    # In the order of the file, in which alone the writer takes these calls.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}


def _check_llama_cpp_computes(config: GPT2Config, dtype_name: str) -> None:
    """Raises unless llama.cpp's GPT-2 is this config's; warns where only its GELU is another."""
    if dtype_name not in FILE_TYPES:
        expected = f"weights in one of {', '.join(FILE_TYPES)}"
        raise CheckpointError(f"For GGUF expected {expected}, got {dtype_name}: give `--dtype`.")
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for name, value in expected.items():
        got = getattr(config, name)
        if got != value:
            raise CheckpointError(f"llama.cpp's GPT-2 has {name}={value} only, got {got}.")
    if config.activation_function not in LLAMA_CPP_GELU:
        used = f"this model was trained with {config.activation_function}"
        warnings.warn(
            f"llama.cpp computes gelu_new, and {used}: its logits will differ. Read back here, the "
            "file keeps its own.",
            stacklevel=2,
        )


def _add_tokenizer(writer: Any, config: GPT2Config, tokenizer: Tokenizer) -> None:
    """Adds a tokenizer; ids that it lacks are filled, as llama.cpp wants one for each row."""
    import gguf

    by_id = {id: token for token, id in tokenizer.vocab.items()}
    special = {id: token for token, id in tokenizer.special_tokens.items()}
    tokens = []
    kinds = []
    for id in range(config.vocab_size):
        kind = gguf.TokenType.NORMAL
        if id in special:
            kind = gguf.TokenType.CONTROL
        elif id not in by_id:
            kind = gguf.TokenType.UNUSED
        # `[PAD...]` is how llama.cpp's converter spells such a row.
        tokens.append(special.get(id) or by_id.get(id, f"[PAD{id}]"))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    # By this name llama.cpp knows the pattern that cuts a text into pieces.
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    if isinstance(config.bos_token_id, int):
        writer.add_bos_token_id(config.bos_token_id)
    for id in config.eos_token_ids[:1]:  # GGUF has one
        writer.add_eos_token_id(id)


def _add_tensor(writer: Any, name: str, array: Tensor) -> None:
    import gguf

    if array.dtype.name != "bfloat16":
        writer.add_tensor(name, array)
        return
    # As bytes: numpy, and so the package, has no such dtype.
    data = np.ascontiguousarray(array).view(np.uint8)
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
