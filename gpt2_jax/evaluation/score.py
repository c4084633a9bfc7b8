"""Scoring: how likely a model finds given tokens, and the figures that are made of it.

Knows ids and log-probabilities; nothing of texts, tokenizers or data sets. The logits of a batch,
`[B, T, V]`, are never held at once: hidden states become log-probabilities a chunk of tokens at a
time.

Axes beside those of `modules.py`: M tokens of a batch that may be scored, C tokens of a chunk, n
scored tokens of one text.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.cache import bucket
from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import Layout, check_ids, pad_rows
from gpt2_jax.kernels import argmax
from gpt2_jax.model import Params, apply, hidden_states, token_logprobs_of, unembed
from gpt2_jax.modules import Tap, no_tap, wants, wide_dtype
from gpt2_jax.rebuilt import TapArgument, tap_argument
from gpt2_jax.sharding import automatic, constrain

# C: how many tokens' logits, `[C, V]`, are held at once. With GPT-2's vocabulary that is 51 MB in
# float32; all logits of 8 texts of 1024 tokens would be 1.6 GB.
TOKENS_PER_CHUNK = 256

AnyArray = np.ndarray | Array
TokenIds = Sequence[int | np.integer] | Int[AnyArray, " _"]  # a list or an array, of any length
Progress = Callable[[int], object]  # called after each batch with the number of requests in it


# What is asked, and what is answered.


class ScoreRequest(NamedTuple):
    """A text whose last tokens are to be scored; a plain tuple of the two is taken as well.

    Examples:
      >>> gpt2_jax.evaluation.score.ScoreRequest(ids=[5, 6, 7], n_scored=1).n_scored
      1
    """

    ids: TokenIds
    n_scored: int  # how many tokens, at the end


class Scored(NamedTuple):
    """What a model thinks of the `n` scored tokens of one request.

    Examples:
      >>> (scored,) = gpt2_jax.score(params, [(ids[0], 2)], config=config)
      >>> round(scored.total, 3) == round(float(scored.logprobs.sum()), 3), scored.all_greedy
      (True, False)
    """

    # Of each token after all tokens before it, in nats: float32, or float64 from a float64 model.
    logprobs: Float[AnyArray, " n"]
    greedy: Bool[AnyArray, " n"]  # whether the token is the likeliest one there

    @property
    def total(self) -> float:
        """The log-probability of all scored tokens together, in nats."""
        # In float64, as figures are compared to more digits than float32 keeps in a long sum.
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def all_greedy(self) -> bool:
        """Whether greedy decoding would have produced all scored tokens."""
        return bool(self.greedy.all())


class Window(NamedTuple):
    """Part of a longer text, of which the last tokens are scored."""

    start: int  # the first token that is read
    end: int  # one past the last
    n_scored: int


class Likelihood(NamedTuple):
    """How well a model predicts a text: a sum, what it is divided by, and the usual quotients.

    Examples:
      >>> found = gpt2_jax.Likelihood(nll=8.0, tokens=4, variance=1.0, words=2, bytes=8)
      >>> found.loss, found.stderr, round(found.word_perplexity, 2), round(found.bits_per_byte, 3)
      (2.0, 0.5, 54.6, 1.443)
    """

    nll: float  # sum of the negative log-likelihoods of the scored tokens, in nats
    tokens: int  # how many were scored
    variance: float  # of the negative log-likelihood of a token, over the scored ones
    words: int | None = None  # of the text, where they were counted
    bytes: int | None = None  # likewise, in UTF-8

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

    # Per word or byte, models of different tokenizers can be compared; per token they cannot.

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
        return None if not self.bytes else bits(self.nll / self.bytes)


class Choice(NamedTuple):
    """The scores of one continuation among several: log-probabilities, the greater the better.

    Examples:
      >>> gpt2_jax.evaluation.score.Choice._fields
      ('total', 'per_token', 'per_byte')
    """

    total: float  # of all its tokens together
    per_token: float  # the mean
    per_byte: float  # the total divided by the UTF-8 bytes; NaN where they are not given


def bits(nats: float) -> float:
    """Converts nats, the unit of natural logarithms, to bits."""
    return nats / math.log(2)


# Every token of a batch.


@automatic
def token_logprobs(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    tap: Tap = no_tap,
) -> Float[Array, "B T-1"]:
    """Returns the log-probability of each token after its predecessors, in nats.

    `int[B, T] -> float32[B, T - 1]`, or float64 from a float64 model. A pure function that can be
    jitted and differentiated; it does not compile itself. Tokens after a row's end are scored too:
    ignore them.

    Args:
      params: the parameters.
      ids: token ids, padded on the right with any id of the vocabulary; `T` is at most
        `n_positions + 1`.
      config: the model's configuration.
      positions, mask, segment_ids, tap: see `apply`. The first token of a segment is scored after
        the segment before it: ignore that, too. Where the tap wants `logits`, as a plain function
        seems to, all of them are held at once.

    Raises:
      ValueError: as `apply`; or `ids` has less than 2 columns.

    Examples:
      >>> gpt2_jax.token_logprobs(params, ids, config=config).shape
      (1, 3)
    """
    ids = check_ids(ids, config, longest=config.n_positions + 1)
    if ids.shape[1] < 2:
        raise ValueError("`ids` must have at least 2 columns: one to read and one to score, got 1.")
    # The last token is scored, and not read; what is said of it is dropped.
    layout = Layout(positions, mask, segment_ids).without_last()
    sees_logits = wants(tap, "logits")
    run = apply if sees_logits else hidden_states
    out = run(
        params,
        ids[:, :-1],
        config=config,
        positions=layout.positions,
        mask=layout.mask,
        segment_ids=layout.segment_ids,
        tap=tap,
    )  # [B, T - 1, D], or [B, T - 1, V]
    if sees_logits:
        return token_logprobs_of(out, ids[:, 1:])
    flat_hidden = out.reshape(-1, out.shape[-1])
    flat_targets = ids[:, 1:].reshape(-1)

    def logprob_of(pair: tuple[Float[Array, " D"], Int[Array, ""]]) -> Float[Array, ""]:
        hidden_state, target = pair
        logits = unembed(params, hidden_state, config=config)  # [V]
        return token_logprobs_of(logits, target)

    # In words one token at a time; `batch_size` makes chunks of them, so that the logits of all are
    # never there at once.
    logprobs = lax.map(logprob_of, (flat_hidden, flat_targets), batch_size=TOKENS_PER_CHUNK)
    return logprobs.reshape(ids.shape[0], -1)


# The last tokens of many texts.


def score(
    params: Params,
    requests: Sequence[tuple[TokenIds, int]],
    *,
    config: GPT2Config,
    batch_size: int = 8,
    progress: Progress | None = None,
    share: bool = True,
    tap: Tap | None = None,
) -> list[Scored]:
    """Scores the last tokens of many texts, each after all that stands before it.

    Texts of like length share a batch, and texts that differ in their last token alone, which is
    what is scored, one pass: the answers to a question may be letters. Compiles itself; rows are
    padded to 32, 64, 128, ... columns, so that few programs serve all lengths.

    Args:
      params: the parameters.
      requests: for each text its ids and how many of them, at its end, to score (see
        `ScoreRequest`). A text that is longer than `n_positions + 1` is cut from the left.
      config: the model's configuration.
      batch_size: texts that pass through the model at once.
      progress: called after each batch with the number of requests in it.
      share: whether texts share a pass.
      tap: changes activations: see `apply`. As in `generate`, other arrays in it compile nothing,
        and a plain function compiles once for each object. Texts share batches in an order of their
        own: values of a tap must be the same for all rows. Where it wants `logits`, as a plain
        function seems to, those of a batch are all held at once.

    Returns:
      What the model thinks of each request's tokens, in the order of the requests.

    Raises:
      ValueError: an id is outside the vocabulary, or a request asks for less than 1 token, for more
        than the text has after its first, or for more than `n_positions`; the request is named. Or
        `tap` cannot be called.

    Examples:
      >>> (scored,) = gpt2_jax.score(params, [(ids[0], 2)], config=config)
      >>> logprobs = gpt2_jax.token_logprobs(params, ids, config=config)
      >>> np.allclose(scored.logprobs, logprobs[0, -2:], atol=1e-5)
      True
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    argument = tap_argument(tap)
    checked = [
        _checked_request(index, ids, n_scored, config)
        for index, (ids, n_scored) in enumerate(requests)
    ]
    rows = _rows_of(checked, share, config)
    scored: dict[int, Scored] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        together = [[checked[index] for index in row] for row in part]
        batch = _batch_of(together, batch_size, config)
        batch_scores = jax.device_get(score_batch(params, batch, argument, config=config))
        indices = list(chain.from_iterable(part))
        requests_of_batch = chain.from_iterable(together)
        scored.update(zip(indices, _by_request(batch_scores, requests_of_batch), strict=True))
        if progress is not None:
            progress(len(indices))
    return [scored[index] for index in range(len(checked))]


