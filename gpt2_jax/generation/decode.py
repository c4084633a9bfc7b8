"""The compiled decoding loop, which everything that decodes step by step uses.

A `State` is everything that a batch of rows needs to go on. `begin` makes one from prompts, `read`
and `choose` from a cache that is there already, `advance` takes it further by many tokens in one
program, and `pieces` drives these from the host, with a cache that grows as the text does. Knows
checked requests alone.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, cache_slots
from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.request import Past, Request, Rules, fold_rows
from gpt2_jax.generation.sampling import History
from gpt2_jax.model import decode_step, prefill, read_on, token_logprobs_of, unembed
from gpt2_jax.modules import Params, no_tap
from gpt2_jax.sharding import automatic, constrain

AHEAD = 128  # tokens before the end of a cache at which the program of the next one is compiled


class Generation(NamedTuple):
    """Generated tokens, without the prompts."""

    ids: Int[Array, "R N"]  # after a row's stop id, `pad_id`
    lengths: Int[Array, " R"]  # tokens made by each row, its stop id included
    logprobs: Float[Array, "R N"]  # the model's own, before any transform; 0 after the stop


class State(NamedTuple):
    """What rows need to go on: `token` is chosen and handed out, but not yet read by the model."""

    token: Int[Array, " R"]
    done: Bool[Array, " R"]
    ids: Int[Array, "R S"]  # every token at its slot
    step: Int[Array, ""]  # tokens chosen so far
    cache: KVCache


class Plan(NamedTuple):
    """How much is to be made, and how: whole numbers of the host."""

    max_new_tokens: int
    chunk: int  # tokens to a piece
    num_return_sequences: int
    keep: int  # how many of its last tokens a full row goes on from, if it slides


# Programs.


@partial(jax.jit, static_argnames=("cache_len", "num_return_sequences"))
@automatic
def begin(
    params: Params,
    request: Request,
    step: Int[Array, ""],
    done: Bool[ArrayLike, "..."],
    *,
    config: GPT2Config,
    cache_len: int,
    num_return_sequences: int,
) -> tuple[State, Generation]:
    """Reads the prompts and chooses the `step`-th token of each row that is not `done`."""
    # In the request None stands for no tap: a pytree without leaves, as the function is not.
    tap = request.rules.tap or no_tap
    ids = request.ids
    logits, cache = prefill(
        params, ids, request.lengths, config=config, cache_len=cache_len, tap=tap
    )
    ids = jnp.pad(ids, ((0, 0), (0, cache_len - ids.shape[1])))
    # A prompt is read once for all of its sequences.
    if num_return_sequences > 1:
        ids, logits, cache = _repeat(ids, logits, cache, num_return_sequences)
    # One bool at the start of a text; one for each row where a full one goes on.
    done = jnp.broadcast_to(jnp.asarray(done), (len(ids),))
    return choose(logits, cache, ids, request.rules, step, done, config=config)


# Nothing is donated: a caller may go on from the same cache again.
@partial(jax.jit, static_argnames="num_return_sequences")
@automatic
def resume(
    params: Params,
    past: Past,
    rules: Rules,
    *,
    config: GPT2Config,
    num_return_sequences: int,
) -> tuple[State, Generation]:
    """Reads what a cache lacks of some texts, and chooses the first token after each."""
    tap = rules.tap or no_tap
    unread = jnp.asarray(past.ids)
    lengths = jnp.asarray(past.lengths)
    hidden, cache = read_on(params, unread, past.cache, lengths, config=config, tap=tap)
    # The head is the largest product of all: it is computed for the last tokens alone.
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    logits = tap("logits", unembed(params, last, config=config))
    ids = jnp.asarray(past.at_slots)
    if num_return_sequences > 1:
        ids, logits, cache = _repeat(ids, logits, cache, num_return_sequences)
    done = jnp.zeros(len(ids), bool)
    return choose(logits, cache, ids, rules, jnp.int32(0), done, config=config)


def _repeat(
    ids: Int[Array, "B S"], logits: Float[Array, "B V"], cache: KVCache, n: int
) -> tuple[Int[Array, "R S"], Float[Array, "R V"], KVCache]:
    """Returns each row `n` times."""
    rows = jnp.repeat(jnp.arange(len(ids)), n)
    return ids[rows], logits[rows], kv_cache.select(cache, rows)


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
@partial(jax.jit, donate_argnames="cache", inline=True)
@automatic
def choose(
    logits: Float[Array, "R V"],
    cache: KVCache,
    ids: Int[Array, "R S"],
    rules: Rules,
    step: Int[Array, ""],
    done: Bool[Array, " R"],
    *,
    config: GPT2Config,
) -> tuple[State, Generation]:
    """Chooses the token after the `ids` that the cache holds, of each row that is not `done`."""
    history = History(ids, cache.valid, step)
    token = rules.sampler(fold_rows(rules.keys, step), logits, history)
    # Rows that have ended are computed all the same, as the batch keeps its shape.
    token = jnp.where(done, rules.pad_id, token)
    # Of a float64 model, too: the loop collects them in float32.
    logprob = token_logprobs_of(logits, token).astype(jnp.float32)
    made = Generation(
        ids=token[:, None],
        lengths=(~done).astype(jnp.int32),
        logprobs=jnp.where(done, 0.0, logprob)[:, None],
    )
    # On a mesh, on all devices: the host of each process looks at them.
    made = jax.tree.map(constrain, made)
    # A row ends at a stop id, or as no position is left to read the token at.
    ends = jnp.isin(token, rules.stop_ids) | (cache.lengths + 1 >= config.n_positions)
    return State(token, constrain(done | ends), ids, step + 1, cache), made


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
    n_rows = len(state.token)
    blank = Generation(
        ids=jnp.full((n_rows, chunk), rules.pad_id),
        lengths=jnp.zeros(n_rows, jnp.int32),
        logprobs=jnp.zeros((n_rows, chunk), jnp.float32),
    )

    # A `while`, not a `scan`: it ends with the rows, and one program serves any number of steps.
    def unfinished(carry):
        n_generated, state, _ = carry
        return (n_generated < steps) & ~state.done.all()

    def step(carry):
        n_generated, state, out = carry
        state, made = _step(params, state, rules, config=config)
        out = Generation(
            ids=kv_cache.put(out.ids, made.ids, n_generated),
            lengths=out.lengths + made.lengths,
            logprobs=kv_cache.put(out.logprobs, made.logprobs, n_generated),
        )
        return n_generated + 1, state, out

    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, blank))
    return state, out


def _step(
    params: Params, state: State, rules: Rules, *, config: GPT2Config
) -> tuple[State, Generation]:
    """Reads the last token of each row and chooses the next."""
    ids = kv_cache.put(state.ids, state.token[:, None], state.cache.slot)
    # What has ended may have no position left to be read at: its token goes to position 0, and
    # nobody looks.
    lengths = jnp.where(state.done, 0, state.cache.lengths)
    cache = state.cache._replace(lengths=lengths)
    tap = rules.tap or no_tap
    logits, cache = decode_step(params, state.token, cache, config=config, tap=tap)
    return choose(logits, cache, ids, rules, state.step, state.done, config=config)


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


# From the host.


def _with_slots(past: Past, slots: int) -> Past:
    """Returns a past whose cache, and whose tokens by slots, have room for `slots` tokens."""
    n_new = slots - past.at_slots.shape[1]
    cache = past.cache if slots == past.cache.slots else _lengthen(past.cache, slots)
    return past._replace(cache=cache, at_slots=np.pad(past.at_slots, ((0, 0), (0, n_new))))


class _Ahead:
    """Compiles `advance` for the next size of the cache in a thread, while this one is filled.

    The call that later needs the program finds it, or waits for it, instead of compiling it then.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool
        self.compiling: dict[int, Future] = {}  # by the number of slots

    def start(
        self, slots: int, params: Params, state: State, rules: Rules, plan: Plan, config: GPT2Config
    ) -> None:
        """Begins to compile for a cache of `slots`, unless that was begun before."""
        if slots in self.compiling:
            return
        # Shapes alone: the larger cache itself is made when it is needed.
        larger = jax.eval_shape(partial(grow, slots=slots), state)

        def compile_program():
            steps = jnp.int32(plan.chunk)
            lowered = advance.lower(params, larger, rules, steps, config=config, chunk=plan.chunk)
            # JAX remembers what it has compiled; the program itself is of no use here.
            lowered.compile()

        self.compiling[slots] = self.pool.submit(compile_program)

    def finish(self, slots: int) -> None:
        """Waits for the program, not for its success: the call that needs it would compile it."""
        wait([self.compiling[slots]])


