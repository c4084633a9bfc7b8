"""Transforms that ask a second model: classifier-free guidance and contrastive decoding.

The second model reads each token as the first does, with a cache of its own, which the transform
carries as its state. None compiles itself: they are parts of the programs of `generate`, `stream`
and `beam_search`.

Axes: B rows, P prompt length, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, cache_slots
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import ranges
from gpt2_jax.generation.transforms import (
    History,
    Ids,
    Logits,
    PerRow,
    Room,
    Stateful,
    as_column,
    check_range,
)
from gpt2_jax.model import decode_step, prefill
from gpt2_jax.modules import Params
from gpt2_jax.pytrees import dataclass


class Reading(NamedTuple):
    """Where the second model stands."""

    logits: Float[Array, "B V"]  # after the last token that it has read
    cache: KVCache


class SecondModel(Stateful):
    """What reads along with another model: the state of `Guidance` and `Contrastive`."""

    params: Any
    config: Any

    def read(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Reading:
        """Returns the state after some prompts.

        Raises:
          ValueError: the model has too few positions for the texts.
        """
        n_tokens = room.longest + room.max_new_tokens
        if n_tokens > self.config.n_positions:
            raise ValueError(
                f"The second model of {type(self).__name__} must have {n_tokens} positions for"
                f" these texts, it has {self.config.n_positions}."
            )
        # No fewer than the columns of the prompts, which hold padding, too.
        slots = max(ids.shape[1], cache_slots(n_tokens, n_tokens))
        logits, cache = prefill(self.params, ids, lengths, config=self.config, cache_len=slots)
        return Reading(logits, cache)

    def update(self, state: Reading, tokens: Ids) -> Reading:
        """Returns the state after one more token of each row."""
        logits, cache = decode_step(self.params, tokens, state.cache, config=self.config)
        return Reading(logits, cache)

    def select(self, state: Reading, rows: Int[Array, " R"]) -> Reading:
        """Returns the state of some rows."""
        return Reading(state.logits[rows], kv_cache.select(state.cache, rows))

    def logprobs(self, logits: Logits, history: History | None) -> tuple[Logits, Logits]:
        """Returns the log-probabilities of both models.

        Raises:
          ValueError: they have not as many tokens.
        """
        second = self.state_in(history).logits
        if second.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"The second model of {type(self).__name__} must have the model's"
                f" {logits.shape[-1]} tokens, it has {second.shape[-1]}."
            )
        return jax.nn.log_softmax(logits), jax.nn.log_softmax(second)


@dataclass
class Guidance(SecondModel):
    """Classifier-free guidance (arXiv:2306.17806): moves away from what another prompt would give.

    `log p(x | other) + scale (log p(x | prompt) - log p(x | other))`, HF's `guidance_scale`: above
    1 the prompt counts more. The other prompt, HF's `negative_prompt_ids`, is followed by the same
    new tokens. As in HF's list it comes before all other transforms:
    `Categorical(Chain((Guidance(params, config, 1.5), TopK(40))))`.

    Args:
      params, config: the model, the same as that which generates.
      scale: one number, or one per row.
      ids: `int[1, P]`, or `[B, P]`, one for each prompt; the last token of the prompt by default.
      lengths: how many ids of each row are real; all of them by default.

    Examples:
      >>> guided = gpt2_jax.Greedy(gpt2_jax.Guidance(params, config, 1.0))  # 1 changes nothing
      >>> wishes = {"config": config, "max_new_tokens": 3, "stop_ids": ()}
      >>> plain = gpt2_jax.generate(params, ids, **wishes)
      >>> bool((gpt2_jax.generate(params, ids, **wishes, sampler=guided).ids == plain.ids).all())
      True
    """

    params: Params
    config: GPT2Config
    scale: PerRow
    ids: Any = None
    lengths: Any = None

    def __post_init__(self) -> None:
        check_range("scale", self.scale, ranges.FINITE)

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Reading:
        """Returns the state after the other prompts."""
        n_rows = ids.shape[0]
        if self.ids is None:
            last = jnp.take_along_axis(ids, lengths[:, None] - 1, axis=1)
            return self.read(last, jnp.ones_like(lengths), Room(1, room.max_new_tokens))
        other = jnp.asarray(self.ids, jnp.int32)
        if other.ndim != 2 or other.shape[0] not in (1, n_rows):
            expected = f"[1, P] or [{n_rows}, P]"
            got = list(other.shape)
            raise ValueError(f"`ids` of Guidance must be of shape {expected}, got {got}.")
        width = other.shape[1]
        other_lengths = width if self.lengths is None else jnp.asarray(self.lengths, jnp.int32)
        other = jnp.broadcast_to(other, (n_rows, width))
        other_lengths = jnp.broadcast_to(other_lengths, lengths.shape)
        return self.read(other, other_lengths, Room(width, room.max_new_tokens))

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        own, other = self.logprobs(logits, history)
        return as_column(self.scale, logits) * (own - other) + other


@dataclass
class Contrastive(SecondModel):
    """Contrastive decoding (arXiv:2210.15097): what an expert likes and an amateur does not.

    `log p_expert - log p_amateur`, among the tokens that the expert finds at least `alpha` times as
    likely as its likeliest. It comes before cuts, and has the scale of logits:
    `Greedy(Contrastive(amateur_params, amateur_config))`.

    Args:
      params, config: the amateur, a smaller model of the same vocabulary.
      alpha: in (0, 1]; 0.1 in the paper.
      temperature: divides the amateur's logits; the paper's best are 0.5 and 1.

    Examples:
      >>> amateur = gpt2_jax.init(jax.random.key(1), config)
      >>> sampler = gpt2_jax.Greedy(gpt2_jax.Contrastive(amateur, config))
      >>> wishes = {"config": config, "max_new_tokens": 3, "stop_ids": ()}
      >>> gpt2_jax.generate(params, ids, **wishes, sampler=sampler).ids.shape
      (1, 3)
    """

    params: Params
    config: GPT2Config
    alpha: PerRow = 0.1
    temperature: PerRow = 1.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, ranges.POSITIVE_FRACTION)
        check_range("temperature", self.temperature, ranges.POSITIVE)

    def init(self, ids: Int[Array, "B P"], lengths: Ids, room: Room) -> Reading:
        """Returns the state after the prompts."""
        return self.read(ids, lengths, room)

    def __call__(self, logits: Logits, history: History | None = None) -> Logits:
        expert, _ = self.logprobs(logits, history)
        cooled = self.state_in(history).logits / as_column(self.temperature, logits)
        amateur = jax.nn.log_softmax(cooled)
        least = jnp.log(as_column(self.alpha, logits)) + expert.max(axis=-1, keepdims=True)
        return jnp.where(expert < least, -jnp.inf, expert - amateur)
