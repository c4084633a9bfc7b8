"""Lossless speculation: guess some tokens cheaply, and check them all in one pass.

Greedy texts are those of plain greedy decoding, and drawn texts have the model's own distribution
(arXiv:2211.17192, algorithm 1), whatever is guessed: guesses change the time alone. They come from
a smaller model, or from what followed when the last tokens stood in the text before (prompt
lookup). Each round guesses, verifies and emits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    check_room,
    check_stateless,
    fold_rows,
    is_traced,
    make_request,
    read_endings,
    read_prompts,
    transform_of,
)
from gpt2_jax.generation.sampling import Categorical, History
from gpt2_jax.kernels import argmax
from gpt2_jax.model import extend, prefill, read_on, token_logprobs_of
from gpt2_jax.modules import Params, Tap, no_tap
from gpt2_jax.sharding import automatic, constrain

# What each of the draws of a round folds into a row's key.
DRAW_ACCEPT = 0
DRAW_OWN = 1
DRAW_GUESS = 2  # and on, one for each guess


class Speculation(NamedTuple):
    """Generated tokens, without the prompts, and how well they were guessed.

    Examples:
      >>> gpt2_jax.Speculation._fields[3:]  # passes, guesses, and how many of these were right
      ('rounds', 'drafted', 'accepted')
    """

    ids: Int[Array, "B N"]  # after a row's stop id, `pad_id`
    lengths: Int[Array, " B"]  # tokens made by each row, its stop id included
    logprobs: Float[Array, "B N"]  # the model's own, of each id; 0 after the stop
    rounds: Int[Array, " B"]  # passes of the model over each row, the prompt's included
    drafted: Int[Array, " B"]  # tokens that were guessed
    accepted: Int[Array, " B"]  # those of them that the model agreed to


class _Sizes(NamedTuple):
    """What shapes the program."""

    max_new_tokens: int
    num_draft_tokens: int  # D
    max_matching_ngram_size: int


class _Draft(NamedTuple):
    """The model that guesses."""

    params: Params
    config: GPT2Config


class _State(NamedTuple):
    """Where each row stands.

    Each token's slot is its position; the last token is chosen, but not yet read.
    """

    ids: Int[Array, "B S"]
    count: Int[Array, " B"]  # tokens of each row
    n_generated: Int[Array, " B"]
    # Of the generated tokens, with room for the guesses of one more round.
    logprobs: Float[Array, "B M"]
    done: Bool[Array, " B"]
    cache: KVCache
    draft_cache: KVCache | None
    round: Int[Array, ""]
    rounds: Int[Array, " B"]  # as in `Speculation`, like the next two
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]


class _Guess(NamedTuple):
    """What may come next."""

    ids: Int[Array, "B S"]  # the text, with the guesses written behind it
    tokens: Int[Array, "B D"]  # the guesses
    n_guessed: Int[Array, " B"]
    # The distributions that they were drawn from; None where nothing is drawn.
    probs: Float[Array, "B D V"] | None
    cache: KVCache | None  # the draft model's, if there is one


class _Verdict(NamedTuple):
    """What comes next: guesses that hold, and one token of the model's own."""

    tokens: Int[Array, "B E"]  # E = D + 1
    n_accepted: Int[Array, " B"]  # so many of the tokens are guesses, the next is the model's own
    logprobs: Float[Array, "B E"]
    cache: KVCache


