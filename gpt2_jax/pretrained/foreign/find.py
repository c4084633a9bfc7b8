"""Which format a checkpoint is in, told by what its files hold, and the config that goes with it.

Knows every format; what the tensors must be is `layout.py`'s to say.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, check_content, listing
from gpt2_jax.pretrained import formats
from gpt2_jax.pretrained.foreign import (
    flax_msgpack,
    gguf_file,
    keras_h5,
    llmc,
    npz,
    openai,
    torch_file,
)
from gpt2_jax.pretrained.foreign.damage import naming
from gpt2_jax.pretrained.foreign.names import (
    Checkpoint,
    Renamed,
    prefix_of,
    said_by_shapes,
    upright,
)
from gpt2_jax.pretrained.formats import SafetensorsFile, TensorReader
from gpt2_jax.tokenizer import Tokenizer

CONFIG = "config.json"
HEAD_BYTES = 256
# Of several in one folder, these are HF's, with the same weights in each.
HF_FILES = (flax_msgpack.FILE, keras_h5.FILE)
EXPECTED = (
    "safetensors, PyTorch's, Flax's msgpack, TensorFlow's h5 or index, llm.c's, GGUF, or .npz"
)


class Format(NamedTuple):
    """A format of a single file."""

    is_it: Callable[[Path, bytes], bool]  # told by the file and its first bytes
    read: Callable[[Path], Checkpoint]


def open_checkpoint(path: Path, config: GPT2Config | None) -> tuple[Checkpoint, GPT2Config]:
    """Returns what lies at a path, a file or a folder, and its config.

    Args:
      path: what `resolve` returned.
      config: the one to take instead of the checkpoint's own.

    Raises:
      CheckpointError: nothing here is a checkpoint, or there is no config.
    """
    if is_hf_folder(path):
        # The config first: without it nobody needs the weights.
        config = config or config_in(path)
        return Checkpoint("", upright(_hf_reader(path)), None), config
    file = path if path.is_file() else _only_checkpoint_in(path)
    checkpoint = open_file(file)
    prefix = prefix_of(checkpoint.reader.shapes)
    # HF's own needs no words; others tell of the tool that saved the file.
    if prefix not in ("", "transformer."):
        kind = f"{checkpoint.kind}, with `{prefix}` before its names"
        checkpoint = checkpoint._replace(kind=kind)
    _check_names(file, checkpoint)
    # What was given counts first, then what the file holds, then what lies beside it.
    config = config or checkpoint.config
    if config is None and (file.parent / CONFIG).is_file():
        config = config_in(file.parent)
    if config is None:
        raise _no_config(file, checkpoint)
    return checkpoint, config


def open_file(file: Path) -> Checkpoint:
    """Returns what a file holds, in whatever format.

    Raises:
      CheckpointError: it is in none, or damaged.
    """
    check_content(file, allowed=(formats.ZIP_MAGIC,))  # PyTorch's and numpy's files are zips
    format = _format_of(file)
    if format is None:
        got = f"got one that begins with {_head(file)[:16]!r}"
        raise CheckpointError(f"{file}: expected a file of {EXPECTED}, {got}.")
    with naming(file):
        return format.read(file)


def config_in(folder: Path) -> GPT2Config:
    """Returns the config in a folder's `config.json`.

    Raises:
      CheckpointError: there is none, or none of a GPT-2.
    """
    try:
        return GPT2Config.from_json_file(folder / CONFIG)
    except FileNotFoundError:
        expected = f"`{CONFIG}` in this folder"
        raise CheckpointError(f"{folder}: expected {expected}, got {listing(folder)}.") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def folder_of(path: Path) -> Path:
    """Returns a folder itself, or the one that a file lies in."""
    return path.parent if path.is_file() else path


def n_tokens(path: Path) -> int | None:
    """Returns how many tokens the model at a path has, or `None` where no sound one is."""
    try:
        file = path if path.is_file() else _only_checkpoint_in(path)
        return said_by_shapes(open_file(file).reader.shapes).get("vocab_size")
    except CheckpointError:
        return None  # whoever loads the weights says what is wrong with them


def has_tokenizer(path: Path) -> bool:
    """Returns whether a path is a file that holds a tokenizer: only GGUF does."""
    return path.is_file() and gguf_file.is_it(_head(path))


def read_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer that a file holds.

    Raises:
      ValueError: it is of another kind than GPT-2's.
    """
    return gguf_file.read_tokenizer(path)


# Files, by their content.


def _format_of(file: Path) -> Format | None:
    head = _head(file)
    # An empty file has no first byte for a format to look at.
    if not head:
        return None
    return next((format for format in FORMATS if format.is_it(file, head)), None)


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(HEAD_BYTES)


def _is_safetensors(file: Path, head: bytes) -> bool:
    # The length of a JSON object, which follows.
    n_bytes = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and n_bytes < file.stat().st_size


