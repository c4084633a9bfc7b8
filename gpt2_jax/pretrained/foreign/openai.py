"""OpenAI's own files: a checkpoint of TensorFlow and `hparams.json`, read without TensorFlow.

A checkpoint is an index, `model.ckpt.index`, and files of raw data. The index is a table of LevelDB
(google/leveldb, doc/table_format.md) from names to `BundleEntryProto`s, of which a few fields are
read here (tensorflow/core/protobuf/tensor_bundle.proto). Names and layout are those of
openai/gpt-2, `src/model.py`: a kernel, `w`, is `[1, I, O]`; `g` and `b` are a LayerNorm's.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError, read_json_object
from gpt2_jax.pretrained.foreign.damage import naming
from gpt2_jax.pretrained.foreign.names import Checkpoint, Renamed
from gpt2_jax.pretrained.foreign.raw import Place, RawTensors

KIND = "OpenAI's TensorFlow checkpoint"
HPARAMS = "hparams.json"
INDEX = ".index"
END_OF_TEXT = 50256

LEAVES = {"w": "weight", "g": "weight", "b": "bias"}
# What an optimiser keeps beside the weights, in checkpoints of training code over OpenAI's.
OPTIMIZER = re.compile(r".*/(Adam|Adam_1|Momentum|[vm][rc]?)|beta[12]_power.*|global_step|.*/accum")

# Tables of LevelDB.
MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)  # the last eight bytes
FOOTER_BYTES = 48
# TensorFlow's numbers of dtypes, `tensorflow/core/framework/types.proto`.
DTYPES = {1: np.float32, 2: np.float64, 19: np.float16, 14: jnp.bfloat16, 3: np.int32, 9: np.int64}


class Entry(NamedTuple):
    """What the index says of a tensor."""

    shape: tuple[int, ...]
    dtype: int
    shard: int
    offset: int


def find_index(folder: Path) -> Path | None:
    """Returns the index of the checkpoint in a folder: the latest, of several."""
    indices = [file for file in folder.glob(f"*{INDEX}") if is_index(file)]
    # Training code numbers its checkpoints, `model-1000.index`; OpenAI's is alone.
    return max(indices, key=_step, default=None)


def _step(index: Path) -> int:
    digits = re.search(r"-(\d+)\.index$", index.name)
    return int(digits[1]) if digits else -1


def is_index(file: Path) -> bool:
    """Returns whether a file ends as a table of LevelDB does."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(size - len(MAGIC), 0))
        return opened.read() == MAGIC


def read(index: Path) -> Checkpoint:
    """Returns what the checkpoint of an index holds, with the config in `hparams.json` beside it.

    Raises:
      CheckpointError: a file is damaged or missing.
    """
    with naming(index):
        places = _places(index)
    names = {}
    for name in places:
        # By name, as an optimiser's moments have the very shapes of the weights.
        if not OPTIMIZER.fullmatch(name):
            names[hf_name(name)] = name
    return Checkpoint(KIND, Renamed(RawTensors(places), names), config_in(index.parent))


def config_in(folder: Path) -> GPT2Config | None:
    """Returns the config that `hparams.json` gives, or `None` where there is no such file.

    Raises:
      CheckpointError: a field is missing.
    """
    file = folder / HPARAMS
    if not file.is_file():
        return None
    hparams = read_json_object(file)
    needed = ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head")
    missing = [name for name in needed if name not in hparams]
    if missing:
        raise CheckpointError(f"{file}: expected {', '.join(missing)} too, got {list(hparams)}.")
    vocab_size = hparams["n_vocab"]
    # OpenAI's last token is the end of a text, in GPT-2's vocabulary and in tests of another.
    end = END_OF_TEXT if vocab_size > END_OF_TEXT else vocab_size - 1
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=hparams["n_ctx"],
        n_embd=hparams["n_embd"],
        n_layer=hparams["n_layer"],
        n_head=hparams["n_head"],
        bos_token_id=end,
        eos_token_id=end,
    )