def speculate(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None = None,
    key: Keys | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    draft_params: Params | None = None,
    draft_config: GPT2Config | None = None,
    num_draft_tokens: int = 5,
    max_matching_ngram_size: int = 2,
    sampler: Any = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    tap: Tap | None = None,
) -> Speculation:
    """Continues prompts as `generate` does, several tokens to a pass. Compiles itself.

    Greedy texts equal `generate`'s up to the rounding of differently shaped products, which can
    decide between equal logits. Drawn texts have the same distribution, but differ for the same
    key. Arguments that are not named here are those of `generate`. Under `jax.jit`, `jax.vmap` and
    `jax.export` it is a part of the caller's program, as `generate` is, without checks of values.

    Args:
      draft_params: the parameters of a smaller model of the same vocabulary; without one, guesses
        come from the text.
      draft_config: its configuration.
      num_draft_tokens: `D`, guesses to a pass.
      max_matching_ngram_size: without a draft model, how many of the last tokens are looked up,
        from the start of the text, at first; then one less, down to 1.
      tap: as for `generate`, of the model alone: what guesses goes on as it is, and what the tap
        makes of the model decides.

    Raises:
      FloatingPointError: as `generate`.
      ValueError: as `generate`, or the draft model does not fit, a number is less than 1, or the
        sampler has no transform, or one that carries a state, of which a refused guess would have
        to be taken back.

    Examples:
      >>> wishes = {"config": config, "max_new_tokens": 3, "stop_ids": ()}
      >>> found = gpt2_jax.speculate(params, ids, **wishes, num_draft_tokens=2)
      >>> bool((found.ids == gpt2_jax.generate(params, ids, **wishes).ids).all())
      True
    """
    if (draft_params is None) != (draft_config is None):
        raise ValueError(
            "`draft_params` and `draft_config` belong together: one of them is missing."
        )
    if draft_config is not None and draft_config.vocab_size != config.vocab_size:
        raise ValueError(
            f"The draft model must have the model's {config.vocab_size} tokens,"
            f" it has {draft_config.vocab_size}."
        )
    if draft_config is not None and draft_config.n_positions < config.n_positions:
        raise ValueError(
            f"The draft model must have the model's {config.n_positions} positions,"
            f" it has {draft_config.n_positions}."
        )
    prompts = read_prompts(ids, lengths, padding_side, config=config)
    sizes = _Sizes(
        max_new_tokens=as_count("max_new_tokens", max_new_tokens),
        num_draft_tokens=as_count("num_draft_tokens", num_draft_tokens),
        max_matching_ngram_size=as_count("max_matching_ngram_size", max_matching_ngram_size),
    )
    if sizes.num_draft_tokens > config.n_positions:  # room is made for them all
        most = f"{config.n_positions} (`n_positions`)"
        got = sizes.num_draft_tokens
        raise ValueError(f"`num_draft_tokens` must be at most {most}, got {got}.")
    check_room(prompts, sizes.max_new_tokens, "error", config=config)
    endings = read_endings(stop_ids, pad_id, config=config)
    request = make_request(prompts, endings, key, sampler, tap=tap)
    transform_of(request.rules.sampler)  # raises where there is none
    check_stateless(request.rules.sampler, "Speculation")
    draft = None
    if draft_params is not None and draft_config is not None:
        draft = _Draft(draft_params, draft_config)
    if is_traced((params, draft, request)):
        return _in_one(params, draft, request, config=config, sizes=sizes)
    made = _in_parts(params, draft, request, prompts.longest, config=config, sizes=sizes)
    check_numbers(made.logprobs, config=config)
    return made


# Programs.


@partial(jax.jit, static_argnames="sizes")
@automatic
def _in_one(
    params: Params, draft: _Draft | None, request: Request, *, config: GPT2Config, sizes: _Sizes
) -> Speculation:
    """Runs rounds until every row has ended; the cache has room for all from the start."""
    slots = _most_slots(request, sizes)
    state = _begin(params, draft, request, config=config, sizes=sizes, cache_len=slots)
    round = partial(_round, params, draft, request, config=config, sizes=sizes)
    state = jax.lax.while_loop(lambda state: ~state.done.all(), round, state)
    return _collect(state, request, sizes=sizes)


def _in_parts(
    params: Params,
    draft: _Draft | None,
    request: Request,
    longest: int,
    *,
    config: GPT2Config,
    sizes: _Sizes,
) -> Speculation:
    """Runs rounds until every row has ended, with a cache that grows with the texts."""

    def call(program, state):
        return program(params, draft, request, state, config=config, sizes=sizes)

    # A round reads the last token and the guesses.
    step = sizes.num_draft_tokens + 1
    most = _most_slots(request, sizes)
    # No fewer than the columns of the prompts, whose padding is written as well.
    slots = max(request.ids.shape[1], cache_slots(longest + step, most))
    state = _begin(params, draft, request, config=config, sizes=sizes, cache_len=slots)
    state = to_the_end(_rounds, call, state, used=longest, step=step, most=most)
    return _collect(state, request, sizes=sizes)


