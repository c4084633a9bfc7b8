"""Text generation: an eager shell that checks its arguments, around two compiled programs (prefill, decoding loop)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation.sampling import Greedy, History
from gpt2_jax.model import KVCache, Params, check_ids, check_side, decode_step, lengthen, prefill
from gpt2_jax.modules import Tap, no_tap

SMALLEST_BUCKET = 32
SMALLEST_CACHE = (
    256  # slots, unless fewer will do: attention over so many is a small part of a step
)
CHUNK = 128  # tokens that `generate` makes at a time, and before the end of a cache when the next program compiles


class Generation(NamedTuple):
    """Generated tokens, without the prompts."""

    ids: Array  # int32[B, N]; after a row's stop id, `pad_id`
    lengths: Array  # int32[B], tokens made by each row, its stop id included
    logprobs: Array  # float32[B, N], the model's own log-probability of each id, before any transform; 0 after the stop


class State(NamedTuple):
    """What a row of tokens needs to go on: `token` is chosen and emitted, but not yet read by the model."""

    token: Array  # int32[B]
    done: Array  # bool[B]
    ids: Array  # int32[B, S], every token at its slot
    step: Array  # int32[], tokens chosen so far
    cache: KVCache


def generate(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    key: Array | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    sampler: Any = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    overflow: str = "error",
    keep: int | None = None,
    tap: Tap | None = None,
) -> Generation:
    """Continues each prompt of a batch by up to `max_new_tokens` tokens.

    Prompts are padded to a bucket of 32, 64, 128, ... columns and the cache grows with the text: few sizes mean few
    compilations, and a larger cache's program is compiled while the smaller one is filled. The rest of what a program
    depends on are `config`, the sampler's structure and the number of stop ids. Work ends as soon as every row has.

    Args:
      params: the parameters.
      ids: `int[B, P]`, the prompts. Padding may hold any id of the vocabulary.
      lengths: `int[B]`, how many ids of each row are real, at least 1; all of them by default.
      key: for samplers that draw, one key, from which row `i` of the result gets `fold_in(key, i)`, or one key per
        row, `key[B]`.
        A row's tokens depend on its own key and prompt alone (up to the rounding of differently shaped products),
        and a longer run begins with the shorter run's tokens.
      config: the model's configuration.
      max_new_tokens: `N`, at least 1.
      num_return_sequences: `R`, texts to draw for each prompt. The result has `B R` rows in the place of `B`, and row
        `b R + r` continues prompt `b`.
      sampler: `Greedy()` by default; see `gpt2_jax.sampling`.
      stop_ids: ids that end a row; the config's `eos_token_id` by default, `()` for none.
      pad_id: what follows a row's end; by default the config's `pad_token_id`, or else the first stop id, or 0.
      padding_side: "right" or "left", where the padding of `ids` is.
      overflow: what happens when a prompt and its new tokens exceed `n_positions`. "error": an error, beforehand.
        "stop": the row ends with its last position. "slide": a full row goes on from its last tokens, which are read
        anew from position 0 on; rules that look back see them alone.
      keep: for "slide", how many tokens these are; half of `n_positions` by default. All of them is nanoGPT's
        cropping, which reads the whole context for each token.
      tap: changes activations, of the prompts and of each new token: see `apply`. It is a pytree, as those of
        `gpt2_jax.make_tap` are: new arrays in it compile nothing. A plain function compiles once for each object.

    Raises:
      ValueError: an id outside the vocabulary, an empty prompt, a prompt and new tokens that exceed `n_positions`, a
        sampler that draws without a key, or an argument of the wrong shape.
    """
    arrays = check_arguments(
        ids, lengths, key, config, max_new_tokens, sampler, stop_ids, pad_id, padding_side, num_return_sequences,
        overflow, keep,
    )  # fmt: skip
    options = {
        "config": config,
        "copies": num_return_sequences,
        "tap": _as_pytree(tap),
        "keep": keep,
    }
    pieces = list(
        _pieces(
            params,
            *arrays,
            max_new_tokens=max_new_tokens,
            overflow=overflow,
            chunk=CHUNK,
            **options,
        )
    )
    ids, lengths, logprobs = (list(map(np.asarray, parts)) for parts in zip(*pieces, strict=True))
    ids, logprobs = np.concatenate(ids, axis=1), np.concatenate(logprobs, axis=1)
    rest = ((0, 0), (0, max_new_tokens - ids.shape[1]))
    whole = Generation(
        np.pad(ids, rest, constant_values=arrays[-1]), sum(lengths), np.pad(logprobs, rest)
    )
    return jax.tree.map(jnp.asarray, whole)


def stream(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    key: Array | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    chunk: int = 8,
    num_return_sequences: int = 1,
    sampler: Any = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    overflow: str = "error",
    keep: int | None = None,
    tap: Tap | None = None,
) -> Iterator[Generation]:
    """Yields what `generate` would return in pieces: the first token, then at most `chunk` tokens at a time.

    Takes and checks `generate`'s arguments, and ends as soon as every row has.
    """
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
    arrays = check_arguments(
        ids, lengths, key, config, max_new_tokens, sampler, stop_ids, pad_id, padding_side, num_return_sequences,
        overflow, keep,
    )  # fmt: skip
    options = {
        "config": config,
        "copies": num_return_sequences,
        "tap": _as_pytree(tap),
        "keep": keep,
    }
    return _pieces(
        params, *arrays, max_new_tokens=max_new_tokens, overflow=overflow, chunk=chunk, **options
    )


def _pieces(params, *arrays, config, max_new_tokens, overflow, keep, **options):
    """Yields the pieces of checked arguments, past the context if need be."""
    full, lengths = config.n_positions, np.asarray(arrays[1])
    options |= {"config": config, "max_new_tokens": max_new_tokens}
    if lengths.max(initial=0) + max_new_tokens > full and overflow == "slide":
        return _slide(params, *arrays, keep=keep, **options)
    options["max_new_tokens"] = min(max_new_tokens, full - int(lengths.min(initial=full)))
    return _stream(params, *arrays, **options)


def _stream(
    params, ids, lengths, row_keys, sampler, stops, pad, *, tap, config, copies, chunk, max_new_tokens, made=0,
    done=False,
):  # fmt: skip
    """Yields pieces of a text of which `made` tokens are made already, for rows that are not `done`."""
    count, used = 1, int(np.max(lengths, initial=1))  # tokens made here; slots in use
    most = used + max_new_tokens - 1  # the last token is never read
    slots = max(ids.shape[1], cache_slots(used, most))
    choice, static = (row_keys, sampler, stops, pad), {"tap": tap, "config": config}
    begin = {"cache_len": slots, "copies": copies, **static}
    state, out = _begin_jit(params, ids, lengths, *choice, jnp.int32(made), done, **begin)
    yield out
    static["chunk"], growing = chunk, None

    def compile_ahead(*inputs):  # the later call with the like of these finds the program
        advance.lower(*inputs, **static).compile()

    with ThreadPoolExecutor(1) as pool:
        while count < max_new_tokens and not np.all(state.done):
            if used == slots:
                wait(
                    [growing]
                )  # for the program, not for success: if it is not there, the call below compiles it
                slots = cache_slots(used, most)
                state, growing = _grow(state, slots=slots), None
            steps = min(chunk, max_new_tokens - count, slots - used)
            inputs = (*choice, jnp.int32(steps))
            if growing is None and slots < most and slots - used <= max(steps, CHUNK):
                larger = jax.eval_shape(partial(_grow, slots=cache_slots(slots, most)), state)
                growing = pool.submit(compile_ahead, params, larger, *inputs)
            state, out = advance(params, state, *inputs, **static)
            count, used = count + steps, used + steps
            ids, logprobs = (jnp.asarray(np.asarray(x)[:, :steps]) for x in (out.ids, out.logprobs))
            yield Generation(ids, out.lengths, logprobs)


def _slide(
    params,
    ids,
    lengths,
    row_keys,
    sampler,
    stops,
    pad,
    *,
    tap,
    config,
    copies,
    chunk,
    max_new_tokens,
    keep,
):
    """Yields pieces as `_stream` does; whenever a row is full, all are read anew, that row from its last tokens."""
    full, stop_ids = config.n_positions, np.asarray(stops)
    texts = [row[:length] for row, length in zip(np.asarray(ids), np.asarray(lengths), strict=True)]
    made, done = 0, np.zeros(len(texts) * copies, bool)
    while made < max_new_tokens and not done.all():
        texts = [text if len(text) < full else text[-(keep or full // 2) :] for text in texts]
        lengths = np.array([len(text) for text in texts], np.int32)
        longest = int(lengths.max())
        ids = np.zeros((len(texts), bucket(longest, full)), np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        left = min(max_new_tokens - made, max(1, full - longest))
        options = {
            "tap": tap,
            "config": config,
            "copies": copies,
            "chunk": chunk,
            "max_new_tokens": left,
        }
        if copies > 1:
            texts, copies = [text for text in texts for _ in range(copies)], 1
        for piece in _stream(
            params, ids, lengths, row_keys, sampler, stops, pad, made=made, done=done, **options
        ):
            new, counts = np.asarray(piece.ids), np.asarray(piece.lengths)
            texts = [
                np.append(text, row[:count])
                for text, row, count in zip(texts, new, counts, strict=True)
            ]
            done |= np.isin(new, stop_ids).any(axis=1)
            made += new.shape[1]
            yield piece


def bucket(length: int, largest: int | None = None) -> int:
    """Rounds a length up to the next of 32, 64, 128, ..., at most `largest`."""
    size = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return size if largest is None else min(size, largest)


def cache_slots(used: int, most: int) -> int:
    """Returns how many slots a cache gets of which `used` are in use and at most `most` will be.

    Twice as many as are used, so that it seldom grows, in steps of a quarter of a power of two, so that few programs
    serve all.
    """
    size = min(most, max(SMALLEST_CACHE, 2 * used))
    step = max(SMALLEST_BUCKET, 1 << size.bit_length() >> 3)
    return -(-size // step) * step


def _begin(
    params,
    ids,
    lengths,
    row_keys,
    sampler,
    stops,
    pad,
    step,
    done,
    *,
    tap=None,
    config,
    cache_len,
    copies,
):
    """Reads the prompts and chooses the next token, the `step`-th, of each row; `copies` rows continue each prompt."""
    logits, cache = prefill(
        params, ids, lengths, config=config, cache_len=cache_len, tap=tap or no_tap
    )
    if copies > 1:
        rows = jnp.repeat(jnp.arange(len(ids)), copies)
        ids, logits, cache = ids[rows], logits[rows], select(cache, rows)
    seen = jnp.pad(ids, ((0, 0), (0, cache_len - ids.shape[1])))
    token = sampler(fold(row_keys, step), logits, History(seen, cache.valid, step))
    token, logprob = jnp.where(done, pad, token), jnp.where(done, 0.0, token_logprob(logits, token))
    live = jnp.broadcast_to(~jnp.asarray(done), token.shape).astype(jnp.int32)
    state = State(token, done | ends(token, cache, stops, config), seen, step + 1, cache)
    return state, Generation(token[:, None], live, logprob[:, None])


def _advance(params, state, row_keys, sampler, stops, pad, steps, *, tap=None, config, chunk):
    """Chooses `steps` more tokens of each row, at most `chunk`: so many times a decode step, then the sampler.

    Stops as soon as every row has ended. The cache must have as many free slots. Behind what was made is padding.
    """
    blank = Generation(
        ids=jnp.full((len(state.token), chunk), pad),
        lengths=jnp.zeros(len(state.token), jnp.int32),
        logprobs=jnp.zeros((len(state.token), chunk), jnp.float32),
    )

    def unfinished(carry):
        number, state, _ = carry
        return (number < steps) & ~state.done.all()

    def step(carry):
        number, state, out = carry
        ids = jax.lax.dynamic_update_slice_in_dim(
            state.ids, state.token[:, None], state.cache.slot, axis=1
        )
        lengths = jnp.where(
            state.done, 0, state.cache.lengths
        )  # what has ended may have no position left
        cache = state.cache._replace(lengths=lengths)
        logits, cache = decode_step(params, state.token, cache, config=config, tap=tap or no_tap)
        token = sampler(fold(row_keys, state.step), logits, History(ids, cache.valid, state.step))
        token = jnp.where(state.done, pad, token)
        logprob = jnp.where(state.done, 0.0, token_logprob(logits, token))
        out = Generation(
            ids=jax.lax.dynamic_update_slice_in_dim(out.ids, token[:, None], number, axis=1),
            lengths=out.lengths + ~state.done,
            logprobs=jax.lax.dynamic_update_slice_in_dim(
                out.logprobs, logprob[:, None], number, axis=1
            ),
        )
        done = state.done | ends(token, cache, stops, config)
        return number + 1, State(token, done, ids, state.step + 1, cache), out

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, blank))[1:]


@partial(jax.jit, static_argnames="slots")
def _grow(state, *, slots):
    """Returns the state with a cache of more slots."""
    count, cache = slots - state.ids.shape[1], state.cache
    more = ((0, 0), (0, count))
    cache = cache._replace(layers=lengthen(cache.layers, count), valid=jnp.pad(cache.valid, more))
    return state._replace(ids=jnp.pad(state.ids, more), cache=cache)


_begin_jit = jax.jit(_begin, static_argnames=("config", "cache_len", "copies"))
advance = jax.jit(_advance, static_argnames=("config", "chunk"), donate_argnames="state")


def ends(token, cache, stops, config):
    """Whether a row ends with the token just chosen: at a stop id, or as no position is left to read it at."""
    return jnp.isin(token, stops) | (cache.lengths + 1 >= config.n_positions)


def token_logprob(logits, token):
    """Log-probability of `token[B]` under `logits[B, V]`, in float32."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)


