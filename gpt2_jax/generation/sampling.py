"""From next-token logits to token ids: transforms reshape logits, samplers choose from them.

Knows nothing of models. A transform maps `(logits, history)` to logits, with -inf for the tokens
that it removes; one that carries a state of its own from token to token is `Stateful`. A sampler
maps `(keys, logits, history)` to ids: see `Sampler`. All are pytrees: their numbers are leaves, so
that new values recompile nothing, and each may be a scalar or hold one value per row, `[B]`. None
compiles itself.

The definitions are HF transformers' (generation/logits_process.py), ties included; where rules look
back, padding does not count. Cuts by probability leave the largest logit; rules that forbid ids may
leave none, and then id 0 is taken.

Axes: B rows, V vocabulary, S slots of the history.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32

from gpt2_jax.generation import ranges
from gpt2_jax.generation.ranges import Range
from gpt2_jax.kernels import argmax, categorical, kth_largest, outside_nucleus, smallest_holding
from gpt2_jax.pytrees import dataclass, static

Logits = Float[Array, "B V"]
Ids = Int[Array, " B"]
Keys = Key[Array, " B"] | UInt32[Array, "B _"]  # one key per row, typed or raw

# Fields that hold numbers are `Any`: JAX rebuilds pytrees with whatever it needs as leaves, tracers
# and placeholders among them.
PerRow = Any  # a number, or an array of one number per row, `[B]`

TOP_H_CANDIDATES = 100  # how many of the likeliest tokens HF's top-h looks at


class History(NamedTuple):
    """The tokens before the one being chosen, for rules that look back. Padding is none of them.

    Examples:
      >>> history = gpt2_jax.History(
      ...     ids=jnp.array([[5, 0, 7, 7]]),
      ...     valid=jnp.array([[True, False, True, True]]),  # the second slot is a gap
      ...     step=jnp.array(2),
      ... )
      >>> history.length.tolist(), history.packed().tolist()
      ([3], [[5, 7, 7, -1]])
      >>> history.counts(8, generated=True)[0, 5:].tolist()  # 5 is the prompt
      [0, 0, 2]
    """

    ids: Int[Array, "B S"]  # the prompt and what was generated, with gaps
    valid: Bool[Array, "B S"]  # which of them are real
    step: Int[Array, ""] | Int[Array, " B"]  # how many tokens were generated so far
    state: Any = None  # what a `Stateful` transform carries, of these tokens

    @property
    def length(self) -> Int[Array, " B"]:
        """How many tokens each row has, the prompt's included."""
        return self.valid.sum(axis=-1, dtype=jnp.int32)

    def packed(self) -> Int[Array, "B S"]:
        """Returns the ids without gaps: row `b` has its `length[b]` tokens first, then -1."""
        n_rows, n_slots = self.ids.shape
        rank = jnp.cumsum(self.valid, axis=-1) - 1
        # A gap goes beyond the last column, where it is dropped.
        column = jnp.where(self.valid, rank, n_slots)
        rows = jnp.arange(n_rows)[:, None]
        blank = jnp.full_like(self.ids, -1)
        return blank.at[rows, column].set(self.ids, mode="drop")

    def counts(self, vocab_size: int, *, generated: bool = False) -> Int[Array, "B V"]:
        """Returns how often each token has come; on request, among the generated ones alone."""
        counted = self.valid
        if generated:
            # By rank, not by slot: prompts differ in length, and gaps may stand anywhere.
            prompt_length = self.length - self.step
            counted &= jnp.cumsum(self.valid, axis=-1) > prompt_length[:, None]
        n_rows = len(self.ids)
        rows = jnp.arange(n_rows)[:, None]
        zeros = jnp.zeros((n_rows, vocab_size), jnp.int32)
        # A gap holds some id as well, and adds 0 to its count.
        return zeros.at[rows, self.ids].add(counted)


class Room(NamedTuple):
    """How long texts may become, for states that are as large as the text.

    Examples:
      >>> room = gpt2_jax.generation.sampling.Room(longest=4, max_new_tokens=3)
      >>> room.longest + room.max_new_tokens  # how long a text may become
      7
    """

    longest: int  # tokens of the longest prompt
    max_new_tokens: int


