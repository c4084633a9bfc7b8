"""GPT-2's tensors as other tools name and turn them, in HF's names and as HF's layout has them.

Knows names and shapes, and no file.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.pretrained.formats import ReadPart, Shape, Tensor, TensorReader, parts_of

# What wrappers put before the names of a model that they hold: HF's heads, DistributedDataParallel,
# torch.compile, Lightning, PEFT. Any of them may stand within another.
PREFIXES = re.compile(r"((transformer|module|_orig_mod|model|base_model\.model)\.)+")
# The LayerNorm's words of TensorFlow, and of PyTorch code that follows it.
NORM_WORDS = re.compile(r"(ln_\w+)\.(gamma|beta)")
DENSE_WEIGHT = re.compile(
    r"(.*\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
)
# Heads for classification and the like, beside a whole GPT-2; the last is TRL's.
OTHER_HEADS = re.compile(r"(score|classifier|qa_outputs|multiple_choice_head|v_head)\..+")


class Checkpoint(NamedTuple):
    """What a file of some tool holds."""

    kind: str  # of format, in messages; "" in HF's layout, which goes without saying
    reader: TensorReader  # in HF's names, perhaps with a prefix; kernels `[I, O]`
    config: GPT2Config | None  # where the file has one


def prefix_of(names: Iterable[str]) -> str:
    """Returns what stands before `wte.weight` among some names, or "" where it is not there."""
    for name in names:
        if bare(name) == "wte.weight":
            return name.removesuffix("wte.weight")
    return ""


def bare(name: str) -> str:
    """`module.transformer.h.0.ln_1.gamma` -> `h.0.ln_1.weight`."""
    # At the beginning alone: `sub` by itself would also find one in the middle of a name.
    without_prefix = PREFIXES.sub("", name, count=1) if PREFIXES.match(name) else name
    return NORM_WORDS.sub(_norm_word, without_prefix)


def _norm_word(match: re.Match[str]) -> str:
    leaf = "weight" if match[2] == "gamma" else "bias"
    return f"{match[1]}.{leaf}"


class Renamed:
    """A reader's tensors under other names.

    Axes of length 1 in front are dropped: TensorFlow's kernels and biases have one more than HF's.

    Args:
      reader: of the file.
      names: the file's name of each tensor by the one that it gets; what has none is left out.
    """

    def __init__(self, reader: TensorReader, names: Mapping[str, str]):
        self.reader = reader
        self.names = dict(names)
        self.shapes: dict[str, Shape] = {}
        for name, own_name in self.names.items():
            self.shapes[name] = _squeezed(name, reader.shapes[own_name])

    @property
    def file(self) -> Path | None:
        """See `TensorReader`."""
        return self.reader.file

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self.reader.read(self.names[name]).reshape(self.shapes[name])

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        return self.reader.file_of(self.names[name])


def _squeezed(name: str, shape: Shape) -> Shape:
    """Returns a shape without the axes of length 1 that HF's tensor of this name has not."""
    is_vector = name.endswith(".bias") or bool(re.search(r"ln_\w+\.weight$", name))
    n_axes = 1 if is_vector else 2
    # Only in front, and only what is too much: a model may have one position.
    while len(shape) > n_axes and shape[0] == 1:
        shape = shape[1:]
    return shape


class Turned:
    """A reader's tensors, with the matrices of some names transposed."""

    def __init__(self, reader: TensorReader, names: Collection[str]):
        self.reader = reader
        self.names = frozenset(names)
        self.shapes: dict[str, Shape] = {}
        for name, shape in reader.shapes.items():
            self.shapes[name] = shape[::-1] if name in self.names else shape

    @property
    def file(self) -> Path | None:
        """See `TensorReader`."""
        return self.reader.file

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        return self.reader.file_of(name)

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        array = self.reader.read(name)
        # In C order, as whoever writes an array's memory expects.
        return np.ascontiguousarray(array.T) if name in self.names else array

    def parts(self, name: str) -> ReadPart:
        """Returns what reads parts of a tensor."""
        read_part = parts_of(self.reader, name)
        if name not in self.names:
            return read_part
        return lambda index: np.ascontiguousarray(read_part(index[::-1]).T)


def upright(reader: TensorReader) -> TensorReader:
    """Returns a reader whose kernels are `[I, O]`, whichever way they lie in the file.

    PyTorch's `nn.Linear` and HF's Flax models keep them as `[O, I]`. `attn.c_attn`, which is never
    square, tells for all: `attn.c_proj` always is, and could not.
    """
    if not _keeps_outputs_first(reader.shapes):
        return reader
    return Turned(reader, [name for name in reader.shapes if DENSE_WEIGHT.fullmatch(name)])


def _keeps_outputs_first(shapes: Mapping[str, Shape]) -> bool:
    """Returns whether kernels are `[O, I]`, by the first `c_attn`; without one, they are not."""
    for name, shape in shapes.items():
        if name.endswith("attn.c_attn.weight") and len(shape) == 2:
            return shape[0] == 3 * shape[1]
    return False


def said_by_shapes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the fields of a config that shapes tell: sizes but `n_head`, and a lack of biases."""
    by_name = {bare(name): shape for name, shape in shapes.items()}
    said: dict[str, Any] = {}
    if len(by_name.get("wte.weight", ())) == 2:
        said["vocab_size"], said["n_embd"] = by_name["wte.weight"]
    if len(by_name.get("wpe.weight", ())) == 2:
        said["n_positions"] = by_name["wpe.weight"][0]
    # Counted, as no tensor's shape depends on how many layers there are.
    layers = {name.split(".")[1] for name in by_name if re.match(r"h\.\d+\.", name)}
    if layers:
        said["n_layer"] = len(layers)
    # Told apart from the rest, as every model of HF's has them.
    if layers and "ln_f.weight" in by_name and "ln_f.bias" not in by_name:
        said["bias"] = False
    return said
