"""Lossless speculation: guess some tokens cheaply, let the model check them all in one pass, keep what it agrees to.

Greedy texts are those of plain greedy decoding, and drawn texts have the model's own distribution (arXiv:2211.17192,
algorithm 1), whatever is guessed: guesses change the time alone. They come from a smaller model, or from what followed
when the last tokens stood in the text before (prompt lookup).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.generate import check_arguments, fold
from gpt2_jax.generation.sampling import Categorical, History, argmax
from gpt2_jax.model import Params, extend, prefill
from gpt2_jax.modules import LayerCache, write


class Speculation(NamedTuple):
    """Generated tokens, without the prompts, and how well they were guessed."""

    ids: Array  # int32[B, N]; after a row's stop id, `pad_id`
    lengths: Array  # int32[B], tokens made by each row, its stop id included
    logprobs: Array  # float32[B, N], the model's own log-probability of each id; 0 after the stop
    rounds: Array  # int32[B], passes of the model over each row, the prompt's included
    drafted: Array  # int32[B], tokens that were guessed
    accepted: Array  # int32[B], those of them that the model agreed to


class _State(NamedTuple):
    """Each token stands at the slot of its position. `count - 1` tokens are read, the last one is only chosen."""

    ids: Array  # int32[B, S]
    count: Array  # int32[B], tokens of each row
    out: Speculation  # `ids` unused; `logprobs` is float32[B, N + D + 1]
    done: Array  # bool[B]
    cache: tuple[LayerCache, ...]
    draft_cache: tuple[LayerCache, ...] | None
    round: Array  # int32[]


def speculate(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    key: Array | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    draft_params: Params | None = None,
    draft_config: GPT2Config | None = None,
    num_draft_tokens: int = 5,
    max_matching_ngram_size: int = 2,
    sampler: Any = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
) -> Speculation:
    """Continues each prompt of a batch as `generate` does, several tokens to a pass of the model.

    Greedy texts equal `generate`'s up to the rounding of differently shaped products, which can decide between equal
    logits. Drawn texts have the same distribution, but differ for the same key. Arguments that are not named here are
    those of `generate`.

    Args:
      draft_params: the parameters of a smaller model of the same vocabulary; without one, guesses come from the text.
      draft_config: its configuration.
      num_draft_tokens: `D`, guesses to a pass.
      max_matching_ngram_size: without a draft model, how many of the last tokens are looked up, from the start of the
        text, at first; then one less, down to 1.

    Raises:
      ValueError: as `generate`, or the draft model does not fit, or a number is less than 1.
    """
    if (draft_params is None) != (draft_config is None):
        raise ValueError(
            "`draft_params` and `draft_config` belong together: one of them is missing."
        )
    if draft_config is not None and draft_config.vocab_size != config.vocab_size:
        raise ValueError(
            f"The draft model must have the model's {config.vocab_size} tokens, it has {draft_config.vocab_size}."
        )
    if draft_config is not None and draft_config.n_positions < config.n_positions:
        raise ValueError(
            f"The draft model must have the model's {config.n_positions} positions, it has {draft_config.n_positions}."
        )
    for name, value in (
        ("num_draft_tokens", num_draft_tokens),
        ("max_matching_ngram_size", max_matching_ngram_size),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    arrays = check_arguments(
        ids, lengths, key, config, max_new_tokens, sampler, stop_ids, pad_id, padding_side
    )
    ids, lengths, row_keys, sampler, stops, pad = arrays
    return _speculate(
        params, draft_params, ids, lengths, row_keys, sampler.transform, stops, pad,
        config=config, draft_config=draft_config, max_new_tokens=max_new_tokens, guesses=num_draft_tokens,
        ngram=max_matching_ngram_size, draw=isinstance(sampler, Categorical),
    )  # fmt: skip


@partial(
    jax.jit,
    static_argnames=("config", "draft_config", "max_new_tokens", "guesses", "ngram", "draw"),
)
def _speculate(
    params, draft_params, prompts, lengths, row_keys, transform, stops, pad, *,
    config, draft_config, max_new_tokens, guesses, ngram, draw,
):  # fmt: skip
    rows, width = prompts.shape
    slots = width + max_new_tokens + guesses  # the last pass may guess beyond the end

    def distribution(logits, ids, count):
        """Probabilities of the next token after `count[R]` tokens of `ids[R, S]`, in rows that may repeat prompts."""
        valid = jnp.arange(slots)[None] < count[:, None]
        made = count - jnp.repeat(lengths, len(count) // rows)
        logits = transform(logits, History(ids, valid, made))
        if draw:
            return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return jax.nn.one_hot(argmax(logits), config.vocab_size)

    def by_model(state, keys):
        """Guesses of the draft model, `int32[B, D]`, and the distributions that they are drawn from, `[B, D, V]`."""
        count = state.count

        def pick(i, logits, ids):
            probs = distribution(logits[:, -1], ids, count + i)
            token = _draw(keys, 2 + i, probs)[:, None]
            return write(ids, token, count + i), token, probs

        def step(carry, i):
            ids, token, cache = carry
            logits, cache = extend(draft_params, token, cache, count + i - 1, config=draft_config)
            ids, token, probs = pick(i, logits, ids)
            return (ids, token, cache), probs

        # Of a round whose guesses all held, it has not read the last: it reads the last two tokens.
        two = jnp.take_along_axis(state.ids, count[:, None] - jnp.array([[2, 1]]), axis=1)
        logits, cache = extend(draft_params, two, state.draft_cache, count - 2, config=draft_config)
        ids, token, first = pick(0, logits, state.ids)
        (ids, _, cache), others = jax.lax.scan(
            step, (ids, token, cache), jnp.arange(1, guesses, dtype=jnp.int32)
        )
        probs = jnp.concatenate([first[None], others]).swapaxes(0, 1)
        return ids, probs, jnp.full(rows, guesses, jnp.int32), cache

    def by_lookup(state, keys):
        """Guesses that follow an earlier occurrence of the last tokens; where there is none, no guess."""
        del keys
        count, found = state.count[:, None], jnp.full(rows, slots)  # where a guess begins
        starts = jnp.arange(slots)[None]
        for size in range(1, ngram + 1):  # a longer match takes a shorter one's place
            same = starts + size < count
            for i in range(size):
                last = jnp.take_along_axis(state.ids, jnp.maximum(count - size + i, 0), axis=1)
                same &= jnp.roll(state.ids, -i, axis=1) == last
            same &= count >= size
            found = jnp.where(same.any(axis=1), jnp.argmax(same, axis=1) + size, found)
        places = found[:, None] + jnp.arange(guesses)[None]
        tokens = jnp.take_along_axis(state.ids, places, axis=1, mode="clip")
        number = jnp.clip(state.count - found, 0, guesses).astype(jnp.int32)
        return (
            write(state.ids, tokens, state.count),
            jax.nn.one_hot(tokens, config.vocab_size),
            number,
            None,
        )

    guess = by_lookup if draft_params is None else by_model

    def check(state):
        """One round: guess, read the guesses in one pass, keep the tokens that hold and one of the model's own."""
        keys = fold(row_keys, state.round)
        ids, guessed, number, draft_cache = guess(state, keys)
        places = state.count[:, None] - 1 + jnp.arange(guesses + 1)[None]  # [B, D + 1]
        logits, cache = extend(
            params,
            jnp.take_along_axis(ids, places, axis=1),
            state.cache,
            state.count - 1,
            config=config,
        )
        many = jnp.repeat(ids, guesses + 1, axis=0), (places + 1).ravel()
        wanted = distribution(logits.reshape(-1, config.vocab_size), *many).reshape(
            rows, guesses + 1, -1
        )
        tokens = jnp.take_along_axis(ids, places[:, 1:], axis=1)  # [B, D]
        chosen, agreed = _choose(keys, tokens, guessed, number, wanted, draw)

        room = max_new_tokens - state.out.lengths
        stop = jnp.isin(chosen, stops) & (jnp.arange(guesses + 1)[None] <= agreed[:, None])
        until = jnp.where(
            stop.any(axis=1), jnp.argmax(stop, axis=1) + 1, slots
        )  # so many, the stop included
        made = jnp.where(state.done, 0, jnp.minimum(jnp.minimum(agreed + 1, until), room)).astype(
            jnp.int32
        )
        own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        logprobs = jnp.take_along_axis(own, chosen[..., None], axis=-1)[..., 0]
        live = (~state.done).astype(jnp.int32)
        out = Speculation(
            ids=None,
            lengths=state.out.lengths + made,
            logprobs=write(state.out.logprobs, logprobs, state.out.lengths),
            rounds=state.out.rounds + live,
            drafted=state.out.drafted + live * number,
            accepted=state.out.accepted + jnp.minimum(live * agreed, made),
        )
        done = state.done | (made == room) | (until <= made)
        ids = jnp.where(state.done[:, None], state.ids, write(ids, chosen, state.count))
        return _State(ids, state.count + made, out, done, cache, draft_cache, state.round + 1)

    logits, cache = prefill(params, prompts, lengths, config=config, cache_len=slots)
    ids = jnp.pad(prompts, ((0, 0), (0, slots - width)))
    first = _draw(fold(row_keys, 0), 0, distribution(logits, ids, lengths))
    one = jnp.ones(rows, jnp.int32)
    own = jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32)), first[:, None], axis=1
    )
    own = jnp.pad(own, ((0, 0), (0, max_new_tokens + guesses)))
    draft_cache = None
    if draft_params is not None:
        draft_cache = prefill(draft_params, prompts, lengths, config=draft_config, cache_len=slots)[
            1
        ].layers
    out = Speculation(None, one, own, rounds=one, drafted=0 * one, accepted=0 * one)
    done = jnp.isin(first, stops) | (max_new_tokens == 1)
    ids = write(ids, first[:, None], lengths)
    state = _State(ids, lengths + 1, out, done, cache.layers, draft_cache, jnp.int32(1))
    state = jax.lax.while_loop(lambda state: ~state.done.all(), check, state)

    made = jnp.arange(max_new_tokens)[None] < state.out.lengths[:, None]
    new = jnp.take_along_axis(
        state.ids, lengths[:, None] + jnp.arange(max_new_tokens)[None], axis=1
    )
    logprobs = jnp.where(made, state.out.logprobs[:, :max_new_tokens], 0.0)
    return state.out._replace(ids=jnp.where(made, new, pad), logprobs=logprobs)