class Transform:
    """What reshapes logits. Any function `(logits, history) -> logits` may stand beside these.

    Examples:
      >>> class Negated(gpt2_jax.generation.sampling.Transform):
      ...     def __call__(self, logits, history=None):
      ...         return -logits
      >>> gpt2_jax.Greedy(Negated())(None, jnp.array([[0.0, 2.0, 1.0]])).tolist()
      [0]
    """

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        raise NotImplementedError

    def needs(self, history: History | None) -> History:
        """Returns the history, and raises `ValueError` where there is none."""
        if history is None:
            name = type(self).__name__
            raise ValueError(f"{name} looks back: `history` must be a `History`, got None.")
        return history


class Stateful(Transform):
    """A transform that carries a state from token to token, in the place of reading all again.

    `init` makes it of the prompts, `update` reads a token into it, and `history.state` is what they
    returned, when the transform is called. A state is a pytree; its leaves have a row for each row
    of the batch, which follows it through copies and beams, or `select` says how it does.

    Examples:
      >>> class Once(gpt2_jax.Stateful):
      ...     def init(self, ids, lengths, room):
      ...         return jnp.zeros((len(ids), 3), bool)  # which tokens were generated
      ...     def update(self, state, tokens):
      ...         return state | jax.nn.one_hot(tokens, 3, dtype=bool)
      ...     def __call__(self, logits, history):
      ...         return jnp.where(self.state_in(history), -jnp.inf, logits)
      >>> state = Once().init(jnp.zeros((1, 2), int), jnp.array([2]), room=None)
      >>> state = Once().update(state, jnp.array([1]))
      >>> Once()(jnp.zeros((1, 3)), history._replace(state=state)).tolist()
      [[0.0, -inf, 0.0]]
    """

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Any:
        """Returns the state after some prompts, padded on the right."""
        raise NotImplementedError

    def update(self, state: Any, tokens: Ids) -> Any:
        """Returns the state after one more token of each row; of rows that have ended, any."""
        raise NotImplementedError

    def select(self, state: Any, rows: Int[Array, " R"]) -> Any:
        """Returns the state of some rows, of which one may come more than once."""
        return jax.tree.map(lambda x: x[rows], state)

    def state_in(self, history: History | None) -> Any:
        """Returns the state, and raises `ValueError` where there is none."""
        state = None if history is None else history.state
        if state is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} carries a state: `history.state` must be what its `init` or `update`"
                " returned, got None."
            )
        return state


def is_stateful(transform: Any) -> bool:
    """Returns whether a transform carries a state: whether it has `init` and `update`."""
    if isinstance(transform, Chain):
        return any(is_stateful(part) for part in transform.transforms)
    return hasattr(transform, "init") and hasattr(transform, "update")


def init_state(transform: Any, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Any:
    """Returns a transform's state after some prompts; None, which costs nothing, if it has none."""
    return transform.init(ids, lengths, room) if is_stateful(transform) else None


def update_state(transform: Any, state: Any, tokens: Ids) -> Any:
    """Returns a transform's state, if it has one, after one more token of each row."""
    return transform.update(state, tokens) if is_stateful(transform) else None


def select_state(transform: Any, state: Any, rows: Int[Array, " R"]) -> Any:
    """Returns a transform's state, if it has one, of some rows."""
    return transform.select(state, rows) if is_stateful(transform) else None


# Cuts: fewer tokens to draw from.


@dataclass
class Temperature(Transform):
    """Divides logits by `temperature`, which must be positive: 0 would be `Greedy`.

    Examples:
      >>> gpt2_jax.Temperature(2.0)(jnp.array([[0.0, 4.0]])).tolist()
      [[0.0, 2.0]]
      >>> rows = jnp.array([[0.0, 4.0], [0.0, 4.0]])
      >>> gpt2_jax.Temperature(jnp.array([1.0, 2.0]))(rows).tolist()  # one for each row
      [[0.0, 4.0], [0.0, 2.0]]
    """

    temperature: PerRow

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, ranges.POSITIVE)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        return logits / as_column(self.temperature, logits)


@dataclass
class TopK(Transform):
    """Keeps the `k` largest logits and any tied with the last of them.

    Examples:
      >>> gpt2_jax.TopK(2)(jnp.array([[3.0, 1.0, 2.0]])).tolist()
      [[3.0, -inf, 2.0]]
    """

    k: int | np.integer = static()  # static: it shapes the program

    def __post_init__(self) -> None:
        _check_count("`k` of TopK", self.k)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        # By value, not by the places of the `k` largest: ties with the last stay, as in HF's code.
        return jnp.where(logits < kth_largest(logits, int(self.k)), -jnp.inf, logits)


