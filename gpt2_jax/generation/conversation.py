"""A text that a user and a model write in turns, of which nothing is read twice."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.generation.decode import (
    Generation,
    State,
    advance,
    check_numbers,
    choose,
    read,
)
from gpt2_jax.generation.request import Rules, check_sampler, check_stateless
from gpt2_jax.generation.text import Continuation
from gpt2_jax.modules import Params
from gpt2_jax.tokenizer import Tokenizer

BLOCK = 32  # tokens that are read at a time


class Conversation:
    """A text that a user and the model write in turns. Compiles itself.

    What was read stays in the cache: a turn reads its own part.

    When the context is full, the text goes on from its last half, which is read anew.

    Attributes:
      ids: the text so far, or what is left of it.
      read: how many of them are in the cache.
      turn: how many turns the model has had.

    Examples:
      >>> talk = gpt2_jax.Conversation(params, tokenizer, config=config)
      >>> for row in talk.reply("Once upon a time", max_new_tokens=3):
      ...     pass
      >>> talk.turn, talk.ids[:4] == ids[0].tolist()
      (1, True)
    """

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        key: PRNGKeyArray | None = None,
        *,
        config: GPT2Config,
        sampler: Any = None,
        stop: Sequence[str] = (),
        add_special_tokens: bool = True,
        chunk: int = 8,
    ):
        """Takes what `stream_text` takes; `key` is one key.

        Raises:
          ValueError: a sampler that draws has no key, or its transform carries a state.
        """
        self.params = params
        self.tokenizer = tokenizer
        self.config = config
        self.key = key
        self.sampler = check_sampler(sampler, key)
        check_stateless(self.sampler, "A conversation")
        self.stop = stop
        self.add_special_tokens = add_special_tokens
        self.turn = 0
        self._busy = threading.Lock()
        self._chunk = as_count("chunk", chunk)
        # One size for the whole context, so that no turn waits for a compilation. A last block may
        # be half empty, and a last chunk too long.
        self._slots = config.n_positions + max(BLOCK, self._chunk)
        self.reset()

    def reset(self) -> None:
        """Begins a new text."""
        self.ids: list[int] = []
        self.read = 0
        self._cache: KVCache | None = None

    def reply(self, text: str, *, max_new_tokens: int) -> Iterator[Continuation]:
        """Adds the user's text and yields the model's continuation whenever it has grown.

        Turn `t` draws with `fold_in(key, t)`, as `generate` would with this for the key of its row.

        Another turn ends this one, as far as it has come.

        Raises:
          ValueError: the whole text is empty, or `max_new_tokens` is less than 1.
          RuntimeError: two threads ask at once; or, while it is iterated, another turn has begun.
        """
        max_new_tokens = as_count("max_new_tokens", max_new_tokens)
        with self._alone():
            row, rules = self._open_turn(text)
        # Returned, not yielded from: what the user said counts, even if nobody asks for an answer.
        return self._guarded(self.turn, self._continue(row, rules, max_new_tokens))

    def _open_turn(self, text: str) -> tuple[Continuation, Rules]:
        """Adds the user's text; returns the row of the answer, still empty, and how it is made."""
        # What the tokenizer adds to a text is added to its beginning, not to each turn.
        is_beginning = not self.ids
        ids = self.tokenizer.encode(
            text, add_special_tokens=is_beginning and self.add_special_tokens
        )
        if not self.ids and not ids:
            raise ValueError("There is no text to continue.")
        self.ids += ids
        # By the turn, so that the same words in another turn are answered anew.
        keys = None if self.key is None else jax.random.fold_in(self.key, self.turn)[None]
        # Counted as it begins: a turn that is broken off has used its key up.
        self.turn += 1
        rules = Rules(
            keys=keys,
            sampler=self.sampler,
            stop_ids=jnp.asarray(self.config.eos_token_ids, jnp.int32),
            # Seen by nobody: what stands behind a stop id is cut off.
            pad_id=jnp.int32(0),
            tap=None,
        )
        stop_ids = self.config.eos_token_ids
        row = Continuation(text, self.tokenizer, self.stop, stop_ids, list(self.ids))
        return row, rules

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other threads out, by an error: two would give the cache away twice."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("A conversation must be used by one thread at a time, got two.")
        try:
            yield
        finally:
            self._busy.release()

    def _guarded(self, turn: int, rows: Iterator[Continuation]) -> Iterator[Continuation]:
        """Yields what a turn does, as long as it is the last one."""
        while True:
            with self._alone():
                if turn != self.turn:
                    raise RuntimeError(
                        f"Turn {turn} of the conversation was ended by turn {self.turn}: its"
                        " continuation cannot go on."
                    )
                row = next(rows, None)
            if row is None:
                return
            yield row

    def _continue(
        self, row: Continuation, rules: Rules, max_new_tokens: int
    ) -> Iterator[Continuation]:
        """Yields the row whenever it has grown, past the end of the context if need be."""
        full = self.config.n_positions
        while len(row.ids) < max_new_tokens and not row.finish_reason:
            if len(self.ids) >= full:
                # Positions are learned: what is kept must be read anew, from position 0 on.
                self.ids = self.ids[-(full // 2) :]
                self.read = 0
            room = min(max_new_tokens - len(row.ids), full - len(self.ids))
            yield from self._fill(row, rules, room)
        row.finish()
        yield row

    def _fill(self, row: Continuation, rules: Rules, room: int) -> Iterator[Continuation]:
        """Yields the row as it grows by up to `room` tokens, which fit into the context."""
        state, made = self._begin(len(row.ids), rules)
        while True:
            self._take(row, made, room)
            room -= made.ids.shape[1]
            # The last token is not read yet; what was read beyond a stop will be written over.
            self._cache = state.cache
            self.read = len(self.ids) - 1
            yield row
            if room <= 0 or row.finish_reason:
                return
            self._lend()
            state, made = advance(
                self.params,
                state,
                rules,
                jnp.int32(min(room, self._chunk)),
                config=self.config,
                chunk=self._chunk,
            )

    def _take(self, row: Continuation, made: Generation, room: int) -> None:
        """Adds what was made to the row, and what the row took of it to the text."""
        check_numbers(made.logprobs, config=self.config)
        n_known = len(row.ids)
        # A chunk is filled up with padding behind the tokens that there was room for.
        ids = np.asarray(made.ids)[0, :room].tolist()
        row.push(ids, np.asarray(made.logprobs)[0, :room].tolist())
        # A stop id ends the turn, not the text: the next turn goes on as if it had not come.
        taken = row.ids[n_known:]
        self.ids += [token for token in taken if token not in self.config.eos_token_ids]

    def _begin(self, step: int, rules: Rules) -> tuple[State, Generation]:
        """Reads what is unread, at least the last token, and chooses this turn's `step`-th."""
        n_tokens = len(self.ids)
        # Of one shape, however long the text is, like the cache: each turn runs the same programs.
        ids = np.zeros((1, self._slots), np.int32)
        ids[0, :n_tokens] = self.ids
        if self._cache is None:
            self._cache = kv_cache.empty(self.config, 1, self._slots)
            self.read = 0
        # The logits after the last token are needed, even where it was read before.
        start = min(self.read, n_tokens - 1)
        cache = self._lend()
        while True:
            # In blocks of one size: a long addition runs the same program several times.
            count = min(n_tokens - start, BLOCK)
            logits, cache = read(
                self.params,
                ids[:, start : start + BLOCK],
                cache,
                jnp.int32(start),
                jnp.int32(count),
                config=self.config,
            )
            start += count
            if start == n_tokens:
                break
        state = State(
            token=jnp.zeros(1, jnp.int32),
            done=jnp.zeros(1, bool),
            ids=jnp.asarray(ids),
            step=jnp.int32(step),
            cache=cache,
            memory=None,
        )
        return choose(logits, state, rules, {}, config=self.config)

    def _lend(self) -> KVCache:
        """Returns the cache, which a program is about to consume.

        Until its successor is put back there is none: a turn that is broken off in between must
        read all anew.
        """
        cache = self._cache
        assert cache is not None
        self._cache = None
        return cache
