"""Beam search and beam sampling, as HF transformers has them, in one compiled program.

Each step expands every running beam to its best candidates, retires the candidates that end, keeps
the best of the others running, and asks of each prompt whether its search is still open.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, cache_slots
from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.generation.decode import check_numbers
from gpt2_jax.generation.growing import STEPS, Progress, to_the_end
from gpt2_jax.generation.request import (
    Keys,
    Request,
    check_memory,
    check_room,
    fold_rows,
    for_copies,
    is_traced,
    make_request,
    read_endings,
    read_prompts,
    remember,
    transform_of,
)
from gpt2_jax.generation.transforms import History, Room, select_state, update_state
from gpt2_jax.model import decode_step, prefill
from gpt2_jax.modules import Params, Tap, no_tap
from gpt2_jax.sharding import automatic, constrain

# HF's score of what must not be chosen; finite, so that such beams still have an order.
NEVER = -1e9


class Beams(NamedTuple):
    """Some continuations of each prompt, without the prompts, the best first.

    Examples:
      >>> gpt2_jax.Beams._fields  # R texts of each prompt, the best first
      ('ids', 'lengths', 'logprobs', 'scores')
    """

    ids: Int[Array, "B R N"]  # after the stop id, `pad_id`
    lengths: Int[Array, "B R"]  # tokens of each, the stop id included
    logprobs: Float[Array, "B R N"]  # the model's own, of each id; 0 after the stop
    # The sum of the log-probabilities, after transforms, divided by length ** length_penalty.
    scores: Float[Array, "B R"]


class _Search(NamedTuple):
    """What a search is told."""

    request: Request
    length_penalty: Float[Array, ""]


class _Sizes(NamedTuple):
    """What shapes the program."""

    max_new_tokens: int
    num_beams: int
    early_stopping: bool | str


class _Candidates(NamedTuple):
    """The best extensions of each prompt's running beams by one token, the best first."""

    beams: Beams  # with the token; `scores` are plain sums
    parents: Int[Array, "B C"]  # the beam that each extends
    ended: Bool[Array, "B C"]  # at a stop id, or as there is no room for more


class _State(NamedTuple):
    """Where the search stands, for `n` beams of each of `B` prompts.

    In beams that go on, `lengths` is 0.
    """

    running: Beams  # what may go on; its `scores` are plain sums
    finished: Beams  # the best that have ended; empty places have length 0
    source: Int[Array, " R"]  # the row of the cache that each running beam continues
    open: Bool[Array, " B"]  # whether running beams can still improve on the finished ones
    all_ended: Bool[Array, ""]  # whether every candidate of the last step ended
    step: Int[Array, ""]  # tokens chosen so far
    cache: KVCache  # of B * n rows
    memory: Any  # of as many: the state of a transform that carries one


