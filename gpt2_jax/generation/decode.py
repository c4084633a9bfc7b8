"""The compiled decoding loop, which everything that decodes step by step uses.

A `State` is everything that a batch of rows needs to go on. `begin` makes one from prompts, `read`
and `choose` from a cache that is there already, `advance` takes it further by many tokens in one
program, and `pieces` drives these from the host, with a cache that grows as the text does. Knows
checked requests alone.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, cache_slots
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.growing import AHEAD, Ahead
from gpt2_jax.generation.request import Past, Request, Rules, fold_rows, for_copies
from gpt2_jax.generation.sampling import pick
from gpt2_jax.generation.transforms import History, select_state, update_state
from gpt2_jax.memory import give_back_after_compiling
from gpt2_jax.model import decode_step, prefill, read_on, token_logprobs_of, unembed
from gpt2_jax.modules import Params, Tap, no_tap, placed, wants
from gpt2_jax.sharding import automatic, constrain
from gpt2_jax.summary import spec_of_fields


class Generation(NamedTuple):
    """Generated tokens, without the prompts.

    Examples:
      >>> out = gpt2_jax.generate(params, ids, config=config, max_new_tokens=3, stop_ids=())
      >>> out._fields
      ('ids', 'lengths', 'logprobs', 'policy_logprobs', 'outputs')
      >>> out.policy_logprobs.tolist()  # a greedy choice is certain
      [[0.0, 0.0, 0.0]]
    """

    ids: Int[Array, "R N"]  # after a row's stop id, `pad_id`
    lengths: Int[Array, " R"]  # tokens made by each row, its stop id included
    # Of each token, in nats, and 0 after the stop: under the model's own distribution, before any
    # transform; and under the one that it was drawn from, after all of them. That of a greedy
    # choice is certain, 0; of what a plain function chooses nobody knows it, NaN.
    logprobs: Float[Array, "R N"]
    policy_logprobs: Float[Array, "R N"]
    # What `outputs` asked for, by name: `[R, N, ...]`, of each token what it was chosen by.
    outputs: dict[str, Array]

    def __repr__(self) -> str:
        return spec_of_fields(self)


class State(NamedTuple):
    """What rows need to go on: `token` is chosen and handed out, but not yet read by the model."""

    token: Int[Array, " R"]
    done: Bool[Array, " R"]
    ids: Int[Array, "R S"]  # every token at its slot
    step: Int[Array, ""]  # tokens chosen so far
    cache: KVCache
    memory: Any  # the state of a transform that carries one, which has not read `token` either


class Start(NamedTuple):
    """Where texts stand before their next token is chosen."""

    step: int | Int[Array, ""] = 0  # tokens chosen so far
    # One bool at the start of a text; one for each row where a full one goes on.
    done: Bool[ArrayLike, "..."] = False


BEGINNING = Start()


class Plan(NamedTuple):
    """How much is to be made, and how: whole numbers of the host."""

    max_new_tokens: int
    chunk: int  # tokens to a piece
    num_return_sequences: int
    keep: int  # how many of its last tokens a full row goes on from, if it slides


# Activations of the tokens that the next ones are chosen by.


class Recorder:
    """A tap that keeps the last token's activations at some sites, after another tap changed them.

    Its dict grows while the model is traced: it serves one pass.
    """

    def __init__(self, tap: Tap, sites: tuple[str, ...], last: Callable[[Array], Array]):
        self.tap = tap
        self.sites = sites
        self.last = last  # [B, T, ...] -> [B, ...]
        self.acts: dict[str, Array] = {}

    def __call__(self, site: str, x: Array) -> Array:
        if wants(self.tap, site):
            x = self.tap(site, x)
        if site in self.sites:
            # Of the last token alone already, as the head is computed for no other.
            self.acts[site] = x if site == "logits" else self.last(x)
        return x

    def wants(self, site: str) -> bool:
        """Returns whether the site is kept, or the other tap wants it."""
        return site in self.sites or wants(self.tap, site)

    def placed(self, positions: Int[Array, "#B T"]) -> "Recorder":
        """Returns the tap for a pass over tokens at these positions, with the same dict."""
        at_positions = Recorder(placed(self.tap, positions), self.sites, self.last)
        at_positions.acts = self.acts
        return at_positions


def _tap_of(rules: Rules, last: Callable[[Array], Array]) -> Any:
    """Returns the tap of a pass, and the dict in which it keeps what is asked for."""
    # In the rules None stands for no tap: a pytree without leaves, as the function is not.
    tap = no_tap if rules.tap is None else rules.tap
    if not rules.outputs:
        return tap, {}
    recorder = Recorder(tap, rules.outputs, last)
    return recorder, recorder.acts


def _at(x: Array, places: Int[Array, " B"]) -> Array:
    """Returns what stands at one token of each row, `[B, T, ...] -> [B, ...]`."""
    aligned = places.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(x, aligned, axis=1)[:, 0]


# Programs.


@partial(jax.jit, static_argnames=("cache_len", "num_return_sequences"))
@automatic
def begin(
    params: Params,
    request: Request,
    start: Start,
    *,
    config: GPT2Config,
    cache_len: int,
    num_return_sequences: int,
) -> tuple[State, Generation]:
    """Reads the prompts and chooses the next token of each row that is not done."""
    ids = request.ids
    lengths = request.lengths
    tap, acts = _tap_of(request.rules, lambda x: _at(x, lengths - 1))
    logits, cache = prefill(params, ids, lengths, config=config, cache_len=cache_len, tap=tap)
    ids = jnp.pad(ids, ((0, 0), (0, cache_len - ids.shape[1])))
    read = _Read(ids, logits, cache, acts, request.memory)
    return _choose_first(read, request.rules, start, num_return_sequences, config=config)


# Nothing is donated: a caller may go on from the same cache again.
@partial(jax.jit, static_argnames="num_return_sequences")
@automatic
def resume(
    params: Params,
    past: Past,
    rules: Rules,
    memory: Any,
    *,
    config: GPT2Config,
    num_return_sequences: int,
) -> tuple[State, Generation]:
    """Reads what a cache lacks of some texts, and chooses the first token after each."""
    unread = jnp.asarray(past.ids)
    lengths = jnp.asarray(past.lengths)
    tap, acts = _tap_of(rules, lambda x: _at(x, lengths - 1))
    hidden, cache = read_on(params, unread, past.cache, lengths, config=config, tap=tap)
    # The head is the largest product of all: it is computed for the last tokens alone.
    last = _at(hidden, lengths - 1)
    tap = placed(tap, (past.cache.lengths + lengths - 1)[:, None])
    logits = tap("logits", unembed(params, last, config=config))
    read = _Read(jnp.asarray(past.at_slots), logits, cache, acts, memory)
    return _choose_first(read, rules, BEGINNING, num_return_sequences, config=config)


class _Read(NamedTuple):
    """What reading the prompts has left: a row for each."""

    ids: Int[Array, "B S"]
    logits: Float[Array, "B V"]
    cache: KVCache
    acts: dict[str, Array]
    memory: Any


def _choose_first(
    read: _Read, rules: Rules, start: Start, num_return_sequences: int, *, config: GPT2Config
) -> tuple[State, Generation]:
    """Chooses the token after each prompt, `num_return_sequences` times."""
    # A prompt is read once for all of its sequences.
    if num_return_sequences > 1:
        read = _copies(read, rules, num_return_sequences)
    n_rows = read.ids.shape[0]
    state = State(
        token=jnp.zeros(n_rows, jnp.int32),
        done=jnp.broadcast_to(jnp.asarray(start.done), (n_rows,)),
        ids=read.ids,
        step=jnp.int32(start.step),
        cache=read.cache,
        memory=read.memory,
    )
    return choose(read.logits, state, rules, read.acts, config=config)


def _copies(read: _Read, rules: Rules, n: int) -> _Read:
    """Returns each row `n` times."""
    rows = jnp.repeat(jnp.arange(read.ids.shape[0]), n)
    return _Read(
        ids=read.ids[rows],
        logits=read.logits[rows],
        cache=kv_cache.select(read.cache, rows),
        acts={site: x[rows] for site, x in read.acts.items()},
        memory=select_state(rules.sampler.transform, read.memory, rows),
    )


# Donated, as in `choose` and `advance`: the cache is large, and one of it is enough.
@partial(jax.jit, donate_argnames="cache")
@automatic
def read(
    params: Params,
    ids: Int[Array, "1 T"],
    cache: KVCache,
    start: Int[Array, ""],
    count: Int[Array, ""],
    *,
    config: GPT2Config,
) -> tuple[Float[Array, "1 V"], KVCache]:
    """Reads `count` tokens onto the first `start` tokens of a cache; returns the logits after them.

    The slot of each of the cache's tokens must be its position. What is behind `count` is padding.
    """
    known = kv_cache.keep_first(cache, start)
    hidden, cache = read_on(params, ids, known, ids.shape[1], config=config)
    # At a traced place: a block that is half empty runs the program of a full one.
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
    logits = unembed(params, last, config=config)
    return logits, kv_cache.keep_first(cache, start + count)


# Inlined where another program calls it: its body is the end of each of their steps.
@partial(jax.jit, donate_argnames="state", inline=True)
@automatic
def choose(
    logits: Float[Array, "R V"],
    state: State,
    rules: Rules,
    acts: dict[str, Array],
    *,
    config: GPT2Config,
) -> tuple[State, Generation]:
    """Chooses the token after the `ids` that the cache holds, of each row that is not `done`.

    `state.token` has been read by now; `acts` are what the last pass kept.
    """
    cache = state.cache
    done = state.done
    history = History(state.ids, cache.valid, state.step, state.memory)
    keys = fold_rows(rules.keys, state.step)
    token, scores = pick(rules.sampler, keys, logits, history)
    # Rows that have ended are computed all the same, as the batch keeps its shape.
    token = jnp.where(done, rules.pad_id, token)
    # Of a float64 model, too: the loop collects them in float32.
    logprob = token_logprobs_of(logits, token).astype(jnp.float32)
    policy_logprob = _policy_logprobs(rules.sampler, scores, token)
    made = Generation(
        ids=token[:, None],
        lengths=(~done).astype(jnp.int32),
        logprobs=jnp.where(done, 0.0, logprob)[:, None],
        policy_logprobs=jnp.where(done, 0.0, policy_logprob)[:, None],
        outputs=_outputs(rules.outputs, acts | {"scores": scores}, done),
    )
    # On a mesh, on all devices: the host of each process looks at them.
    made = jax.tree.map(constrain, made)
    # A row ends at a stop id, or as no position is left to read the token at.
    ends = jnp.isin(token, rules.stop_ids) | (cache.lengths + 1 >= config.n_positions)
    return state._replace(token=token, done=constrain(done | ends), step=state.step + 1), made


def _policy_logprobs(
    sampler: Any, scores: Float[Array, "R V"] | None, token: Int[Array, " R"]
) -> Float[Array, " R"]:
    """Returns the log-probability of each token in the distribution that it was drawn from."""
    if scores is None:
        return jnp.full(token.shape, jnp.nan, jnp.float32)
    if not sampler.draws:
        return jnp.zeros(token.shape, jnp.float32)
    return token_logprobs_of(scores, token).astype(jnp.float32)


def _outputs(
    names: tuple[str, ...], found: dict[str, Any], done: Bool[Array, " R"]
) -> dict[str, Array]:
    """Returns what is asked for, `[R, 1, ...]`: 0 for rows that have ended."""
    outputs = {}
    for name in names:
        x = found[name]
        ended = done.reshape(-1, *[1] * (x.ndim - 1))
        outputs[name] = jnp.where(ended, jnp.zeros_like(x), x)[:, None]
    return outputs


def each_token(function: Callable[..., Any], *made: Generation, lengths: Any) -> Generation:
    """Returns a function of what there is for each token, `[R, N, ...]`, and some lengths."""
    # None is no leaf: `lengths` are one for each row.
    parts = [part._replace(lengths=None) for part in made]  # pyright: ignore[reportArgumentType]
    return jax.tree.map(function, *parts)._replace(lengths=lengths)


@partial(jax.jit, static_argnames="chunk", donate_argnames="state")
@automatic
def advance(
    params: Params,
    state: State,
    rules: Rules,
    steps: Int[Array, ""],
    *,
    config: GPT2Config,
    chunk: int,
) -> tuple[State, Generation]:
    """Chooses up to `steps` more tokens of each row: each time a decode step, then the sampler.

    Stops as soon as every row has ended. The cache must have as many free slots. Behind what was
    made is padding.
    """
    return _advance(params, state, rules, steps, config=config, chunk=chunk)


def _advance(
    params: Params,
    state: State,
    rules: Rules,
    steps: Int[Array, ""],
    *,
    config: GPT2Config,
    chunk: int,
) -> tuple[State, Generation]:
    """Returns what `advance` does, for programs of which it is a part."""
    blank = _blank(params, state, rules, config=config, chunk=chunk)

    # A `while`, not a `scan`: it ends with the rows, and one program serves any number of steps.
    def unfinished(carry):
        n_generated, state, _ = carry
        return (n_generated < steps) & ~state.done.all()

    def step(carry):
        n_generated, state, out = carry
        state, made = _step(params, state, rules, config=config)
        out = each_token(
            lambda old, new: kv_cache.put(old, new, n_generated),
            out,
            made,
            lengths=out.lengths + made.lengths,
        )
        return n_generated + 1, state, out

    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, blank))
    return state, out


def _blank(
    params: Params, state: State, rules: Rules, *, config: GPT2Config, chunk: int
) -> Generation:
    """Returns what `chunk` steps fill."""
    n_rows = state.token.shape[0]
    outputs = {}
    # Traced once more, for what their shapes are, only where somebody asks.
    if rules.outputs:
        _, made = jax.eval_shape(partial(_step, config=config), params, state, rules)
        for name, x in made.outputs.items():
            outputs[name] = jnp.zeros((n_rows, chunk, *x.shape[2:]), x.dtype)
    return Generation(
        ids=jnp.full((n_rows, chunk), rules.pad_id),
        lengths=jnp.zeros(n_rows, jnp.int32),
        logprobs=jnp.zeros((n_rows, chunk), jnp.float32),
        policy_logprobs=jnp.zeros((n_rows, chunk), jnp.float32),
        outputs=outputs,
    )


def _step(
    params: Params, state: State, rules: Rules, *, config: GPT2Config
) -> tuple[State, Generation]:
    """Reads the last token of each row and chooses the next."""
    ids = kv_cache.put(state.ids, state.token[:, None], state.cache.slot)
    # What has ended may have no position left to be read at: its token goes to position 0, and
    # nobody looks.
    lengths = jnp.where(state.done, 0, state.cache.lengths)
    cache = state.cache._replace(lengths=lengths)
    tap, acts = _tap_of(rules, lambda x: x[:, 0])
    logits, cache = decode_step(params, state.token, cache, config=config, tap=tap)
    memory = update_state(rules.sampler.transform, state.memory, state.token)
    state = state._replace(ids=ids, cache=cache, memory=memory)
    return choose(logits, state, rules, acts, config=config)


_lengthen = jax.jit(kv_cache.lengthen, static_argnums=1)


@partial(jax.jit, static_argnames="slots")
@automatic
def grow(state: State, *, slots: int) -> State:
    """Returns the state with room for `slots` tokens."""
    n_new = slots - state.ids.shape[1]
    return state._replace(
        ids=jnp.pad(state.ids, ((0, 0), (0, n_new))),
        cache=kv_cache.lengthen(state.cache, slots),
    )


# By `_advance`, which gives nothing away: within another's program nothing can be.
@partial(jax.jit, static_argnames=("plan", "longest"))
def in_one(
    params: Params, request: Request, plan: Plan, *, config: GPT2Config, longest: int
) -> Generation:
    """Returns whole texts of prompts of up to `longest` tokens, in one program that can be traced.

    The cache has room for all from the start.
    """
    most = longest + plan.max_new_tokens - 1
    slots = max(request.ids.shape[1], cache_slots(most, most))
    n = plan.num_return_sequences
    state, first = begin(
        params,
        request,
        BEGINNING,
        config=config,
        cache_len=slots,
        num_return_sequences=n,
    )
    chunk = plan.max_new_tokens - 1
    if chunk == 0:
        return first
    rules = for_copies(request.rules, n)
    _, rest = _advance(params, state, rules, jnp.int32(chunk), config=config, chunk=chunk)
    return each_token(
        lambda *parts: jnp.concatenate(parts, axis=1),
        first,
        rest,
        lengths=first.lengths + rest.lengths,
    )


# From the host.


def _with_slots(past: Past, slots: int) -> Past:
    """Returns a past whose cache, and whose tokens by slots, have room for `slots` tokens."""
    n_new = slots - past.at_slots.shape[1]
    cache = past.cache if slots == past.cache.slots else _lengthen(past.cache, slots)
    return past._replace(cache=cache, at_slots=np.pad(past.at_slots, ((0, 0), (0, n_new))))


def check_numbers(logprobs: Float[ArrayLike, "..."], *, config: GPT2Config) -> None:
    """Raises `FloatingPointError` for log-probabilities that are NaN.

    The largest of such logits is the first, so that a text of them is all "!". Traced ones are not
    looked at.
    """
    if isinstance(logprobs, Tracer):
        return
    if np.isnan(np.asarray(logprobs)).any():
        advice = "" if config.dtype in ("float32", "float64") else ": `load` them as float32"
        raise FloatingPointError(
            f"The model's logits are NaN. Its weights are no numbers, or overflow in"
            f" {config.dtype}{advice}."
        )


def compile_first(params: Params, request: Request, plan: Plan, *, config: GPT2Config) -> None:
    """Compiles the program of the first piece, which `pieces` then finds. Params may be shapes."""
    give_back_after_compiling()
    slots = _slots_for(request, plan, None)
    begin.lower(
        params,
        request,
        BEGINNING,
        config=config,
        cache_len=slots.at_first,
        num_return_sequences=plan.num_return_sequences,
    ).compile()


class _Slots(NamedTuple):
    """How many slots of a cache some texts need."""

    used: int  # when their prompts are read
    most: int  # when they are finished
    at_first: int  # that the cache begins with


def _slots_for(request: Request, plan: Plan, past: Past | None) -> _Slots:
    """Returns how large the cache of some texts is to be."""
    used = int(np.max(np.asarray(request.lengths), initial=1)) if past is None else past.used
    most = used + plan.max_new_tokens - 1  # the last token is never read
    # No fewer than the columns of the prompts: their padding is read, and so written, as well.
    columns = request.ids.shape[1] if past is None else past.at_slots.shape[1]
    return _Slots(used, most, max(columns, cache_slots(used, most)))


def pieces(
    params: Params,
    request: Request,
    plan: Plan,
    *,
    config: GPT2Config,
    start: Start = BEGINNING,
    past: Past | None = None,
) -> Iterator[Generation]:
    """Yields texts in pieces: the first token, then at most `plan.chunk` at a time.

    The context must have room. What a `past` knows of the prompts is not read again.
    """
    give_back_after_compiling()
    slots = _slots_for(request, plan, past)
    if past is None:
        state, made = begin(
            params,
            request,
            start,
            config=config,
            cache_len=slots.at_first,
            num_return_sequences=plan.num_return_sequences,
        )
    else:
        state, made = resume(
            params,
            _with_slots(past, slots.at_first),
            request.rules,
            request.memory,
            config=config,
            num_return_sequences=plan.num_return_sequences,
        )
    # Before the loop, and what it compiles: the first token waits for its own program alone.
    check_numbers(made.logprobs, config=config)
    yield made
    yield from _grown(
        params,
        state,
        for_copies(request.rules, plan.num_return_sequences),
        plan,
        config=config,
        used=slots.used,
        most=slots.most,
    )


def _grown(
    params: Params,
    state: State,
    rules: Rules,
    plan: Plan,
    *,
    config: GPT2Config,
    used: int,
    most: int,
) -> Iterator[Generation]:
    """Yields what follows the first token, with a cache of which `used` slots are used by now."""
    slots = state.cache.slots
    n_generated = 1
    with ThreadPoolExecutor(1) as pool:
        ahead = Ahead(pool)
        # To look at `done` waits for the device: once for each chunk, not for each token.
        while n_generated < plan.max_new_tokens and not np.all(state.done):
            if used == slots:
                slots = cache_slots(used, most)
                ahead.finish(slots)
                state = grow(state, slots=slots)
            steps = min(plan.chunk, plan.max_new_tokens - n_generated, slots - used)
            # So long before the end that the program is ready then, as far as one chunk reaches.
            n_free = slots - used
            if slots < most and n_free <= max(steps, AHEAD):
                next_size = cache_slots(slots, most)
                # Shapes alone: the larger cache itself is made when it is needed.
                larger = jax.eval_shape(partial(grow, slots=next_size), state)
                lower = partial(
                    advance.lower,
                    params,
                    larger,
                    rules,
                    jnp.int32(steps),
                    config=config,
                    chunk=plan.chunk,
                )
                ahead.start(next_size, lower)
            state, made = advance(
                params, state, rules, jnp.int32(steps), config=config, chunk=plan.chunk
            )
            n_generated += steps
            used += steps
            check_numbers(made.logprobs, config=config)
            yield _first_steps(made, steps)


def _first_steps(made: Generation, steps: int) -> Generation:
    """Returns the first tokens of a piece."""
    # Cut on the host: on the device, each size would compile a program of its own.
    return each_token(lambda x: jnp.asarray(np.asarray(x)[:, :steps]), made, lengths=made.lengths)