def _choose(keys, tokens, guessed, number, wanted, draw):
    """Returns the tokens of a round, `int32[B, D + 1]`, and how many of the guesses they begin with, `int32[B]`.

    A guess holds with the probability `min(1, wanted / guessed)`; the first that does not is replaced by a draw from
    what `wanted` has more than `guessed`; if all hold, one more token is drawn. What follows it is to be ignored.
    """
    count = tokens.shape[1]
    real = jnp.arange(count)[None] < number[:, None]
    p = jnp.take_along_axis(wanted[:, :count], tokens[..., None], axis=-1)[..., 0]
    q = jnp.take_along_axis(guessed, tokens[..., None], axis=-1)[..., 0]
    if draw:
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (count,)))(keys)
        holds = real & (u * q < p)
    else:
        holds = real & (p > 0)
    agreed = jnp.cumprod(holds, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    spent = jnp.pad(jnp.where(real[..., None], guessed, 0.0), ((0, 0), (0, 1), (0, 0)))
    at = agreed[:, None, None]
    left = jnp.take_along_axis(jnp.maximum(wanted - spent, 0.0), at, axis=1)[:, 0]
    whole = jnp.take_along_axis(wanted, at, axis=1)[:, 0]
    left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, whole)  # a rest of 0 is rounding
    own = _draw(keys, 1, left)
    chosen = jnp.pad(tokens, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(count + 1)[None] == agreed[:, None], own[:, None], chosen), agreed


def _draw(keys, number, probs):
    """Draws from `probs[B, V]` with the `number`-th key of each row, or without keys takes the likeliest."""
    if keys is None:
        return argmax(probs)
    return Categorical()(fold(keys, number), jnp.log(probs))