def _is_torch(file: Path, head: bytes) -> bool:
    # Both PyTorch and numpy write zips: what is in one tells whose it is.
    if head.startswith(formats.ZIP_MAGIC):
        return not npz.is_npz(file)
    # A pickle of protocol 2 or later: the format before PyTorch 1.6.
    return head[:1] == b"\x80" and head[1] in range(2, 6)


def _is_npz(file: Path, head: bytes) -> bool:
    return head.startswith(formats.ZIP_MAGIC) and npz.is_npz(file)


def _is_index(file: Path, head: bytes) -> bool:
    del head
    return openai.is_index(file)


def _by_head(is_it: Callable[[bytes], bool]) -> Callable[[Path, bytes], bool]:
    """Returns a test of a file that looks at its first bytes alone."""

    def is_it_by_head(file: Path, head: bytes) -> bool:
        del file
        return is_it(head)

    return is_it_by_head


def read_safetensors(file: Path) -> Checkpoint:
    """Returns what one file of safetensors holds, in HF's names or in ours, which has a config.

    Raises:
      CheckpointError: as `SafetensorsFile`.
    """
    stored = SafetensorsFile(file)
    names = {}
    for name in stored.shapes:
        module, _, leaf = name.rpartition(".")
        # By the leaf alone, as the modules have the names of HF's.
        is_ours = leaf in flax_msgpack.LEAVES
        names[f"{module}.weight" if is_ours else name] = name
    config = None
    # In files of `save_params`; HF has its config in a file of its own.
    if "config" in stored.metadata:
        config = GPT2Config.from_dict(json.loads(stored.metadata["config"]))
    return Checkpoint("a safetensors file", upright(Renamed(stored, names)), config)


# The surest signs first: msgpack's is two bytes long.
FORMATS = (
    Format(_by_head(gguf_file.is_it), gguf_file.read),
    Format(_by_head(keras_h5.is_it), keras_h5.read),
    Format(_is_npz, npz.read),
    Format(_is_torch, torch_file.read),
    Format(_by_head(llmc.is_it), llmc.read),
    Format(_is_index, openai.read),
    Format(_is_safetensors, read_safetensors),
    Format(_by_head(flax_msgpack.is_it), flax_msgpack.read),
)


# Folders.


def is_hf_folder(path: Path) -> bool:
    """Returns whether a path is a folder of weights under HF's names for PyTorch's."""
    if not path.is_dir():
        return False
    return any(formats.WEIGHT_FILE.fullmatch(file.name) for file in path.iterdir())


def _hf_reader(folder: Path) -> TensorReader:
    """Returns a reader of a folder's weights under HF's names."""
    whole = folder / formats.TORCH
    # Training codes save under HF's name too, and keep the weights in a container.
    if whole.is_file() and not any(folder.glob("model*.safetensors*")):
        return torch_file.ContainedTensors(whole)
    return formats.open_folder(folder)


def _only_checkpoint_in(folder: Path) -> Path:
    """Returns the file in a folder that is a checkpoint.

    Raises:
      CheckpointError: there is none, or one cannot tell which.
    """
    # Before single files: TensorFlow's data files beside an index are no checkpoints by themselves.
    index = openai.find_index(folder)
    if index is not None:
        return index
    for name in HF_FILES:
        if (folder / name).is_file():  # also where it is damaged, which its reader says
            return folder / name
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _format_of(file)]
    if not files:
        config_in(folder)  # without one this is no folder of HF's at all
        formats.open_folder(folder)  # which says what it expects
    if len(files) > 1:
        names = [file.name for file in files]
        expected = "one checkpoint in this folder"
        got = f"got {', '.join(names)}: give the path of one of them"
        raise CheckpointError(f"{folder}: expected {expected}, {got}.")
    return files[0]


# What is refused, by name.


def _check_names(file: Path, checkpoint: Checkpoint) -> None:
    """Raises for weights that are no GPT-2's at all, before anything asks for a config."""
    names = list(checkpoint.reader.shapes)
    # First, as names of adapters begin with those of layers, and would pass for a model's.
    if any("lora_" in name for name in names):
        advice = "load their model, then `merge_lora` what `load_lora` reads in this folder"
        raise CheckpointError(f"{file}: expected a whole GPT-2, got LoRA's adapters: {advice}.")
    if not said_by_shapes(checkpoint.reader.shapes):
        expected = f"GPT-2's names, such as `h.0.attn.c_attn.weight`, in {checkpoint.kind}"
        raise CheckpointError(f"{file}: expected {expected}; got {', '.join(names[:5])}.")


def _no_config(file: Path, checkpoint: Checkpoint) -> CheckpointError:
    """Returns the error for weights without a config: which fields are known and which are not."""
    said = said_by_shapes(checkpoint.reader.shapes)
    known = ", ".join(f"{name}={value}" for name, value in said.items())
    needed = "`n_head`, and `activation_function` if it is not gelu_new, they do not"
    return CheckpointError(
        f"{file} holds no config: give one with `--config config.json` of `gpt2-jax convert`, with "
        f"`load(path, config=GPT2Config(...))`, or as `{CONFIG}` beside it. As {checkpoint.kind}, "
        f"its weights say {known}; {needed}."
    )
