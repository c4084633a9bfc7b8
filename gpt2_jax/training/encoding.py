"""Texts to ids, piece by piece, here or by several processes. Knows strings and a tokenizer."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.texts import Span, spans

MIN_CHARACTERS_FOR_WORKERS = 2**25  # fewer are encoded sooner than processes start
PIECES_AHEAD = 8  # for each worker: enough that none waits, few enough for memory


class Piece(NamedTuple):
    """A part of a text, encoded."""

    ids: UInt32[np.ndarray, " N"]
    span: Span

    @property
    def starts_text(self) -> bool:
        """Whether it is the first one of its text."""
        return self.span.start == 0

    @property
    def ends_text(self) -> bool:
        """Whether it is the last one of its text."""
        return self.span.end == len(self.span.text)


def encode(tokenizer: Tokenizer, texts: Iterable[str], n_workers: int) -> Iterator[Piece]:
    """Yields texts piece by piece, in order, and reads no further than it must.

    What is short is encoded here, without workers.

    Raises:
      ChildProcessError: a worker has ended before its work.
    """
    before = np.array(tokenizer.template.before, np.uint32)
    after = np.array(tokenizer.template.after, np.uint32)
    unread = iter(texts)
    first = _first(unread, MIN_CHARACTERS_FOR_WORKERS)
    is_short = sum(len(text) for text in first) < MIN_CHARACTERS_FOR_WORKERS
    # Bounds alone, no text is copied: pieces are cut out as they are encoded.
    if tokenizer.is_seamless:
        pieces = spans(chain(first, unread))
    else:
        pieces = (Span(text, 0, len(text)) for text in chain(first, unread))
    with contextlib.ExitStack() as stack:
        if n_workers == 1 or is_short:
            encoded = (Piece(_ids_of(tokenizer, piece.cut()), piece) for piece in pieces)
        else:
            # Not forked: JAX, which `import gpt2_jax` brings, has threads, and a fork may hang.
            context = multiprocessing.get_context("spawn")
            # Nor a `multiprocessing.Pool`, which waits for ever for a worker that was killed.
            pool = ProcessPoolExecutor(n_workers, context, _start_worker, (tokenizer,))
            stack.callback(pool.shutdown, cancel_futures=True)
            encoded = _encoded_by(pool, pieces, PIECES_AHEAD * n_workers)
        for ids, piece in encoded:
            if piece.start == 0:
                ids = np.concatenate([before, ids])
            if piece.end == len(piece.text):
                ids = np.concatenate([ids, after])
            yield Piece(ids, piece)


def _first(texts: Iterator[str], n_characters: int) -> list[str]:
    """Returns texts from the beginning, of together so many characters if there are."""
    first = []
    total = 0
    for text in texts:
        first.append(text)
        total += len(text)
        if total >= n_characters:
            break
    return first


def _encoded_by(pool: Executor, pieces: Iterable[Span], n_ahead: int) -> Iterator[Piece]:
    """Yields pieces as workers encode them, in order."""
    # Not `map`, which takes in all that there are to encode: together they are the corpus.
    waiting: deque[tuple[Future, Span]] = deque()
    try:
        for piece in pieces:
            waiting.append((pool.submit(_encode_in_worker, piece.cut()), piece))
            if len(waiting) == n_ahead:
                result, done = waiting.popleft()
                yield Piece(result.result(), done)
        for result, done in waiting:
            yield Piece(result.result(), done)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A process that encodes has ended before its work: was it killed, as where memory runs "
            "out? Fewer `workers` need less of it."
        ) from error


def _ids_of(tokenizer: Tokenizer, text: str) -> UInt32[np.ndarray, " N"]:
    # As an array it goes from process to process whole: a list would be taken apart, id by id.
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.uint32)


# What a worker does. It gets the tokenizer once, when its process starts, not with each piece.


def _start_worker(tokenizer: Tokenizer) -> None:
    # A terminal's Ctrl-C goes to all processes; the first of them ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(text: str) -> UInt32[np.ndarray, " N"]:
    return _ids_of(_worker_tokenizer, text)
