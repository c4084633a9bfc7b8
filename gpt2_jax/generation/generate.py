"""Text generation in batches: whole texts, streams, and texts that outgrow the context.

An eager shell: it checks its arguments, then drives the programs of `decode.py`. Knows no cache and
no sampler. Where JAX traces a caller, `generate` becomes a single program without host or checks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax.cache import KVCache, bucket
from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.generation.decode import (
    Generation,
    Plan,
    Start,
    compile_first,
    each_token,
    in_one,
    pieces,
)
from gpt2_jax.generation.request import (
    Keys,
    Past,
    Prompts,
    Request,
    check_memory,
    check_room,
    check_stateless,
    for_copies,
    is_traced,
    make_request,
    on_the_right,
    read_endings,
    read_outputs,
    read_past,
    read_prompts,
    remember,
)
from gpt2_jax.generation.transforms import Room
from gpt2_jax.inputs import check_side, pad_rows
from gpt2_jax.modules import Params, Tap

CHUNK = 128  # tokens that `generate` makes before it looks whether every row has ended


class _Wishes(NamedTuple):
    """The arguments of `generate` and `stream` beside the prompts, as they came."""

    max_new_tokens: int
    chunk: int = CHUNK
    num_return_sequences: int = 1
    sampler: Any = None
    stop_ids: Sequence[int] | None = None
    pad_id: int | None = None
    padding_side: str = "right"
    overflow: str = "error"
    keep: int | None = None
    tap: Tap | None = None
    cache: KVCache | None = None
    outputs: str | Sequence[str] = ()


class _Job(NamedTuple):
    """What is to be done, checked."""

    request: Request
    plan: Plan
    prompts: Prompts
    past: Past | None
    slides: bool  # whether texts outgrow the context and go on
    is_traced: bool


def generate(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None = None,
    key: Keys | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    sampler: Any = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    overflow: str = "error",
    keep: int | None = None,
    tap: Tap | None = None,
    cache: KVCache | None = None,
    outputs: str | Sequence[str] = (),
) -> Generation:
    """Continues each prompt of a batch by up to `max_new_tokens` tokens. Compiles itself.

    Returns the tokens with two log-probabilities of each: the model's own, and that of the
    distribution which the token was drawn from, as importance ratios need it (`Generation`).

    Prompts are padded to a bucket of 32, 64, 128, ... columns and the cache grows with the text:
    few sizes mean few compilations, and a larger cache's program is compiled while the smaller one
    is filled. The rest of what a program depends on are `config`, the sampler's structure and the
    number of stop ids. Work ends as soon as every row has.

    Under `jax.jit`, `jax.vmap` and `jax.export` it gives the same tokens, by one program with room
    for `max_new_tokens` from the start. Values are not checked there: an id outside the vocabulary,
    a length that is none, logits that are NaN. `overflow="error"` counts the columns of `ids` for
    the longest prompt, and `"slide"` and `cache` are refused, as the host does their work. Many
    keys or many models: `jax.vmap(lambda key: generate(params, ids, None, key, ...))(keys)`.

    Args:
      params: the parameters.
      ids: `int[B, P]`, the prompts. Padding may hold any id of the vocabulary.
      lengths: `int[B]`, how many ids of each row are real, at least 1; all of them by default.
      key: for samplers that draw, one key, from which row `i` of the result gets `fold_in(key, i)`,
        or one key per row, `key[B]`.
        A row's tokens depend on its own key and prompt alone (up to the rounding of differently
        shaped products), and a longer run begins with the shorter run's tokens.
      config: the model's configuration.
      max_new_tokens: `N`, at least 1.
      num_return_sequences: `R`, texts to draw for each prompt. The result has `B R` rows in the
        place of `B`, and row `b R + r` continues prompt `b`.
      sampler: `Greedy()` by default; see `gpt2_jax.generation.sampling`.
      stop_ids: ids that end a row; the config's `eos_token_id` by default, `()` for none.
      pad_id: what follows a row's end; by default the config's `pad_token_id`, or else the first
        stop id, or 0.
      padding_side: "right" or "left", where the padding of `ids` is.
      outputs: what to keep of each token besides, for `Generation.outputs`: "logits", the model's,
        [R, N, V]; "scores", what the sampler's transform made of them; and sites of activations, or
        patterns of such, "h.3.resid_post", as they were where the token was chosen: those of the
        last token that the model had read. None by default, which costs nothing; each takes its
        size for every token, on the host as well.
      overflow: what happens when a prompt and its new tokens exceed `n_positions`. "error": an
        error, beforehand. "stop": the row ends with its last position. "slide": a full row goes on
        from its last tokens, which are read anew from position 0 on; rules that look back see them
        alone.
      keep: for "slide", how many tokens these are; half of `n_positions` by default. All of them is
        nanoGPT's cropping, which reads the whole context for each token.
      tap: changes activations, of the prompts and of each new token: see `apply`. It is a pytree,
        as those of `gpt2_jax.make_tap` are: new arrays in it compile nothing. A plain function
        compiles once for each object. A value for each prompt follows it into all of its sequences
        by the tap's method `repeated(n)`.
      cache: what `prefill`, `extend` or `share` returned for the beginnings of the prompts: they
        are not read again. `ids` are the whole prompts all the same, each at least one token longer
        (HF's `past_key_values`). It stays as it is, for other calls.

    Raises:
      FloatingPointError: the logits are NaN.
      ValueError: an id outside the vocabulary, an empty prompt, a prompt and new tokens that exceed
        `n_positions`, a sampler that draws without a key, an argument of the wrong shape, or, where
        JAX traces, one that the host would have to read.

    Examples:
      >>> out = gpt2_jax.generate(params, ids, config=config, max_new_tokens=3, stop_ids=())
      >>> out.ids.shape, out.lengths.tolist()
      ((1, 3), [3])
      >>> bool(out.ids[0, 0] == gpt2_jax.apply(params, ids, config=config)[0, -1].argmax())
      True
      >>> gpt2_jax.generate(params, ids, config=config, max_new_tokens=40)
      Traceback (most recent call last):
          ...
      ValueError: ...
    """
    wishes = _Wishes(
        max_new_tokens=max_new_tokens,
        chunk=CHUNK,
        num_return_sequences=num_return_sequences,
        sampler=sampler,
        stop_ids=stop_ids,
        pad_id=pad_id,
        padding_side=padding_side,
        overflow=overflow,
        keep=keep,
        tap=tap,
        cache=cache,
        outputs=outputs,
    )
    job = _read_job(params, ids, lengths, key, wishes, config=config)
    if job.is_traced:
        made = in_one(params, job.request, job.plan, config=config, longest=job.prompts.longest)
        return _filled(made, max_new_tokens, job.request.rules.pad_id, jnp)
    # `generate` is the stream, collected: the two cannot differ. To the host in one go, and back as
    # whole arrays: the pieces' sizes would compile a program each.
    parts = jax.device_get(list(_made(params, job, config=config)))
    made = each_token(
        lambda *xs: np.concatenate(xs, axis=1), *parts, lengths=sum(part.lengths for part in parts)
    )
    whole = _filled(made, max_new_tokens, np.asarray(job.request.rules.pad_id), np)
    return jax.tree.map(jnp.asarray, whole)


def stream(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None = None,
    key: Keys | None = None,
    *,
    config: GPT2Config,
    max_new_tokens: int,
    chunk: int = 8,
    num_return_sequences: int = 1,
    sampler: Any = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    padding_side: str = "right",
    overflow: str = "error",
    keep: int | None = None,
    tap: Tap | None = None,
    cache: KVCache | None = None,
    outputs: str | Sequence[str] = (),
) -> Iterator[Generation]:
    """Yields what `generate` would return, in pieces. Compiles itself.

    The first token comes alone, then at most `chunk` tokens at a time.

    Takes and checks `generate`'s arguments, and ends as soon as every row has. It is of the host:
    inside `jax.jit` or `jax.vmap` it raises `ValueError`, and `generate` serves.

    Examples:
      >>> pieces = gpt2_jax.stream(params, ids, config=config, max_new_tokens=3, stop_ids=())
      >>> [piece.ids.shape for piece in pieces]
      [(1, 1), (1, 2)]
    """
    # Not a generator itself, which would check nothing before its first piece is asked for.
    wishes = _Wishes(
        max_new_tokens=max_new_tokens,
        chunk=chunk,
        num_return_sequences=num_return_sequences,
        sampler=sampler,
        stop_ids=stop_ids,
        pad_id=pad_id,
        padding_side=padding_side,
        overflow=overflow,
        keep=keep,
        tap=tap,
        cache=cache,
        outputs=outputs,
    )
    job = _read_job(params, ids, lengths, key, wishes, config=config)
    if job.is_traced:
        raise ValueError(
            "`stream` hands out its pieces on the host, so it cannot run inside `jax.jit` or"
            " `jax.vmap`: `generate` can, and so can a loop of `prefill` and `decode_step`."
        )
    return _made(params, job, config=config)


def compile_first_token(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None = None,
    key: Keys | None = None,
    *,
    config: GPT2Config,
    **options: Any,
) -> None:
    """Compiles the program that `stream` and `generate` begin with, which they then find.

    Takes their arguments but `cache`, and of params their shapes: `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: as `generate`.
    """
    job = _read_job(params, ids, lengths, key, _Wishes(**options), config=config)
    # One text after the other, of lengths that are known when they come.
    if not job.slides:
        compile_first(params, job.request, job.plan, config=config)


def join(
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None,
    out: Any,
    *,
    padding_side: str = "right",
) -> tuple[Int[Array, "R T"], Int[Array, " R"]]:
    """Returns prompts with what followed them, as one batch padded on the right with 0.

    It is what `apply`, `capture` or `token_logprobs` take:
    `apply(params, *join(ids, None, out), config=config)`.
    Runs op by op; wrap it in `jax.jit` where that counts.

    Args:
      ids, lengths, padding_side: the prompts, as `generate` took them.
      out: what `generate`, `beam_search` or `speculate` returned for them. Several texts of a
        prompt stand together.

    Raises:
      ValueError: there are not as many texts of each prompt.

    Examples:
      >>> out = gpt2_jax.generate(params, ids, config=config, max_new_tokens=3, stop_ids=())
      >>> texts, lengths = gpt2_jax.join(ids, None, out)
      >>> texts.shape, lengths.tolist(), bool((texts[:, :4] == ids).all())
      ((1, 7), [7], True)
    """
    check_side(padding_side)
    ids = jnp.asarray(ids, jnp.int32)
    n_prompts, width = ids.shape
    if lengths is None:
        lengths = jnp.full(n_prompts, width)
    lengths = jnp.asarray(lengths, jnp.int32)
    # Beams have an axis of their own for the texts of a prompt.
    n_new = out.ids.shape[-1]
    new_ids = jnp.reshape(out.ids, (-1, n_new))
    new_lengths = jnp.reshape(out.lengths, -1)
    n_texts = new_ids.shape[0]
    if n_texts % max(1, n_prompts):
        raise ValueError(
            f"`out` must hold as many texts of each of {n_prompts} prompts, got {n_texts} texts."
        )
    if padding_side == "left":
        ids = on_the_right(ids, lengths)
    n_each = max(1, n_texts // max(1, n_prompts))
    sources = jnp.arange(n_texts) // n_each
    starts = lengths[sources]
    room = jnp.pad(ids[sources], ((0, 0), (0, n_new)))
    whole = kv_cache.put(room, new_ids.astype(jnp.int32), starts)
    totals = starts + new_lengths
    is_text = jnp.arange(width + n_new)[None] < totals[:, None]
    return jnp.where(is_text, whole, 0), totals


def _read_job(
    params: Params,
    ids: Int[ArrayLike, "B P"],
    lengths: Int[ArrayLike, " B"] | None,
    key: Keys | None,
    wishes: _Wishes,
    *,
    config: GPT2Config,
) -> _Job:
    """Checks what is asked for."""
    prompts = read_prompts(ids, lengths, wishes.padding_side, config=config)
    n_new = as_count("max_new_tokens", wishes.max_new_tokens)
    overflow = wishes.overflow
    check_room(prompts, n_new, overflow, config=config)
    check_memory(prompts, wishes.num_return_sequences, "num_return_sequences", config=config)
    full = config.n_positions
    keep = wishes.keep
    if keep is not None and not (overflow == "slide" and 1 <= keep <= full):
        raise ValueError(f'`keep` must be in 1 to {full}, with `overflow="slide"`; got {keep}.')
    request = make_request(
        prompts,
        read_endings(wishes.stop_ids, wishes.pad_id, config=config),
        key,
        wishes.sampler,
        num_return_sequences=wishes.num_return_sequences,
        tap=wishes.tap,
        outputs=read_outputs(wishes.outputs, wishes.sampler, config=config),
    )
    slides = overflow == "slide" and prompts.longest + n_new > full
    if slides:
        check_stateless(request.rules.sampler, '`overflow="slide"`, which reads texts anew,')
    traced = is_traced((params, request, wishes.cache))
    if slides and wishes.cache is not None:
        raise ValueError('`overflow="slide"` reads texts anew: leave out `cache`.')
    if traced and (slides or wishes.cache is not None):
        what = '`overflow="slide"`' if slides else "`cache`"
        raise ValueError(f"{what} is read on the host, so not inside `jax.jit` or `jax.vmap`.")
    # The shortest prompt ends its text last; one more token is chosen at the last position than can
    # be read.
    room = n_new if slides else min(n_new, full - prompts.shortest)
    plan = Plan(
        max_new_tokens=room,
        chunk=as_count("chunk", wishes.chunk),
        num_return_sequences=int(wishes.num_return_sequences),
        # `keep` is at least 1 by now, so that `or` means None alone.
        keep=keep or full // 2,
    )
    past = None
    if wishes.cache is not None:
        past = read_past(prompts, wishes.cache, config=config)
    # Last of all, as it may read the prompts by a second model.
    request = remember(request, Room(prompts.longest, n_new))
    return _Job(request, plan, prompts, past, slides, traced)


def _made(params: Params, job: _Job, *, config: GPT2Config) -> Iterator[Generation]:
    """Returns the pieces of the texts."""
    if job.slides:
        return _slide(params, job.request, job.plan, config=config)
    return pieces(params, job.request, job.plan, config=config, past=job.past)


def _filled(made: Generation, n_tokens: int, pad_id: Any, xp: Any) -> Generation:
    """Returns texts of `n_tokens` columns, of which the last may be padding, as arrays of `xp`."""
    n_made = made.ids.shape[1]
    n_missing = int(n_tokens) - n_made  # where every row has ended before

    def fill(x):
        axes = [(0, 0)] * x.ndim
        axes[1] = (0, n_missing)
        return xp.pad(x, axes)

    filled = each_token(fill, made, lengths=made.lengths)
    is_made = xp.arange(n_tokens)[None] < n_made
    return filled._replace(ids=xp.where(is_made, filled.ids, pad_id))


def _slide(
    params: Params, request: Request, plan: Plan, *, config: GPT2Config
) -> Iterator[Generation]:
    """Yields pieces of texts that outgrow the context.

    Whenever a row is full, all rows are read anew: a full one from its last `plan.keep` tokens, at
    position 0.
    """
    full = config.n_positions
    stop_ids = np.asarray(request.rules.stop_ids)
    # On the host: rows fill up at different steps, and only their ends are kept.
    prompts = zip(np.asarray(request.ids), np.asarray(request.lengths), strict=True)
    texts = [row[:length] for row, length in prompts]
    done = np.zeros(len(texts) * plan.num_return_sequences, bool)
    n_generated = 0
    while n_generated < plan.max_new_tokens and not done.all():
        # Full ones alone: a shorter row loses nothing before it must.
        texts = [text if len(text) < full else text[-plan.keep :] for text in texts]
        longest = max(len(text) for text in texts)
        ids, lengths = pad_rows(texts, bucket(longest, full))
        window = request._replace(ids=jnp.asarray(ids), lengths=jnp.asarray(lengths))
        # At least one token: a row that keeps all of its context is full as it is.
        room = max(1, full - longest)
        n_missing = plan.max_new_tokens - n_generated
        part = plan._replace(max_new_tokens=min(n_missing, room))  # until the longest row is full
        start = Start(n_generated, done)
        # Steps go on counting, as keys are folded with them: no window repeats another's draws.
        made = pieces(params, window, part, config=config, start=start)
        # The first window was read once for all sequences of a prompt. From here on each has a text
        # of its own, and is a row.
        texts = [text for text in texts for _ in range(plan.num_return_sequences)]
        rules = for_copies(request.rules, plan.num_return_sequences)
        request = request._replace(rules=rules)
        plan = plan._replace(num_return_sequences=1)
        for piece in made:
            texts = _appended(texts, piece)
            # By stop ids, not by the state of `pieces`: there a row ends with its positions, too.
            done |= np.isin(np.asarray(piece.ids), stop_ids).any(axis=1)
            n_generated += piece.ids.shape[1]
            yield piece


def _appended(texts: list[np.ndarray], piece: Generation) -> list[np.ndarray]:
    """Returns each text with the tokens that a piece adds to it."""
    rows = zip(texts, np.asarray(piece.ids), np.asarray(piece.lengths), strict=True)
    return [np.append(text, new[:n_new]) for text, new, n_new in rows]