def fold(row_keys, step):
    """The keys of one step, `key[B]`; None stays None."""
    return None if row_keys is None else jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)


def select(cache: KVCache, rows: Array) -> KVCache:
    """Returns a cache of some rows of another, in the order of `rows[R]`; a row may come more than once."""

    def take(x):  # [BH, ...] -> [RH, ...]
        return x.reshape(len(cache.valid), -1, *x.shape[1:])[rows].reshape(-1, *x.shape[1:])

    layers = jax.tree.map(take, cache.layers)
    return KVCache(layers, cache.valid[rows], cache.slot, cache.lengths[rows])


def check_arguments(
    ids, lengths, key, config, max_new_tokens, sampler, stop_ids, pad_id, padding_side, num_return_sequences=1,
    overflow="error", keep=None,
):  # fmt: skip
    """Checks what a user passed and returns it in the core's terms: right-padded buckets, row keys, arrays."""
    ids = np.asarray(check_ids(ids, config))
    rows, width = ids.shape
    check_side(padding_side)
    lengths = np.full(rows, width) if lengths is None else np.asarray(lengths)
    if lengths.shape != (rows,) or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"`lengths` must be integers of shape [{rows}], got {lengths.dtype} of shape {list(lengths.shape)}."
        )
    if rows and not (lengths.min() >= 1 and lengths.max() <= width):
        bad = lengths.min() if lengths.min() < 1 else lengths.max()
        raise ValueError(f"`lengths` must be in 1 to {width}, the columns of `ids`; got {bad}.")
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ValueError(f"`max_new_tokens` must be a positive integer, got {max_new_tokens!r}.")
    if overflow not in ("error", "stop", "slide"):
        raise ValueError(f'`overflow` must be "error", "stop" or "slide", got {overflow!r}.')
    if keep is not None and not (overflow == "slide" and 1 <= keep <= config.n_positions):
        raise ValueError(
            f'`keep` must be in 1 to {config.n_positions}, with `overflow="slide"`; got {keep}.'
        )
    longest = int(lengths.max(initial=1))
    wanted = longest + {"error": max_new_tokens, "stop": 1, "slide": -longest}[overflow]
    if wanted > config.n_positions:
        raise ValueError(
            f"The longest prompt has {longest} tokens and `max_new_tokens` is {max_new_tokens}, together"
            f" {longest + max_new_tokens}, but the model has {config.n_positions} positions: shorten one, or choose an"
            " `overflow`."
        )
    if padding_side == "left":
        ids = np.stack(
            [np.roll(row, length - width) for row, length in zip(ids, lengths, strict=True)]
        )
    ids = ids[:, :longest]
    ids = np.pad(ids, ((0, 0), (0, max(bucket(longest, config.n_positions) - longest, 0))))

    sampler = check_sampler(sampler, key)
    if num_return_sequences < 1:
        raise ValueError(f"`num_return_sequences` must be at least 1, got {num_return_sequences}.")
    if num_return_sequences > 1 and isinstance(sampler, Greedy):
        raise ValueError(
            f"Greedy would write the same text {num_return_sequences} times: use a sampler that draws."
        )
    stop_ids = config.eos_token_ids if stop_ids is None else tuple(stop_ids)
    if pad_id is None:
        pad_id = config.pad_token_id
    if pad_id is None:
        pad_id = stop_ids[0] if stop_ids else 0
    for name, values in (("stop_ids", stop_ids), ("pad_id", (pad_id,))):
        for value in values:
            if not 0 <= value < config.vocab_size:
                raise ValueError(
                    f"`{name}` must be in [0, {config.vocab_size}) (`vocab_size`), got {value}."
                )
    return (
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        None if key is None else _row_keys(key, rows * num_return_sequences),
        sampler,
        jnp.asarray(stop_ids, jnp.int32),
        jnp.int32(pad_id),
    )


def check_sampler(sampler, key):
    """Returns the sampler, `Greedy()` for none; raises `ValueError` if it needs a key and there is none."""
    sampler = Greedy() if sampler is None else sampler
    if key is None and not isinstance(sampler, Greedy):
        raise ValueError(
            f"`key` must be given for a sampler that draws, such as {type(sampler).__name__}."
        )
    return sampler


def _as_pytree(tap: Tap | None) -> Any:
    """Returns the tap as an argument of the compiled core: a plain function becomes a pytree without leaves."""
    if not (tap is None or callable(tap)):
        raise ValueError(
            f"`tap` must be callable, such as `make_tap` returns, got {type(tap).__name__}."
        )
    return jax.tree_util.Partial(tap) if jax.tree_util.all_leaves([tap]) else tap


def _row_keys(key, rows):
    """Returns one typed key per row, from one key or from `rows` of them (typed, or raw uint32 data)."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(
            f"`key` must be one key or {rows} keys, one per row; got shape {list(key.shape)}."
        )
    return key