@dataclass
class TopP(Transform):
    """Keeps the most likely tokens whose probabilities together reach `p`.

    This is nucleus sampling (arXiv:1904.09751): a token is dropped when it and all less likely ones
    hold at most `1 - p`. Of tokens with equal logits, those that come first in the vocabulary are
    dropped first. The `min_tokens_to_keep` likeliest always stay.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> jnp.isfinite(gpt2_jax.TopP(0.7)(logits)).tolist()
      [[True, True, False]]
    """

    p: PerRow
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_range("p", self.p, ranges.FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        p = as_column(self.p, logits).reshape(-1, 1)  # [1, 1] or [B, 1]
        # In a function that is jitted by itself, for those who call a transform outside of `jit`.
        removed = outside_nucleus(logits, p, self.min_tokens_to_keep)
        return jnp.where(removed, -jnp.inf, logits)


@dataclass
class MinP(Transform):
    """Keeps tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082).

    The `min_tokens_to_keep` likeliest always stay.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
      >>> jnp.isfinite(gpt2_jax.MinP(0.4)(logits)).tolist()
      [[True, True, False]]
    """

    min_p: PerRow
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_range("min_p", self.min_p, ranges.FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        probabilities = jax.nn.softmax(logits, axis=-1)
        largest = probabilities.max(axis=-1, keepdims=True)
        threshold = as_column(self.min_p, logits) * largest
        return _keep_likely(logits, threshold, self.min_tokens_to_keep)


@dataclass
class Typical(Transform):
    """Keeps the tokens whose surprise is nearest to the entropy and which together hold `mass`.

    The source is arXiv:2202.00666. The `min_tokens_to_keep` most typical always stay.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.9, 0.06, 0.04]]))
      >>> jnp.isfinite(gpt2_jax.generation.sampling.Typical(0.5)(logits)).tolist()
      [[True, False, False]]
    """

    mass: PerRow
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_range("mass", self.mass, ranges.INNER_FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        distance = jnp.abs(-logprobs - _entropy(logprobs))
        mass = as_column(self.mass, logits).reshape(-1, 1)  # [1, 1] or [B, 1]
        # The token that reaches the mass is the last to stay, and with it all at its distance.
        limit = smallest_holding(distance, jnp.exp(logprobs), mass)
        limit = jnp.maximum(limit, -kth_largest(-distance, self.min_tokens_to_keep))
        return jnp.where(distance > limit, -jnp.inf, logits)


@dataclass
class Epsilon(Transform):
    """Keeps tokens of at least the probability `epsilon` (arXiv:2210.15191).

    The `min_tokens_to_keep` likeliest always stay.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
      >>> jnp.isfinite(gpt2_jax.generation.sampling.Epsilon(0.2)(logits)).tolist()
      [[True, True, False]]
    """

    epsilon: PerRow
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, ranges.INNER_FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        return _keep_likely(logits, as_column(self.epsilon, logits), self.min_tokens_to_keep)


@dataclass
class Eta(Transform):
    """Keeps tokens of at least the probability `min(epsilon, sqrt(epsilon) exp(-entropy))`.

    The source is arXiv:2210.15191. The `min_tokens_to_keep` likeliest always stay.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.6, 0.399, 0.001]]))
      >>> jnp.isfinite(gpt2_jax.generation.sampling.Eta(0.01)(logits)).tolist()
      [[True, True, False]]
    """

    epsilon: PerRow
    min_tokens_to_keep: int = static(default=1)

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, ranges.INNER_FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        epsilon = as_column(self.epsilon, logits)
        entropy = _entropy(jax.nn.log_softmax(logits, axis=-1))
        threshold = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy))
        return _keep_likely(logits, threshold, self.min_tokens_to_keep)


@dataclass
class TopH(Transform):
    """Keeps the likeliest tokens that together hold the part `top_h` of the entropy.

    The source is arXiv:2509.02510. As in HF's code the 100 likeliest tokens are looked at, and
    entropy is that of their renormalised probabilities.

    Examples:
      >>> logits = jnp.log(jnp.array([[0.8, 0.1, 0.1]]))
      >>> jnp.isfinite(gpt2_jax.generation.sampling.TopH(0.3)(logits)).tolist()
      [[True, False, False]]
    """

    top_h: PerRow

    def __post_init__(self) -> None:
        check_range("top_h", self.top_h, ranges.POSITIVE_FRACTION)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        n_candidates = min(TOP_H_CANDIDATES, logits.shape[-1])
        largest, tokens = jax.lax.top_k(logits, n_candidates)
        parts = -_expected(jax.nn.log_softmax(largest, axis=-1))  # of the entropy, one a token
        budget = as_column(self.top_h, logits) * parts.sum(axis=-1, keepdims=True)
        stays = jnp.cumsum(parts, axis=-1) <= budget
        stays = stays.at[..., 0].set(True)  # even if it alone exceeds the budget
        none = jnp.zeros(logits.shape, bool)
        kept = jnp.put_along_axis(none, tokens, stays, axis=-1, inplace=False)
        return jnp.where(kept, logits, -jnp.inf)


# Rules that look back.


@dataclass
class RepetitionPenalty(Transform):
    """Divides positive logits of tokens that have come by `penalty`, and multiplies negative ones.

    Those of the prompt have come, too. The definition is CTRL's (arXiv:1909.05858); 1 changes
    nothing, above 1 repeats less.

    Examples:
      >>> penalty = gpt2_jax.generation.sampling.RepetitionPenalty(2.0)
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
      >>> penalty = gpt2_jax.generation.sampling.FrequencyPenalty(0.5)
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
      >>> penalty = gpt2_jax.generation.sampling.PresencePenalty(0.5)
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
      >>> rule = gpt2_jax.generation.sampling.NoRepeatNGram(1)
      >>> rule(jnp.zeros((1, 3)), history).tolist()
      [[0.0, -inf, -inf]]
    """

    n: int | np.integer = static()  # static: it shapes the program

    def __post_init__(self) -> None:
        _check_count("`n` of NoRepeatNGram", self.n)

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
      >>> rule = gpt2_jax.generation.sampling.SequenceBias(((1, 2, 0),), np.array([5.0]))
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
      >>> gpt2_jax.generation.sampling.Suppress((1,))(jnp.zeros((1, 3))).tolist()
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
      >>> rule = gpt2_jax.generation.sampling.Force((0,), step=1)
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
      >>> rule = gpt2_jax.generation.sampling.ExponentialDecayLength((2,), start=0, factor=2.0)
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


# Transforms of transforms.


@dataclass
class Renormalize(Transform):
    """Makes log-probabilities of what transforms have left.

    This matters to the scores of beams; a draw is the same.

    Examples:
      >>> made = gpt2_jax.generation.sampling.Renormalize()(jnp.array([[3.0, 3.0]]))
      >>> jnp.exp(made).round(3).tolist()
      [[0.5, 0.5]]
    """

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        del history
        return jax.nn.log_softmax(logits, axis=-1)


@dataclass
class Chain(Transform):
    """Applies transforms in order; `sampler_from_options` has HF's order.

    Raises:
      ValueError: one of them cannot be called, or is a `Stateful` of a class that is no pytree.

    Examples:
      >>> chain = gpt2_jax.Chain((gpt2_jax.Temperature(2.0), gpt2_jax.TopK(1)))
      >>> chain(jnp.array([[0.0, 4.0, 2.0]])).tolist()
      [[-inf, 2.0, -inf]]
    """

    transforms: tuple[Any, ...] = ()  # of transforms

    def __post_init__(self):
        transforms = tuple(as_transform(part) for part in self.transforms)
        object.__setattr__(self, "transforms", transforms)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        states = None if history is None else history.state
        for number, transform in enumerate(self.transforms):
            seen = history
            # Each sees its own; without any, all see the history as it came.
            if history is not None and states is not None:
                seen = history._replace(state=states[number])
            logits = transform(logits, seen)
        return logits

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> tuple[Any, ...]:
        """Returns the state of each transform, None for those that carry none."""
        return tuple(init_state(part, ids, lengths, room) for part in self.transforms)

    def update(self, state: tuple[Any, ...], tokens: Ids) -> tuple[Any, ...]:
        """Returns the states after one more token of each row."""
        pairs = zip(self.transforms, state, strict=True)
        return tuple(update_state(part, of_part, tokens) for part, of_part in pairs)

    def select(self, state: tuple[Any, ...], rows: Int[Array, " R"]) -> tuple[Any, ...]:
        """Returns the states of some rows."""
        pairs = zip(self.transforms, state, strict=True)
        return tuple(select_state(part, of_part, rows) for part, of_part in pairs)


def as_transform(transform: Any) -> Any:
    """Returns what a user gave as a transform in the form of one, which JAX can carry.

    A plain function, or an object of a class that is no pytree, becomes a part of the program: it
    must be hashable, and compiles once for each object.

    Raises:
      ValueError: it cannot be called, is a class instead of an object, has no hash, or is a
        `Stateful` of a class that is no pytree.
    """
    if isinstance(transform, type) or not callable(transform):
        expected = "a transform or a function `(logits, history) -> logits`"
        raise ValueError(f"`transform` must be {expected}, got {transform!r}.")
    if not jax.tree_util.all_leaves([transform]):
        return transform
    name = type(transform).__name__
    if isinstance(transform, Stateful):
        # As a function alone it would lose its state.
        raise ValueError(f"{name} is no pytree: make it one, by `flax.struct.dataclass` above it.")
    return _compiled_in("transform", transform)


def _compiled_in(argument: str, function: Any) -> Partial:
    """Returns a function as a pytree without leaves. Raises `ValueError` if it has no hash."""
    try:
        hash(function)
    except TypeError:
        name = type(function).__name__
        raise ValueError(f"`{argument}` must be hashable or a pytree, {name} is neither.") from None
    return Partial(function)


# Samplers.


@runtime_checkable
class Sampler(Protocol):
    """What chooses the next token of each row: `Greedy`, `Categorical`, and those of `as_sampler`.

    `transform` is what it does to logits before it chooses, or None where that is not known. Beam
    search and speculation need it: they choose by rules of their own. A class of its own method
    `pick(keys, scores)`, to which transformed logits are given, has these computed once, for the
    choice and for what `generate` says of it.

    Examples:
      >>> sampler = gpt2_jax.Categorical(gpt2_jax.TopK(2))
      >>> isinstance(sampler, gpt2_jax.generation.sampling.Sampler), sampler.draws
      (True, True)
    """

    draws: ClassVar[bool]  # whether its choice is random, so that it needs keys

    @property
    def transform(self) -> Any: ...

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        """Returns the chosen ids, int32."""
        ...


@dataclass
class Greedy:
    """Takes the largest logit, the first of ties, after an optional transform.

    Raises:
      ValueError: the transform is none: see `Chain`.

    Examples:
      >>> gpt2_jax.Greedy()(None, jnp.array([[0.0, 2.0, 1.0]])).tolist()
      [1]
    """

    transform: Any = Chain()
    draws: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "transform", as_transform(self.transform))

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        return self.pick(keys, self.transform(logits, history))

    def pick(self, keys: Keys | None, scores: Logits) -> Ids:
        """Returns the ids chosen from logits that are transformed already."""
        del keys
        return argmax(scores)