def _most_slots(request: Request, sizes: _Sizes) -> int:
    """Returns how many slots texts take at most: the last round may guess beyond the end."""
    return request.ids.shape[1] + sizes.max_new_tokens + sizes.num_draft_tokens


@partial(jax.jit, static_argnames="sizes", donate_argnames="state")
@automatic
def _rounds(
    params: Params,
    draft: _Draft | None,
    request: Request,
    state: _State,
    *,
    config: GPT2Config,
    sizes: _Sizes,
) -> Progress:
    """Runs some rounds, as far as there is room in the cache."""
    first = state.round

    def used(state):
        # A row's last token is chosen, but not read. What has ended is read anew, and nobody looks.
        return jnp.where(state.done, 0, state.count - 1).max(initial=0)

    def goes_on(state):
        has_room = used(state) + sizes.num_draft_tokens + 1 <= state.cache.slots
        return ~state.done.all() & has_room & (state.round < first + STEPS)

    round = partial(_round, params, draft, request, config=config, sizes=sizes)
    state = jax.lax.while_loop(goes_on, round, state)
    # On all devices of a mesh: the host looks at them.
    return Progress(state, constrain(state.done.all()), constrain(used(state)))


def _round(
    params: Params,
    draft: _Draft | None,
    request: Request,
    state: _State,
    *,
    config: GPT2Config,
    sizes: _Sizes,
) -> _State:
    """Guesses, verifies and emits."""
    keys = fold_rows(request.rules.keys, state.round)
    verify = partial(_verify, params, state, keys=keys, request=request, config=config)
    if draft is not None:
        guess = _guess_by_model(state, keys, draft, request, sizes)
        return _emit(state, guess, verify(guess), request, sizes)
    guess = _guess_by_lookup(state, request, sizes, config.vocab_size)
    # Without any guess it is a step of plain decoding, at a half of the cost.
    verdict = jax.lax.cond(
        ((guess.n_guessed > 0) & ~state.done).any(),
        verify,
        lambda guess: _filled(verify(_none_of(guess)), sizes),
        guess,
    )
    return _emit(state, guess, verdict, request, sizes)


@partial(jax.jit, static_argnames=("sizes", "cache_len"))
@automatic
def _begin(
    params: Params,
    draft: _Draft | None,
    request: Request,
    *,
    config: GPT2Config,
    sizes: _Sizes,
    cache_len: int,
) -> _State:
    """Reads the prompts and chooses the first token of each row."""
    n_rows = request.ids.shape[0]
    lengths = request.lengths
    tap = request.rules.tap or no_tap
    logits, cache = prefill(
        params, request.ids, lengths, config=config, cache_len=cache_len, tap=tap
    )
    draft_cache = None
    if draft is not None:
        _, draft_cache = prefill(
            draft.params, request.ids, lengths, config=draft.config, cache_len=cache_len
        )
        draft_cache = kv_cache.keep_first(draft_cache, lengths)

    # From here on a slot is a position, so that each row can go back behind a refused guess.
    room = sizes.max_new_tokens + sizes.num_draft_tokens
    ids = jnp.pad(request.ids, ((0, 0), (0, room)))
    scores = _scores(logits, ids, lengths, request)
    if request.rules.sampler.draws:
        # Round 0: those of the loop count from 1, so that no key serves twice.
        first = _draw(fold_rows(request.rules.keys, 0), 0, _softmax(scores))
    else:
        first = argmax(scores)
    logprob = token_logprobs_of(logits, first).astype(jnp.float32)[:, None]
    ones = jnp.ones(n_rows, jnp.int32)
    return _State(
        ids=kv_cache.put(ids, first[:, None], lengths),
        count=lengths + 1,
        n_generated=ones,
        logprobs=jnp.pad(logprob, ((0, 0), (0, room))),
        done=jnp.isin(first, request.rules.stop_ids) | (sizes.max_new_tokens == 1),
        cache=kv_cache.keep_first(cache, lengths),
        draft_cache=draft_cache,
        round=jnp.int32(1),
        rounds=ones,
        drafted=jnp.zeros(n_rows, jnp.int32),
        accepted=jnp.zeros(n_rows, jnp.int32),
    )


