"""Scoring: how likely a model finds given tokens, and the figures that are made of it. Knows ids; nothing of datasets.

The logits of a batch, `[B, T, V]`, are never held at once: hidden states are turned into log-probabilities in chunks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from gpt2_jax.cache import bucket
from gpt2_jax.config import GPT2Config
from gpt2_jax.kernels import argmax
from gpt2_jax.model import Params, check_ids, hidden_states, unembed
from gpt2_jax.modules import wide_dtype

CHUNK = 256  # tokens whose logits, [CHUNK, V], are held at once


class Scored(NamedTuple):
    """What a model thinks of the `n` scored tokens of one request."""

    logprobs: (
        np.ndarray
    )  # float32[n] (float64 in a float64 model), of each token after those before it, in nats
    greedy: np.ndarray  # bool[n], whether it is the likeliest token there


class Likelihood(NamedTuple):
    """How well a model predicts a text: a sum, what it is divided by, and the usual quotients."""

    nll: float  # sum of the negative log-likelihoods of the scored tokens, in nats
    tokens: int  # that were scored
    variance: float  # of the negative log-likelihood of a token
    words: int | None = None  # of the text, where they were counted
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def stderr(self) -> float:
        """Standard error of `loss`, as if tokens were independent."""
        return math.sqrt(self.variance / self.tokens)

    @property
    def perplexity(self) -> float:
        """Per scored token."""
        return math.exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """Per word of the text, however many tokens were scored: the paper's figure."""
        return None if not self.words else math.exp(self.nll / self.words)

    @property
    def byte_perplexity(self) -> float | None:
        """Per UTF-8 byte of the text."""
        return None if not self.bytes else math.exp(self.nll / self.bytes)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the text."""
        return None if not self.bytes else self.nll / self.bytes / math.log(2)


class Choice(NamedTuple):
    """The scores of one continuation among several: log-probabilities, the greater the better."""

    total: float  # sum
    per_token: float  # mean
    per_byte: (
        float  # sum divided by the UTF-8 bytes of the continuation, if they are known, else NaN
    )


def token_logprobs(params: Params, ids: Array, *, config: GPT2Config) -> Array:
    """Returns the log-probability of each token after its predecessors, `int[B, T] -> float32[B, T - 1]`, in nats.

    A pure function that can be jitted and differentiated. Tokens after a row's end are scored too: pass them over.

    Args:
      params: the parameters.
      ids: token ids, padded on the right with any id of the vocabulary; `T` is at most `n_positions + 1`.
      config: the model's configuration.

    Raises:
      ValueError: as `apply`; or `ids` has less than 2 columns.
    """
    ids = check_ids(ids, config, longest=config.n_positions + 1)
    if ids.shape[1] < 2:
        raise ValueError("`ids` must have at least 2 columns: one to read and one to score, got 1.")
    hidden = hidden_states(params, ids[:, :-1], config=config)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
    pad = -len(targets) % CHUNK
    chunks = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, CHUNK, flat.shape[1])
    logprobs, _ = lax.map(
        lambda chunk: _logprobs(params, *chunk, config=config),
        (chunks, jnp.pad(targets, (0, pad)).reshape(-1, CHUNK)),
    )
    return logprobs.reshape(-1)[: len(targets)].reshape(ids.shape[0], -1)


def score(
    params: Params,
    requests: Sequence[tuple[Sequence[int], int]],
    *,
    config: GPT2Config,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Scores the last tokens of many texts, each after all that stands before it, in batches of like length.

    Rows are padded to 32, 64, 128, ... columns, so that few lengths mean few compilations.

    Args:
      params: the parameters.
      requests: for each text its ids and how many of them, at its end, to score. A text that is longer than
        `n_positions + 1` is cut from the left.
      config: the model's configuration.
      batch_size: texts that pass through the model at once.
      progress: is told how many more requests are done.

    Returns:
      What was found, in the order of the requests.

    Raises:
      ValueError: an id is outside the vocabulary, or a request asks for less than 1 token, for more than the text has
        after its first, or for more than `n_positions`; the request is named.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    texts = [_check_request(number, *request, config) for number, request in enumerate(requests)]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number][0]))
    found: dict[int, Scored] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        scored = _score_batch(params, [texts[number] for number in numbers], batch_size, config)
        found |= dict(zip(numbers, scored, strict=True))
        if progress is not None:
            progress(len(numbers))
    return [found[number] for number in range(len(texts))]


def sliding_windows(count: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields `(start, end, scored)`: windows over `count` tokens, and how many at the end of each are scored.

    Windows start every `stride` tokens and are `window` long, as in HF's guide to perplexity: each token is scored in
    the first window that holds it, unless it is the first there, with nothing before it. So with `stride < window`
    all but the first of the text are scored once, each but the first window's after at least `window - stride` others.

    Raises:
      ValueError: `window` is less than 2, or `stride` is not in [1, `window`].
    """
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"`window` must be at least 2 and `stride` in [1, `window`], got {window} and {stride}."
        )
    done = 0
    for start in range(0, count, stride):
        end = min(start + window, count)
        if scored := min(end - done, end - start - 1):
            yield start, end, scored
        done = end
        if end == count:
            return