@dataclass
class Categorical:
    """Draws from the softmax of transformed logits, each row with its own key.

    Raises:
      ValueError: the transform is none: see `Chain`.

    Examples:
      >>> keys = jax.random.split(jax.random.key(0), 2)  # a key for each row
      >>> logits = jnp.array([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
      >>> gpt2_jax.Categorical(gpt2_jax.TopK(1))(keys, logits).tolist()
      [1, 1]
    """

    transform: Any = Chain()
    draws: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "transform", as_transform(self.transform))

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        return self.pick(keys, self.transform(logits, history))

    def pick(self, keys: Keys | None, scores: Logits) -> Ids:
        """Returns the ids drawn from logits that are transformed already."""
        if keys is None:
            raise ValueError("Categorical draws: `keys` must hold a key for each row, got None.")
        return categorical(keys, scores)


@dataclass
class FunctionSampler:
    """A user's function in the form of a sampler: `as_sampler` makes it."""

    function: Callable[..., Any]  # a pytree
    draws: ClassVar[bool] = True  # it may

    @property
    def transform(self) -> None:
        """Not known."""

    def __call__(self, keys: Keys | None, logits: Logits, history: History | None = None) -> Ids:
        ids = jnp.asarray(self.function(keys, logits, history))
        n_rows = len(logits)
        if ids.shape != (n_rows,) or not jnp.issubdtype(ids.dtype, jnp.integer):
            got = f"{ids.dtype} of shape {list(ids.shape)}"
            raise ValueError(f"`sampler` must return integers of shape [{n_rows}], got {got}.")
        return ids.astype(jnp.int32)  # with `jax_enable_x64` a user's argmax is int64