def _guess_by_model(
    state: _State, keys: Any, draft: _Draft, request: Request, sizes: _Sizes
) -> _Guess:
    """Returns guesses of the draft model, and the distributions that they are drawn from."""
    count = state.count
    n_guesses = sizes.num_draft_tokens
    draws = request.rules.sampler.draws
    assert state.draft_cache is not None

    def step(carry, number):
        """Reads a token, and guesses the one behind it."""
        ids, token, cache = carry
        logits, cache = extend(draft.params, token[:, None], cache, config=draft.config)
        scores = _scores(logits[:, 0], ids, count + number, request)
        probs = _softmax(scores) if draws else None
        token = argmax(scores) if probs is None else _draw(keys, DRAW_GUESS + number, probs)
        return (kv_cache.put(ids, token[:, None], count + number), token, cache), (token, probs)

    # The draft model has read all but the last token, or its own guesses in the place of some.
    cache = kv_cache.keep_first(state.draft_cache, count - 1)
    numbers = jnp.arange(n_guesses, dtype=jnp.int32)
    start = (state.ids, _last_token(state), cache)
    (ids, token, cache), (tokens, probs) = jax.lax.scan(step, start, numbers)
    # The last guess is read as well: if all of them hold, the next round begins behind it.
    _, cache = read_on(draft.params, token[:, None], cache, 1, config=draft.config)
    return _Guess(
        ids=ids,
        tokens=tokens.T,
        n_guessed=jnp.full(len(ids), n_guesses, jnp.int32),
        probs=None if probs is None else probs.swapaxes(0, 1),
        cache=cache,
    )


def _guess_by_lookup(state: _State, request: Request, sizes: _Sizes, vocab_size: int) -> _Guess:
    """Returns what followed when the last tokens stood in the text before; if never, no guess."""
    n_rows, slots = state.ids.shape
    count = state.count[:, None]  # [B, 1]
    starts = jnp.arange(slots)[None]  # where an n-gram may begin
    begins = jnp.full(n_rows, slots)  # where a guess begins; `slots` for none
    for size in range(1, sizes.max_matching_ngram_size + 1):
        matches = (starts + size < count) & (count >= size)
        for i in range(size):
            token = jnp.take_along_axis(state.ids, jnp.maximum(count - size + i, 0), axis=1)
            # `roll` wraps around at the end, where no n-gram may begin.
            matches &= jnp.roll(state.ids, -i, axis=1) == token
        # A longer match takes a shorter one's place.
        begins = jnp.where(matches.any(axis=1), jnp.argmax(matches, axis=1) + size, begins)
    offsets = jnp.arange(sizes.num_draft_tokens)[None]
    # What is clipped, or not written yet, is no guess: `n_guessed` leaves it out.
    tokens = jnp.take_along_axis(state.ids, begins[:, None] + offsets, axis=1, mode="clip")
    n_guessed = jnp.clip(state.count - begins, 0, sizes.num_draft_tokens).astype(jnp.int32)
    draws = request.rules.sampler.draws
    return _Guess(
        ids=kv_cache.put(state.ids, tokens, state.count),
        tokens=tokens,
        n_guessed=n_guessed,
        # What is looked up is certain.
        probs=jax.nn.one_hot(tokens, vocab_size) if draws else None,
        cache=None,
    )


def _none_of(guess: _Guess) -> _Guess:
    """Returns a guess of no token."""
    return guess._replace(
        tokens=guess.tokens[:, :0],
        n_guessed=jnp.zeros_like(guess.n_guessed),
        probs=None if guess.probs is None else guess.probs[:, :0],
    )


