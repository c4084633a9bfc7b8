"""Text generation in batches: whole texts, streams, and texts that outgrow the context.

An eager shell: it checks its arguments, then drives the programs of `decode.py`. Knows no cache and
no sampler.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from gpt2_jax.cache import KVCache, bucket
from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.generation.decode import Generation, Plan, pieces
from gpt2_jax.generation.request import (
    Keys,
    Request,
    check_memory,
    check_room,
    make_request,
    read_endings,
    read_past,
    read_prompts,
)
from gpt2_jax.inputs import pad_rows
from gpt2_jax.modules import Params, Tap

CHUNK = 128  # tokens that `generate` makes before it looks whether every row has ended


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
) -> Generation:
    """Continues each prompt of a batch by up to `max_new_tokens` tokens. Compiles itself.

    Prompts are padded to a bucket of 32, 64, 128, ... columns and the cache grows with the text:
    few sizes mean few compilations, and a larger cache's program is compiled while the smaller one
    is filled. The rest of what a program depends on are `config`, the sampler's structure and the
    number of stop ids. Work ends as soon as every row has.

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
      overflow: what happens when a prompt and its new tokens exceed `n_positions`. "error": an
        error, beforehand. "stop": the row ends with its last position. "slide": a full row goes on
        from its last tokens, which are read anew from position 0 on; rules that look back see them
        alone.
      keep: for "slide", how many tokens these are; half of `n_positions` by default. All of them is
        nanoGPT's cropping, which reads the whole context for each token.
      tap: changes activations, of the prompts and of each new token: see `apply`. It is a pytree,
        as those of `gpt2_jax.make_tap` are: new arrays in it compile nothing. A plain function
        compiles once for each object.
      cache: what `prefill`, `extend` or `share` returned for the beginnings of the prompts: they
        are not read again. `ids` are the whole prompts all the same, each at least one token longer
        (HF's `past_key_values`). It stays as it is, for other calls.

    Raises:
      FloatingPointError: the logits are NaN.
      ValueError: an id outside the vocabulary, an empty prompt, a prompt and new tokens that exceed
        `n_positions`, a sampler that draws without a key, an argument of the wrong shape, or a call
        inside `jax.jit` or `jax.vmap`.
    """
    # `generate` is the stream, collected: the two cannot differ.
    parts = stream(
        params,
        ids,
        lengths,
        key,
        config=config,
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
    )
    # To the host in one go, and back as whole arrays: the pieces' sizes would compile a program
    # each.
    made = jax.device_get(list(parts))
    all_ids = np.concatenate([part.ids for part in made], axis=1)
    all_logprobs = np.concatenate([part.logprobs for part in made], axis=1)
    n_missing = int(max_new_tokens) - all_ids.shape[1]  # where every row has ended before
    behind = ((0, 0), (0, n_missing))
    # The same as in the pieces, which do not carry it.
    pad = read_endings(stop_ids, pad_id, config=config).pad_id
    return Generation(
        ids=jnp.asarray(np.pad(all_ids, behind, constant_values=pad)),
        lengths=jnp.asarray(sum(part.lengths for part in made)),
        logprobs=jnp.asarray(np.pad(all_logprobs, behind)),
    )


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
) -> Iterator[Generation]:
    """Yields what `generate` would return, in pieces. Compiles itself.

    The first token comes alone, then at most `chunk` tokens at a time.

    Takes and checks `generate`'s arguments, and ends as soon as every row has.
    """
    # Not a generator itself, which would check nothing before its first piece is asked for.
    prompts = read_prompts(params, ids, lengths, padding_side, config=config)
    max_new_tokens = as_count("max_new_tokens", max_new_tokens)
    check_room(prompts, max_new_tokens, overflow, config=config)
    check_memory(prompts, num_return_sequences, "num_return_sequences", config=config)
    full = config.n_positions
    if keep is not None and not (overflow == "slide" and 1 <= keep <= full):
        raise ValueError(f'`keep` must be in 1 to {full}, with `overflow="slide"`; got {keep}.')
    endings = read_endings(stop_ids, pad_id, config=config)
    request = make_request(
        prompts,
        endings,
        key,
        sampler,
        num_return_sequences=num_return_sequences,
        tap=tap,
    )
    plan = Plan(
        max_new_tokens=max_new_tokens,
        chunk=as_count("chunk", chunk),
        num_return_sequences=int(num_return_sequences),
        # `keep` is at least 1 by now, so that `or` means None alone.
        keep=keep or full // 2,
    )
    if overflow == "slide" and prompts.longest + max_new_tokens > full:
        if cache is not None:
            raise ValueError('`overflow="slide"` reads texts anew: leave out `cache`.')
        return _slide(params, request, plan, config=config)
    # The shortest prompt ends its text last; one more token is chosen at the last position than can
    # be read.
    room = full - int(prompts.lengths.min(initial=full))
    plan = plan._replace(max_new_tokens=min(max_new_tokens, room))
    past = None if cache is None else read_past(prompts, cache, config=config)
    return pieces(params, request, plan, config=config, past=past)


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
        # Steps go on counting, as keys are folded with them: no window repeats another's draws.
        made = pieces(params, window, part, config=config, step=n_generated, done=done)
        # The first window was read once for all sequences of a prompt. From here on each has a text
        # of its own, and is a row.
        texts = [text for text in texts for _ in range(plan.num_return_sequences)]
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
