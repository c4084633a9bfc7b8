"""What the files of a checkpoint hold, in the formats of safetensors and of `torch.save`.

Knows files and arrays; nothing of GPT-2's names and shapes. Each format is a `TensorReader`, so
that whoever loads weights sees all shapes first, and then reads tensors one by one. PyTorch is
imported only to read a `pytorch_model.bin`.
"""

import contextlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_safetensors

from gpt2_jax.config import DTYPES
from gpt2_jax.files import CheckpointError, listing, read_json_object

# HF's names for the weights of a folder. Shards are called `model-00001-of-00002.safetensors`, and
# an index beside them says which tensor lies in which.
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

ZIP_MAGIC = b"PK\x03\x04"
# Pages of a mapped file count as this process's memory once they are read. After so many bytes the
# file is mapped anew, which gives them back; a new map for each tensor would take too long.
MAX_MAPPED_BYTES = 2**25

Shape = tuple[int, ...]
Tensor = Shaped[np.ndarray, "..."]  # on the host, in the dtype of its file; bfloat16 is ml_dtypes'


@runtime_checkable
class TensorReader(Protocol):
    """How weights are read, whatever they lie in: all shapes at once, the tensors one by one."""

    shapes: dict[str, Shape]  # of every tensor, by the name that it has in the file

    def read(self, name: str) -> Tensor:
        """Returns a tensor as an array that nothing else refers to. Call it once for each name."""
        ...


class SafetensorsFile:
    """One file of safetensors, opened anew for each tensor: the pages of an open map would pile up.

    Raises:
      CheckpointError: the file is missing, cut off or something else; on reading, a dtype that
        numpy lacks.
    """

    def __init__(self, file: Path):
        self.file = file
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        with self._open() as opened:
            self.metadata |= opened.metadata() or {}  # `None` where a file has none
            for name in opened.keys():
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        with self._open() as opened:
            try:
                return opened.get_tensor(name)
            except AttributeError:  # safetensors asks numpy for float8 by a name that it lacks
                dtype = opened.get_slice(name).get_dtype()
                expected = f"one of {', '.join(DTYPES)}"
                raise CheckpointError(f"{name}: expected {expected}, got {dtype}.") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.file, framework="np") as opened:
                yield opened
        except (SafetensorError, FileNotFoundError) as error:
            expected = "a whole safetensors file"
            raise CheckpointError(f"{self.file}: expected {expected}, got {error}.") from error


class TorchFile:
    """One file of `torch.save`, of which nothing is executed (`weights_only=True`).

    Raises:
      CheckpointError: PyTorch is not installed, or the file holds something else than tensors.
    """

    def __init__(self, file: Path):
        self.file = file
        self.is_mapped = False  # whether tensors lie in the file until they are looked at
        self.n_mapped_bytes = 0
        self.state = self._open()
        self.shapes: dict[str, Shape] = {}
        try:
            for name, tensor in self.state.items():
                self.shapes[name] = tuple(tensor.shape)
        except AttributeError:  # no dict, or no tensor in it
            expected = "names and tensors"
            raise CheckpointError(f"{file}: expected {expected}, got something else.") from None

    def read(self, name: str) -> Tensor:
        """Returns a tensor, once."""
        if not self.is_mapped:
            return to_numpy(self.state.pop(name))  # what was read is let go of
        # A copy, as the map goes; and a reader's array belongs to nobody else.
        array = np.array(to_numpy(self.state[name]))
        self.n_mapped_bytes += array.nbytes
        if self.n_mapped_bytes > MAX_MAPPED_BYTES:
            self.state = self._open()
            self.n_mapped_bytes = 0
        return array

    def _open(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            advice = f"Install `torch`, or save the checkpoint as {SAFETENSORS}."
            raise CheckpointError(
                f"{self.file}: reading it needs PyTorch, which is not installed. {advice}"
            ) from None
        expected = "expected a file of tensors alone"
        try:
            # A file that is not mapped is read whole, and held besides the params made of it.
            self.is_mapped = self._is_zip()
            return torch.load(self.file, mmap=self.is_mapped, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.file}: {expected}, got one that is damaged or holds other objects. "
                "Those could run any code, so nothing of it was executed."
            ) from error
        except Exception as error:  # zip's and torch's own, by the kind of damage
            raise CheckpointError(f"{self.file}: {expected}, got: {_reason(error)}") from error

    def _is_zip(self) -> bool:
        """Returns whether the file can be mapped: the format before PyTorch 1.6 is no zip."""
        with self.file.open("rb") as opened:
            return opened.read(len(ZIP_MAGIC)) == ZIP_MAGIC


class Shards:
    """Several files as one reader. Of a tensor that lies in two, the last is read."""

    def __init__(self, readers: Sequence[TensorReader]):
        self.shapes: dict[str, Shape] = {}
        self._reader_of: dict[str, TensorReader] = {}
        for reader in readers:
            self.shapes |= reader.shapes
            self._reader_of |= dict.fromkeys(reader.shapes, reader)

    def read(self, name: str) -> Tensor:
        """Returns a tensor, from the file that holds it."""
        return self._reader_of[name].read(name)


class StateDict:
    """Arrays in memory (numpy's, JAX's or PyTorch's) as a reader, which copies them."""

    def __init__(self, state: Mapping[str, Any]):
        self.state = state
        self.shapes: dict[str, Shape] = {}
        for name, array in state.items():
            self.shapes[name] = tuple(array.shape)

    def read(self, name: str) -> Tensor:
        """Returns a copy of an array."""
        return np.array(to_numpy(self.state[name]))


def open_folder(folder: Path) -> TensorReader:
    """Returns a reader of a folder's weights. Of several formats, safetensors comes first.

    Raises:
      CheckpointError: there are no weights, a shard is missing, or a file is damaged.
    """
    # Safetensors first, as in HF's `from_pretrained`: the two may differ where one is older.
    for name, reader in ((SAFETENSORS, SafetensorsFile), (TORCH, TorchFile)):
        whole = folder / name
        if whole.is_file():
            return reader(whole)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return Shards([reader(shard) for shard in _files_of_index(index)])
    expected = f"{SAFETENSORS} or {TORCH}, whole or in shards"
    raise CheckpointError(f"{folder}: expected {expected}, got {listing(folder)}.")


def _files_of_index(index: Path) -> list[Path]:
    """Returns the weight files that an index names, all of which exist."""
    try:
        weight_map = read_json_object(index)["weight_map"]
        names = sorted(set(weight_map.values()))
        # The bare name: an index from elsewhere must not lead out of its folder.
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "a `weight_map` from names to files"
        raise CheckpointError(f"{index}: expected {expected}, got {error!r}.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        expected = f"{len(files)} weight files"
        raise CheckpointError(f"{index}: expected {expected}, {', '.join(missing)} not found.")
    return files


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, which PyTorch follows with pages of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def to_numpy(array: Any) -> Tensor:
    """Returns an array of numpy, JAX or PyTorch on the host, without a copy where that goes."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    # By its name: PyTorch need not be there for arrays that are none of its tensors.
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        # Numpy itself has no bfloat16, so PyTorch refuses to convert it: its bits go instead.
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def save_file(file: Path, arrays: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes arrays to one file of safetensors, as readable as any other file that is made here."""
    file.touch()  # safetensors would leave a file that only its owner may read
    mode = file.stat().st_mode
    # Safetensors writes an array's memory as it lies, whatever its strides say.
    in_c_order = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    save_safetensors(in_c_order, file, metadata)
    file.chmod(mode)
