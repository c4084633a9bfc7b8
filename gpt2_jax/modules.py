"""GPT-2 as linen modules. Knows one forward pass; what it is for (scoring, prefill, decoding) is the caller's.

Axes: B batch, T query length, S key/cache length, H heads, K head width, D model width, F MLP width, V vocabulary.

Precision, in one place: matrix products and activations run in `config.dtype` with `config.precision`; LayerNorm
statistics, attention scores, softmax and logits are in `wide_dtype(config)`, float32 or better. Parameters come in any
dtype and are cast where they are used.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.config import GPT2Config

Array = jax.Array
Tap = Callable[[str, Array], Array]  # (site, activation) -> activation; what reads or changes activations
LayerCache = tuple[Array, Array]  # keys [BH, K, S] and values [BH, S, K], as the products with one query read them
PARTS, SMALLEST_PART = 4, 64  # into how many parts attention divides its queries, and the fewest worth it
ROW_PARTS = 8  # into how many parts a product with one row divides its sum

# HF's names (transformers/activations.py) -> functions.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": nn.gelu,  # the tanh approximation, which OpenAI trained with
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_python_tanh": nn.gelu,
    "gelu_accurate": nn.gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_python": lambda x: nn.gelu(x, approximate=False),
    "gelu_fast": lambda x: 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_10": lambda x: jnp.clip(nn.gelu(x, approximate=False), -10, 10),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}


def wide_dtype(config: GPT2Config) -> jnp.dtype:
    """Returns the dtype of statistics, softmax and logits: float32, or float64 when the model computes in it."""
    return jnp.promote_types(config.dtype, jnp.float32)


def no_tap(site: str, x: Array) -> Array:
    """Leaves every activation as it is."""
    del site
    return x


def asks(tap: Tap, site: str) -> bool:
    """Whether a tap wants a site: what its method `asks(site)` says, or else any. What none wants is not computed."""
    return tap is not no_tap and getattr(tap, "asks", lambda site: True)(site)


class Below:
    """A tap as seen by a submodule, which names its sites without the `prefix`."""

    def __init__(self, tap: Tap, prefix: str):
        self.tap, self.prefix = tap, prefix

    def __call__(self, site: str, x: Array) -> Array:
        return self.tap(f"{self.prefix}.{site}", x)

    def asks(self, site: str) -> bool:
        return asks(self.tap, f"{self.prefix}.{site}")


def below(tap: Tap, prefix: str) -> Tap:
    """Returns the tap for the submodule `prefix`."""
    return tap if tap is no_tap else Below(tap, prefix)


def dropout(key: Array | None, x: Array, rate: float) -> Array:
    """Zeroes each element of `x` with probability `rate`, independently, and rescales the rest; without a key, `x`.

    PyTorch's law: linen's attention dropout would share one mask among the rows and heads.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """Splits a dropout key that may be absent."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dense(config: GPT2Config, features: int, name: str, stddev: float) -> Callable[[Array], Array]:
    """Returns a `Dense` layer, `[..., in] -> [..., features]`, whose kernel starts as N(0, stddev).

    The product runs on flattened tokens: over three axes XLA's weight gradient is twice as slow on CPU.
    """
    layer = nn.Dense(
        features,
        dtype=config.dtype,
        param_dtype=wide_dtype(config),
        precision=config.precision,
        kernel_init=normal(stddev),
        dot_general=product,
        name=name,
    )
    return lambda x: layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general` of `x[N, in]` and `kernel[in, out]`.

    One row goes in parts on CPU, where XLA's matrix-vector product slows down, by a third, as the sum gets longer.
    """

    def whole(x, kernel):
        return lax.dot_general(x, kernel, dimension_numbers, **options)

    def in_parts(x, kernel):
        x, kernel = x.reshape(ROW_PARTS, -1), kernel.reshape(ROW_PARTS, -1, kernel.shape[1])
        return lax.dot_general(x, kernel, (((1,), (1,)), ((0,), (0,))), **options).sum(axis=0, keepdims=True)

    if x.shape[0] > 1 or x.shape[1] % ROW_PARTS:
        return whole(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=in_parts, default=whole)


@cache
def normal(stddev: float) -> Callable[..., Array]:
    """Returns the initializer N(0, stddev), jitted: linen asks it for its shape at every call of a layer."""
    return jax.jit(nn.initializers.normal(stddev), static_argnums=(1, 2))


def write(old: Array, new: Array, slot: Array, axis: int = 1) -> Array:
    """Puts `new[B, ..., T, ...]` into `old[B, ..., S, ...]` from a slot on: one for all rows, or `int32[B]`."""
    if jnp.ndim(slot) == 0:
        return lax.dynamic_update_slice_in_dim(old, new, slot, axis=axis)
    return jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=axis - 1))(old, new, slot)


