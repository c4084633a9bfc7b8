"""Numpy's `.npz`, with OpenAI's names of tensors (as in picoGPT and its like), or with HF's."""

import zipfile
from pathlib import Path

import numpy as np

from gpt2_jax.pretrained.foreign import openai
from gpt2_jax.pretrained.foreign.damage import naming
from gpt2_jax.pretrained.foreign.names import Checkpoint, Renamed, upright
from gpt2_jax.pretrained.formats import Shape, Tensor

KIND = "an .npz file"
ENDING = ".npy"


class NpzFile:
    """A zip of `.npy` files, of which each is read on its own."""

    def __init__(self, file: Path):
        self.file = file
        self.shapes: dict[str, Shape] = {}
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                # The head of each alone: numpy's own reader takes whole arrays.
                with archive.open(name) as member:
                    self.shapes[name.removesuffix(ENDING)] = _shape(member)

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        # Opened anew for each, so that no handle outlives its read; a pickle could run anything.
        with naming(self.file), np.load(self.file, allow_pickle=False) as arrays:
            return arrays[name]

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        del name
        return self.file


def _shape(member) -> Shape:
    """Returns the shape in the head of an `.npy` file."""
    version = np.lib.format.read_magic(member)
    # Later versions count a longer head; the third differs in names of fields alone.
    if version == (1, 0):
        shape, _, _ = np.lib.format.read_array_header_1_0(member)
    else:
        shape, _, _ = np.lib.format.read_array_header_2_0(member)
    return shape


def is_npz(file: Path) -> bool:
    """Returns whether a zip holds arrays of numpy alone."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # PyTorch's reader, whose turn is next, says that it is damaged
    return bool(names) and all(name.endswith(ENDING) for name in names)


def read(file: Path) -> Checkpoint:
    """Returns what an `.npz` file holds, with a config where `hparams.json` lies beside it."""
    stored = NpzFile(file)
    # A name of HF's has no "/" and stays as it is.
    names = {openai.hf_name(name): name for name in stored.shapes}
    return Checkpoint(KIND, upright(Renamed(stored, names)), openai.config_in(file.parent))
