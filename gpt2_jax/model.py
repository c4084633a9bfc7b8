"""GPT-2's forward pass as pure functions over params: init, apply, prefill, decode_step, unembed.

Nothing but `init` is jitted: wrap what you call in `jax.jit`, with `config` static.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.modules import GPT2, Array, LayerCache, Tap, no_tap, wide_dtype

Params = dict[str, Any]


class KVCache(NamedTuple):
    """What decoding remembers of `B` rows, in `S` slots.

    A slot holds one token of each row; rows of different lengths leave some of their slots unused. Positions enter at
    the input only, so a token's slot and its position may differ.
    """

    layers: tuple[LayerCache, ...]  # per layer (keys [BH, K, S], values [BH, S, K])
    valid: Array  # bool[B, S], which slots hold a real token
    slot: Array  # int32[], next slot to write, shared by the rows
    lengths: Array  # int32[B], next position of each row


@partial(jax.jit, static_argnames="config")
def init(key: Array, config: GPT2Config) -> Params:
    """Returns fresh params, initialised as GPT-2 was (HF's `_init_weights`).

    Weights are N(0, `initializer_range`), those of the projections into the residual stream divided by
    `sqrt(2 * n_layer)`; biases are zero and LayerNorms the identity. Leaves are float32, or float64 when
    `config.dtype` is.
    """
    body_key, head_key = jax.random.split(key)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = GPT2(config).init(body_key, ids, ids, jnp.ones((1, 1, 1, 1), bool))["params"]
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.n_embd)
        head = config.initializer_range * jax.random.normal(head_key, shape, wide_dtype(config))
        params["lm_head"] = {"embedding": head}
    return params


def apply(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    padding_side: str = "right",
    tap: Tap = no_tap,
    dropout_key: Array | None = None,
    remat: bool = False,
) -> Array:
    """Returns next-token logits of every position, `int[B, T] -> float32[B, T, V]` (float64 in a float64 model).

    Args:
      params: the parameters, as `init` or `load` return them.
      ids: token ids. Padding may hold any id of the vocabulary.
      lengths: `int[B]`, how many ids of each row are real. Needed only for left-padded rows: padding on the right
        comes after everything that a real token sees. Logits at padding are meaningless.
      config: the model's configuration.
      padding_side: "right" or "left", where the padding is.
      tap: called as `tap(site, activation)` at every site; what it returns takes the activation's place. See
        `gpt2_jax.taps` for the sites, and for `capture` and `patch`, which are easier.
      dropout_key: turns dropout on.
      remat: in a backward pass, recomputes each layer's activations instead of keeping them.

    Raises:
      ValueError: `ids` is not an integer array `[B, T]`, is longer than `n_positions`, or (where its values can be
        seen, outside `jit`) holds an id outside the vocabulary. Inside `jit` such an id gives NaN.
    """
    options = {"padding_side": padding_side, "tap": tap, "dropout_key": dropout_key, "remat": remat}
    hidden = hidden_states(params, ids, lengths, config=config, **options)
    return tap("logits", unembed(params, hidden, config=config))


def hidden_states(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    padding_side: str = "right",
    tap: Tap = no_tap,
    dropout_key: Array | None = None,
    remat: bool = False,
) -> Array:
    """Returns what `apply` would unembed, `int[B, T] -> [B, T, D]` in `config.dtype`: its arguments, its errors."""
    ids = check_ids(ids, config, longest=config.n_positions)
    check_side(padding_side)
    positions = jnp.arange(ids.shape[1])[None]
    mask = positions[:, None, None, :] <= positions[:, None, :, None]  # [1, 1, T, S]
    if lengths is not None and padding_side == "left":
        positions = positions - (ids.shape[1] - jnp.asarray(lengths)[:, None])  # negative in the padding
        mask = mask & (positions >= 0)[:, None, None, :]
        positions = jnp.maximum(positions, 0)
    options = {"tap": tap, "dropout_key": dropout_key, "remat": remat}
    return forward(params, ids, positions, mask, config=config, **options)[0]


def prefill(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    cache_len: int | None = None,
    tap: Tap = no_tap,
) -> tuple[Array, KVCache]:
    """Reads right-padded prompts, `int[B, P] -> float32[B, V]` logits after each row's last token, and the cache.

    Args:
      params: the parameters.
      ids: token ids, padded on the right with any id of the vocabulary.
      lengths: `int[B]`, at least 1, how many ids of each row are real; all of them by default.
      config: the model's configuration.
      cache_len: `S`, slots to make room for, at least `P`; `n_positions` by default.
      tap: see `apply`.

    Raises:
      ValueError: as `apply`, or `cache_len` is less than `P`.
    """
    ids = check_ids(ids, config, longest=config.n_positions)
    rows, width = ids.shape
    slots = config.n_positions if cache_len is None else cache_len
    if slots < width:
        raise ValueError(f"`cache_len` must be at least the {width} columns of `ids`, got {slots}.")
    lengths = jnp.full(rows, width, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    positions = jnp.arange(width)[None]
    mask = positions[:, None, None, :] <= positions[:, None, :, None]
    hidden, layers = forward(params, ids, positions, mask, config=config, tap=tap)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]  # [B, D]
    cache = KVCache(
        layers=lengthen(layers, slots - width),
        valid=jnp.arange(slots)[None] < lengths[:, None],
        slot=lengths.max(initial=1),  # padding that no row needs is overwritten
        lengths=lengths,
    )
    return tap("logits", unembed(params, last, config=config)), cache


def decode_step(
    params: Params, tokens: Array, cache: KVCache, *, config: GPT2Config, tap: Tap = no_tap
) -> tuple[Array, KVCache]:
    """Reads one more token of each row, `int[B] -> float32[B, V]` logits after it, and the cache that holds it.

    The cache must have a free slot, and each row a free position: that is the caller's to see to.
    """
    valid = cache.valid | (jnp.arange(cache.valid.shape[1]) == cache.slot)[None]
    hidden, layers = forward(
        params,
        tokens[:, None],
        cache.lengths[:, None],
        valid[:, None, None, :],
        config=config,
        past=cache.layers,
        slot=cache.slot,
        tap=tap,
    )
    logits = tap("logits", unembed(params, hidden[:, 0], config=config))
    return logits, KVCache(layers, valid, cache.slot + 1, cache.lengths + 1)


def empty_layers(config: GPT2Config, rows: int, slots: int) -> tuple[LayerCache, ...]:
    """Returns the keys and values of a cache in which nothing is written yet."""
    count, width = rows * config.n_head, config.head_dim
    keys, values = (count, width, slots), (count, slots, width)
    return tuple((jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype)) for _ in range(config.n_layer))


def lengthen(layers: tuple[LayerCache, ...], count: int) -> tuple[LayerCache, ...]:
    """Returns the keys and values of a cache with `count` more slots."""
    none, more = (0, 0), (0, count)
    return tuple((jnp.pad(k, (none, none, more)), jnp.pad(v, (none, more, none))) for k, v in layers)


def extend(
    params: Params, ids: Array, layers: tuple[LayerCache, ...], start: Array, *, config: GPT2Config
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Reads `T` more tokens of each row, `int[B, T] -> float32[B, T, V]` logits after each, and the cache with them.

    The first stands at position `start[b]`. Here a token's slot is its position, and what the slots from `start` on
    held is overwritten: so a row can go back. The cache must have `T` more slots; positions beyond `n_positions` have
    no meaning.
    """
    slots = layers[0][0].shape[2]
    positions = start[:, None] + jnp.arange(ids.shape[1])[None]  # [B, T]
    mask = jnp.arange(slots)[None, None, None] <= positions[:, None, :, None]
    positions = jnp.minimum(positions, config.n_positions - 1)
    hidden, layers = forward(params, ids, positions, mask, config=config, past=layers, slot=start)
    return unembed(params, hidden, config=config), layers


def unembed(params: Params, hidden: Array, *, config: GPT2Config) -> Array:
    """Returns logits of final hidden states, `[..., D] -> float32[..., V]`, through the tied or separate head."""
    head = params["wte" if config.tie_word_embeddings else "lm_head"]["embedding"]
    logits = jnp.einsum(
        "nd,vd->nv",  # flat, as in `modules.dense`
        hidden.reshape(-1, hidden.shape[-1]).astype(config.dtype),
        head.astype(config.dtype),
        precision=config.precision,
        preferred_element_type=wide_dtype(config),
    )
    return logits.reshape(*hidden.shape[:-1], -1)


def forward(params: Params, ids, positions, mask, *, config: GPT2Config, **options):
    """Returns the final hidden states and each layer's keys and values: see `modules.GPT2`."""
    body = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    return GPT2(config).apply({"params": body}, ids, positions, mask, **options)


def check_ids(ids: Array, config: GPT2Config, *, longest: int | None = None) -> Array:
    """Returns `ids` as an array; raises `ValueError` unless it is one `[B, T]` of ids, at most `longest` a row."""
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`ids` must be an integer array of shape [B, T], got {ids.dtype} of shape {list(ids.shape)}."
        )
    if ids.shape[1] < 1 or (longest is not None and ids.shape[1] > longest):
        raise ValueError(f"`ids` must have 1 to {config.n_positions} (`n_positions`) columns, got {ids.shape[1]}.")
    if not isinstance(ids, jax.core.Tracer) and ids.size:
        values = np.asarray(ids)
        bad = values[(values < 0) | (values >= config.vocab_size)]
        if bad.size:
            raise ValueError(f"`ids` must be in [0, {config.vocab_size}) (`vocab_size`), got {bad[0]}.")
    return jnp.asarray(ids)


def check_side(padding_side: str) -> None:
    """Raises `ValueError` unless `padding_side` names a side."""
    if padding_side not in ("left", "right"):
        raise ValueError(f'`padding_side` must be "left" or "right", got {padding_side!r}.')
