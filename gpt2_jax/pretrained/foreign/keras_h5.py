"""`tf_model.h5`, in which HF's TensorFlow models were saved until transformers 5.

Names and layout are those of transformers 4.53, `modeling_tf_gpt2.py`: groups of h5 for modules,
kernels `[I, O]`, biases `[1, O]`, and the tables as `embeddings:0` or, in early files, `weight:0`.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign.damage import naming
from gpt2_jax.pretrained.foreign.names import Checkpoint, Renamed
from gpt2_jax.pretrained.formats import Shape, Tensor

KIND = "a TensorFlow h5 file"
FILE = "tf_model.h5"  # HF's name for it
MAGIC = b"\x89HDF\r\n\x1a\n"
# Behind the names of the model's class, which vary.
PATH = re.compile(r"(?:.*/)?((?:wte|wpe|ln_f|h_\._\d+)/.*?)(?::0)?")
LEAVES = {"gamma": "weight", "beta": "bias", "embeddings": "weight"}


class H5File:
    """The arrays of an h5 file.

    Raises:
      CheckpointError: h5py is not installed.
    """

    def __init__(self, file: Path):
        self.file = file
        self.shapes: dict[str, Shape] = {}
        with self._open() as opened:
            # Shapes alone: h5 keeps them apart from the arrays, which stay on the disk.
            opened.visititems(self._add)

    def _add(self, name: str, item: Any) -> None:
        if hasattr(item, "shape"):  # a group has none
            self.shapes[name] = item.shape

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        # Opened anew for each tensor, so that no handle outlives its read.
        with naming(self.file), self._open() as opened:
            return np.asarray(opened[name])

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        del name
        return self.file

    def _open(self) -> Any:
        try:
            import h5py
        except ImportError:
            advice = "which is not installed. Install `gpt2_jax[h5]`."
            raise CheckpointError(f"{self.file}: reading it needs h5py, {advice}") from None
        return h5py.File(self.file, "r")


def is_it(head: bytes) -> bool:
    """Returns whether a file that begins so is h5."""
    return head.startswith(MAGIC)


def read(file: Path) -> Checkpoint:
    """Returns what a file of TensorFlow holds. It has no config.

    Raises:
      CheckpointError: as `H5File`.
    """
    stored = H5File(file)
    names = {_hf_name(path): path for path in stored.shapes}
    return Checkpoint(KIND, Renamed(stored, names), None)


def _hf_name(path: str) -> str:
    """`transformer/tfgpt2lm_head_model/transformer/h_._0/ln_1/gamma:0` -> `h.0.ln_1.weight`."""
    match = PATH.fullmatch(path)
    # It stays: whoever compares names reports it as the file has it.
    if match is None:
        return path
    module, _, leaf = match[1].replace("h_._", "h/").rpartition("/")
    name = f"{module}/{LEAVES.get(leaf, leaf)}"
    return name.replace("/", ".")
