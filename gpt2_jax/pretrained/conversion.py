"""Conversion of weights between HF's folder layout and one file of params, in either direction.

Knows folders and files; names and formats are `weights.py`'s and `formats.py`'s.
"""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, local_path, replacing
from gpt2_jax.model import apply
from gpt2_jax.modules import Params
from gpt2_jax.pretrained import hub, weights
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
      source: "demo", a folder, a hub id, or a file `*.safetensors` of params.
      target: a file if it ends in `.safetensors`, otherwise a folder, which gets the source's
        tokenizer files as well.
      dtype: to cast to; by default the weights stay as they are.
      revision: branch, tag or commit on the hub.
      config_file: `config.json`, or a folder with one, for a file of params that holds none.
      verified: compares the logits with PyTorch's before anything takes the target's place.
      overwrite: replaces what is at the target.

    Raises:
      CheckpointError: the source is no sound GPT-2, the target is in use, PyTorch is not installed,
        or the logits differ.
    """
    folder = None if is_params_file(source) else hub.resolve(source, revision=revision)
    brings_tokenizer = folder is not None and bool(files_in(folder))
    keep = None
    if not is_params_file(target):
        keep = weights.kept_files(with_tokenizer=brings_tokenizer)
    # So that float64 weights stay what they are.
    with (
        jax.enable_x64(True),
        replacing(target, overwrite=overwrite, keep=keep) as temporary,
    ):
        config, params = read(folder or source, config_file=config_file, dtype=dtype)
        write(temporary, params, config, tokenizer_folder=folder)
        dtype_name = params["wte"]["embedding"].dtype.name
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        difference = None
        if verified:
            difference = compare(temporary, folder)
            _check(difference, TOLERANCE[dtype_name])
    return Conversion(n_parameters, dtype_name, difference)


def read(
    source: str | Path,
    *,
    config_file: str | Path | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[GPT2Config, Params]:
    """Returns the config and params of a folder, or of a file of params.

    Raises:
      CheckpointError: a folder, which has a config of its own, is given another, or a file needs
        one; or there is no sound GPT-2.
    """
    if not is_params_file(source):
        if config_file is not None:
            raise CheckpointError(
                "`--config` is for a single file of params: a folder has its own."
            )
        return weights.load(source, dtype=dtype)
    config = _read_config(source, config_file)
    # Through HF's names, which finds what is missing or misshapen.
    with weights.naming(Path(source)):
        state = weights.to_hf(weights.load_params(source))
        params = weights.from_hf(state, config, dtype)
    return config.replace(dtype=params["wte"]["embedding"].dtype.name), params


def _read_config(params_file: str | Path, config_file: str | Path | None) -> GPT2Config:
    """Returns the config given by the user, else the one in the metadata of a file of params."""
    if config_file is not None:
        path = local_path(config_file)
        return GPT2Config.from_json_file(path / "config.json" if path.is_dir() else path)
    stored = weights.load_config(params_file)
    if stored is None:
        advice = "give one with `--config config.json`"
        raise CheckpointError(f"{params_file} holds no config: {advice}.")
    return stored


def write(
    target: Path, params: Params, config: GPT2Config, *, tokenizer_folder: Path | None = None
) -> None:
    """Writes a file of params, or a folder, with the tokenizer's files of another folder."""
    if is_params_file(target):
        weights.save_params(target, params, config)
        return
    weights.save(target, params, config)
    if tokenizer_folder is None:
        return
    # Byte for byte, and those of every kind: without its `vocab.txt` another kind's model would
    # pass for one of GPT-2's. Generation's defaults go with them.
    for name in (*files_in(tokenizer_folder), "generation_config.json"):
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, target / name)


def compare(written: Path, source: Path | None) -> Difference:
    """Returns how far the logits of what was written are from PyTorch's for `source`.

    Without a source PyTorch reads what was written.

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
    config, params = read(written)
    # Random ids, as any text will do: no logit is to differ.
    shape = (N_ROWS, min(LONGEST_ROW, config.n_positions))
    ids = np.random.default_rng(0).integers(config.vocab_size, size=shape)
    # In float32 on both sides, so that what is compared is the weights, as they were stored.
    ours = np.asarray(apply(params, ids, config=config.replace(dtype="float32")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = source or written
        if is_params_file(folder):  # which PyTorch cannot read
            folder = Path(scratch) / "model"
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
