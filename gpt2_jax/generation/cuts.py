"""Transforms that look at the logits alone: the temperature, and fewer tokens to draw from.

The definitions are HF transformers' (generation/logits_process.py), ties included. Each leaves the
largest logit.

Axes: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
from gpt2_jax.kernels import kth_largest, outside_nucleus, smallest_holding
from gpt2_jax.pytrees import dataclass, static

TOP_H_CANDIDATES = 100  # how many of the likeliest tokens HF's top-h looks at


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
        check_count("`k` of TopK", self.k)

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
      >>> jnp.isfinite(gpt2_jax.generation.cuts.Typical(0.5)(logits)).tolist()
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
      >>> jnp.isfinite(gpt2_jax.generation.cuts.Epsilon(0.2)(logits)).tolist()
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
      >>> jnp.isfinite(gpt2_jax.generation.cuts.Eta(0.01)(logits)).tolist()
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
      >>> jnp.isfinite(gpt2_jax.generation.cuts.TopH(0.3)(logits)).tolist()
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