def perplexity(
    params: Params,
    ids: Sequence[int],
    *,
    config: GPT2Config,
    window: int | None = None,
    stride: int | None = None,
    words: int | None = None,
    bytes: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Likelihood:
    """Returns how well a model predicts a text of any length, by sliding windows (see `sliding_windows`).

    Args:
      params: the parameters.
      ids: the text's ids, at least 2.
      config: the model's configuration.
      window: tokens that the model sees at once; `n_positions` by default.
      stride: tokens from a window to the next; half a window by default.
      words: of the text, for `word_perplexity`.
      bytes: of the text, for `byte_perplexity` and `bits_per_byte`.
      batch_size: windows that pass through the model at once.
      progress: is told how many more windows are done.

    Raises:
      ValueError: the text has less than 2 ids or one outside the vocabulary, or `window` and `stride` do not fit.
    """
    window = config.n_positions if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if window > config.n_positions:
        raise ValueError(
            f"`window` must be at most {config.n_positions} (`n_positions`), got {window}."
        )
    if len(ids) < 2:
        raise ValueError(f"A text must have at least 2 tokens to be scored, got {len(ids)}.")
    spans = sliding_windows(len(ids), window=window, stride=stride)
    requests = [(ids[start:end], scored) for start, end, scored in spans]
    scored = score(params, requests, config=config, batch_size=batch_size, progress=progress)
    losses = -np.concatenate([one.logprobs for one in scored]).astype(np.float64)
    return Likelihood(float(losses.sum()), losses.size, float(losses.var()), words, bytes)


def score_choices(
    params: Params,
    context: Sequence[int],
    choices: Sequence[Sequence[int]],
    *,
    config: GPT2Config,
    bytes: Sequence[int] | None = None,
) -> list[Choice]:
    """Returns the scores of each continuation of a context; both are ids, none empty.

    Args:
      params: the parameters.
      context: what all continuations follow; cut from the left where both together are too long.
      choices: the continuations.
      config: the model's configuration.
      bytes: how many UTF-8 bytes each continuation has.

    Raises:
      ValueError: as `score`.
    """
    requests = [([*context, *choice], len(choice)) for choice in choices]
    sizes = [math.nan] * len(choices) if bytes is None else bytes
    scored = score(params, requests, config=config, batch_size=len(choices) or 1)
    totals = [float(one.logprobs.sum(dtype=np.float64)) for one in scored]
    return [
        Choice(total, total / len(choice), total / size)
        for total, choice, size in zip(totals, choices, sizes, strict=True)
    ]


def _check_request(
    number: int, ids: Sequence[int], count: int, config: GPT2Config
) -> tuple[np.ndarray, int]:
    """Returns the ids that are needed, at most `n_positions + 1`, and how many to score."""
    ids = np.asarray(ids)
    if not 1 <= count <= min(len(ids) - 1, config.n_positions):
        raise ValueError(
            f"Request {number} must score from 1 to {min(len(ids) - 1, config.n_positions)} of its {len(ids)} tokens "
            f"(`n_positions` is {config.n_positions}), got {count}."
        )
    try:
        check_ids(ids[None], config)
    except ValueError as error:
        raise ValueError(f"Request {number}: {error}") from None
    return ids[-(config.n_positions + 1) :], count


def _score_batch(
    params, texts: list[tuple[np.ndarray, int]], rows: int, config: GPT2Config
) -> Iterable[Scored]:
    """Yields what is found about texts of like length, of which the first is the longest."""
    width = bucket(len(texts[0][0]) - 1, config.n_positions)
    ids = np.zeros((rows, width), np.int32)
    places, targets = [], []
    for row, (text, count) in enumerate(texts):
        ids[row, : len(text) - 1] = text[:-1]
        places += range(row * width + len(text) - 1 - count, row * width + len(text) - 1)
        targets.append(text[-count:])
    room = -(-rows * width // CHUNK) * CHUNK
    padded = np.zeros((2, room), np.int32)
    padded[:, : len(places)] = places, np.concatenate(targets)
    logprobs, greedy = _score(params, ids, *padded, -(-len(places) // CHUNK), config=config)
    logprobs, greedy, start = np.asarray(logprobs), np.asarray(greedy), 0
    for _, count in texts:
        yield Scored(logprobs[start : start + count], greedy[start : start + count])
        start += count


@partial(jax.jit, static_argnames="config")
def _score(params, ids, places, targets, chunks, *, config):
    """Scores `targets[i]` at the flat place `places[i]` of `ids[B, T]`, for the first `chunks * CHUNK` of them."""
    hidden = hidden_states(params, ids, config=config)
    flat = hidden.reshape(-1, hidden.shape[-1])

    def chunk(number, out):
        at, goal = (lax.dynamic_slice_in_dim(x, number * CHUNK, CHUNK) for x in (places, targets))
        found = _logprobs(params, flat[at], goal, config=config)
        return tuple(
            lax.dynamic_update_slice_in_dim(x, new, number * CHUNK, 0)
            for x, new in zip(out, found, strict=True)
        )

    return lax.fori_loop(
        0,
        chunks,
        chunk,
        (jnp.zeros(places.shape, wide_dtype(config)), jnp.zeros(places.shape, bool)),
    )


def _logprobs(params, hidden, targets, *, config) -> tuple[Array, Array]:
    """Returns log-probabilities of targets, `[C, D], [C] -> [C]`, and whether they are the likeliest."""
    logits = unembed(params, hidden, config=config)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), argmax(logits) == targets
