"""Beam search and beam sampling, as HF transformers has them, in one compiled program."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.generate import check_arguments, fold, select
from gpt2_jax.generation.sampling import Categorical, History
from gpt2_jax.model import KVCache, Params, decode_step, prefill
from gpt2_jax.modules import write

NEVER = (
    -1e9
)  # HF's score of what must not be chosen; finite, so that such beams still have an order


class Beams(NamedTuple):
    """Some continuations of each prompt, without the prompts, the best first."""

    ids: Array  # int32[B, R, N]; after the stop id, `pad_id`
    lengths: Array  # int32[B, R], tokens of each, the stop id included
    logprobs: (
        Array  # float32[B, R, N], the model's own log-probability of each id; 0 after the stop
    )
    scores: Array  # float32[B, R], sum of the log-probabilities, after transforms, / length ** length_penalty


class _State(NamedTuple):
    """Where the search stands, for `n` beams of each of `B` prompts. In beams that go on, `lengths` is 0."""

    running: Beams  # what may go on; its `scores` are plain sums
    finished: Beams  # the best that have ended; empty places have length 0
    source: Array  # int32[B * n], the row of the cache that each running beam continues
    open: Array  # bool[B], whether the running beams of a prompt can still improve on its finished ones
    last: Array  # bool[], whether every candidate of the last step ended
    step: Array  # int32[], tokens chosen so far
    cache: KVCache  # of B * n rows


def beam_search(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    key: Array | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    sampler: Any = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
) -> Beams:
    """Continues each prompt by the likeliest texts that a search of `num_beams` beams finds.

    Each step extends each beam by every token and keeps the best. What ends is kept aside, as many as there are beams,
    ranked by score. Arguments that are not named here are those of `generate`.

    Args:
      num_beams: `n`, at least 2.
      num_return_sequences: `R`, at most `n`.
      length_penalty: exponent of the length that scores are divided by. Log-probabilities are negative, so values
        above 0 prefer longer texts.
      early_stopping: when a prompt is done. True: when `n` texts have ended. False: when furthermore the best running
        beam, were it to end now, would not be among them. "never": when it could not be at any length.
      sampler: its transform acts on the log-probabilities of each beam. `Greedy` extends by the best tokens,
        `Categorical` by tokens drawn without replacement, in proportion to the probability of the whole beam.

    Raises:
      ValueError: as `generate`, or an argument is out of its range.
    """
    if num_beams < 2:
        raise ValueError(
            f"`num_beams` must be at least 2 (`generate` searches with one), got {num_beams}."
        )
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"`num_return_sequences` must be in 1 to {num_beams} (`num_beams`), got {num_return_sequences}."
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(
            f'`early_stopping` must be True, False or "never", got {early_stopping!r}.'
        )
    if not np.isfinite(length_penalty):
        raise ValueError(f"`length_penalty` must be finite, got {length_penalty}.")
    ids, lengths, row_keys, sampler, stops, pad = check_arguments(
        ids, lengths, key, config, max_new_tokens, sampler, stop_ids, pad_id, padding_side
    )
    if config.vocab_size < 1 + len(stops):
        raise ValueError(
            f"The vocabulary has {config.vocab_size} tokens, too few beside {len(stops)} stop ids."
        )
    draw = isinstance(sampler, Categorical)
    static = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "early_stopping": early_stopping,
        "draw": draw,
    }
    numbers = jnp.float32(length_penalty), stops, pad
    found = _search(
        params, ids, lengths, row_keys, sampler.transform, *numbers, config=config, **static
    )
    return jax.tree.map(lambda x: x[:, :num_return_sequences], found)


@partial(
    jax.jit, static_argnames=("config", "max_new_tokens", "num_beams", "early_stopping", "draw")
)
def _search(
    params, ids, lengths, row_keys, transform, length_penalty, stops, pad, *,
    config, max_new_tokens, num_beams, early_stopping, draw,
):  # fmt: skip
    rows = len(ids)
    prompts = jnp.repeat(jnp.pad(ids, ((0, 0), (0, max_new_tokens))), num_beams, axis=0)

    def choose(logits, state):
        """Takes the next token of each beam, given `logits[B * n, V]`."""
        step, count = (
            state.step,
            num_beams * max(2, 1 + len(stops)),
        )  # candidates; enough of them do not end
        own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        seen = write(
            prompts, state.running.ids.reshape(rows * num_beams, -1), lengths.max(initial=1)
        )  # at its slots
        logprobs = transform(own, History(seen, state.cache.valid, step))
        totals = (logprobs.reshape(rows, num_beams, -1) + state.running.scores[..., None]).reshape(
            rows, -1
        )
        if draw:  # the largest of Gumbel-perturbed scores are a draw without replacement (arXiv:1903.06059)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, totals.shape[1:], totals.dtype))(
                fold(row_keys, step)
            )
            picks = jax.lax.top_k(totals + noise, count)[1]
            scores = jnp.take_along_axis(totals, picks, axis=1)
        else:
            scores, picks = jax.lax.top_k(totals, count)
        beam, token = jnp.divmod(picks, config.vocab_size)
        grown = _take(state.running, beam)
        grown = Beams(
            ids=grown.ids.at[:, :, step].set(token),
            lengths=grown.lengths,
            logprobs=grown.logprobs.at[:, :, step].set(
                jnp.take_along_axis(own.reshape(rows, -1), picks, axis=1)
            ),
            scores=scores,
        )

        last = step + 1 == max_new_tokens
        ended = jnp.isin(token, stops) | last
        going = scores + jnp.where(ended, NEVER, 0.0)
        places = jax.lax.top_k(going, num_beams)[1]
        running = _take(grown._replace(scores=going), places)
        source = jnp.take_along_axis(beam, places, axis=1) + num_beams * jnp.arange(rows)[:, None]

        ends = (
            ended & (jnp.arange(count) < num_beams)[None]
        )  # the others only stand in for those that end
        full = (state.finished.lengths > 0).all(axis=1)
        barred = ~ends | ~state.open[:, None] | (full[:, None] & (early_stopping is True))
        score = scores / (step + 1).astype(jnp.float32) ** length_penalty + jnp.where(
            barred, NEVER, 0.0
        )
        new = grown._replace(scores=score, lengths=jnp.where(ends, step + 1, 0))
        pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, new)
        finished = _take(pool, jax.lax.top_k(pool.scores, num_beams)[1])

        length = jnp.float32(step + 1)  # at which the best running beam is judged
        if early_stopping == "never":
            length = jnp.where(length_penalty > 0, max_new_tokens, length)
        best = running.scores[:, 0] / length**length_penalty
        full = (finished.lengths > 0).all(axis=1)
        still = state.open & (~full | (best > finished.scores[:, -1]))
        return _State(running, finished, source.ravel(), still, ended.all(), step + 1, state.cache)

    def unfinished(state):
        enough = (state.finished.lengths > 0).all() & (early_stopping is True)
        return state.open.any() & ~enough & ~state.last

    def advance(state):
        cache = select(state.cache, state.source)
        token = jnp.take(state.running.ids, state.step - 1, axis=2).ravel()
        logits, cache = decode_step(params, token, cache, config=config)
        return choose(logits, state._replace(cache=cache))

    logits, cache = prefill(params, ids, lengths, config=config, cache_len=prompts.shape[1])
    source = jnp.repeat(jnp.arange(rows), num_beams)
    shape = (rows, num_beams)
    empty = Beams(
        ids=jnp.full((*shape, max_new_tokens), pad, jnp.int32),
        lengths=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        scores=jnp.full(shape, NEVER, jnp.float32),
    )
    running = empty._replace(
        scores=empty.scores.at[:, 0].set(0.0)
    )  # of beams that are all alike, one counts
    state = _State(
        running,
        empty,
        source,
        jnp.ones(rows, bool),
        jnp.array(False),
        jnp.int32(0),
        select(cache, source),
    )
    return jax.lax.while_loop(unfinished, advance, choose(logits[source], state)).finished


def _take(beams: Beams, places: Array) -> Beams:
    """Returns the beams of each prompt at `places[B, m]`."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1
        ),
        beams,
    )
