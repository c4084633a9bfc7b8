"""From next-token logits to token ids: transforms, which reshape logits, and samplers, which draw from them.

Knows nothing of models. A transform maps `(logits[B, V], history)` to logits, with -inf for what it removes. A sampler
maps `(keys[B], logits, history)` to ids. All are pytrees: their numbers are leaves, so that new values recompile
nothing, and each may be a scalar or hold one value per row, `[B]`. The definitions are HF transformers'
(generation/logits_process.py), ties included; where rules look back, padding does not count. Cuts by probability leave
the largest logit; rules that forbid ids may leave none, and then id 0 is taken.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gpt2_jax.kernels import argmax, kth_largest, outside_nucleus

Array = jax.Array
Number = Any  # a float, or an array of one value per row


class History(NamedTuple):
    """The tokens that came before the one being chosen, for rules that look back. Padding is none of them."""

    ids: Array  # int32[B, S], the prompt and what was generated, with gaps
    valid: Array  # bool[B, S], which of them are real
    step: Array  # int32[] or int32[B], tokens generated so far

    @property
    def length(self) -> Array:
        """How many tokens each row has, `int32[B]`."""
        return self.valid.sum(axis=-1, dtype=jnp.int32)

    def packed(self) -> Array:
        """Returns the ids without gaps, `int32[B, S]`: row `b` has its `length[b]` tokens first, then -1."""
        place = jnp.where(self.valid, jnp.cumsum(self.valid, axis=-1) - 1, self.ids.shape[1])
        rows = jnp.arange(len(self.ids))[:, None]
        return jnp.full_like(self.ids, -1).at[rows, place].set(self.ids, mode="drop")

    def counts(self, vocab_size: int, *, generated: bool = False) -> Array:
        """Returns how often each token has come, `int32[B, V]`; on request, among the generated ones alone."""
        counted = self.valid
        if generated:
            counted &= jnp.cumsum(self.valid, axis=-1) > (self.length - self.step)[:, None]
        rows = jnp.arange(len(self.ids))[:, None]
        return jnp.zeros((len(self.ids), vocab_size), jnp.int32).at[rows, self.ids].add(counted)


@struct.dataclass
class Temperature:
    """Divides logits by `temperature`, which must be positive: 0 would be `Greedy`."""

    temperature: Number

    def __post_init__(self):
        _check(
            "temperature", self.temperature, "greater than 0", lambda x: (x > 0) & np.isfinite(x)
        )

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        return logits / _per_row(self.temperature)


@struct.dataclass
class TopK:
    """Keeps the `k` largest logits and any tied with the last of them."""

    k: int = struct.field(pytree_node=False)  # static: it shapes the program

    def __post_init__(self):
        if not isinstance(self.k, int | np.integer) or self.k < 1:
            raise ValueError(f"`k` of TopK must be a positive integer, got {self.k!r}.")

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        return jnp.where(logits < kth_largest(logits, self.k), -jnp.inf, logits)


@struct.dataclass
class TopP:
    """Keeps the most likely tokens whose probabilities together reach `p` (nucleus sampling, arXiv:1904.09751).

    A token is dropped when it and all less likely ones hold at most `1 - p`. Of tied tokens the first go first.
    """

    p: Number
    keep: int = struct.field(
        pytree_node=False, default=1
    )  # so many of the likeliest are never removed

    def __post_init__(self):
        _check("p", self.p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        removed = outside_nucleus(logits, _per_row(self.p), self.keep)
        return jnp.where(removed, -jnp.inf, logits)


@struct.dataclass
class MinP:
    """Keeps tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082)."""

    min_p: Number
    keep: int = struct.field(
        pytree_node=False, default=1
    )  # so many of the likeliest are never removed

    def __post_init__(self):
        _check("min_p", self.min_p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        largest = jax.nn.softmax(logits, axis=-1).max(axis=-1, keepdims=True)
        return _keep_likely(logits, _per_row(self.min_p) * largest, self.keep)


@struct.dataclass
class Typical:
    """Keeps the tokens whose surprise is nearest to the entropy and which together hold `mass` (arXiv:2202.00666)."""

    mass: Number
    keep: int = struct.field(
        pytree_node=False, default=1
    )  # so many of the most typical are never removed

    def __post_init__(self):
        _check("mass", self.mass, "in (0, 1)", lambda x: (x > 0) & (x < 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        logp = jax.nn.log_softmax(logits, axis=-1)
        distance = jnp.abs(-logp - _entropy(logp))
        order = jnp.argsort(distance, axis=-1)
        held = jnp.cumsum(jnp.exp(jnp.take_along_axis(logp, order, axis=-1)), axis=-1)
        last = jnp.minimum(
            (held < _per_row(self.mass)).sum(axis=-1, keepdims=True), logits.shape[-1] - 1
        )
        last = jnp.maximum(last, self.keep - 1)
        limit = jnp.take_along_axis(distance, jnp.take_along_axis(order, last, axis=-1), axis=-1)
        return jnp.where(distance > limit, -jnp.inf, logits)


@struct.dataclass
class Epsilon:
    """Keeps tokens of at least the probability `epsilon`, and the likeliest (arXiv:2210.15191)."""

    epsilon: Number
    keep: int = struct.field(
        pytree_node=False, default=1
    )  # so many of the likeliest are never removed

    def __post_init__(self):
        _check("epsilon", self.epsilon, "in (0, 1)", lambda x: (x > 0) & (x < 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        return _keep_likely(logits, _per_row(self.epsilon), self.keep)


@struct.dataclass
class Eta:
    """Keeps tokens of at least the probability `min(epsilon, sqrt(epsilon) exp(-entropy))` (arXiv:2210.15191)."""

    epsilon: Number
    keep: int = struct.field(
        pytree_node=False, default=1
    )  # so many of the likeliest are never removed

    def __post_init__(self):
        _check("epsilon", self.epsilon, "in (0, 1)", lambda x: (x > 0) & (x < 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        epsilon = _per_row(self.epsilon)
        entropy = _entropy(jax.nn.log_softmax(logits, axis=-1))
        return _keep_likely(
            logits, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy)), self.keep
        )


@struct.dataclass
class TopH:
    """Keeps the likeliest tokens that together hold the part `top_h` of the entropy (arXiv:2509.02510).

    As in HF's code the 100 likeliest tokens are looked at, and entropy is that of their renormalised probabilities.
    """

    top_h: Number

    def __post_init__(self):
        _check("top_h", self.top_h, "in (0, 1]", lambda x: (x > 0) & (x <= 1))

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        best, order = jax.lax.top_k(logits, min(100, logits.shape[-1]))
        logp = jax.nn.log_softmax(best, axis=-1)
        parts = -_expected(logp)
        keep = jnp.cumsum(parts, axis=-1) <= _per_row(self.top_h) * parts.sum(
            axis=-1, keepdims=True
        )
        keep = keep.at[..., 0].set(True)
        kept = jnp.put_along_axis(
            jnp.zeros(logits.shape, bool), order, keep, axis=-1, inplace=False
        )
        return jnp.where(kept, logits, -jnp.inf)


@struct.dataclass
class RepetitionPenalty:
    """Divides positive logits of tokens that have come, prompt included, by `penalty`, and multiplies negative ones.

    The definition is CTRL's (arXiv:1909.05858); 1 changes nothing, above 1 repeats less.
    """

    penalty: Number

    def __post_init__(self):
        _check("penalty", self.penalty, "greater than 0", lambda x: (x > 0) & np.isfinite(x))

    def __call__(self, logits: Array, history: History) -> Array:
        penalty = _per_row(self.penalty)
        changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(history.counts(logits.shape[-1]) > 0, changed, logits)


@struct.dataclass
class FrequencyPenalty:
    """Subtracts `penalty` for each time that a token was generated (OpenAI's `frequency_penalty`)."""

    penalty: Number

    def __call__(self, logits: Array, history: History) -> Array:
        return logits - _per_row(self.penalty) * history.counts(logits.shape[-1], generated=True)


@struct.dataclass
class PresencePenalty:
    """Subtracts `penalty` from tokens that were generated, however often (OpenAI's `presence_penalty`)."""

    penalty: Number

    def __call__(self, logits: Array, history: History) -> Array:
        return logits - _per_row(self.penalty) * (
            history.counts(logits.shape[-1], generated=True) > 0
        )


@struct.dataclass
class NoRepeatNGram:
    """Removes each token that would complete a run of `n` tokens which the row, prompt included, already has."""

    n: int = struct.field(pytree_node=False)  # static: it shapes the program

    def __post_init__(self):
        if not isinstance(self.n, int | np.integer) or self.n < 1:
            raise ValueError(f"`n` of NoRepeatNGram must be a positive integer, got {self.n!r}.")

    def __call__(self, logits: Array, history: History) -> Array:
        if self.n > history.ids.shape[1]:
            return logits
        ids, length = history.packed(), history.length[:, None]
        runs = ids.shape[1] - self.n + 1  # as many could fit
        repeats = jnp.arange(runs)[None] + self.n <= length
        for offset in range(self.n - 1):
            now = jnp.take_along_axis(ids, length - self.n + 1 + offset, axis=-1, mode="clip")
            repeats &= ids[:, offset : offset + runs] == now
        ends, rows = ids[:, self.n - 1 :], jnp.arange(len(ids))[:, None]
        banned = (
            jnp.zeros(logits.shape, bool)
            .at[rows, jnp.where(repeats, ends, logits.shape[-1])]
            .set(True, mode="drop")
        )
        return jnp.where(banned, -jnp.inf, logits)


@struct.dataclass
class SequenceBias:
    """Adds a bias to the last token of each sequence wherever the row ends with the tokens before it.

    Sequences of one token are always met. Banned words are sequences of bias -inf: `SequenceBias.ban`.
    """

    sequences: tuple = struct.field(
        pytree_node=False
    )  # of tuples of ids; static: they shape the program
    biases: Any  # float[number of sequences]

    def __post_init__(self):
        if not self.sequences or not all(self.sequences):
            raise ValueError(
                f"`sequences` must be tuples of ids, none of them empty, got {self.sequences}."
            )

    @classmethod
    def ban(cls, words: Sequence[Sequence[int]]) -> "SequenceBias":
        """Returns what removes the last token of each word, given in ids, where it would complete the word."""
        sequences = tuple(tuple(int(id) for id in word) for word in words)
        return cls(sequences, np.full(len(sequences), -np.inf, np.float32))

    def __call__(self, logits: Array, history: History) -> Array:
        ids, length = history.packed(), history.length
        for sequence, bias in zip(self.sequences, jnp.asarray(self.biases), strict=True):
            *before, last = sequence
            places = length[:, None] - len(before) + jnp.arange(len(before))[None]
            met = (
                jnp.take_along_axis(ids, places, axis=-1, mode="clip")
                == jnp.array(before, jnp.int32)[None]
            )
            met = met.all(axis=-1) & (length >= len(before))
            logits = logits.at[:, last].add(jnp.where(met, bias, 0.0))
        return logits


@struct.dataclass
class Suppress:
    """Removes `ids`: always, or only while fewer than `steps` tokens are generated, or the row has less than `length`.

    So HF's `suppress_tokens` is `Suppress(ids)`, `begin_suppress_tokens` is `Suppress(ids, steps=1)`, `min_new_tokens`
    is `Suppress(stop_ids, steps=n)`, and `min_length` is `Suppress(stop_ids, length=n)`.
    """

    ids: Any  # int[N]
    steps: Number | None = None
    length: Number | None = None

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        ids = jnp.asarray(self.ids, jnp.int32)
        removed = jnp.zeros(logits.shape[-1], bool).at[ids].set(True)[None]
        if self.steps is not None:
            removed &= _per_row(history.step < jnp.asarray(self.steps))
        if self.length is not None:
            removed &= (history.length < jnp.asarray(self.length))[:, None]
        return jnp.where(removed, -jnp.inf, logits)


@struct.dataclass
class Force:
    """Leaves nothing but `ids`, equally likely: at the step `step`, or in rows of `length` tokens.

    HF's `forced_bos_token_id` is `Force((id,), length=1)`, for prompts of one token; `forced_eos_token_id` is
    `Force(ids, step=max_new_tokens - 1)`.
    """

    ids: Any  # int[N]
    step: Number | None = None
    length: Number | None = None

    def __post_init__(self):
        if (self.step is None) == (self.length is None):
            raise ValueError("Force needs either `step` or `length`.")

    def __call__(self, logits: Array, history: History) -> Array:
        now = (
            _per_row(history.step == jnp.asarray(self.step))
            if self.length is None
            else (history.length == jnp.asarray(self.length))[:, None]
        )
        forced = (
            jnp.full(logits.shape[-1], -jnp.inf, logits.dtype)
            .at[jnp.asarray(self.ids, jnp.int32)]
            .set(0.0)
        )
        return jnp.where(now, forced[None], logits)


@struct.dataclass
class ExponentialDecayLength:
    """Lifts `stop_ids` more with each generated token after `start`, by `|logit| (factor ** excess - 1)`."""

    stop_ids: Any  # int[N]
    start: Number
    factor: Number

    def __call__(self, logits: Array, history: History) -> Array:
        excess = jnp.maximum(history.step - jnp.asarray(self.start), 0)
        lift = _per_row(jnp.asarray(self.factor, logits.dtype) ** excess - 1)
        stop = jnp.asarray(self.stop_ids, jnp.int32)
        stopping = logits[:, stop]
        return logits.at[:, stop].set(
            jnp.where(jnp.isfinite(stopping), stopping + jnp.abs(stopping) * lift, stopping)
        )


@struct.dataclass
class Renormalize:
    """Makes log-probabilities of what transforms have left: for the scores of beams, as a draw is the same."""

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        del history
        return jax.nn.log_softmax(logits, axis=-1)


@struct.dataclass
class Chain:
    """Applies transforms in order; `sampler_from_options` has HF's order."""

    transforms: tuple = ()

    def __call__(self, logits: Array, history: History | None = None) -> Array:
        for transform in self.transforms:
            logits = transform(logits, history)
        return logits


@struct.dataclass
class Greedy:
    """Takes the largest logit, the first of ties, after an optional transform."""

    transform: Any = Chain()

    def __call__(self, keys: Array | None, logits: Array, history: History | None = None) -> Array:
        del keys
        return argmax(self.transform(logits, history))


@struct.dataclass
class Categorical:
    """Draws from the softmax of the logits, each row with its own key, after an optional transform."""

    transform: Any = Chain()

    def __call__(self, keys: Array, logits: Array, history: History | None = None) -> Array:
        logits = self.transform(logits, history)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
        return argmax(logits + noise)  # as `jax.random.categorical` draws


def _keep_likely(logits: Array, threshold: Array, keep: int) -> Array:
    """Removes tokens less likely than `threshold[B or none, 1]`, but never the `keep` likeliest and their equals."""
    likely = jax.nn.softmax(logits, axis=-1) >= threshold
    return jnp.where(likely | (logits >= kth_largest(logits, keep)), logits, -jnp.inf)


def _expected(logp: Array) -> Array:
    """`p log p`, which is 0 where `p` is."""
    return jnp.where(jnp.isneginf(logp), 0.0, jnp.exp(logp) * logp)


def _entropy(logp: Array) -> Array:
    """Entropy in nats of log-probabilities, `[..., V] -> [..., 1]`."""
    return -_expected(logp).sum(axis=-1, keepdims=True)


def _per_row(number: Number) -> Array:
    """Lines a scalar, or one value per row, up with `logits[B, V]`."""
    number = jnp.asarray(number)
    return number[:, None] if number.ndim else number


def _check(name: str, number: Number, expected: str, holds) -> None:
    """Raises `ValueError` where a number is out of range. Traced numbers have no value to check."""
    concrete = isinstance(number, int | float | np.ndarray | np.generic | jax.Array)
    if (
        concrete
        and not isinstance(number, jax.core.Tracer)
        and not np.all(holds(np.asarray(number)))
    ):
        raise ValueError(f"`{name}` must be {expected}, got {number}.")
