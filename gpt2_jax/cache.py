"""The KV cache: what decoding remembers of each row. Alone knows how keys and values lie in memory.

Axes are those of `modules.py`: B rows, T new tokens, S slots, H heads, K head width. Keys and
values come and go as `[B, T, H, K]`; whoever decodes asks for them to be written, read, lengthened,
selected or forgotten, and never looks inside. Nothing here is jitted; everything can be.
"""

import math
import os
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.config import GPT2Config, as_count
from gpt2_jax.products import contract
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.sharding import BATCH_AXES, TENSOR, automatic, constrain, n_parts, own_values

# Columns of the narrowest batch: shorter texts all share its programs.
SMALLEST_BUCKET = 32
# Slots, unless fewer will do: attention over so many is a small part of a step.
SMALLEST_CACHE = 256


@dataclass
class LayerCache:
    """One layer's keys and values, as the products with one query read them.

    Rows and heads share an axis: were they two, XLA would copy the cache before each product and
    each write. On a mesh the heads of each device along `tensor` come together, in as many groups
    as there are devices: the axis is groups, rows and a group's heads, in this order, so that a
    device has a stretch of it.
    """

    keys: Float[Array, "BH K S"]
    values: Float[Array, "BH S K"]
    groups: int = static(default=1)

    @property
    def spread(self) -> Any:
        """What axes of a mesh the shared axis lies along."""
        return BATCH_AXES if self.groups == 1 else (TENSOR, *BATCH_AXES)


class KVCache(NamedTuple):
    """What decoding remembers of `B` rows, in `S` slots.

    A slot holds one token of each row; rows of different lengths leave some of their slots unused.
    Positions enter at the input only, so a token's slot and its position may differ.

    Examples:
      >>> ragged = np.array([[5, 6, 7, 8], [5, 6, 0, 0]])
      >>> lengths = np.array([4, 2])
      >>> _, cache = gpt2_jax.prefill(params, ragged, lengths, config=config, cache_len=8)
      >>> cache.slots, int(cache.slot), cache.lengths.tolist()
      (8, 4, [4, 2])
      >>> cache.valid.sum(axis=1).tolist()  # the shorter row leaves two of the four slots unused
      [4, 2]
    """

    layers: tuple[LayerCache, ...]
    valid: Bool[Array, "B S"]  # which slots hold a real token
    # The next slot to write: one for all rows, or each row's own.
    slot: Int[Array, ""] | Int[Array, " B"]
    lengths: Int[Array, " B"]  # next position of each row

    @property
    def slots(self) -> int:
        """How many slots there are, used or not."""
        return self.valid.shape[1]


# One layer.


def layer_of(k: Float[Array, "B T H K"], v: Float[Array, "B T H K"]) -> LayerCache:
    """Returns the cache that holds these tokens alone, in order."""
    return _layer_of(k, v, groups=n_parts(k, TENSOR, k.shape[2]))


def _layer_of(k: Float[Array, "B T H K"], v: Float[Array, "B T H K"], groups: int) -> LayerCache:
    return LayerCache(_by_head(k, groups).swapaxes(1, 2), _by_head(v, groups), groups)


