"""Text in, text out: prompts continued up to stop texts, at once or as they grow, and conversations."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.generate import (
    Generation,
    State,
    advance,
    check_sampler,
    ends,
    fold,
    stream,
    token_logprob,
)
from gpt2_jax.generation.sampling import History
from gpt2_jax.model import KVCache, Params, empty_layers, extend
from gpt2_jax.tokenizer import Tokenizer

BLOCK = 32  # tokens of a conversation that are read at a time


class Continuation:
    """What follows a prompt, as it grows.

    Attributes:
      prompt: the text that is continued.
      text: what follows, up to a stop text or a stop id.
      ids: the generated tokens, among them those that a stop text ended in, and the stop id.
      logprobs: the model's own log-probability of each of them.
      new: the part of `text` that the last tokens added, as far as it cannot turn out to begin a stop text.
      finish_reason: "stop" after a stop text or a stop id, "length" when nothing more will come, None before.
      score: of the beam that found it, if one did.
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ):
        self.prompt, self.text, self.new, self.finish_reason = prompt, "", "", None
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.score: float | None = None
        self._stop, self._stop_ids, self._shown = tuple(stop), tuple(stop_ids), 0
        self._decoder = tokenizer.stream_decoder()

    def push(self, ids: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes the next tokens, up to a stop, and returns `new`."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish_reason:
                break
            self.ids.append(int(token))
            self.logprobs.append(float(logprob))
            if token in self._stop_ids:
                self.finish_reason = "stop"
            else:
                self._extend(self._decoder.push([token]))
        return self._show(0 if self.finish_reason else self._held())

    def finish(self) -> str:
        """Says that no token follows and returns `new`, which now holds whatever was kept back."""
        if not self.finish_reason:
            self._extend(self._decoder.flush())
            self.finish_reason = self.finish_reason or "length"
        return self._show(0)

    def _extend(self, text):
        self.text += text
        cuts = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.text, self.finish_reason = self.text[: min(cuts)], "stop"

    def _held(self):
        """How many characters at the end could turn out to begin a stop text."""
        sizes = (
            size
            for stop in self._stop
            for size in range(1, len(stop))
            if self.text.endswith(stop[:size])
        )
        return max(sizes, default=0)

    def _show(self, held):
        end = max(self._shown, len(self.text) - held)
        self.new, self._shown = self.text[self._shown : end], end
        return self.new


def stream_text(
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    key: Array | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    allow_special: bool = False,
    num_return_sequences: int = 1,
    stop_ids: tuple[int, ...] | None = None,
    **options: Any,
) -> Iterator[list[Continuation]]:
    """Continues prompts, and yields all continuations whenever they have grown, until each has finished.

    Args:
      params: the parameters.
      tokenizer: of the model.
      prompts: texts, none of them empty.
      key, config, max_new_tokens, num_return_sequences, stop_ids: as for `generate`; continuations of the same prompt
        stand together.
      stop: texts before which a continuation ends, wherever they begin and end in its tokens.
      allow_special: read `<|endoftext|>` in a prompt as the special token.
      **options: further arguments of `stream`, such as `sampler` and `overflow`.

    Raises:
      ValueError: as `stream`, or a prompt or a stop text is empty.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise ValueError("`stop` must not hold an empty text.")
    batch, lengths = encode_batch(tokenizer, prompts, allow_special=allow_special)
    stop_ids = config.eos_token_ids if stop_ids is None else stop_ids
    options |= {"config": config, "max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    pieces = stream(
        params, batch, lengths, key, num_return_sequences=num_return_sequences, **options
    )
    rows = [
        Continuation(prompt, tokenizer, stop, stop_ids)
        for prompt in prompts
        for _ in range(num_return_sequences)
    ]

    def grow():
        for piece in pieces:
            for row, ids, length, logprobs in zip(rows, *map(np.asarray, piece), strict=True):
                row.push(ids[:length].tolist(), logprobs[:length].tolist())
            yield rows
            if all(row.finish_reason for row in rows):
                break
        for row in rows:
            row.finish()
        yield rows

    return grow()


def complete(
    params: Params, tokenizer: Tokenizer, prompts: Sequence[str], *args: Any, **options: Any
):
    """Returns the finished continuations of `stream_text`, whose arguments it takes: `list[Continuation]`."""
    *_, rows = stream_text(params, tokenizer, prompts, *args, **options)
    return rows


def encode_batch(
    tokenizer: Tokenizer, texts: Sequence[str], *, allow_special: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts as `generate` takes them: ids `int32[B, T]`, padded on the right, and lengths `int32[B]`.

    Raises:
      ValueError: a text is empty, or `texts` is one text.
    """
    if isinstance(texts, str):
        raise ValueError("A sequence of texts is expected, got one text.")
    encoded = [tokenizer.encode(text, "all" if allow_special else ()) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise ValueError(
                f"The prompt {text!r} is empty. To start from nothing, take '<|endoftext|>' with `allow_special`."
            )
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    batch = np.zeros((len(encoded), lengths.max(initial=1)), np.int32)
    for row, ids in zip(batch, encoded, strict=True):
        row[: len(ids)] = ids
    return batch, lengths


class Conversation:
    """A text that a user and the model write in turns. What was read stays in the cache: a turn reads its own part.

    When the context is full, the text goes on from its last half, which is read anew.

    Attributes:
      ids: the text so far, or what is left of it.
      read: how many of them are in the cache.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        key: Array | None = None,
        *,
        config: GPT2Config,
        sampler: Any = None,
        stop: Sequence[str] = (),
        chunk: int = 8,
    ):
        """Takes what `stream_text` takes; `key` is one key.

        Raises:
          ValueError: a sampler that draws has no key.
        """
        self.params, self.tokenizer, self.config, self.stop = params, tokenizer, config, stop
        self.sampler, self.key, self.turn = check_sampler(sampler, key), key, 0
        self._chunk, self._slots = (
            chunk,
            config.n_positions + max(BLOCK, chunk),
        )  # a last block may be half empty
        self.reset()

    def reset(self) -> None:
        """Begins a new text."""
        self.ids: list[int] = []
        self.read = 0
        self._layers = None  # the cache; None while it is lent to a step, so also after one that was broken off

    def reply(self, text: str, *, max_new_tokens: int) -> Iterator[Continuation]:
        """Adds the user's text and yields the model's continuation whenever it has grown.

        Turn `t` draws with `fold_in(key, t)`, as `generate` would with this for the key of its row.

        Raises:
          ValueError: the whole text is empty, or `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        ids = self.tokenizer.encode(text)
        if not self.ids and not ids:
            raise ValueError("There is no text to continue.")
        self.ids += ids
        keys = None if self.key is None else jax.random.fold_in(self.key, self.turn)[None]
        self.turn += 1
        row = Continuation(text, self.tokenizer, self.stop, self.config.eos_token_ids)
        return self._grow(row, max_new_tokens, keys)

    def _grow(self, row, max_new_tokens, keys):
        full, stops, pad = (
            self.config.n_positions,
            jnp.asarray(self.config.eos_token_ids, jnp.int32),
            jnp.int32(0),
        )
        while len(row.ids) < max_new_tokens and not row.finish_reason:
            if len(self.ids) >= full:
                self.ids, self.read = self.ids[-(full // 2) :], 0
            room = min(max_new_tokens - len(row.ids), full - len(self.ids))
            state, piece = self._begin(np.int32(len(row.ids)), keys, stops)
            while True:
                known = len(row.ids)
                row.push(
                    np.asarray(piece.ids)[0, :room].tolist(),
                    np.asarray(piece.logprobs)[0, :room].tolist(),
                )
                self.ids += [id for id in row.ids[known:] if id not in self.config.eos_token_ids]
                room -= piece.ids.shape[1]
                # The last token is not read yet, and what was read beyond a stop is as good as unread.
                self._layers, self.read = state.cache.layers, len(self.ids) - 1
                yield row
                if room <= 0 or row.finish_reason:
                    break
                self._layers = None
                static = {"config": self.config, "chunk": self._chunk}
                steps = np.int32(min(room, self._chunk))
                state, piece = advance(
                    self.params, state, keys, self.sampler, stops, pad, steps, **static
                )
        row.finish()
        yield row

    def _begin(self, step, keys, stops):
        """Reads what is unread, at least the last token, and chooses the next; returns as `advance` does."""
        if self._layers is None:
            self._layers, self.read = empty_layers(self.config, 1, self._slots), 0
        self.read = min(self.read, len(self.ids) - 1)
        ids, length = np.zeros((1, self._slots), np.int32), np.array([len(self.ids)], np.int32)
        ids[0, : len(self.ids)] = self.ids
        for start in range(self.read, len(self.ids), BLOCK):
            block, (layers, self._layers) = ids[:, start : start + BLOCK], (self._layers, None)
            last = np.int32(min(len(self.ids) - start, BLOCK) - 1)
            logits, self._layers = _read(
                self.params, block, layers, np.array([start], np.int32), last, config=self.config
            )
        layers, self._layers = self._layers, None
        return _choose(
            logits, layers, ids, length, step, keys, self.sampler, stops, config=self.config
        )


@partial(jax.jit, static_argnames="config", donate_argnames="layers")
def _read(params, ids, layers, start, last, *, config):
    """Reads the tokens `ids[1, BLOCK]` from position `start[1]` on; returns the logits after the `last` of them."""
    logits, layers = extend(params, ids, layers, start, config=config)
    return logits[:, last], layers


@partial(jax.jit, static_argnames="config", donate_argnames="layers")
def _choose(logits, layers, ids, length, step, keys, sampler, stops, *, config):
    """Chooses the token after `ids[1, S]`, of which `length[1]` are real; returns as `advance` does."""
    valid = jnp.arange(ids.shape[1])[None] < length[:, None]
    token = sampler(fold(keys, step), logits, History(ids, valid, step))
    cache = KVCache(layers, valid, length[0], length)
    state = State(token, ends(token, cache, stops, config), ids, step + 1, cache)
    return state, Generation(
        token[:, None], jnp.ones(1, jnp.int32), token_logprob(logits, token)[:, None]
    )