def score_groups(
    params: Params,
    groups: Sequence[Sequence[tuple[TokenIds, int]]],
    *,
    config: GPT2Config,
    batch_size: int = 8,
    progress: Progress | None = None,
    tap: Tap | None = None,
) -> list[list[Scored]]:
    """Scores requests that belong together, such as a text's windows or a question's choices.

    Arguments and errors are those of `score`; the result is grouped as the requests are. Compiles
    itself.
    """
    requests = list(chain.from_iterable(groups))
    # One after the other, so that a batch may hold parts of several groups.
    scored = iter(
        score(
            params,
            requests,
            config=config,
            batch_size=batch_size,
            progress=progress,
            tap=tap,
        )
    )
    return [list(islice(scored, len(group))) for group in groups]


def after(context: TokenIds, continuation: TokenIds) -> ScoreRequest:
    """Returns the request that scores a continuation after its context."""
    return ScoreRequest([*context, *continuation], n_scored=len(continuation))


def score_choices(
    params: Params,
    context: TokenIds,
    choices: Sequence[TokenIds],
    *,
    config: GPT2Config,
    bytes: Sequence[int] | None = None,
    tap: Tap | None = None,
) -> list[Choice]:
    """Returns the scores of each continuation of a context; both are ids, none empty.

    Compiles itself, as `score` does.

    Args:
      params: the parameters.
      context: what all continuations follow; cut from the left where both together are too long.
      choices: the continuations.
      config: the model's configuration.
      bytes: how many UTF-8 bytes each continuation has.
      tap: see `score`.

    Raises:
      ValueError: as `score`; or `bytes` has another length than `choices`.

    Examples:
      >>> choices = gpt2_jax.score_choices(params, ids[0], [[5], [6, 7]], config=config)
      >>> [round(choice.total / choice.per_token) for choice in choices]  # tokens
      [1, 2]
    """
    sizes = [math.nan] * len(choices) if bytes is None else bytes
    if len(sizes) != len(choices):
        raise ValueError(
            f"`bytes` must have one number for each of {len(choices)} choices, got {len(sizes)}."
        )
    requests = [after(context, choice) for choice in choices]
    # All in one batch: they share a context, so they are of like length.
    n_choices = max(1, len(choices))
    scored = score(params, requests, config=config, batch_size=n_choices, tap=tap)
    results = []
    for choice, size, choice_scores in zip(choices, sizes, scored, strict=True):
        total = choice_scores.total
        results.append(Choice(total, per_token=total / len(choice), per_byte=total / size))
    return results