def beam_search(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None = None,
    key: Keys | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    sampler: Any = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    tap: Tap | None = None,
) -> Beams:
    """Continues each prompt by the likeliest texts that a search finds. Compiles itself.

    Each step extends each beam by every token and keeps the best. What ends is kept aside, as many
    as there are beams, ranked by score. Arguments that are not named here are those of `generate`.
    Under `jax.jit`, `jax.vmap` and `jax.export` it is a part of the caller's program, as `generate`
    is, without checks of values.

    Args:
      num_beams: `n`, at least 2.
      num_return_sequences: `R`, at most `n`.
      length_penalty: exponent of the length that scores are divided by. Log-probabilities are
        negative, so values above 0 prefer longer texts.
      early_stopping: when a prompt is done. True: when `n` texts have ended. False: when
        furthermore the best running beam, were it to end now, would not be among them. "never":
        when it could not be at any length.
      sampler: its transform acts on the log-probabilities of each beam. `Greedy` extends by the
        best tokens, `Categorical` by tokens drawn without replacement, in proportion to the
        probability of the whole beam.
      tap: as for `generate`: a value for each prompt follows it into all of its beams.

    Raises:
      FloatingPointError: as `generate`.
      ValueError: as `generate`, or an argument is out of its range, or the sampler has no
        transform.

    Examples:
      >>> beams = gpt2_jax.beam_search(
      ...     params, ids, config=config, max_new_tokens=3, num_beams=2, num_return_sequences=2
      ... )
      >>> beams.ids.shape, bool(beams.scores[0, 0] >= beams.scores[0, 1])
      ((1, 2, 3), True)
    """
    num_beams = as_count("num_beams", num_beams)
    num_return_sequences = as_count("num_return_sequences", num_return_sequences)
    if num_beams < 2:
        raise ValueError(
            f"`num_beams` must be at least 2 (`generate` searches with one), got {num_beams}."
        )
    if not 1 <= num_return_sequences <= num_beams:
        expected = f"1 to {num_beams} (`num_beams`)"
        raise ValueError(
            f"`num_return_sequences` must be in {expected}, got {num_return_sequences}."
        )
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise ValueError(
            f'`early_stopping` must be True, False or "never", got {early_stopping!r}.'
        )
    if not np.isfinite(length_penalty):
        raise ValueError(f"`length_penalty` must be finite, got {length_penalty}.")
    prompts = read_prompts(ids, lengths, padding_side, config=config)
    max_new_tokens = as_count("max_new_tokens", max_new_tokens)
    check_room(prompts, max_new_tokens, "error", config=config)
    check_memory(prompts, num_beams, "num_beams", config=config)
    endings = read_endings(stop_ids, pad_id, config=config)
    n_stops = len(endings.stop_ids)
    if config.vocab_size < 1 + n_stops:
        raise ValueError(
            f"The vocabulary has {config.vocab_size} tokens, too few beside {n_stops} stop ids."
        )
    request = make_request(prompts, endings, key, sampler, tap=tap)
    transform_of(request.rules.sampler)  # raises where there is none
    sizes = _Sizes(max_new_tokens, num_beams, early_stopping)
    search = _Search(
        remember(request, Room(prompts.longest, max_new_tokens)), jnp.float32(length_penalty)
    )
    if is_traced((params, search)):
        found = _in_one(params, search, config=config, sizes=sizes)
    else:
        found = _in_parts(params, search, prompts.longest, config=config, sizes=sizes)
    # A search finds no text where no score is a number: none is larger than another.
    is_none = found.lengths[:, :1, None] == 0
    check_numbers(jnp.where(is_none, jnp.nan, found.logprobs), config=config)
    return jax.tree.map(lambda x: x[:, :num_return_sequences], found)


# Programs.


@partial(jax.jit, static_argnames="sizes")
@automatic
def _in_one(params: Params, search: _Search, *, config: GPT2Config, sizes: _Sizes) -> Beams:
    """Returns the finished beams of each prompt; the cache has room for all from the start."""
    slots = search.request.ids.shape[1] + sizes.max_new_tokens
    state = _begin(params, search, config=config, sizes=sizes, cache_len=slots)
    step = partial(_step, params, search, config=config, sizes=sizes)
    state = jax.lax.while_loop(partial(_unfinished, sizes=sizes), step, state)
    return jax.tree.map(constrain, state.finished)  # on all devices of a mesh: the host looks at it


def _in_parts(
    params: Params, search: _Search, longest: int, *, config: GPT2Config, sizes: _Sizes
) -> Beams:
    """Returns the finished beams of each prompt, by a cache that grows with the texts."""

    def call(program, state):
        return program(params, search, state, config=config, sizes=sizes)

    columns = search.request.ids.shape[1]
    most = columns + sizes.max_new_tokens
    # No fewer than the columns of the prompts, whose padding is written as well.
    slots = max(columns, cache_slots(longest + 1, most))
    state = _begin(params, search, config=config, sizes=sizes, cache_len=slots)
    state = to_the_end(_steps, call, state, used=longest, step=1, most=most)
    return state.finished


@partial(jax.jit, static_argnames="sizes", donate_argnames="state")
@automatic
def _steps(
    params: Params, search: _Search, state: _State, *, config: GPT2Config, sizes: _Sizes
) -> Progress:
    """Takes some steps, as far as there is room in the cache."""
    first = state.step

    def goes_on(state):
        has_room = state.cache.slot < state.cache.slots
        return _unfinished(state, sizes=sizes) & has_room & (state.step < first + STEPS)

    step = partial(_step, params, search, config=config, sizes=sizes)
    state = jax.lax.while_loop(goes_on, step, state)
    # On all devices of a mesh: the host looks at them.
    state = state._replace(finished=jax.tree.map(constrain, state.finished))
    return Progress(state, ~_unfinished(state, sizes=sizes), state.cache.slot)


def _unfinished(state: _State, *, sizes: _Sizes) -> Bool[Array, ""]:
    """Returns whether the search goes on."""
    enough = (state.finished.lengths > 0).all() & (sizes.early_stopping is True)
    return state.open.any() & ~enough & ~state.all_ended


