"""What the files of a checkpoint hold, in the formats of safetensors and of `torch.save`.

Knows files and arrays; nothing of GPT-2's names and shapes. Each format is a `TensorReader`, so
that whoever loads weights sees all shapes first, and then reads tensors one by one. PyTorch is
imported only to read a `pytorch_model.bin`.
"""

import contextlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from gpt2_jax.config import DTYPES
from gpt2_jax.files import (
    GZIP_MAGIC,
    ZIP_MAGIC,
    CheckpointError,
    check_content,
    listing,
    read_json_object,
    some,
)

# HF's names for the weights of a folder. Shards are called `model-00001-of-00002.safetensors`, and
# an index beside them says which tensor lies in which.
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

# Safetensors' names of dtypes.
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
NUMPY_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 64  # bytes; XLA's `cpu_function_runtime::MinAlign()`
# Pages of a mapped file count as this process's memory once they are read. After so many bytes the
# file is mapped anew, which gives them back; a new map for each tensor would take too long.
MAX_MAPPED_BYTES = 2**25

Shape = tuple[int, ...]
Tensor = Shaped[np.ndarray, "..."]  # on the host, in the dtype of its file; bfloat16 is ml_dtypes'
Index = tuple[slice, ...]  # of a part of a tensor
ReadPart = Callable[[Index], Tensor]


@runtime_checkable
class TensorReader(Protocol):
    """How weights are read, whatever they lie in: all shapes at once, the tensors one by one."""

    shapes: dict[str, Shape]  # of every tensor, by the name that it has in the file

    @property
    def file(self) -> Path | None:
        """What messages about names are about; `None` for arrays in memory."""
        ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor as an array that nothing else refers to. Call it once for each name."""
        ...

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        ...


class _Stored(NamedTuple):
    """Where a tensor lies in a file of safetensors."""

    dtype: str  # safetensors' name of it
    start: int  # byte of the file
    n_bytes: int


class SafetensorsFile:
    """One file of safetensors, opened anew for each tensor.

    Its header is safetensors' own to judge. Whole tensors are read past it, straight into memory
    that JAX takes over on CPU as it is, in half of its time, and other threads go on meanwhile: a
    map's pages, as safetensors has them, are copied twice and count as memory of the process.

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
            self._stored = _stored_in(file)

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self._whole(name)

    def parts(self, name: str) -> ReadPart:
        """Returns what reads parts of a tensor, and of the file these alone."""
        shape = self.shapes[name]

        def read_part(index: Index) -> Tensor:
            part_shape = tuple(len(range(n)[part]) for n, part in zip(shape, index, strict=True))
            if part_shape == shape:
                return self._whole(name)
            dtype = self._dtype_of(name)
            # Safetensors would end in a panic of its own, and print pages about it.
            np.empty(part_shape, dtype)
            with self._open() as opened:
                return opened.get_slice(name)[index]

        return read_part

    def _whole(self, name: str) -> Tensor:
        dtype = self._dtype_of(name)
        stored = self._stored[name]
        memory = _aligned(stored.n_bytes)
        missing = memory.data
        try:
            # Without a buffer: a copy less.
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(stored.start)
                # Systems read no more than 2 GiB at once.
                while missing:
                    n_read = opened.readinto(missing)
                    if not n_read:
                        raise OSError(f"{len(missing)} bytes less of {name} than its header says")
                    missing = missing[n_read:]
        except OSError as error:  # it was whole when it was opened
            raise self._damaged(error) from error
        return memory.view(dtype).reshape(self.shapes[name])

    def _dtype_of(self, name: str) -> np.dtype:
        found = self._stored[name].dtype
        if found not in NUMPY_DTYPES:
            expected = f"one of {', '.join(DTYPES)}"
            raise CheckpointError(f"{name}: expected {expected}, got {found}.")
        return jnp.dtype(NUMPY_DTYPES[found])

    def file_of(self, name: str) -> Path:
        """Returns this file."""
        del name
        return self.file

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            check_content(self.file, allowed=(GZIP_MAGIC,))  # may be the length of a header
            with safe_open(self.file, framework="np") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        got = "no file" if isinstance(error, FileNotFoundError) else error
        return CheckpointError(f"{self.file}: expected a whole safetensors file, got {got}.")