def write(
    layer: LayerCache,
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    slot: Int[Array, ""] | Int[Array, " B"],
) -> LayerCache:
    """Returns a layer's cache with `T` tokens of each row written from a slot on."""
    dtype = layer.keys.dtype
    new = _layer_of(k.astype(dtype), v.astype(dtype), layer.groups)
    n_heads = k.shape[2]
    if jnp.shape(slot) == (1,):
        slot = slot[0]  # of the one row
    if jnp.ndim(slot):
        # Rows and heads share an axis: all heads of a row are written at the slot of the row.
        slot = jnp.repeat(slot, n_heads // layer.groups)
        slot = jnp.concatenate([slot] * layer.groups)
    return replace(
        layer,
        keys=put(layer.keys, new.keys, slot, axis=2),
        values=put(layer.values, new.values, slot, axis=1),
    )


def first_slots(layer: LayerCache, count: int) -> LayerCache:
    """Returns the cache of a layer's first `count` slots."""
    return replace(layer, keys=layer.keys[..., :count], values=layer.values[:, :count])


def scores(
    q: Float[Array, "B T H K"], layer: LayerCache, *, precision: str, dtype: DTypeLike
) -> Float[Array, "B H T S"]:
    """Returns the product of each query with each key, in `dtype`."""
    rows, _, heads, _ = q.shape
    q = _by_head(q.astype(layer.keys.dtype), layer.groups)
    # Returned wide: rounded to 16 bits, near scores would tie in the softmax.
    products = contract(q, layer.keys, (1, 0), dtype=dtype, precision=precision)  # [BH, T, S]
    return _apart(products, rows, heads, layer.groups)


def mix(
    pattern: Float[Array, "B H T S"], layer: LayerCache, *, precision: str, dtype: DTypeLike
) -> Float[Array, "B T H K"]:
    """Returns the values, mixed as the attention pattern says, in `dtype`."""
    rows, heads = pattern.shape[:2]
    # As in HF's code: the softmax is wide, its product with the values is in their dtype.
    pattern = _joined(pattern.astype(layer.values.dtype), layer.groups)
    mixed = contract(pattern, layer.values, (1, 0), dtype=dtype, precision=precision)
    return _apart(mixed, rows, heads, layer.groups).swapaxes(1, 2)


# The whole cache.


def kept_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which keys and values of a model's dtype are kept: its own.

    But float32 for bfloat16 where JAX's platform is the CPU. To write one token there, XLA copies
    an array of bfloat16 whole: for 8 rows of 512 slots that took 25 ms of each step of GPT-2, where
    float32 took 1.7.
    """
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def empty(config: GPT2Config, rows: int, slots: int) -> KVCache:
    """Returns a cache in which nothing is written yet."""
    keys_shape = (rows * config.n_head, config.head_dim, slots)
    values_shape = (rows * config.n_head, slots, config.head_dim)
    dtype = kept_dtype(config.dtype)
    layers = tuple(
        LayerCache(jnp.zeros(keys_shape, dtype), jnp.zeros(values_shape, dtype))
        for _ in range(config.n_layer)
    )
    return KVCache(
        layers=layers,
        valid=jnp.zeros((rows, slots), bool),
        slot=jnp.int32(0),
        lengths=jnp.zeros(rows, jnp.int32),
    )


def of_prompts(layers: tuple[LayerCache, ...], lengths: Int[Array, " B"], slots: int) -> KVCache:
    """Returns the cache of right-padded prompts read from slot 0 on, with room for more."""
    width = layers[0].keys.shape[2]
    dtype = kept_dtype(layers[0].keys.dtype)
    kept = tuple(
        replace(layer, keys=layer.keys.astype(dtype), values=layer.values.astype(dtype))
        for layer in layers
    )
    return KVCache(
        layers=_lengthen_layers(kept, slots - width),
        valid=jnp.arange(slots)[None] < lengths[:, None],
        slot=lengths.max(initial=1),  # padding that no row needs is overwritten
        lengths=lengths,
    )


def see_only(cache: KVCache, seen: Bool[Array, "B P"], position: Int[Array, " B"]) -> KVCache:
    """Returns a cache of prompts of which later tokens see some slots, from a position on."""
    n_new = cache.slots - seen.shape[1]
    return cache._replace(
        valid=cache.valid & jnp.pad(seen, ((0, 0), (0, n_new))),
        lengths=position.astype(jnp.int32),
    )


def n_written(
    cache: KVCache, layers: tuple[LayerCache, ...], count: int | Int[Array, " B"]
) -> KVCache:
    """Returns the cache after `count` tokens of each row were written to its layers at its slot.

    Of rows that share a slot, the one with the most tokens says which is the next.
    """
    # Slots behind `slot` may hold what a longer pass wrote before: they count again once written
    # anew.
    begin = jnp.reshape(cache.slot, (-1, 1))
    end = begin + jnp.reshape(count, (-1, 1))
    slots = jnp.arange(cache.slots)[None]
    shares_slot = jnp.ndim(cache.slot) == 0 and jnp.ndim(count) == 1
    return KVCache(
        layers=layers,
        valid=cache.valid | ((slots >= begin) & (slots < end)),
        slot=cache.slot + (jnp.max(count) if shares_slot else count),
        lengths=cache.lengths + count,
    )


def visible(cache: KVCache, count: int) -> Bool[Array, "B 1 T S"]:
    """Returns which slots each of `count` new tokens sees: old ones, and new ones up to itself."""
    return (cache.valid[:, None] | _new_slots(cache, count))[:, None]


@automatic
def lengthen(cache: KVCache, slots: int) -> KVCache:
    """Returns the cache with room for `slots` tokens. Does not compile itself.

    Raises:
      ValueError: it has more already.

    Examples:
      >>> _, cache = gpt2_jax.prefill(params, ids, config=config, cache_len=4)
      >>> gpt2_jax.lengthen(cache, 8).slots
      8
    """
    count = slots - cache.slots
    if count < 0:
        raise ValueError(f"`slots` must be at least the cache's {cache.slots}, got {slots}.")
    return cache._replace(
        layers=_lengthen_layers(cache.layers, count),
        valid=jnp.pad(cache.valid, ((0, 0), (0, count))),
    )


def share(cache: KVCache, n: int) -> KVCache:
    """Returns a cache with each row `n` times: one prefix, read once, for many continuations.

    Row `b * n + i` of the result is row `b`. Each has its own copy, in which others see nothing.
    Does not compile itself.

    Raises:
      ValueError: `n` is less than 1.

    Examples:
      >>> _, cache = gpt2_jax.prefill(params, ids, config=config, cache_len=8)
      >>> gpt2_jax.share(cache, 3).lengths.tolist()
      [4, 4, 4]
    """
    n = as_count("n", n)
    return select(cache, jnp.repeat(jnp.arange(cache.valid.shape[0]), n))


@automatic
def select(cache: KVCache, rows: Int[Array, " R"]) -> KVCache:
    """Returns a cache of some rows of another, in their order; a row may come more than once."""
    n_rows = cache.valid.shape[0]  # which may be symbolic

    def take(x, groups):  # [BH, ...] -> [RH, ...]
        # By rows: all heads of a row go together.
        separate = _apart(x, n_rows, x.shape[0] // max(n_rows, 1), groups)
        return _joined(separate[rows], groups)

    layers = tuple(
        replace(layer, keys=take(layer.keys, layer.groups), values=take(layer.values, layer.groups))
        for layer in cache.layers
    )
    return KVCache(
        layers=layers,
        valid=cache.valid[rows],
        slot=cache.slot[rows] if jnp.ndim(cache.slot) else cache.slot,
        lengths=cache.lengths[rows],
    )


@automatic
def keep_first(cache: KVCache, count: Int[Array, ""] | Int[Array, " B"]) -> KVCache:
    """Returns the cache that remembers the first `count` slots, and goes on behind them.

    For caches in which a token's slot is its position: those of prompts, and whatever was written
    behind them by counts of this kind, one for all rows or each row's own. What stood behind is
    overwritten: so a row can go back.
    """
    # Keys and values stay as they are: what is not valid is masked, and nothing need be cleared.
    lengths = jnp.broadcast_to(count, cache.lengths.shape)
    return cache._replace(
        valid=jnp.arange(cache.slots)[None] < lengths[:, None],
        slot=count,
        lengths=lengths,
    )


def check_room(
    cache: KVCache, width: int, count: int | Int[Array, " B"], *, config: GPT2Config
) -> None:
    """Raises `ValueError` where `width` slots, or the positions of `count` tokens, are not left.

    Values are seen outside `jit` alone.
    """
    if isinstance(cache.slot, Tracer) or isinstance(cache.lengths, Tracer):
        return
    used = int(np.max(own_values(cache.slot)))
    if used + width > cache.slots:
        raise ValueError(
            f"The cache must have {width} free slots, got {cache.slots - used} of {cache.slots}:"
            " see `lengthen`."
        )
    if isinstance(count, Tracer):
        return
    longest = int(np.max(own_values(cache.lengths) + own_values(count), initial=0))
    if longest > config.n_positions:
        raise ValueError(
            f"A row would have {longest} tokens, but the model has {config.n_positions} positions."
        )


# Sizes: few of them, so that few programs are compiled.


def bucket(length: int, largest: int | None = None) -> int:
    """Rounds a length up to the next of 32, 64, 128, ..., at most `largest`."""
    size = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return size if largest is None else min(size, largest)


def cache_slots(used: int, most: int) -> int:
    """Returns how many slots a cache gets of which `used` are in use and at most `most` will be.

    Twice as many as are used, so that it seldom grows, in steps of a quarter of a power of two, so
    that few programs serve all.
    """
    size = min(most, max(SMALLEST_CACHE, 2 * used))
    # A quarter of the largest power of two in `size`.
    step = max(SMALLEST_BUCKET, 1 << size.bit_length() >> 3)
    return -(-size // step) * step


def row_bytes(config: GPT2Config, slots: int) -> int:
    """Returns how much memory a row takes at the least: its keys, its values and its logits."""
    n_cached = 2 * config.n_layer * config.n_embd * slots
    return n_cached * kept_dtype(config.dtype).itemsize + 4 * config.vocab_size  # logits: float32


def device_memory() -> int | float:
    """Returns how many bytes the device has, or the machine if that is a CPU."""
    stats = jax.local_devices()[0].memory_stats()  # None on CPU
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Arrays.


def put(old: Array, new: Array, start: Int[Array, ""] | Int[Array, " N"], axis: int = 1) -> Array:
    """Puts `new[N, ..., T, ...]` into `old[N, ..., S, ...]`, from `start` on."""
    # JAX moves a start that leaves too little room back to where `new` fits, and so over what
    # stands there, without a word: whoever writes has seen to the room.
    if jnp.ndim(start) == 0:
        return lax.dynamic_update_slice_in_dim(old, new, start, axis=axis)
    if jnp.shape(start) == (1,):  # a slice as well: several starts make it a scatter
        return lax.dynamic_update_slice_in_dim(old, new, start[0], axis=axis)
    put_row = partial(lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(put_row)(old, new, start)


def _new_slots(cache: KVCache, count: int) -> Bool[Array, "#B T S"]:
    """Returns which slots are a new token's own, or those of the new tokens before it."""
    slot = jnp.reshape(cache.slot, (-1, 1, 1))
    slots = jnp.arange(cache.slots)[None, None]
    tokens = jnp.arange(count)[None, :, None]
    return (slots >= slot) & (slots <= slot + tokens)


def _by_head(x: Float[Array, "B T H K"], groups: int) -> Float[Array, "BH T K"]:
    """Lines up rows and heads."""
    return _joined(x.swapaxes(1, 2), groups)


def _joined(x: Shaped[Array, "B H ..."], groups: int) -> Shaped[Array, "BH ..."]:
    """Returns an array whose first axis is rows and heads, in a cache's order."""
    rows, heads = x.shape[:2]
    rest = x.shape[2:]
    if groups == 1:
        return constrain(x, BATCH_AXES).reshape(rows * heads, *rest)
    x = x.reshape(rows, groups, heads // groups, *rest).swapaxes(0, 1)
    return constrain(x, TENSOR, BATCH_AXES).reshape(rows * heads, *rest)


def _apart(
    x: Shaped[Array, "BH ..."], rows: int, heads: int, groups: int
) -> Shaped[Array, "B H ..."]:
    """Undoes `_joined`."""
    rest = x.shape[1:]
    if groups == 1:
        return constrain(x.reshape(rows, heads, *rest), BATCH_AXES)
    x = constrain(x.reshape(groups, rows, heads // groups, *rest), TENSOR, BATCH_AXES)
    return x.swapaxes(0, 1).reshape(rows, heads, *rest)


def _lengthen_layers(layers: tuple[LayerCache, ...], count: int) -> tuple[LayerCache, ...]:
    """Returns the layers with `count` more slots."""
    # New slots hold zeros, never garbage: masked they weigh 0, but 0 * NaN would be NaN.
    none = (0, 0)
    more = (0, count)
    # Layer by layer: a stacked array would be copied whole at each step of a loop.
    return tuple(
        replace(
            layer,
            keys=jnp.pad(layer.keys, (none, none, more)),
            values=jnp.pad(layer.values, (none, more, none)),
        )
        for layer in layers
    )
