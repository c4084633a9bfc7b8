"""Conversion of weights between formats: any that is read to any that is written.

Knows folders and files; names and formats are its neighbours'.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, local_path, replacing, write_json
from gpt2_jax.model import apply
from gpt2_jax.modules import Params
from gpt2_jax.pretrained import hub, loading, params_file, reading, weights
from gpt2_jax.pretrained.foreign import export, find, flax_msgpack
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer_files import files_in

# Largest difference allowed, relative to the largest logit, by the dtype of the written weights.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}

N_ROWS = 2  # of the random text on which logits are compared
LONGEST_ROW = 32


class Difference(NamedTuple):
    """How far logits are from PyTorch's."""

    error: float  # the largest difference
    scale: float  # the largest logit


class Conversion(NamedTuple):
    """What was written."""

    n_parameters: int
    dtype: str
    difference: Difference | None  # where it was verified


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    config_file: str | Path | None = None,
    verified: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Writes the weights of `source` to `target`, all or nothing.

    Args:
      source: whatever `load` takes: "demo", a hub id, a folder or a file.
      target: a file of params if it ends in `.safetensors`; a file for llama.cpp, Flax or nanoGPT
        if it ends in `.gguf`, `.msgpack`, or `.pt` or `.pth`; otherwise a folder in HF's layout,
        which gets the source's tokenizer files as well.
      dtype: to cast to; by default the weights stay as they are.
      revision: branch, tag or commit on the hub.
      config_file: `config.json`, or a folder with one, for weights that hold none.
      verified: compares the logits with PyTorch's before anything takes the target's place.
      overwrite: replaces what is at the target.

    Raises:
      CheckpointError: the source is no sound GPT-2, the target is in use, PyTorch is not installed,
        or the logits differ.
    """
    dtype = reading.checked_dtype(dtype)  # which are fewer than `load` takes
    place = hub.resolve(source, revision=revision)
    brings_tokenizer = bool(files_in(find.folder_of(place))) or find.has_tokenizer(place)
    keep = None
    if not (is_params_file(target) or export.is_written(Path(target))):
        keep = weights.kept_files(with_tokenizer=brings_tokenizer)
    # So that float64 weights stay what they are.
    with (
        jax.enable_x64(True),
        replacing(target, overwrite=overwrite, keep=keep) as temporary,
    ):
        config, params = read(place, config_file=config_file, dtype=dtype)
        write(temporary, params, config, source=place)
        dtype_name = params["wte"]["embedding"].dtype.name
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        difference = None
        if verified:
            difference = compare(temporary, place, config)
            _check(difference, TOLERANCE[dtype_name])
    beside = Path(target).expanduser().parent / find.CONFIG
    # Under HF's name it is part of a folder, where HF and `load` look for the config beside it.
    if Path(target).name == flax_msgpack.FILE and not beside.exists():
        write_json(beside, config.to_dict() | {"dtype": dtype_name})
    return Conversion(n_parameters, dtype_name, difference)


def read(
    source: str | Path,
    *,
    config_file: str | Path | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[GPT2Config, Params]:
    """Returns the config and params of a folder or file, with the config in `config_file` if given.

    Raises:
      CheckpointError: there is no config, or no sound GPT-2.
    """
    config = None
    if config_file is not None:
        path = local_path(config_file)
        config = GPT2Config.from_json_file(path / find.CONFIG if path.is_dir() else path)
    return weights.load(source, dtype=dtype, config=config)


def write(target: Path, params: Params, config: GPT2Config, *, source: Path) -> None:
    """Writes a file, by the ending of its name, or a folder, with the source's tokenizer."""
    if is_params_file(target):
        params_file.save_params(target, params, config)
        return
    if export.is_written(target):
        export.write(target, params, config, lambda: _tokenizer_of(source))
        return
    weights.save(target, params, config)
    folder = find.folder_of(source)
    # Byte for byte, and those of every kind: without its `vocab.txt` another kind's model would
    # pass for one of GPT-2's. Generation's defaults go with them.
    for name in (*files_in(folder), "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    # A file that holds a tokenizer has none beside it.
    if find.has_tokenizer(source) and not files_in(target):
        find.read_tokenizer(source).save(target)


def _tokenizer_of(source: Path) -> Tokenizer:
    try:
        return loading.load_tokenizer(source)
    except FileNotFoundError as error:
        expected = "a tokenizer beside the weights, as GGUF holds one"
        raise CheckpointError(f"{source}: expected {expected}, got none.") from error


def compare(written: Path, source: Path, config: GPT2Config) -> Difference:
    """Returns how far the logits of what was written are from PyTorch's for `source`.

    Where PyTorch cannot read the source, it reads the weights that were written.

    Raises:
      CheckpointError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(f"`--verify` needs PyTorch and transformers: {error}.") from None

    # Its bar for loading is none of this command's output.
    transformers.utils.logging.disable_progress_bar()
    # Read again from the disk: what is checked is the file, not what it was written from.
    is_bare = written.suffix == export.FLAX  # without a config of its own
    config, params = weights.load(written, config=config if is_bare else None)
    # Random ids, as any text will do: no logit is to differ.
    shape = (N_ROWS, min(LONGEST_ROW, config.n_positions))
    ids = np.random.default_rng(0).integers(config.vocab_size, size=shape)
    # In float32 on both sides, so that what is compared is the weights, as they were stored.
    ours = np.asarray(apply(params, ids, config=config.replace(dtype="float32")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = source
        if not find.is_hf_folder(source):
            folder = Path(scratch) / "model"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it says was said when the target was written
                weights.save(folder, params, config)
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(torch.from_numpy(ids)).logits.numpy()
    error = float(np.abs(ours - theirs).max())
    return Difference(error, scale=float(np.abs(theirs).max()))


def _check(difference: Difference, tolerance: float) -> None:
    """Raises `CheckpointError` where logits differ by more than the tolerance allows."""
    limit = tolerance * difference.scale
    if not difference.error <= limit:  # also where it is NaN
        got = f"got {difference.error:.3g}: nothing was written"
        raise CheckpointError(f"Expected logits within {limit:.3g} of PyTorch's, {got}.")


def is_params_file(path: str | Path) -> bool:
    """Returns whether a path is a file of params, which its name tells from a folder."""
    return str(path).endswith(".safetensors") and not Path(path).is_dir()
