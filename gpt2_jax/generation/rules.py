"""Transforms that look back at the text so far: penalties, and tokens forbidden or forced.

The definitions are HF transformers' (generation/logits_process.py), but that padding does not
count. Rules that forbid ids may leave none, and then id 0 is taken.

Axes: B rows, V vocabulary, S slots of the history.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt2_jax.generation import ranges
from gpt2_jax.generation.transforms import (
    History,
    Logits,
    PerRow,
    Transform,
    as_column,
    check_count,
    check_range,
)
from gpt2_jax.pytrees import dataclass, static


@dataclass
class RepetitionPenalty(Transform):
    """Divides positive logits of tokens that have come by `penalty`, and multiplies negative ones.

    Those of the prompt have come, too. The definition is CTRL's (arXiv:1909.05858); 1 changes
    nothing, above 1 repeats less.

    Examples:
      >>> penalty = gpt2_jax.generation.rules.RepetitionPenalty(2.0)
      >>> penalty(jnp.array([[4.0, 4.0, -4.0]]), history).tolist()  # 1 and 2 have come
      [[4.0, 2.0, -8.0]]
    """

    penalty: PerRow

    def __post_init__(self) -> None:
        check_range("penalty", self.penalty, ranges.POSITIVE)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        counts = self.needs(history).counts(logits.shape[-1])
        penalty = as_column(self.penalty, logits)
        # Divided, a negative logit would rise.
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(counts > 0, penalised, logits)


@dataclass
class FrequencyPenalty(Transform):
    """Subtracts `penalty` for each time that a token was generated (OpenAI's).

    Examples:
      >>> penalty = gpt2_jax.generation.rules.FrequencyPenalty(0.5)
      >>> penalty(jnp.zeros((1, 3)), history).tolist()  # 2 was generated, 1 stood in the prompt
      [[0.0, 0.0, -0.5]]
    """

    penalty: PerRow  # of either sign

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        # OpenAI counts what was generated, HF's rule above the prompt as well.
        counts = self.needs(history).counts(logits.shape[-1], generated=True)
        return logits - as_column(self.penalty, logits) * counts


@dataclass
class PresencePenalty(Transform):
    """Subtracts `penalty` from tokens that were generated, however often (OpenAI's).

    Examples:
      >>> penalty = gpt2_jax.generation.rules.PresencePenalty(0.5)
      >>> penalty(jnp.zeros((1, 3)), history).tolist()
      [[0.0, 0.0, -0.5]]
    """

    penalty: PerRow  # of either sign

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        counts = self.needs(history).counts(logits.shape[-1], generated=True)
        return logits - as_column(self.penalty, logits) * (counts > 0)


@dataclass
class NoRepeatNGram(Transform):
    """Removes each token that would complete a run of `n` tokens for a second time.

    The first time may be in the prompt.

    Examples:
      >>> rule = gpt2_jax.generation.rules.NoRepeatNGram(1)
      >>> rule(jnp.zeros((1, 3)), history).tolist()
      [[0.0, -inf, -inf]]
    """

    n: int | np.integer = static()  # static: it shapes the program

    def __post_init__(self) -> None:
        check_count("`n` of NoRepeatNGram", self.n)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        history = self.needs(history)
        n_rows, n_slots = history.ids.shape
        if self.n > n_slots:
            return logits  # no text of this size holds a run
        ids = history.packed()
        length = history.length[:, None]
        n_runs = n_slots - self.n + 1  # how many could fit; run `i` begins at token `i`
        # bool[B, n_runs]; at first those that fit into the row, behind which stand -1s.
        repeats = jnp.arange(n_runs)[None] + self.n <= length
        for offset in range(self.n - 1):
            # The row's last `n - 1` tokens, beside the first `n - 1` of every run.
            place = length - self.n + 1 + offset
            recent = jnp.take_along_axis(ids, place, axis=-1, mode="clip")
            repeats &= ids[:, offset : offset + n_runs] == recent
        ends = ids[:, self.n - 1 :]
        vocab_size = logits.shape[-1]
        banned_ids = jnp.where(repeats, ends, vocab_size)  # the others beyond the last, dropped
        rows = jnp.arange(n_rows)[:, None]
        none = jnp.zeros(logits.shape, bool)
        banned = none.at[rows, banned_ids].set(True, mode="drop")
        return jnp.where(banned, -jnp.inf, logits)


@dataclass
class SequenceBias(Transform):
    """Adds a bias to the last token of each sequence where the row ends with those before it.

    Sequences of one token are always met. Banned words are sequences of bias -inf:
    `SequenceBias.ban`.

    Examples:
      >>> rule = gpt2_jax.generation.rules.SequenceBias(((1, 2, 0),), np.array([5.0]))
      >>> rule(jnp.zeros((1, 3)), history).tolist()  # the text ends in 1, 2
      [[5.0, 0.0, 0.0]]
    """

    # Static, as they shape the program.
    sequences: tuple[tuple[int, ...], ...] = static()
    biases: Any  # float[number of sequences]

    def __post_init__(self) -> None:
        if not self.sequences or not all(self.sequences):
            expected = "`sequences` must be tuples of ids, none of them empty"
            raise ValueError(f"{expected}, got {self.sequences}.")

    @classmethod
    def ban(cls, words: Sequence[Sequence[int]]) -> "SequenceBias":
        """Returns what removes the last token of each word, given in ids, where it completes it."""
        sequences = tuple(tuple(int(token) for token in word) for word in words)
        return cls(sequences, np.full(len(sequences), -np.inf, np.float32))

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        history = self.needs(history)
        ids = history.packed()
        length = history.length
        biases = jnp.asarray(self.biases)
        # A loop that is unrolled: sequences differ in length, and are few.
        for sequence, bias in zip(self.sequences, biases, strict=True):
            *before, last = sequence
            n_before = len(before)
            places = length[:, None] - n_before + jnp.arange(n_before)[None]
            recent = jnp.take_along_axis(ids, places, axis=-1, mode="clip")
            same = recent == jnp.array(before, jnp.int32)[None]
            # What "clip" reads in a row that is too short may look the same.
            met = same.all(axis=-1) & (length >= n_before)
            logits = logits.at[:, last].add(jnp.where(met, bias, 0.0))
        return logits


@dataclass
class Suppress(Transform):
    """Removes `ids`: always, or early in a text.

    With `steps`, while fewer tokens than that are generated; with `length`, while the row has
    fewer. So HF's `suppress_tokens` is `Suppress(ids)`, `begin_suppress_tokens` is `Suppress(ids,
    steps=1)`, `min_new_tokens` is `Suppress(stop_ids, steps=n)`, and `min_length` is
    `Suppress(stop_ids, length=n)`. Only the first needs no history.

    Examples:
      >>> gpt2_jax.generation.rules.Suppress((1,))(jnp.zeros((1, 3))).tolist()
      [[0.0, -inf, 0.0]]
    """

    # A leaf, not static: other ids, if as many, compile nothing.
    ids: Any  # int[N]
    steps: PerRow | None = None
    length: PerRow | None = None

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        ids = jnp.asarray(self.ids, jnp.int32)
        removed = jnp.zeros(logits.shape[-1], bool).at[ids].set(True)[None]  # [1, V]
        if self.steps is not None:
            early = self.needs(history).step < jnp.asarray(self.steps)
            removed &= as_column(early, logits)
        if self.length is not None:
            short = self.needs(history).length < jnp.asarray(self.length)
            removed &= short[:, None]
        return jnp.where(removed, -jnp.inf, logits)


@dataclass
class Force(Transform):
    """Leaves nothing but `ids`, equally likely: at the step `step`, or in rows of `length` tokens.

    HF's `forced_bos_token_id` is `Force((id,), length=1)`, for prompts of one token;
    `forced_eos_token_id` is `Force(ids, step=max_new_tokens - 1)`.

    Examples:
      >>> rule = gpt2_jax.generation.rules.Force((0,), step=1)
      >>> rule(jnp.zeros((1, 3)), history).tolist()  # one token was generated
      [[0.0, -inf, -inf]]
    """

    ids: Any  # int[N]
    step: PerRow | None = None
    length: PerRow | None = None

    def __post_init__(self) -> None:
        if (self.step is None) == (self.length is None):
            raise ValueError("Force needs either `step` or `length`.")

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        history = self.needs(history)
        if self.length is None:
            now = as_column(history.step == jnp.asarray(self.step), logits)
        else:
            now = (history.length == jnp.asarray(self.length))[:, None]
        ids = jnp.asarray(self.ids, jnp.int32)
        nothing = jnp.full(logits.shape[-1], -jnp.inf, logits.dtype)
        forced = nothing.at[ids].set(0.0)  # HF's value; any finite one gives the same softmax
        return jnp.where(now, forced[None], logits)


@dataclass
class ExponentialDecayLength(Transform):
    """Lifts `stop_ids` more with each token after `start`, by `|logit| (factor ** excess - 1)`.

    Examples:
      >>> rule = gpt2_jax.generation.rules.ExponentialDecayLength((2,), start=0, factor=2.0)
      >>> rule(jnp.ones((1, 3)), history).tolist()  # one token was generated
      [[1.0, 1.0, 2.0]]
    """

    stop_ids: Any  # int[N]
    start: PerRow
    factor: PerRow

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        step = self.needs(history).step
        excess = jnp.maximum(step - jnp.asarray(self.start), 0)
        lift = as_column(jnp.asarray(self.factor, logits.dtype) ** excess - 1, logits)
        stop = jnp.asarray(self.stop_ids, jnp.int32)
        stopping = logits[:, stop]
        # By `abs`, as a negative logit is to rise, too.
        lifted = stopping + jnp.abs(stopping) * lift
        # What is removed stays so: -inf + inf would be NaN.
        return logits.at[:, stop].set(jnp.where(jnp.isfinite(stopping), lifted, stopping))