def pick(
    sampler: Any, keys: Keys | None, logits: Logits, history: History
) -> tuple[Ids, Logits | None]:
    """Returns what a sampler chooses, and the transformed logits that it chose from, if known."""
    if sampler.transform is None:
        return sampler(keys, logits, history), None
    scores = sampler.transform(logits, history)
    # Of its very class: who inherits ours with another `__call__` chooses by that.
    pick_from = vars(type(sampler)).get("pick")
    if pick_from is None:
        return sampler(keys, logits, history), scores
    return pick_from(sampler, keys, scores), scores


def as_sampler(sampler: Any) -> Sampler:
    """Returns what a user gave as a sampler in the form of one.

    Args:
      sampler: None for `Greedy()`; a `Sampler`, that is, a callable pytree with the attributes
        `transform` and `draws`, as it is; or a function
        `(keys[B], logits[B, V], history) -> ids[B]`, which runs under `jit` and is taken to draw.
        An own class without those attributes counts as such a function: as a pytree
        (`flax.struct.dataclass` makes one) its numbers may change without recompiling, otherwise it
        must be hashable and compiles once for each object.

    Raises:
      ValueError: it is a transform, a class instead of an object, not hashable, or nothing that can
        be called.
    """
    if sampler is None:
        return Greedy()
    if isinstance(sampler, type):
        name = sampler.__name__
        raise ValueError(f"`sampler` must be an object, got the class {name}: use `{name}(...)`.")
    name = type(sampler).__name__
    if isinstance(sampler, Transform):
        raise ValueError(f"{name} is a transform, not a sampler: use `Categorical({name}(...))`.")
    # Before `callable`, after which a type checker takes it for a plain function.
    if hasattr(sampler, "transform") and hasattr(sampler, "draws"):
        return sampler
    if not callable(sampler):
        expected = "a sampler or a function `(keys, logits, history) -> ids`"
        raise ValueError(f"`sampler` must be {expected}, got {sampler!r}.")
    # What JAX takes for a leaf is no pytree.
    if not jax.tree_util.all_leaves([sampler]):
        return FunctionSampler(sampler)
    return FunctionSampler(_compiled_in("sampler", sampler))