def by_head(x: Array) -> Array:
    """Lines up rows and heads, `[B, T, H, K] -> [BH, T, K]`."""
    rows, length, heads, width = x.shape
    return x.swapaxes(1, 2).reshape(rows * heads, length, width)


def residual_stddev(config: GPT2Config) -> float:
    """Returns the initial deviation of the projections into the residual stream (GPT-2 paper, section 2.3)."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


class LayerNorm(nn.Module):
    """Linen's LayerNorm, bit for bit, with its scale in view, `[..., D] -> [..., D]`.

    The variance is a two-pass one: linen's default, E[x^2] - E[x]^2, cancels.
    """

    config: GPT2Config

    @nn.compact
    def __call__(self, x, tap: Tap = no_tap):
        wide, width = wide_dtype(self.config), x.shape[-1]
        weight = self.param("scale", nn.initializers.ones, (width,), wide)
        bias = self.param("bias", nn.initializers.zeros, (width,), wide)
        weight, bias = (leaf.reshape((1,) * (x.ndim - 1) + (width,)) for leaf in (weight, bias))

        x = x.astype(wide)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True) + self.config.layer_norm_epsilon
        inverse = lax.rsqrt(variance)  # [..., 1]
        if asks(tap, "scale"):
            scale = jnp.sqrt(variance)
            inverse *= scale / tap("scale", scale)  # exactly 1 where the tap changes nothing
        return tap("out", (centred * (inverse * weight) + bias).astype(self.config.dtype))


class Attention(nn.Module):
    """Causal self-attention, `[B, T, D] -> [B, T, D]`, over its own keys or a cache of `S` slots."""

    config: GPT2Config
    layer: int

    @nn.compact
    def __call__(self, x, mask, past: LayerCache | None, slot, tap: Tap, key):
        config = self.config
        pattern_key, out_key = split_key(key, 2)

        qkv = dense(config, 3 * config.n_embd, "c_attn", config.initializer_range)(x)  # [B, T, 3D]
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * config.n_head, config.head_dim), 3, axis=2)  # [B, T, H, K]
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        # Rows and heads share an axis: were they two, XLA would copy the cache before each product and each write.
        k, v = by_head(k).swapaxes(1, 2), by_head(v)  # [BH, K, T], [BH, T, K]
        if past is not None:
            slot = jnp.repeat(slot, config.n_head) if jnp.ndim(slot) else slot
            k, v = write(past[0], k, slot, axis=2), write(past[1], v, slot, axis=1)

        if past is not None or asks(tap, "scores") or asks(tap, "pattern"):
            z = self.attend(q, k, v, mask, tap, pattern_key)
        else:
            z = self.attend_in_parts(q, k, v, mask, pattern_key)
        z = tap("z", z)
        out = dense(config, config.n_embd, "c_proj", residual_stddev(config))(z.reshape(x.shape))  # [B, T, D]
        if asks(tap, "result"):
            result = self.result(z)
            out += (tap("result", result) - result).sum(axis=2)  # exactly 0 where the tap changes nothing
        return tap("out", dropout(out_key, out, config.resid_pdrop)), (k, v)

    def attend_in_parts(self, q, k, v, mask, key):
        """`attend` of a text to itself: each part of the queries takes the keys up to its last, the rest is masked."""
        length = q.shape[1]
        parts = min(PARTS, -(-length // SMALLEST_PART))
        bounds = [length * i // parts for i in range(parts + 1)]
        zs = [
            self.attend(q[:, start:end], k[..., :end], v[:, :end], mask[:, :, start:end, :end], no_tap, part_key)
            for start, end, part_key in zip(bounds[:-1], bounds[1:], split_key(key, parts), strict=True)
        ]
        return jnp.concatenate(zs, axis=1)

    def attend(self, q, k, v, mask, tap: Tap, key):
        """Returns the mixed values of queries `[B, T, H, K]`, from keys `[BH, K, S]` and values `[BH, S, K]`."""
        config, wide = self.config, wide_dtype(self.config)
        scores = jnp.einsum("ntk,nks->nts", by_head(q), k, precision=config.precision, preferred_element_type=wide)
        scores = scores.reshape(len(q), config.n_head, *scores.shape[1:])  # [B, H, T, S]
        scores = tap("scores", scores * self.scale())
        # The least finite number, not -inf: a row with nothing to attend to becomes uniform instead of NaN.
        pattern = nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)  # [B, H, T, S]
        pattern = tap("pattern", dropout(key, pattern, config.attn_pdrop))
        pattern = pattern.astype(v.dtype).reshape(len(v), *pattern.shape[2:])
        z = jnp.einsum("nts,nsk->ntk", pattern, v, precision=config.precision)
        return z.reshape(len(q), config.n_head, *z.shape[1:]).swapaxes(1, 2)

    def result(self, z):
        """Returns what each head adds to the residual stream, `[B, T, H, K] -> [B, T, H, D]`, before the bias."""
        kernel = self.variables["params"]["c_proj"]["kernel"].astype(z.dtype)
        return jnp.einsum("bthk,hkd->bthd", z, kernel.reshape(*z.shape[2:], -1), precision=self.config.precision)

    def scale(self) -> float:
        """Returns what the scores are multiplied by (HF's `scale_attn_*` flags)."""
        scale = self.config.head_dim**-0.5 if self.config.scale_attn_weights else 1.0
        return scale / (self.layer + 1) if self.config.scale_attn_by_inverse_layer_idx else scale


class MLP(nn.Module):
    """Position-wise feed-forward layer, `[B, T, D] -> [B, T, D]`."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x, tap: Tap, key):
        config = self.config
        x = tap("pre", dense(config, config.mlp_width, "c_fc", config.initializer_range)(x))  # [B, T, F]
        x = tap("post", ACTIVATIONS[config.activation_function](x))
        x = dense(config, config.n_embd, "c_proj", residual_stddev(config))(x)  # [B, T, D]
        return tap("out", dropout(key, x, config.resid_pdrop))


class Block(nn.Module):
    """One layer: two residual lines, each behind its LayerNorm."""

    config: GPT2Config
    layer: int

    @nn.compact
    def __call__(self, x, mask, past: LayerCache | None, slot, tap: Tap, key):
        config = self.config
        attn_key, mlp_key = split_key(key, 2)
        x = tap("resid_pre", x)
        normed = LayerNorm(config, name="ln_1")(x, below(tap, "ln_1"))
        attn, present = Attention(config, self.layer, name="attn")(
            normed, mask, past, slot, below(tap, "attn"), attn_key
        )
        x = tap("resid_mid", x + attn)
        normed = LayerNorm(config, name="ln_2")(x, below(tap, "ln_2"))
        x = x + MLP(config, name="mlp")(normed, below(tap, "mlp"), mlp_key)
        return tap("resid_post", x), present


class Blocks(nn.Module):
    """The layers in a Python loop: a scan would copy each layer's weights out of a stack on every step."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x, mask, past: tuple[LayerCache, ...] | None, slot, tap: Tap, key, remat: bool):
        one = nn.remat(Block, static_argnums=5) if remat else Block  # 5 is the tap
        presents = []
        for i, block_key in enumerate(split_key(key, self.config.n_layer)):
            layer_past = None if past is None else past[i]
            block = one(self.config, i, name=str(i))
            x, present = block(x, mask, layer_past, slot, below(tap, str(i)), block_key)
            presents.append(present)
        return x, tuple(presents)


class GPT2(nn.Module):
    """The transformer up to the last LayerNorm, `ids[B, T] -> hidden[B, T, D]` and each layer's keys and values.

    `mask[B or 1, 1, T, S]` says which keys each query sees. With `past`, a tuple of caches, the new keys and values
    are written from `slot` on (`int32[]`, or `int32[B]`) and `S` is the cache's length; without, `S` is `T`.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        ids,
        positions,
        mask,
        past: Any = None,
        slot: Any = 0,
        tap: Tap = no_tap,
        dropout_key: Any = None,
        remat: bool = False,
    ):
        config = self.config
        embed_key, blocks_key = split_key(dropout_key, 2)
        tokens = tap("wte.out", self.embed("wte", config.vocab_size)(ids))  # [B, T, D]
        places = jnp.broadcast_to(self.embed("wpe", config.n_positions)(positions), tokens.shape)
        x = tap("embed", dropout(embed_key, tokens + tap("wpe.out", places), config.embd_pdrop))
        x, presents = Blocks(config, name="h")(x, mask, past, slot, below(tap, "h"), blocks_key, remat)
        return LayerNorm(config, name="ln_f")(x, below(tap, "ln_f")), presents

    def embed(self, name: str, rows: int) -> nn.Embed:
        """Returns an embedding table of `rows` rows."""
        config = self.config
        init = normal(config.initializer_range)
        return nn.Embed(
            rows, config.n_embd, dtype=config.dtype, param_dtype=wide_dtype(config), embedding_init=init, name=name
        )
