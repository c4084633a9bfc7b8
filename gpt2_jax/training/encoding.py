"""Texts to ids, piece by piece, here or by several processes. Knows strings and a tokenizer."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from multiprocessing.pool import AsyncResult, Pool
from typing import NamedTuple

from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.training.texts import Span, spans

MIN_CHARACTERS_FOR_WORKERS = 2**25  # fewer are encoded sooner than processes start
PIECES_AHEAD = 8  # for each worker: enough that none waits, few enough for memory


class Piece(NamedTuple):
    """A part of a text, encoded."""

    ids: list[int]
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
    """
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
            pool = stack.enter_context(context.Pool(n_workers, _start_worker, (tokenizer,)))
            encoded = _encoded_by(pool, pieces, PIECES_AHEAD * n_workers)
        for ids, piece in encoded:
            if piece.start == 0:
                ids = [*tokenizer.template.before, *ids]
            if piece.end == len(piece.text):
                ids = [*ids, *tokenizer.template.after]
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


def _encoded_by(pool: Pool, pieces: Iterable[Span], n_ahead: int) -> Iterator[Piece]:
    """Yields pieces as workers encode them, in order."""
    # Not `imap`, which takes in all that there are to encode: together they are the corpus.
    waiting: deque[tuple[AsyncResult, Span]] = deque()
    for piece in pieces:
        waiting.append((pool.apply_async(_encode_in_worker, (piece.cut(),)), piece))
        if len(waiting) == n_ahead:
            result, done = waiting.popleft()
            yield Piece(result.get(), done)
    for result, done in waiting:
        yield Piece(result.get(), done)


def _ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# What a worker does. It gets the tokenizer once, when its process starts, not with each piece.


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(text: str) -> list[int]:
    return _ids_of(_worker_tokenizer, text)