def hf_name(name: str) -> str:
    """`model/h0/attn/c_attn/w` -> `h.0.attn.c_attn.weight`; a name of another kind stays."""
    parts = name.removeprefix("model/").split("/")
    if re.fullmatch(r"h\d+", parts[0]):
        parts[:1] = ["h", parts[0][1:]]
    if parts[-1] in LEAVES:
        parts[-1] = LEAVES[parts[-1]]
    elif parts in (["wte"], ["wpe"]):
        parts.append("weight")
    return ".".join(parts)


# The index.


def _places(index: Path) -> dict[str, Place]:
    entries = dict(_table(index.read_bytes()))
    # The entry without a name describes the whole: its field 1 is the number of files of data.
    header = dict(_fields(entries.pop(b"", b"")))
    n_shards = header.get(1, 1)
    # The names of the data files are a rule of TensorFlow's: the index holds their number alone.
    prefix = index.name.removesuffix(INDEX)
    places = {}
    for key, value in entries.items():
        entry = _entry(value)
        file = index.with_name(f"{prefix}.data-{entry.shard:05}-of-{n_shards:05}")
        if not file.is_file():
            raise CheckpointError(f"{index}: expected {file.name} beside it, which is not there.")
        name = key.decode()
        if entry.dtype in DTYPES:  # others, such as strings, are no weights
            dtype = np.dtype(DTYPES[entry.dtype])
            places[name] = Place(file, entry.offset, entry.shape, dtype)
    return places


def _entry(message: bytes) -> Entry:
    """Returns the fields of a `BundleEntryProto` that tell where a tensor lies."""
    fields = dict(_fields(message))
    shape = []
    # Field 2, a `TensorShapeProto`, has a message for each axis, whose field 1 is its length.
    for number, axis in _fields(fields.get(2, b"")):
        if number == 2:
            shape.append(dict(_fields(axis)).get(1, 0))
    # A number that is 0 is left out of a protocol buffer.
    return Entry(tuple(shape), fields.get(1, 0), fields.get(3, 0), fields.get(4, 0))


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a table of LevelDB."""
    if data[-len(MAGIC) :] != MAGIC:
        raise ValueError("its end is missing")
    # The footer has the places of two blocks: one of meta data, and the index of the others.
    footer = _Varints(data[-FOOTER_BYTES:])
    for _ in range(2):
        footer.next()
    for _, place in _block(data, footer.next(), footer.next()):
        numbers = _Varints(place)
        yield from _block(data, numbers.next(), numbers.next())


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block."""
    # Behind each block stand a byte for its compression and a checksum, which is not looked at.
    if data[offset + size] != 0:
        raise ValueError("its blocks are compressed, which TensorFlow's are not")
    block = data[offset : offset + size]
    # At the end there are numbers of four bytes: places to start from, and how many they are.
    (n_restarts,) = struct.unpack("<I", block[-4:])
    entries = _Varints(block[: -4 * (n_restarts + 1)])
    key = b""
    while entries.at < len(entries.data):
        # A key shares its beginning with the one before it.
        n_shared = entries.next()
        n_own = entries.next()
        n_value = entries.next()
        key = key[:n_shared] + entries.bytes(n_own)
        yield key, entries.bytes(n_value)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the numbers and values of a protocol buffer's fields: integers or bytes."""
    stream = _Varints(message)
    while stream.at < len(message):
        tag = stream.next()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, stream.next()
        elif kind == 2:
            yield tag >> 3, stream.bytes(stream.next())
        elif kind in (1, 5):  # eight bytes or four: a checksum, passed over
            stream.bytes(8 if kind == 1 else 4)
        else:
            raise ValueError(f"a field of kind {kind}")


class _Varints:
    """A walk through bytes that hold numbers of seven bits a byte, the lowest first."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def next(self) -> int:
        """Returns the next number."""
        number = 0
        shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    def bytes(self, count: int) -> bytes:
        """Returns the next bytes."""
        out = self.data[self.at : self.at + count]
        if len(out) < count:
            raise IndexError("it ends too early")
        self.at += count
        return out