def check_numbers(logprobs: Float[ArrayLike, "..."], *, config: GPT2Config) -> None:
    """Raises `FloatingPointError` for log-probabilities that are NaN.

    The largest of such logits is the first, so that a text of them is all "!".
    """
    if np.isnan(np.asarray(logprobs)).any():
        advice = "" if config.dtype in ("float32", "float64") else ": `load` them as float32"
        raise FloatingPointError(
            f"The model's logits are NaN. Its weights are no numbers, or overflow in"
            f" {config.dtype}{advice}."
        )


def pieces(
    params: Params,
    request: Request,
    plan: Plan,
    *,
    config: GPT2Config,
    step: int = 0,
    done: Bool[np.ndarray, " R"] | bool = False,
    past: Past | None = None,
) -> Iterator[Generation]:
    """Yields texts in pieces: the first token, then at most `plan.chunk` at a time.

    Of the text, `step` tokens are made already; rows that are `done` get none. The context must
    have room. What a `past` knows of the prompts is not read again.
    """
    # Slots in use.
    used = int(np.max(request.lengths, initial=1)) if past is None else past.used
    most = used + plan.max_new_tokens - 1  # the last token is never read
    # No fewer than the columns of the prompts: their padding is read, and so written, as well.
    columns = request.ids.shape[1] if past is None else past.at_slots.shape[1]
    slots = max(columns, cache_slots(used, most))
    rules = request.rules
    if past is None:
        state, made = begin(
            params,
            request,
            jnp.int32(step),
            done,
            config=config,
            cache_len=slots,
            num_return_sequences=plan.num_return_sequences,
        )
    else:
        state, made = resume(
            params,
            _with_slots(past, slots),
            rules,
            config=config,
            num_return_sequences=plan.num_return_sequences,
        )
    # Before the loop, and what it compiles: the first token waits for its own program alone.
    check_numbers(made.logprobs, config=config)
    yield made

    n_generated = 1
    with ThreadPoolExecutor(1) as pool:
        ahead = _Ahead(pool)
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
                ahead.start(next_size, params, state, rules, plan, config)
            state, made = advance(
                params, state, rules, jnp.int32(steps), config=config, chunk=plan.chunk
            )
            n_generated += steps
            used += steps
            check_numbers(made.logprobs, config=config)
            # Cut on the host: on the device, each size would compile a program of its own.
            yield Generation(
                ids=jnp.asarray(np.asarray(made.ids)[:, :steps]),
                lengths=made.lengths,
                logprobs=jnp.asarray(np.asarray(made.logprobs)[:, :steps]),
            )