# What they share.


def check_range(name: str, number: PerRow, expected: Range) -> None:
    """Raises `ValueError` where a number, or one of an array, is out of range.

    Traced numbers have no value to check.
    """
    concrete = isinstance(number, int | float | np.ndarray | np.generic | jax.Array)
    if not concrete or isinstance(number, Tracer):
        return
    if not np.all(expected.contains(np.asarray(number))):
        raise ValueError(f"`{name}` must be {expected.asked(np.max(number))}, got {number}.")


def _check_count(name: str, number: Any) -> None:
    """Raises `ValueError` unless it is a positive integer."""
    if not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {number!r}.")


def _keep_likely(
    logits: Logits, threshold: Float[Array, ""] | Float[Array, "B 1"], min_tokens_to_keep: int
) -> Logits:
    """Removes tokens less likely than the threshold.

    The `min_tokens_to_keep` likeliest, and any tied with the last of them, always stay.
    """
    likely = jax.nn.softmax(logits, axis=-1) >= threshold
    # By logits: probabilities may round to equal ones.
    likeliest = logits >= kth_largest(logits, min_tokens_to_keep)
    return jnp.where(likely | likeliest, logits, -jnp.inf)


def _expected(logprobs: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Returns `p log p`, which is 0 where `p` is."""
    return jnp.where(jnp.isneginf(logprobs), 0.0, jnp.exp(logprobs) * logprobs)


def _entropy(logprobs: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    """Returns the entropy of log-probabilities, in nats."""
    return -_expected(logprobs).sum(axis=-1, keepdims=True)


def as_column(number: PerRow, logits: Logits) -> Shaped[Array, ""] | Shaped[Array, "B 1"]:
    """Returns a scalar as it is, and values `[B]` as `[B, 1]`: either fits `logits[B, V]`.

    Raises:
      ValueError: the values are not one for each row; broadcast, they might fit another axis.
    """
    number = jnp.asarray(number)
    # Not `[1, 1]`: a division by that rounds otherwise.
    if number.ndim == 0:
        return number
    if logits.ndim != 2 or number.shape != logits.shape[:1]:
        shapes = f"numbers {list(number.shape)} and logits {list(logits.shape)}"
        raise ValueError(f"A transform takes one number, or `[B]` for logits [B, V]; got {shapes}.")
    return number[:, None]
