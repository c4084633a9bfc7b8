"""`flax_model.msgpack`, HF's Flax models until transformers 5: read and written.

The file is what `flax.serialization.msgpack_serialize` makes of nested dicts: a map of maps whose
leaves are of msgpack's extension type 1, with a shape, the name of a dtype and the bytes inside.
Names and layout are those of transformers 4.57, `modeling_flax_gpt2.py`: kernels are `[O, I]`.
"""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import msgpack
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict

from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.foreign.names import DENSE_WEIGHT, Checkpoint, Renamed, Turned, upright
from gpt2_jax.pretrained.foreign.raw import Place, RawTensors
from gpt2_jax.pretrained.formats import Tensor

KIND = "a Flax msgpack file"
FILE = "flax_model.msgpack"  # HF's name for it
ARRAY = 1  # flax's number of the extension type
LONGEST_DESCRIPTION = 128  # bytes before an array's own: a shape of four axes takes 37
HEAD = "lm_head.weight"
LEAVES = {"scale", "embedding", "kernel"}  # what HF's PyTorch models call `weight`

# First bytes in msgpack's specification -> how the length follows: its format for `struct`.
LONG_MAPS = {0xDE: ">H", 0xDF: ">I"}
LONG_STRINGS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

# What the walk meets where a file ends too early, or holds something else between its names.
BROKEN = (
    IndexError,
    struct.error,
    UnicodeDecodeError,
    TypeError,
    msgpack.exceptions.UnpackException,
)


def is_it(head: bytes) -> bool:
    """Returns whether a file that begins so is a map by names, in msgpack."""
    is_map = head[:1] != b"\x80" and 0x80 <= head[0] <= 0x8F or head[0] in LONG_MAPS
    # Its first key, a short string, follows the byte or bytes of the map.
    after = 1 if head[0] <= 0x8F else 1 + struct.calcsize(LONG_MAPS.get(head[0], ">H"))
    return is_map and len(head) > after and 0xA0 <= head[after] <= 0xBF


def read(file: Path) -> Checkpoint:
    """Returns what a file of Flax holds. It has no config.

    Raises:
      CheckpointError: it is cut off, or holds something else than arrays in dicts.
    """
    # An index first, so that arrays are read one by one: flax's own reader takes all of the file
    # into memory.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            places = _Index(file, data).places()
        except BROKEN as error:
            got = f"got one that is cut off after {len(data):,} bytes"
            raise CheckpointError(f"{file}: expected a whole file of Flax, {got}.") from error
    # The file is closed again by now: arrays are read from their places when they are wanted.
    names = {_hf_name(path): path for path in places}
    reader = upright(Renamed(RawTensors(places), names))
    # A head of its own is a `Dense`, `[D, V]`, where HF's is a table.
    return Checkpoint(KIND, Turned(reader, [HEAD]), None)


def write(file: Path, state: Mapping[str, Tensor]) -> None:
    """Writes HF's names and arrays as HF's `FlaxGPT2LMHeadModel.save_pretrained` does."""
    leaves = {}
    for name, array in state.items():
        path = _flax_path(name)
        is_kernel = path.endswith(".kernel")
        leaves[path] = np.ascontiguousarray(array.T) if is_kernel else array
    # In one piece, as flax has no other way: the memory of the weights once more.
    file.write_bytes(msgpack_serialize(unflatten_dict(leaves, sep=".")))


def _hf_name(path: str) -> str:
    """`transformer.h.0.ln_1.scale` -> `transformer.h.0.ln_1.weight`."""
    module, _, leaf = path.rpartition(".")
    if leaf in LEAVES:
        leaf = "weight"
    return f"{module}.{leaf}"


def _flax_path(name: str) -> str:
    """`transformer.h.0.ln_1.weight` -> `transformer.h.0.ln_1.scale`."""
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        if name == HEAD or DENSE_WEIGHT.fullmatch(name):
            leaf = "kernel"
        elif ".ln_" in f".{module}":
            leaf = "scale"
        else:
            leaf = "embedding"
    return f"{module}.{leaf}"


class _Index:
    """A walk through the maps of a file, which passes over the arrays."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file = file
        self.data = data
        self.at = 0  # where the next value begins

    def places(self) -> dict[str, Place]:
        """Returns where each array lies, by its path, joined by "."."""
        out: dict[str, Place] = {}
        self._map("", out)
        return out

    def _map(self, prefix: str, out: dict[str, Place]) -> None:
        for _ in range(self._map_length()):
            path = prefix + self._string()
            if self._is_map(self.data[self.at]):
                self._map(f"{path}.", out)
            else:
                out[path] = self._array(path)

    @staticmethod
    def _is_map(first: int) -> bool:
        return 0x80 <= first <= 0x8F or first in LONG_MAPS

    def _map_length(self) -> int:
        first = self._byte()
        # The lowest bits of a short map's first byte are its length.
        return self._number(LONG_MAPS[first]) if first in LONG_MAPS else first & 0x0F

    def _string(self) -> str:
        first = self._byte()
        if 0xA0 <= first <= 0xBF:
            length = first & 0x1F
        elif first in LONG_STRINGS:
            length = self._number(LONG_STRINGS[first])
        else:
            raise self._refusal("a name", first)
        return self._bytes(length).decode()

    def _array(self, path: str) -> Place:
        first = self._byte()
        if first in EXTENSIONS:
            n_bytes = self._number(EXTENSIONS[first])
        elif first in FIXED_EXTENSIONS:
            n_bytes = FIXED_EXTENSIONS[first]
        else:
            raise self._refusal(f"an array at {path}", first)
        kind = self._byte()
        if kind != ARRAY:
            raise self._refusal(f"an array at {path}", kind)
        start = self.at
        self.at += n_bytes
        # A triple: the shape, the dtype's name, and the bytes, which end where the value does.
        description = msgpack.Unpacker()
        # Its beginning alone: the bytes of the array itself are passed over.
        description.feed(self.data[start : start + min(n_bytes, LONGEST_DESCRIPTION)])
        description.read_array_header()
        shape = tuple(description.unpack())
        dtype = jnp.dtype(description.unpack())
        place = Place(self.file, start, shape, dtype)
        return place._replace(offset=self.at - place.n_bytes)

    def _refusal(self, expected: str, got: int) -> CheckpointError:
        where = f"the byte {got:#04x} before byte {self.at}"
        return CheckpointError(f"{self.file}: expected {expected}, as Flax writes it, got {where}.")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _number(self, format: str) -> int:
        (number,) = struct.unpack(format, self._bytes(struct.calcsize(format)))
        return number

    def _bytes(self, count: int) -> bytes:
        out = self.data[self.at : self.at + count]
        self.at += count
        return out