# Texts of any length, by windows.


def sliding_windows(count: int, *, window: int, stride: int) -> Iterator[Window]:
    """Yields windows over `count` tokens, and how many at the end of each are scored.

    Windows start every `stride` tokens and are `window` long, as in HF's guide to perplexity
    (https://huggingface.co/docs/transformers/perplexity): each token is scored in the first window
    that holds it, unless it is the first there, with nothing before it. So with `stride < window`
    all but the first of the text are scored once, each but the first window's after at least
    `window - stride` others.

    Raises:
      ValueError: `window` is less than 2, or `stride` is not in [1, `window`].
    """
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"`window` must be at least 2 and `stride` in [1, `window`], got {window} and {stride}."
        )
    previous_end = 0
    # The last window is cut short rather than moved back, as in the guide.
    for start in range(0, count, stride):
        end = min(start + window, count)
        # Where windows do not overlap, the first token is new too, but nothing predicts it.
        n_scored = min(end - previous_end, end - start - 1)
        if n_scored > 0:
            yield Window(start, end, n_scored)
        previous_end = end
        if end == count:
            return


def rolling_windows(ids: TokenIds, *, prefix_id: int, window: int) -> list[ScoreRequest]:
    """Returns requests that score each token of a text once, the very first after `prefix_id`.

    The rolling windows of lm-evaluation-harness (`utils.get_rolling_token_windows` with
    `context_len=1`): each scores the next `window` tokens after the one before them, and the last,
    which has fewer left, reads more context.
    """
    whole = [prefix_id, *ids]
    requests = []
    for first_scored in range(1, len(whole), window):
        end = min(first_scored + window, len(whole))
        # One longer than the window: the last token of a request is scored but not read.
        start = max(end - window - 1, 0)
        requests.append(ScoreRequest(whole[start:end], n_scored=end - first_scored))
    return requests


