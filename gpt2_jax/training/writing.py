"""Ids to token files, each of at most so many, with a record of each. Knows numbers and files."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Integer

from gpt2_jax.training.manifest import FileRecord, Scan, record_of
from gpt2_jax.training.token_files import TokenFile


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
        self._opened: BinaryIO | None = None

    def write(self, ids: list[int], *, n_bytes: int, starts_document: bool) -> None:
        """Writes the ids of a document or of a part of one, which has so many bytes of text."""
        self.n_bytes += n_bytes
        self.n_documents += starts_document
        n_begun = int(starts_document)
        array = np.array(ids, self.dtype)
        while array.size:
            if self._opened is None:
                self._begin()
            room = array.size if self.max_tokens is None else self.max_tokens - self._n_ids
            self._append(array[:room], n_begun)
            n_begun = 0  # in the file that goes on it does not begin again
            array = array[room:]

    def close(self) -> None:
        """Ends the last file."""
        if self._opened is not None:
            self._end()

    def summary(self) -> dict[str, Any]:
        """Returns what `meta.json` says of the part."""
        n_tokens = sum(record.tokens for record in self.records)
        return {"tokens": n_tokens, "bytes": self.n_bytes, "documents": self.n_documents}

    def _begin(self) -> None:
        number = len(self.records)
        name = f"{self.part}.bin" if self.max_tokens is None else f"{self.part}_{number:05}.bin"
        self._opened = (self.folder / name).open("wb")
        self._name = name
        self._digest = hashlib.sha256()  # as it is written: nothing is read again
        self._max_id = 0
        self._n_ids = 0
        self._n_documents = 0

    def _append(self, ids: Integer[np.ndarray, " N"], n_documents: int) -> None:
        assert self._opened is not None, "`write` has begun a file"
        content = ids.tobytes()
        self._opened.write(content)
        self._digest.update(content)
        self._max_id = max(self._max_id, int(ids.max()))
        self._n_ids += len(ids)
        self._n_documents += n_documents
        if self._n_ids == self.max_tokens:
            self._end()

    def _end(self) -> None:
        assert self._opened is not None, "nobody ends what was not begun"
        self._opened.close()
        self._opened = None
        file = TokenFile(self.folder / self._name, self.dtype, 0, self._n_ids)
        found = Scan(self._digest.hexdigest(), self._max_id)
        self.records.append(record_of(file, self._name, found, documents=self._n_documents))