def _filled(verdict: _Verdict, sizes: _Sizes) -> _Verdict:
    """Returns what comes of no guess in the form of that of some."""
    behind = ((0, 0), (0, sizes.num_draft_tokens))
    return verdict._replace(
        tokens=jnp.pad(verdict.tokens, behind), logprobs=jnp.pad(verdict.logprobs, behind)
    )


def _verify(
    params: Params,
    state: _State,
    guess: _Guess,
    *,
    keys: Any,
    request: Request,
    config: GPT2Config,
) -> _Verdict:
    """Reads the last token and the guesses in one pass; returns what the model makes of them."""
    n_rows, n_guesses = guess.tokens.shape
    tokens = jnp.concatenate([_last_token(state)[:, None], guess.tokens], axis=1)  # [B, E]
    cache = kv_cache.keep_first(state.cache, state.count - 1)
    tap = request.rules.tap or no_tap
    logits, cache = extend(params, tokens, cache, config=config, tap=tap)  # [B, E, V]

    # Each guess is judged as if it were the last token of a text of its own.
    counts = state.count[:, None] + jnp.arange(n_guesses + 1)[None]
    scores = _scores(
        logits.reshape(-1, logits.shape[-1]),
        jnp.repeat(guess.ids, n_guesses + 1, axis=0),
        counts.ravel(),
        request,
    )
    scores = scores.reshape(n_rows, n_guesses + 1, -1)
    judge = _judge_choices if guess.probs is None else partial(_judge_draws, keys)
    chosen, n_accepted = judge(guess, scores)
    # Of a float64 model, too, as in `generate`.
    logprobs = token_logprobs_of(logits, chosen).astype(jnp.float32)
    return _Verdict(chosen, n_accepted, logprobs, cache)


def _judge_choices(
    guess: _Guess, scores: Float[Array, "B E V"]
) -> tuple[Int[Array, "B E"], Int[Array, " B"]]:
    """Returns the model's choices, and how many guesses are the same, from the first on."""
    chosen = argmax(scores)
    return chosen, _count_from_first(guess, guess.tokens == chosen[:, :-1])


def _judge_draws(
    keys: Any, guess: _Guess, scores: Float[Array, "B E V"]
) -> tuple[Int[Array, "B E"], Int[Array, " B"]]:
    """Returns guesses with a token of the model's own behind those that hold, and their number.

    Each holds with the probability `min(1, wanted / guessed)`.
    """
    assert guess.probs is not None
    guessed = guess.tokens
    n_guesses = guessed.shape[1]
    wanted = _softmax(scores)
    p = jnp.take_along_axis(wanted[:, :n_guesses], guessed[..., None], axis=-1)[..., 0]
    q = jnp.take_along_axis(guess.probs, guessed[..., None], axis=-1)[..., 0]
    accept_keys = fold_rows(keys, DRAW_ACCEPT)
    u = jax.vmap(lambda key: jax.random.uniform(key, (n_guesses,)))(accept_keys)
    n_accepted = _count_from_first(guess, u * q < p)  # u < p / q, without dividing by 0
    own = _own_token(keys, guess, wanted, n_accepted)
    is_own = jnp.arange(n_guesses + 1)[None] == n_accepted[:, None]
    chosen = jnp.where(is_own, own[:, None], jnp.pad(guessed, ((0, 0), (0, 1))))
    return chosen, n_accepted


def _count_from_first(guess: _Guess, holds: Bool[Array, "B D"]) -> Int[Array, " B"]:
    """Returns how many guesses hold before the first that does not, or is none."""
    exists = jnp.arange(holds.shape[1])[None] < guess.n_guessed[:, None]
    # The product is 1 up to the first refusal, and 0 from there on.
    return jnp.cumprod(exists & holds, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)


