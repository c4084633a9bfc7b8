"""Text in, text out: prompts continued up to stop texts, at once or as they grow."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.decode import Generation
from gpt2_jax.generation.generate import stream
from gpt2_jax.generation.request import Keys
from gpt2_jax.inputs import pad_rows
from gpt2_jax.modules import Params
from gpt2_jax.tokenizer import Tokenizer


class Continuation:
    """What follows a prompt, as it grows. It is of the host, and compiles nothing.

    Attributes:
      prompt: the text that is continued.
      text: what follows, up to a stop text or a stop id.
      ids: the generated tokens, among them those that a stop text ended in, and the stop id.
      logprobs: the model's own log-probability of each of them.
      new: the part of `text` that the last tokens added, as far as it cannot turn out to begin a
        stop text.
      finish_reason: "stop" after a stop text or a stop id, "length" when nothing more will come,
        None before.
      score: of the beam that found it, if one did.
      context: the ids of the prompt, on which the text of the first token may depend.

    Examples:
      >>> (row,) = gpt2_jax.complete(
      ...     params, tokenizer, ["Once upon a time"], config=config, max_new_tokens=3, stop_ids=()
      ... )
      >>> row.prompt, len(row.ids), len(row.logprobs), row.finish_reason
      ('Once upon a time', 3, 3, 'length')
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        context: Sequence[int] = (),
    ):
        self.prompt = prompt
        self.context = context
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.new = ""
        self.finish_reason: str | None = None
        self.score: float | None = None
        self._stop = tuple(stop)
        self._stop_ids = tuple(stop_ids)
        self._n_shown = 0  # characters of `text` that were in some `new`
        # A token may end within a character, which is shown when it is whole.
        self._decoder = tokenizer.stream_decoder(context)

    def push(self, ids: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes the next tokens, up to a stop, and returns `new`."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish_reason:
                break
            # As Python's numbers, which JSON takes.
            self.ids.append(int(token))
            self.logprobs.append(float(logprob))
            # The id that ends the text is no part of it.
            if token in self._stop_ids:
                self.finish_reason = "stop"
            else:
                self._append(self._decoder.push([token]))
        n_held_back = 0 if self.finish_reason else self._count_held_back()
        return self._show(n_held_back)

    def finish(self) -> str:
        """Says that no token follows and returns `new`, which now holds whatever was held back."""
        if not self.finish_reason:
            self._append(self._decoder.flush())
            # The last characters may have completed a stop text.
            self.finish_reason = self.finish_reason or "length"
        return self._show(0)

    def _append(self, text: str) -> None:
        """Adds to the text; the first stop text in it, wherever that begins, ends it."""
        self.text += text
        # In all of the text: a stop text may have begun tokens ago.
        starts = [self.text.find(stop) for stop in self._stop]
        starts = [start for start in starts if start >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.finish_reason = "stop"

    # A text is shown as it grows, and what was shown cannot be taken back: so an end that may turn
    # out to begin a stop text waits for the tokens that decide it.
    def _count_held_back(self) -> int:
        """Returns how many characters at the end could turn out to begin a stop text."""
        n_held_back = 0
        for stop in self._stop:
            for size in range(1, len(stop)):  # the whole of it would have ended the text
                if self.text.endswith(stop[:size]):
                    n_held_back = max(n_held_back, size)
        return n_held_back

    def _show(self, n_held_back: int) -> str:
        """Returns what was not shown before, but for the last characters."""
        # A stop text may have cut off what was held back: then there is nothing new.
        end = max(self._n_shown, len(self.text) - n_held_back)
        self.new = self.text[self._n_shown : end]
        self._n_shown = end
        return self.new


def stream_text(
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    key: Keys | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    allow_special: bool = False,
    add_special_tokens: bool = True,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[list[Continuation]]:
    """Continues prompts, and yields all continuations whenever they have grown. Compiles itself.

    Args:
      params: the parameters.
      tokenizer: of the model.
      prompts: texts, none of them empty.
      key, config, max_new_tokens, num_return_sequences, stop_ids: as for `generate`; continuations
        of the same prompt stand together.
      stop: texts before which a continuation ends, wherever they begin and end in its tokens.
      allow_special: read `<|endoftext|>` and the like in a prompt as special tokens.
      add_special_tokens: add to a prompt what the tokenizer's template adds to a text, as HF does;
        GPT-2's own adds nothing.
      **options: further arguments of `stream`, such as `sampler` and `overflow`.

    Raises:
      ValueError: as `stream`, or a prompt or a stop text is empty.

    Examples:
      >>> texts = gpt2_jax.stream_text(
      ...     params, tokenizer, ["Once upon a time"], config=config, max_new_tokens=3, stop_ids=()
      ... )
      >>> [(len(row.ids), row.finish_reason) for (row,) in texts]
      [(1, None), (3, None), (3, 'length')]
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise ValueError("`stop` must not hold an empty text.")
    ids, lengths = encode_batch(
        tokenizer, prompts, allow_special=allow_special, add_special_tokens=add_special_tokens
    )
    # Said here, and not left to `stream`: the rows must know where their text ends, too.
    stop_ids = config.eos_token_ids if stop_ids is None else stop_ids
    pieces = stream(
        params,
        ids,
        lengths,
        key,
        config=config,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_return_sequences,
        stop_ids=stop_ids,
        **options,
    )
    rows = []
    for prompt, prompt_ids, length in zip(prompts, ids, lengths, strict=True):
        context = prompt_ids[:length].tolist()
        for _ in range(num_return_sequences):
            rows.append(Continuation(prompt, tokenizer, stop, stop_ids, context))
    # Not a generator itself, so that arguments are checked when it is called: see `stream`.
    return _grow(rows, pieces)


def _grow(rows: list[Continuation], pieces: Iterator[Generation]) -> Iterator[list[Continuation]]:
    """Yields the rows after each piece, until all have finished."""
    for piece in pieces:
        all_ids = np.asarray(piece.ids)
        all_logprobs = np.asarray(piece.logprobs)
        for number, length in enumerate(np.asarray(piece.lengths)):
            ids = all_ids[number, :length].tolist()
            rows[number].push(ids, all_logprobs[number, :length].tolist())
        yield rows
        # Stop texts end rows of which the program knows nothing: it is simply not asked again.
        if all(row.finish_reason for row in rows):
            break
    for row in rows:
        row.finish()
    yield rows


def complete(
    params: Params, tokenizer: Tokenizer, prompts: Sequence[str], *args: Any, **options: Any
) -> list[Continuation]:
    """Returns the finished continuations of `stream_text`, whose arguments it takes.

    Compiles itself.

    Examples:
      >>> (row,) = gpt2_jax.complete(
      ...     params, tokenizer, ["Once upon a time"], config=config, max_new_tokens=3, stop_ids=()
      ... )
      >>> row.finish_reason, row.text == tokenizer.decode(row.ids)
      ('length', True)
    """
    # Each time the same rows, further on: the last have all of it.
    *_, rows = stream_text(params, tokenizer, prompts, *args, **options)
    return rows


def encode_batch(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    allow_special: bool = False,
    add_special_tokens: bool = True,
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns texts as `generate` takes them: ids, padded on the right, and lengths, in int32.

    It compiles nothing.

    Args:
      tokenizer: of the model.
      texts: what to encode.
      allow_special: read `<|endoftext|>` and the like in a text as special tokens.
      add_special_tokens: add what the tokenizer's template adds to a text, as HF does.

    Raises:
      ValueError: a text is empty, or `texts` is one text.

    Examples:
      >>> batch, lengths = gpt2_jax.encode_batch(tokenizer, ["Once upon a time", "Once"])
      >>> batch.shape, lengths.tolist()
      ((2, 4), [4, 1])
    """
    if isinstance(texts, str):
        raise ValueError("A sequence of texts is expected, got one text.")
    allowed = "all" if allow_special else ()
    encoded = tokenizer.encode_batch(texts, allowed, add_special_tokens=add_special_tokens)
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            eot_token = tokenizer.eot_token
            advice = f"take {eot_token!r} with `allow_special`" if eot_token else "take any token"
            raise ValueError(f"The prompt {text!r} is empty. To start from nothing, {advice}.")
    return pad_rows(encoded)
