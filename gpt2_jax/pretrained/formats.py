"""What the files of a checkpoint hold: safetensors, and what PyTorch saved. One class a format, with `.shapes` and `.read`.

Knows files and arrays; nothing of GPT-2's names and shapes. PyTorch is imported only to read a `pytorch_model.bin`.
"""

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_safetensors

from gpt2_jax.config import DTYPES
from gpt2_jax.files import CheckpointError, listing

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


class SafetensorsFile:
    """Shapes and tensors of one file, which is opened anew for each: the pages of an open map would pile up."""

    def __init__(self, file: Path):
        self.file = file
        with self._open() as opened:
            self.metadata = opened.metadata() or {}
            self.shapes = {
                name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()
            }

    def read(self, name: str) -> np.ndarray:
        with self._open() as opened:
            try:
                return opened.get_tensor(name)
            except AttributeError:  # numpy has no such dtype
                dtype = opened.get_slice(name).get_dtype()
                raise CheckpointError(
                    f"{name}: expected one of {', '.join(DTYPES)}, got {dtype}."
                ) from None

    @contextlib.contextmanager
    def _open(self):
        try:
            with safe_open(self.file, framework="np") as opened:
                yield opened
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{self.file}: expected a whole safetensors file, got {error}."
            ) from error


class TorchFile:
    """Shapes and tensors of one file of `torch.save`, of which nothing is executed (`weights_only=True`)."""

    def __init__(self, file: Path):
        self.file = file
        self.state, self.mapped = self._open(), 0
        try:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        except AttributeError:
            raise CheckpointError(
                f"{file}: expected names and tensors, got something else."
            ) from None

    def read(self, name: str) -> np.ndarray:
        if not self.zipped:
            return to_numpy(self.state.pop(name))
        array = np.array(to_numpy(self.state[name]))
        self.mapped += array.nbytes
        if (
            self.mapped > 2**26
        ):  # now and then a new map; a new one for each tensor would take too long
            self.state, self.mapped = self._open(), 0
        return array

    def _open(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{self.file}: reading it needs PyTorch, which is not installed. Install `torch`, or save the "
                f"checkpoint as {SAFETENSORS}."
            ) from None
        options = {"weights_only": True, "map_location": "cpu"}
        try:
            with self.file.open("rb") as opened:
                self.zipped = (
                    opened.read(4) == b"PK\x03\x04"
                )  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(self.file, mmap=self.zipped, **options)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.file}: expected a file of tensors alone, got one that is damaged or holds other objects. "
                "Those could run any code, so nothing of it was executed."
            ) from error
        except Exception as error:  # zip's and torch's own, by the kind of damage
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise CheckpointError(
                f"{self.file}: expected a file of tensors alone, got: {reason}"
            ) from error


def open_folder(folder: Path) -> tuple[dict[str, tuple], Callable[[str], np.ndarray]]:
    """Returns the shapes of a folder's tensors, and the function that reads one."""
    for name, kind in ((SAFETENSORS, SafetensorsFile), (TORCH, TorchFile)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [kind(folder / name)]
            break
        if index.is_file():
            files = [kind(file) for file in _indexed(index)]
            break
    else:
        expected = f"{SAFETENSORS} or {TORCH}, whole or in shards"
        raise CheckpointError(f"{folder}: expected {expected}, got {listing(folder)}.")
    home = {tensor: file for file in files for tensor in file.shapes}
    return {tensor: home[tensor].shapes[tensor] for tensor in home}, lambda tensor: home[
        tensor
    ].read(tensor)


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: expected a `weight_map` from names to files, got {error!r}."
        ) from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index}: expected {len(files)} weight files, {', '.join(missing)} not found."
        )
    return files


def to_numpy(array: Any) -> np.ndarray:
    """Returns the array on the host; PyTorch's bfloat16, which numpy lacks, goes by its bits."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    array = array.detach().cpu()
    if str(array.dtype) == "torch.bfloat16":
        import torch

        return array.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return array.numpy()


def save_file(file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    file.touch()  # safetensors would leave a file that only its owner may read
    mode = file.stat().st_mode
    save_safetensors(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, file, metadata
    )
    file.chmod(mode)