def _own_token(
    keys: Any,
    guess: _Guess,
    wanted: Float[Array, "B E V"],
    n_accepted: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Returns the model's own token, behind the guesses that hold.

    After a refusal it is a draw from what `wanted` has more than was guessed; behind guesses that
    all hold nothing was guessed, and it is a plain draw.
    """
    assert guess.probs is not None
    at = n_accepted[:, None, None]
    whole = jnp.take_along_axis(wanted, at, axis=1)[:, 0]
    guessed = jnp.pad(guess.probs, ((0, 0), (0, 1), (0, 0)))  # [B, E, V]
    guessed = jnp.take_along_axis(guessed, at, axis=1)[:, 0]
    is_refusal = (n_accepted < guess.n_guessed)[:, None]
    residual = jnp.maximum(whole - jnp.where(is_refusal, guessed, 0.0), 0.0)
    something_left = residual.sum(axis=-1, keepdims=True) > 0
    # Where nothing is left, both distributions are equal up to rounding.
    return _draw(keys, DRAW_OWN, jnp.where(something_left, residual, whole))


def _emit(
    state: _State, guess: _Guess, verdict: _Verdict, request: Request, sizes: _Sizes
) -> _State:
    """Adds a round's tokens to each row that is not done, up to a stop id or the last one."""
    slots = state.ids.shape[1]
    n_tokens = verdict.n_accepted + 1
    room = sizes.max_new_tokens - state.n_generated
    is_token = jnp.arange(verdict.tokens.shape[1])[None] < n_tokens[:, None]
    stops = jnp.isin(verdict.tokens, request.rules.stop_ids) & is_token
    until_stop = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1) + 1, slots)
    n_new = jnp.minimum(jnp.minimum(n_tokens, until_stop), room)
    n_new = jnp.where(state.done, 0, n_new).astype(jnp.int32)
    done = state.done | (n_new == room) | (until_stop <= n_new)

    is_live = (~state.done).astype(jnp.int32)
    written = kv_cache.put(state.ids, verdict.tokens, state.count)
    return _State(
        ids=jnp.where(state.done[:, None], state.ids, written),
        count=state.count + n_new,
        n_generated=state.n_generated + n_new,
        # What is written behind the new tokens is written over by the next round.
        logprobs=kv_cache.put(state.logprobs, verdict.logprobs, state.n_generated),
        done=done,
        cache=verdict.cache,
        draft_cache=guess.cache,
        round=state.round + 1,
        rounds=state.rounds + is_live,
        drafted=state.drafted + is_live * guess.n_guessed,
        accepted=state.accepted + jnp.minimum(is_live * verdict.n_accepted, n_new),
    )


@partial(jax.jit, static_argnames="sizes")
@automatic
def _collect(state: _State, request: Request, *, sizes: _Sizes) -> Speculation:
    """Returns what was generated."""
    numbers = jnp.arange(sizes.max_new_tokens)[None]
    is_generated = numbers < state.n_generated[:, None]
    new = jnp.take_along_axis(state.ids, request.lengths[:, None] + numbers, axis=1)
    logprobs = state.logprobs[:, : sizes.max_new_tokens]
    made = Speculation(
        ids=jnp.where(is_generated, new, request.rules.pad_id),
        lengths=state.n_generated,
        logprobs=jnp.where(is_generated, logprobs, 0.0),
        rounds=state.rounds,
        drafted=state.drafted,
        accepted=state.accepted,
    )
    # On all devices of a mesh: the host looks at them.
    return jax.tree.map(constrain, made)


def _last_token(state: _State) -> Int[Array, " B"]:
    """Returns the last token of each row, which the model has not read."""
    return jnp.take_along_axis(state.ids, state.count[:, None] - 1, axis=1)[:, 0]


def _scores(
    logits: Float[Array, "R V"], ids: Int[Array, "R S"], count: Int[Array, " R"], request: Request
) -> Float[Array, "R V"]:
    """Returns what the token after the first `count` of `ids` is chosen by.

    Each prompt may stand in several rows, one after the other.
    """
    n_rows, slots = ids.shape
    copies = n_rows // request.lengths.shape[0]
    n_generated = count - jnp.repeat(request.lengths, copies)
    valid = jnp.arange(slots)[None] < count[:, None]
    history = History(ids, valid, n_generated)
    return transform_of(request.rules.sampler)(logits, history)


def _softmax(scores: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Returns probabilities in float32."""
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1)


def _draw(keys: Any, number: int | Int[Array, ""], probs: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Draws with the `number`-th key of each row."""
    return Categorical()(fold_rows(keys, number), jnp.log(probs))