def _step(
    params: Params, search: _Search, state: _State, *, config: GPT2Config, sizes: _Sizes
) -> _State:
    """Reads the last token of each beam and takes the next."""
    rules = search.request.rules
    # Beams change places among those of their prompt alone: the prompt's value serves all.
    tap = for_copies(rules, sizes.num_beams).tap or no_tap
    # The best beams may all continue the same one: each takes its own copy of that one's past.
    cache = kv_cache.select(state.cache, state.source)
    token = jnp.take(state.running.ids, state.step - 1, axis=2).ravel()
    logits, cache = decode_step(params, token, cache, config=config, tap=tap)
    transform = rules.sampler.transform
    memory = select_state(transform, state.memory, state.source)
    memory = update_state(transform, memory, token)
    state = state._replace(cache=cache, memory=memory)
    return _choose(logits, state, search, sizes.early_stopping)


@partial(jax.jit, static_argnames=("sizes", "cache_len"))
@automatic
def _begin(
    params: Params, search: _Search, *, config: GPT2Config, sizes: _Sizes, cache_len: int
) -> _State:
    """Reads the prompts and takes the first token of each beam."""
    request = search.request
    ids = request.ids
    tap = request.rules.tap or no_tap
    logits, cache = prefill(
        params, ids, request.lengths, config=config, cache_len=cache_len, tap=tap
    )
    state = _before_any_token(cache, request, sizes.num_beams, sizes.max_new_tokens)
    return _choose(logits[state.source], state, search, sizes.early_stopping)


def _before_any_token(
    cache: KVCache, request: Request, num_beams: int, max_new_tokens: int
) -> _State:
    """Returns the state before the first token is chosen."""
    n_rows = request.ids.shape[0]
    transform = request.rules.sampler.transform
    shape = (n_rows, num_beams)
    empty = Beams(
        ids=jnp.full((*shape, max_new_tokens), request.rules.pad_id, jnp.int32),
        lengths=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        scores=jnp.full(shape, NEVER, jnp.float32),
    )
    # Of beams that are all alike, one counts: else the best token would be taken once for each.
    running = empty._replace(scores=empty.scores.at[:, 0].set(0.0))
    source = jnp.repeat(jnp.arange(n_rows), num_beams)
    return _State(
        running=running,
        finished=empty,
        source=source,
        open=jnp.ones(n_rows, bool),
        all_ended=jnp.array(False),
        step=jnp.int32(0),
        cache=kv_cache.select(cache, source),
        memory=select_state(transform, request.memory, source),
    )


def _choose(
    logits: Float[Array, "R V"], state: _State, search: _Search, early_stopping: bool | str
) -> _State:
    """Takes the next token of each beam."""
    candidates = _expand(logits, state, search)
    running, source = _keep_running(candidates, state)
    finished = _retire(candidates, state, search, early_stopping)
    still_open = _is_open(running, finished, state, search, early_stopping)
    return _State(
        running=running,
        finished=finished,
        source=source,
        open=still_open,
        all_ended=candidates.ended.all(),
        step=state.step + 1,
        cache=state.cache,
        memory=state.memory,
    )


