"""Ids to token files, each of at most so many, with a record of each. Knows numbers and files."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Integer

from gpt2_jax.training.manifest import FileRecord, Scan, record_of
from gpt2_jax.training.token_files import TokenFile


@dataclasses.dataclass
class Opened:
    """A token file that is being written, and what is known of it so far."""

    name: str
    stream: BinaryIO
    digest: Any  # of `hashlib`, as it is written: nothing is read again
    max_id: int = 0
    n_ids: int = 0
    n_documents: int = 0  # that begin in it

    def write(self, ids: Integer[np.ndarray, " N"], n_begun: int) -> None:
        """Writes ids, among which so many documents begin."""
        content = ids.tobytes()
        self.stream.write(content)
        self.digest.update(content)
        self.max_id = max(self.max_id, int(ids.max()))
        self.n_ids += len(ids)
        self.n_documents += n_begun


class PartWriter:
    """Writes the token files of a part, one after the other: close it, also where that failed.

    Args:
      folder: where they go.
      part: "train" or "val".
      dtype: of the ids.
      max_tokens: of a file; where it is full, the next one goes on, within a document too. None
        writes a single one, `train.bin` instead of `train_00000.bin`.
    """

    def __init__(self, folder: Path, part: str, dtype: np.dtype, max_tokens: int | None = None):
        self.folder = folder
        self.part = part
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.records: list[FileRecord] = []
        self.n_bytes = 0  # of the texts
        self.n_documents = 0
        self._file: Opened | None = None

    def write(self, ids: Integer[np.ndarray, " N"], *, n_bytes: int, starts_document: bool) -> None:
        """Writes the ids of a document or of a part of one, which has so many bytes of text."""
        self.n_bytes += n_bytes
        self.n_documents += starts_document
        n_begun = int(starts_document)
        array = ids.astype(self.dtype)
        while array.size:
            file = self._file or self._begin()
            room = array.size if self.max_tokens is None else self.max_tokens - file.n_ids
            file.write(array[:room], n_begun)
            n_begun = 0  # in the file that goes on it does not begin again
            array = array[room:]
            if file.n_ids == self.max_tokens:
                self.close()

    def close(self) -> None:
        """Ends the last file, and keeps a record of it."""
        file = self._file
        if file is None:
            return
        self._file = None
        file.stream.close()
        layout = TokenFile(self.folder / file.name, self.dtype, 0, file.n_ids)
        found = Scan(file.digest.hexdigest(), file.max_id)
        self.records.append(record_of(layout, file.name, found, documents=file.n_documents))

    def summary(self) -> dict[str, Any]:
        """Returns what `meta.json` says of the part."""
        n_tokens = sum(record.tokens for record in self.records)
        return {"tokens": n_tokens, "bytes": self.n_bytes, "documents": self.n_documents}

    def _begin(self) -> Opened:
        """Begins the next file."""
        number = len(self.records)
        name = f"{self.part}.bin" if self.max_tokens is None else f"{self.part}_{number:05}.bin"
        self._file = Opened(name, (self.folder / name).open("wb"), hashlib.sha256())
        return self._file