def _stored_in(file: Path) -> dict[str, _Stored]:
    """Returns where the tensors of a file lie, whose header safetensors has found to be sound."""
    with file.open("rb") as opened:
        n_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(n_bytes))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]  # behind the header
        stored[name] = _Stored(entry["dtype"], 8 + n_bytes + first, end - first)
    return stored


def _aligned(n_bytes: int) -> np.ndarray:
    """Returns memory that begins where XLA's CPU wants it, so that it need not copy it."""
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + n_bytes]


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
        self.shapes = _shapes_in(self.state, file)

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

    def file_of(self, name: str) -> Path:
        """Returns this file."""
        del name
        return self.file

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
            check_content(self.file, allowed=(ZIP_MAGIC,))
            # A file that is not mapped is read whole, and held besides the params made of it.
            self.is_mapped = self._is_zip()
            return _load_quietly(torch, self.file, mmap=self.is_mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.file}: {expected}, got one that is damaged or holds other objects. "
                "Those could run any code, so nothing of it was executed."
            ) from error
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # zip's and torch's own, by the kind of damage
            raise CheckpointError(f"{self.file}: {expected}, got: {_reason(error)}") from error

    def _is_zip(self) -> bool:
        """Returns whether the file can be mapped: the format before PyTorch 1.6 is no zip."""
        with self.file.open("rb") as opened:
            return opened.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _load_quietly(torch: Any, file: Path, *, mmap: bool) -> Any:
    """Returns what `torch.load` does; it warns of details where a damaged file ends in an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, mmap=mmap, weights_only=True, map_location="cpu")


class Shards:
    """Several files as one reader. Of a tensor that lies in two, the last is read.

    Args:
      index: the file that says which tensor lies where.
      reader: opens a file in the format of them all.

    Raises:
      CheckpointError: the index or a file is damaged, or a file lacks what the index names.
    """

    def __init__(self, index: Path, reader: Callable[[Path], TensorReader]):
        self.file = index
        self.shapes: dict[str, Shape] = {}
        self._reader_of: dict[str, TensorReader] = {}
        for file, names in _files_of_index(index).items():
            opened = reader(file)
            missing = [name for name in names if name not in opened.shapes]
            if missing:  # said of the file, as the index may be whole
                expected = f"what {index.name} places there"
                raise CheckpointError(f"{file}: expected {expected}, found no {some(missing)}.")
            self.shapes |= opened.shapes
            self._reader_of |= dict.fromkeys(opened.shapes, opened)

    def read(self, name: str) -> Tensor:
        """Returns a tensor, from the file that holds it."""
        return self._reader_of[name].read(name)

    def parts(self, name: str) -> ReadPart:
        """Returns what reads parts of a tensor."""
        return parts_of(self._reader_of[name], name)

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        return self._reader_of[name].file


class StateDict:
    """Arrays in memory (numpy's, JAX's or PyTorch's) as a reader, which copies them.

    Raises:
      CheckpointError: something else than names and arrays is in it; on reading, an array without
        numbers of its own, such as one on PyTorch's meta device.
    """

    file = None

    def __init__(self, state: Mapping[str, Any]):
        self.state = state
        self.shapes = _shapes_in(state, "The state")

    def read(self, name: str) -> Tensor:
        """Returns a copy of an array."""
        return np.array(to_numpy(self.state[name]))

    def file_of(self, name: str) -> None:
        """Returns `None`, as there is no file."""
        del name


def parts_of(reader: TensorReader, name: str) -> ReadPart:
    """Returns what reads parts of a tensor. Call it once for each name.

    A reader with a method `parts` reads these alone; of another's the whole is held meanwhile.
    """
    own = getattr(reader, "parts", None)
    if own is not None:
        return own(name)
    whole = reader.read(name)
    return lambda index: whole[index]


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
            return Shards(index, reader)
    expected = f"{SAFETENSORS} or {TORCH}, whole or in shards"
    if any(WEIGHT_FILE.fullmatch(file.name) for file in folder.iterdir()):  # shards alone
        expected += f" with {SAFETENSORS}.index.json or {TORCH}.index.json"
    raise CheckpointError(f"{folder}: expected {expected}, got {listing(folder)}.")


def _files_of_index(index: Path) -> dict[Path, list[str]]:
    """Returns the weight files that an index names, all of which exist, and the names in each."""
    names_in: dict[Path, list[str]] = {}
    weight_map: Any = read_json_object(index).get("weight_map")
    try:
        for name, file in sorted(weight_map.items()):
            # The bare name: an index from elsewhere must not lead out of its folder.
            names_in.setdefault(index.parent / Path(file).name, []).append(name)
    except (TypeError, AttributeError) as error:
        expected = "a `weight_map` from names to files"
        raise CheckpointError(f"{index}: expected {expected}, got {error!r}.") from error
    # Not `Path.is_file`, which raises for a name that is too long.
    missing = [file.name for file in sorted(names_in) if not os.path.isfile(file)]
    if missing:
        expected = f"{len(names_in)} weight files"
        raise CheckpointError(f"{index}: expected {expected}, {some(missing)} not found.")
    return dict(sorted(names_in.items()))


def _shapes_in(state: Any, where: Path | str) -> dict[str, Shape]:
    """Returns the shapes of the arrays in a state dict, by their names."""
    expected = "names and tensors"
    if not isinstance(state, Mapping):
        got = type(state).__name__
        raise CheckpointError(f"{where}: expected {expected}, got {got}.")
    shapes = {}
    for name, array in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: expected {expected}, got the name {name!r}.")
        if not hasattr(array, "shape"):
            got = type(array).__name__
            raise CheckpointError(f"{where}: expected {expected}, got {got} as {name!r}.")
        shapes[name] = tuple(array.shape)
    return shapes


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message, which PyTorch follows with pages of advice."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def to_numpy(array: Any) -> Tensor:
    """Returns an array of numpy, JAX or PyTorch on the host, without a copy where that goes."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    # What is no block of numbers in memory, by what PyTorch calls it.
    if array.is_meta:
        raise CheckpointError("Expected a tensor with values, got one on the meta device.")
    if array.is_quantized or str(array.layout) != "torch.strided":
        got = "a quantised one" if array.is_quantized else f"{array.layout}"
        raise CheckpointError(f"Expected a dense tensor of floats, got {got}.")
    tensor = array.detach().cpu()
    # By its name: PyTorch need not be there for arrays that are none of its tensors.
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        # Numpy itself has no bfloat16, so PyTorch refuses to convert it: its bits go instead.
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    try:
        return tensor.numpy()
    except TypeError:  # float8 and others that numpy lacks
        expected = f"one of {', '.join(DTYPES)}"
        raise CheckpointError(f"Expected {expected}, got {tensor.dtype}.") from None


def save_file(file: Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Writes arrays to one file of safetensors, as safetensors' own function does.

    That takes all arrays on the host; this one brings them there one by one, each by `on_host`, so
    that the peak of memory is one array of several devices.
    """
    names = in_order(arrays)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        array = arrays[name]
        dtype = SAFETENSORS_DTYPES.get(np.dtype(array.dtype).name)
        if dtype is None:
            expected = f"one of {', '.join(SAFETENSORS_DTYPES)}"
            raise CheckpointError(f"{name}: expected {expected}, got {array.dtype}.")
        start = end
        end += array.nbytes
        offsets = [start, end]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in names:
            # In C order: an array's memory is written as it lies, whatever its strides say.
            in_c_order = np.asarray(on_host(arrays[name]), order="C")
            opened.write(in_c_order.reshape(-1).view(np.uint8).data)


def in_order(arrays: Mapping[str, Any]) -> list[str]:
    """Returns the names of arrays in the order in which `save_file` writes them."""
    # The widest first, as theirs: then each begins at a multiple of its numbers' size.
    return sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))


def on_host(array: Any) -> Tensor:
    """Returns an array on the host; one that lies on several processes' devices, gathered.

    All of these must call it, for the same arrays in the same order.
    """
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        # Not `np.asarray(array)`, which JAX keeps for as long as the array lives: one after the
        # other, the whole model would come to lie on the host.
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(jnp.copy(shard.data))
    return whole
