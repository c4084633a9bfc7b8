"""Arrays that lie in a file as they are, each at a place that its format's index tells."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained.formats import Shape, Tensor


class Place(NamedTuple):
    """Where an array lies, in C order and with the least significant byte first."""

    file: Path
    offset: int  # in bytes
    shape: Shape
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        """How long it is."""
        return math.prod(self.shape) * self.dtype.itemsize


class RawTensors:
    """Arrays at known places, read by plain reads: pages of a mapped file would pile up.

    Raises:
      CheckpointError: a file ends before an array does.
    """

    def __init__(self, places: Mapping[str, Place]):
        self.places = dict(places)
        self.shapes: dict[str, Shape] = {}
        # Before anything is read: a file that is cut off is told at once, not after gigabytes.
        sizes = {place.file: place.file.stat().st_size for place in self.places.values()}
        for name, place in self.places.items():
            self.shapes[name] = place.shape
            end = place.offset + place.n_bytes
            size = sizes[place.file]
            if end > size:
                got = f"got {size:,}, which end before {name} does: it is cut off"
                raise CheckpointError(f"{place.file}: expected at least {end:,} bytes, {got}.")

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        place = self.places[name]
        # As bytes first: numpy reads no dtype from a file that is not its own, and bfloat16 is not.
        data = np.fromfile(place.file, np.uint8, count=place.n_bytes, offset=place.offset)
        return data.view(place.dtype).reshape(place.shape)

    @property
    def file(self) -> Path | None:
        """One of the files."""
        return next((place.file for place in self.places.values()), None)

    def file_of(self, name: str) -> Path | None:
        """Returns the file that holds a tensor."""
        return self.places[name].file