def perplexity(
    params: Params,
    ids: TokenIds,
    *,
    config: GPT2Config,
    window: int | None = None,
    stride: int | None = None,
    words: int | None = None,
    bytes: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    tap: Tap | None = None,
) -> Likelihood:
    """Returns how well a model predicts a text of any length, by sliding windows.

    For the windows see `sliding_windows`. Compiles itself.

    Args:
      params: the parameters.
      ids: the text's ids, at least 2.
      config: the model's configuration.
      window: tokens that the model sees at once; `n_positions` by default.
      stride: tokens from a window to the next; half a window by default.
      words: of the text, for `word_perplexity`.
      bytes: of the text, for `byte_perplexity` and `bits_per_byte`.
      batch_size: windows that pass through the model at once.
      progress: called after each batch with the number of windows in it.
      tap: see `score`. Positions are those within a window.

    Raises:
      ValueError: the text has less than 2 ids or one outside the vocabulary, or `window` and
        `stride` do not fit.

    Examples:
      >>> found = gpt2_jax.perplexity(params, ids[0], config=config, bytes=16)
      >>> found.tokens, round(found.perplexity / config.vocab_size)  # untrained, it guesses
      (3, 1)
    """
    if window is None:
        window = config.n_positions
    if stride is None:
        stride = max(window // 2, 1)  # as in HF's guide: twice the work, and half a window to read
    if window > config.n_positions:
        raise ValueError(
            f"`window` must be at most {config.n_positions} (`n_positions`), got {window}."
        )
    if len(ids) < 2:
        raise ValueError(f"A text must have at least 2 tokens to be scored, got {len(ids)}.")
    requests = [
        ScoreRequest(ids[start:end], n_scored)
        for start, end, n_scored in sliding_windows(len(ids), window=window, stride=stride)
    ]
    scored = score(
        params, requests, config=config, batch_size=batch_size, progress=progress, tap=tap
    )
    logprobs = np.concatenate([window_scores.logprobs for window_scores in scored])
    losses = -logprobs.astype(np.float64)  # a book's sum would lose digits in float32
    return Likelihood(
        nll=float(losses.sum()),
        tokens=losses.size,
        variance=float(losses.var()),
        words=words,
        bytes=bytes,
    )


# One batch.


class CheckedRequest(NamedTuple):
    """A request whose ids are in the vocabulary and no more than the model can use."""

    ids: list[int]  # 2 to `n_positions + 1`
    n_scored: int


class Batch(NamedTuple):
    """Right-padded texts and which of their tokens to score, as the compiled program takes them.

    `M` is what the batch would need if all its tokens were scored, rounded up to whole chunks, so
    that it follows from the shape of `ids` and one program serves all batches of that shape.
    """

    ids: Int[AnyArray, "B T"]
    offsets: Int[AnyArray, " M"]  # in flattened `ids`, of the token before each target
    targets: Int[AnyArray, " M"]  # the tokens to score
    # How many chunks hold targets; the others are padding. A value, not a shape: it recompiles
    # nothing.
    n_chunks: Int[ArrayLike, ""]


@jax.jit
@automatic
def score_batch(
    params: Params, batch: Batch, argument: TapArgument, *, config: GPT2Config
) -> Scored:
    """Returns the scores of a batch's targets, `[M]`.

    Compiled once for each shape of `ids` and structure of the tap.
    """
    tap = argument.tap
    # A tap sees the logits of all tokens, as in `apply`, or else they are never there at once.
    sees_logits = wants(tap, "logits")
    run = apply if sees_logits else hidden_states
    out = run(params, batch.ids, config=config, tap=tap)
    flat_out = out.reshape(-1, out.shape[-1])  # [BT, D], or [BT, V]

    def score_chunk(index: Int[Array, ""], scored: Scored) -> Scored:
        start = index * TOKENS_PER_CHUNK
        offsets = lax.dynamic_slice_in_dim(batch.offsets, start, TOKENS_PER_CHUNK)
        targets = lax.dynamic_slice_in_dim(batch.targets, start, TOKENS_PER_CHUNK)
        # The hidden states are gathered here, not before the loop: a copy of a chunk, not of all.
        chosen = flat_out[offsets]
        logits = chosen if sees_logits else unembed(params, chosen, config=config)  # [C, V]
        logprobs = token_logprobs_of(logits, targets)
        greedy = argmax(logits) == targets
        return Scored(
            logprobs=lax.dynamic_update_slice_in_dim(scored.logprobs, logprobs, start, axis=0),
            greedy=lax.dynamic_update_slice_in_dim(scored.greedy, greedy, start, axis=0),
        )

    nothing = Scored(
        logprobs=jnp.zeros(batch.targets.shape, wide_dtype(config)),
        greedy=jnp.zeros(batch.targets.shape, bool),
    )
    # Not a `lax.map` over all chunks: most requests score a few tokens of many, and the head is a
    # good part of a small model's work.
    scored = lax.fori_loop(0, batch.n_chunks, score_chunk, nothing)
    return jax.tree.map(constrain, scored)  # on all devices of a mesh: the host looks at them


def _rows_of(
    requests: Sequence[CheckedRequest], share: bool, config: GPT2Config
) -> list[list[int]]:
    """Returns the indices of the requests that share a row of a batch, the longest rows first."""
    # A batch is made for as many tokens to score as it reads, and no row reads less than this.
    most = bucket(1, config.n_positions)
    rows: list[list[int]] = []
    open_rows: dict[int | tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        shares = share and request.n_scored == 1
        key = tuple(request.ids[:-1]) if shares else index
        row = open_rows.get(key)
        if row is None or len(row) == most:
            row = []
            rows.append(row)
            open_rows[key] = row
        row.append(index)
    # Rows of like length waste little on padding. The longest come first, so that a batch for which
    # memory is short fails at once, and the time that is left is never underestimated.
    return sorted(rows, key=lambda row: -len(requests[row[0]].ids))


def _batch_of(
    requests: Sequence[Sequence[CheckedRequest]], n_rows: int, config: GPT2Config
) -> Batch:
    """Returns rows of requests, the longest first, as one batch of `n_rows`, the rest empty."""
    # The first is the longest. No wider than the model has positions, which need be no power of 2.
    width = bucket(len(requests[0][0].ids) - 1, config.n_positions)
    rows = [row[0].ids[:-1] for row in requests]  # the last token is scored but not read
    n_empty = n_rows - len(rows)  # so that a last batch of fewer texts needs no program of its own
    ids, lengths = pad_rows(rows + [[]] * n_empty, width)

    offsets: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(requests):
        # The token at an offset predicts the one after it, so offsets end where the row does.
        row_end = number * width + int(lengths[number])
        for text, n_scored in row:
            offsets += range(row_end - n_scored, row_end)
            targets += text[-n_scored:]

    capacity = _n_chunks(n_rows * width) * TOKENS_PER_CHUNK
    padded, _ = pad_rows([offsets, targets], capacity)
    return Batch(ids, offsets=padded[0], targets=padded[1], n_chunks=_n_chunks(len(targets)))


def _n_chunks(n_tokens: int) -> int:
    """Returns how many chunks hold so many tokens."""
    return math.ceil(n_tokens / TOKENS_PER_CHUNK)


def _by_request(scored: Scored, requests: Iterable[CheckedRequest]) -> Iterator[Scored]:
    """Yields each request's part of a batch's scores."""
    start = 0
    for request in requests:
        end = start + request.n_scored
        yield Scored(scored.logprobs[start:end], scored.greedy[start:end])
        start = end


def _checked_request(
    index: int, ids: TokenIds, n_scored: int, config: GPT2Config
) -> CheckedRequest:
    """Returns a request cut from the left to what the model can use.

    Raises:
      ValueError: it asks for too few or too many tokens, or has an id outside the
        vocabulary; the message names it by its index.
    """
    array = np.asarray(ids)
    if len(array) < 2:
        raise ValueError(
            f"Request {index} must have at least 2 tokens, one to read and one to score, "
            f"got {len(array)}."
        )
    # The first token has nothing before it, and the model has no position for more.
    most = min(len(array) - 1, config.n_positions)
    if not 1 <= n_scored <= most:
        raise ValueError(
            f"Request {index} must score 1 to {most} of its {len(array)} tokens "
            f"(`n_positions` is {config.n_positions}), got {n_scored}."
        )
    # Before any batch runs: an id outside the vocabulary would give NaN, and late.
    try:
        check_ids(array[None], config)
    except ValueError as error:
        raise ValueError(f"Request {index}: {error}") from None
    return CheckedRequest(array[-(config.n_positions + 1) :].tolist(), n_scored)