def _expand(logits: Float[Array, "R V"], state: _State, search: _Search) -> _Candidates:
    """Returns the best extensions of each prompt's beams, enough that `n` of them do not end."""
    rules = search.request.rules
    step = state.step
    n_rows, num_beams, max_new_tokens = state.running.ids.shape
    vocab_size = logits.shape[-1]
    # HF's number: even if every beam ends at every stop id, `n` others are left to go on.
    n_candidates = num_beams * max(2, 1 + len(rules.stop_ids))

    # HF adds up log-probabilities, not logits, and lets the transforms act on these.
    own = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    new = state.running.ids.reshape(n_rows * num_beams, max_new_tokens)
    # The slot of the first token after the prompts: all rows write from there, as in the cache.
    first_new = search.request.lengths.max(initial=1)
    # Beams of one prompt stand together, in all arrays of rows. Slots that the cache has no room
    # for yet hold nothing.
    prompts = jnp.repeat(search.request.ids, num_beams, axis=0)
    slots = max(state.cache.slots, prompts.shape[1] + max_new_tokens)
    prompts = jnp.pad(prompts, ((0, 0), (0, slots - prompts.shape[1])))
    seen = kv_cache.put(prompts, new, first_new)
    valid = jnp.pad(state.cache.valid, ((0, 0), (0, slots - state.cache.slots)))
    history = History(seen, valid, step, state.memory)
    logprobs = transform_of(rules.sampler)(own, history)
    totals = logprobs.reshape(n_rows, num_beams, -1) + state.running.scores[..., None]
    totals = totals.reshape(n_rows, -1)  # [B, n V]: all extensions of a prompt compete

    if rules.sampler.draws:
        # The largest of Gumbel-perturbed scores are a draw without replacement (arXiv:1903.06059).
        noise = _gumbel_rows(fold_rows(rules.keys, step), totals)
        _, picks = jax.lax.top_k(totals + noise, n_candidates)
        scores = jnp.take_along_axis(totals, picks, axis=1)
    else:
        scores, picks = jax.lax.top_k(totals, n_candidates)

    parents, token = jnp.divmod(picks, vocab_size)
    beams = _take(state.running, parents)
    token_logprobs = jnp.take_along_axis(own.reshape(n_rows, -1), picks, axis=1)
    beams = Beams(
        ids=beams.ids.at[:, :, step].set(token),
        lengths=beams.lengths,
        logprobs=beams.logprobs.at[:, :, step].set(token_logprobs),
        scores=scores,
    )
    # HF's criteria include the length: at the last step each candidate ends.
    is_last_step = step + 1 == max_new_tokens
    return _Candidates(beams, parents, jnp.isin(token, rules.stop_ids) | is_last_step)


def _keep_running(candidates: _Candidates, state: _State) -> tuple[Beams, Int[Array, " R"]]:
    """Returns the best candidates that go on, and the row of the cache that each continues."""
    n_rows, num_beams, _ = state.running.ids.shape
    # Added, as in HF's code. Enough go on that none of these is taken, but in the last step.
    scores = candidates.beams.scores + jnp.where(candidates.ended, NEVER, 0.0)
    _, places = jax.lax.top_k(scores, num_beams)
    running = _take(candidates.beams._replace(scores=scores), places)
    parents = jnp.take_along_axis(candidates.parents, places, axis=1)
    source = parents + num_beams * jnp.arange(n_rows)[:, None]
    return running, source.ravel()


def _retire(
    candidates: _Candidates, state: _State, search: _Search, early_stopping: bool | str
) -> Beams:
    """Returns the best finished beams, with the candidates that end among them."""
    num_beams = state.finished.lengths.shape[1]
    n_candidates = candidates.ended.shape[1]
    # Only the best `n` may end; those behind them stand in for the ones that end.
    among_best = jnp.arange(n_candidates)[None] < num_beams
    ends = candidates.ended & among_best
    is_full = (state.finished.lengths > 0).all(axis=1)
    closed = ~state.open | (is_full & (early_stopping is True))
    barred = ~ends | closed[:, None]

    length = state.step + 1
    scores = candidates.beams.scores / length.astype(jnp.float32) ** search.length_penalty
    new = candidates.beams._replace(
        scores=scores + jnp.where(barred, NEVER, 0.0),
        lengths=jnp.where(ends, length, 0),
    )
    # The old ones come first: of equal scores, `top_k` keeps them, as HF does.
    pool = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.finished, new)
    _, places = jax.lax.top_k(pool.scores, num_beams)
    return _take(pool, places)


def _is_open(
    running: Beams,
    finished: Beams,
    state: _State,
    search: _Search,
    early_stopping: bool | str,
) -> Bool[Array, " B"]:
    """Returns of which prompts the best running beam may still come among the finished ones."""
    max_new_tokens = running.ids.shape[2]
    length = jnp.float32(state.step + 1)  # at which the best running beam is judged
    if early_stopping == "never":
        # Where long texts are preferred, it may yet gain by its length.
        length = jnp.where(search.length_penalty > 0, max_new_tokens, length)
    best = running.scores[:, 0] / length**search.length_penalty
    is_full = (finished.lengths > 0).all(axis=1)
    return state.open & (~is_full | (best > finished.scores[:, -1]))


def _take(beams: Beams, places: Int[Array, "B M"]) -> Beams:
    """Returns the beams of each prompt at some places."""

    def take(x):
        aligned = places.reshape(*places.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, aligned, axis=1)

    return jax.tree.map(take, beams)


def _gumbel_rows(keys: Any, like: Float[Array, "B X"]) -> Float[Array, "B X"]:
    """Returns Gumbel noise of a shape, each row from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(key, like.shape[1:], like.dtype))(keys)
