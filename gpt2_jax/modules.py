"""GPT-2 as linen modules: one forward pass.

Knows nothing of what it is for; scoring, prefill and decoding are the caller's.

Axes: B batch, T query length, S key/cache length, H heads, K head width, D model width, F MLP
width, V vocabulary; I and O, the input and the output of a dense layer; `rows`, B unless a tap
makes the batch grow.

Precision, in one place: matrix products and activations run in `config.dtype` with
`config.precision`; LayerNorm statistics, attention scores, softmax and logits are in
`wide_dtype(config)`, float32 or better. Parameters come in any dtype and are cast where they are
used.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax import cache as kv_cache
from gpt2_jax import quantised
from gpt2_jax.cache import LayerCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.kernels import normal, query_parts
from gpt2_jax.products import keeps_dense_products, product
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.quantised import Quantised
from gpt2_jax.sharding import BATCH_AXES, TENSOR, constrain, mesh_of, n_batch_shards, n_parts
from gpt2_jax.stack import is_stacked

Params = dict[str, Any]  # a nested dict of arrays, under the checkpoint's names
# (site, activation) -> activation: what reads or changes activations.
Tap = Callable[[str, Array], Array]

# A config shapes programs and holds no array: to JAX it is a pytree without leaves, so that
# `jax.jit` of a function that takes one needs no `static_argnames`.
jax.tree_util.register_static(GPT2Config)

# HF's names (transformers/activations.py) -> functions.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": nn.gelu,  # the tanh approximation, which OpenAI trained with
    "gelu_pytorch_tanh": nn.gelu,
    "gelu_python_tanh": nn.gelu,
    "gelu_accurate": nn.gelu,
    # HF's "gelu" is the exact one; linen's function approximates unless it is told not to.
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_python": lambda x: nn.gelu(x, approximate=False),
    # HF writes sqrt(2 / pi) with ten digits here: in float64 this is not `gelu_new`.
    "gelu_fast": lambda x: 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_10": lambda x: jnp.clip(nn.gelu(x, approximate=False), -10, 10),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "relu6": nn.relu6,
    # Of slope 0.01, the default of PyTorch and of JAX alike.
    "leaky_relu": nn.leaky_relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "linear": lambda x: x,
}


def activated(x: Float[Array, "B T F"], config: GPT2Config) -> Float[Array, "B T F"]:
    """Returns what the MLP's activation function makes of `x`, in the dtype of the model.

    A backward pass computes it anew: of each layer, what it has in between is several times `x`.
    """

    def run(x):
        # Wide: rounded once, not after each operation.
        return ACTIVATIONS[config.activation_function](x.astype(wide_dtype(config)))

    return jax.checkpoint(run)(x).astype(config.dtype)


# What a backward pass recomputes of each layer: JAX's policy of what is kept, None for nothing.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    # All but the outputs of the dense layers, which are the dearest: attention and what is done
    # element by element.
    "dots": keeps_dense_products,
    "full": None,
}


def wide_dtype(config: GPT2Config) -> jnp.dtype:
    """Returns the dtype of statistics, softmax and logits: float32, or float64 in such a model."""
    # By promotion, not by a table of cases: the dtypes of 16 bits widen, float64 stays.
    return jnp.promote_types(config.dtype, jnp.float32)


def dense_kernel(layer: Params) -> Float[Array, "I O"]:
    """Returns the kernel of a `Dense` layer's params, for those who only read weights."""
    return quantised.kernel_of(layer["kernel"])


# Taps.


def no_tap(site: str, x: Array) -> Array:
    """Leaves every activation as it is."""
    del site
    return x


def wants(tap: Tap, site: str) -> bool:
    """Returns whether a tap wants a site: what its method `wants(site)` says, or else any.

    What none wants is not computed.
    """
    # By identity, and first: `no_tap` has no method `wants`, and would seem to want every site.
    if tap is no_tap:
        return False
    wants_site = getattr(tap, "wants", None)
    return wants_site is None or wants_site(site)


class PrefixedTap:
    """A tap as seen by a submodule, which names its sites without the prefix."""

    # A class and not a closure: `wants` must pass through the prefix as well.
    def __init__(self, tap: Tap, prefix: str):
        self.tap = tap
        self.prefix = prefix

    def __call__(self, site: str, x: Array) -> Array:
        return self.tap(f"{self.prefix}.{site}", x)

    def wants(self, site: str) -> bool:
        return wants(self.tap, f"{self.prefix}.{site}")


def prefixed(tap: Tap, prefix: str) -> Tap:
    """Returns the tap for the submodule `prefix`."""
    # `no_tap` stays itself, so that `wants` knows it in every submodule.
    return tap if tap is no_tap else PrefixedTap(tap, prefix)


def placed(tap: Tap, positions: Int[Array, "#B T"]) -> Tap:
    """Returns the tap for a pass over tokens at these positions: its method `placed` says which."""
    at_positions = getattr(tap, "placed", None)
    return tap if at_positions is None else at_positions(positions)


def repeated(tap: Tap, n: int) -> Tap:
    """Returns the tap for a batch with each row `n` times: its method `repeated` says which.

    Row `b * n + i` of such a batch is row `b`, as for `cache.share`.
    """
    of_copies = getattr(tap, "repeated", None)
    return tap if of_copies is None else of_copies(n)


# Dropout.


def dropout(key: Array | None, x: Array, rate: float) -> Array:
    """Zeroes each element with probability `rate` and rescales the rest.

    Without a key it returns `x`. PyTorch's law: linen's attention dropout would share one mask
    among the rows and heads.
    """
    # Not left to the mask: at rate 0 its random bits would still be drawn, in every layer.
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def split_key(key: Array | None, count: int) -> list[Array] | list[None]:
    """Splits a dropout key that may be absent."""
    if key is None:
        # As many as there would be keys, so that callers unpack and zip without asking.
        return [None] * count
    return list(jax.random.split(key, count))


# The layers.


@dataclass
class Pass:
    """What every layer of one forward pass shares."""

    positions: Int[Array, "#B T"]
    mask: Bool[Array, "#B #H T S"]  # which keys each query sees
    past: tuple[LayerCache, ...] | None = None  # the cache that new keys and values are written to
    slot: Any = 0  # and where: int32[], or int32[B]
    is_causal: bool = static(default=True)  # whether no query sees a key after itself


class Dense(nn.Module):
    """`x @ kernel + bias`, if any, `[..., I] -> [..., O]`: the one door to kernels.

    The product runs on flattened tokens: over three axes XLA's weight gradient is twice as slow on
    CPU. With `parts` the kernel is several side by side, `[I, P O]`, and the result `[..., P, O]`.
    """

    config: GPT2Config
    features: int
    stddev: float  # of the initial kernel
    cut: str  # which axis of the kernel the devices along `tensor` share: "I" or "O"
    parts: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "..."]:
        config = self.config
        wide = wide_dtype(config)
        n_columns = self.parts * self.features
        # Fresh params are wide even where the model computes in 16 bits; those that are given stay
        # in the dtype they came in.
        kernel = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantised):
            kernel = self.param("kernel", normal(self.stddev), (x.shape[-1], n_columns), wide)

        if self.cut == "O":
            # Whole on each device: else XLA cuts what comes before, and sums there, too.
            x = constrain(x, BATCH_AXES)
        tokens = x.reshape(-1, x.shape[-1]).astype(config.dtype)
        if isinstance(kernel, Quantised):
            out = self.quantised_product(tokens, kernel)
        else:
            out = self.product(tokens, kernel.astype(config.dtype))
        if config.bias:
            bias = self.param("bias", nn.initializers.zeros, (n_columns,), wide)
            # With its row axis, for programs that forbid ranks to be promoted in silence. Wide, so
            # that its gradient is no sum of 16 bits.
            bias = bias.astype(wide).reshape(1, *out.shape[1:])
            out = (out.astype(wide) + bias).astype(config.dtype)
        columns = (self.features,) if self.parts == 1 else (self.parts, self.features)
        out = out.reshape(*x.shape[:-1], *columns)
        between = [None] * (out.ndim - 2)
        return constrain(out, BATCH_AXES, *between, None if self.cut == "I" else TENSOR)

    def product(
        self, tokens: Float[Array, "N I"], kernel: Float[Array, "I PO"]
    ) -> Float[Array, "N ..."]:
        """Returns `tokens @ kernel`, `[N, P O]`, or `[N, P, O]` where devices share each part."""
        config = self.config
        n_rows = len(kernel)
        n_devices = n_parts(kernel, TENSOR, self.features)
        n_tokens = tokens.shape[0] // n_batch_shards(mesh_of(kernel))
        # A device's columns of each part do not lie side by side. Either the sums of all columns,
        # `[N, P O]`, go between devices, or their columns of the kernel: what is less.
        is_shared = self.parts > 1 and n_devices > 1
        if is_shared and 2 * n_tokens * n_devices > n_rows:
            # First what lies along `fsdp`: in one step XLA would gather all of it.
            kernel = constrain(kernel, TENSOR).reshape(n_rows, self.parts, self.features)
            kernel = constrain(constrain(kernel, TENSOR), None, None, TENSOR)
            return jnp.einsum("ni,ipo->npo", tokens, kernel, precision=config.precision)
        # As it lies; what is spread along `fsdp` is gathered here, in the dtype of the product.
        by_columns = self.cut == "O" and self.parts == 1
        kernel = constrain(kernel, None, TENSOR) if by_columns else constrain(kernel, TENSOR)
        return product(tokens, kernel, precision=config.precision)

    def quantised_product(
        self, tokens: Float[Array, "N I"], kernel: Quantised
    ) -> Float[Array, "N PO"]:
        """Returns what `product` does, by a kernel of 8 bits, in `config.dtype`."""
        by_columns = self.cut == "O" and self.parts == 1
        place = (TENSOR,) if by_columns else (None, TENSOR)
        kernel = Quantised(constrain(kernel.values, *place), constrain(kernel.scale, *place[:1]))
        return quantised.product(tokens, kernel, self.config.precision).astype(self.config.dtype)


class LayerNorm(nn.Module):
    """Linen's LayerNorm, bit for bit, with its scale in view, `[..., D] -> [..., D]`.

    The variance is a two-pass one: linen's default, E[x^2] - E[x]^2, cancels.
    """

    config: GPT2Config

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], tap: Tap = no_tap) -> Float[Array, "... D"]:
        wide = wide_dtype(self.config)
        width = x.shape[-1]
        weight = self.param("scale", nn.initializers.ones, (width,), wide)
        # With all axes of `x`, so that nothing relies on silent broadcasting of ranks.
        aligned = (1,) * (x.ndim - 1) + (width,)
        weight = weight.reshape(aligned)

        x = x.astype(wide)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        variance += self.config.layer_norm_epsilon
        inverse = lax.rsqrt(variance)  # [..., 1]
        if wants(tap, "scale"):
            # Not `1 / tap(...)`: this factor is exactly 1 where the tap changes nothing, so that a
            # tap which only looks leaves every later bit as it is.
            scale = jnp.sqrt(variance)
            inverse *= scale / tap("scale", scale)
        # In the order of linen's products: `(centred * inverse) * weight` rounds otherwise.
        normed = centred * (inverse * weight)
        if self.config.bias:
            bias = self.param("bias", nn.initializers.zeros, (width,), wide)
            normed += bias.reshape(aligned)
        return tap("out", normed.astype(self.config.dtype))


class InputChanges(NamedTuple):
    """By how much a tap has changed what each head reads, behind `ln_1`; None where not at all."""

    q: Float[Array, "B T H D"] | None = None
    k: Float[Array, "B T H D"] | None = None
    v: Float[Array, "B T H D"] | None = None


def input_changes(norm: LayerNorm, x: Float[Array, "B T D"], n_head: int, tap: Tap) -> InputChanges:
    """Shows a tap the stream before `ln_1` as each head reads it, and returns what it changed.

    A head's queries, keys and values each have a copy, which passes `ln_1` on its own.
    """
    # Only for those who ask: each copy is H times the stream.
    if not any(wants(tap, site) for site in ("in", "q_in", "k_in", "v_in")):
        return InputChanges()
    n_rows, length, width = x.shape
    stream = jnp.broadcast_to(x[:, :, None], (n_rows, length, n_head, width))
    forked = tap("in", stream)
    changes = []
    for site in ("q_in", "k_in", "v_in"):
        read = tap(site, forked)
        # A tap that only looks returns what it got, and nothing is computed; for one that returns
        # the same numbers the difference is exactly 0.
        changes.append(None if read is stream else norm(read) - norm(stream))
    return InputChanges(*changes)


class Attention(nn.Module):
    """Causal self-attention, `[B, T, D] -> [B, T, D]`, over its own keys or a cache's."""

    config: GPT2Config
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: Pass,
        tap: Tap,
        key: Array | None,
        changes: InputChanges,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        config = self.config
        pattern_key, out_key = split_key(key, 2)

        # The columns of `c_attn` are the queries of all heads, then all keys, then all values.
        stddev = config.initializer_range
        qkv = Dense(config, config.n_embd, stddev, cut="O", parts=3, name="c_attn")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, config.n_head, config.head_dim)  # [B, T, 3, H, K]
        # Where the heads do not divide, the columns may: then each device has all heads.
        qkv = constrain(qkv, BATCH_AXES, None, None, TENSOR)
        q, k, v = jnp.unstack(qkv, axis=2)  # [B, T, H, K] each
        # Before anything is written: a key or value that a tap has changed is what the cache keeps.
        q = tap("q", self.read_anew(q, changes.q, 0))
        k = tap("k", self.read_anew(k, changes.k, 1))
        v = tap("v", self.read_anew(v, changes.v, 2))
        if shared.past is None:
            present = kv_cache.layer_of(k, v)
        else:
            present = kv_cache.write(shared.past[self.layer], k, v, shared.slot)

        # Parts leave out keys after their queries, which another mask may show; they count keys
        # from the first query on, which a past would come before; and a tap wants the whole square.
        whole = shared.past is not None or not shared.is_causal
        whole = whole or wants(tap, "scores") or wants(tap, "pattern")
        attend = self.attend if whole else self.attend_in_parts
        z = tap("z", attend(q, present, shared.mask, tap, pattern_key))  # [B, T, H, K]
        stddev = residual_stddev(config)
        out = Dense(config, config.n_embd, stddev, cut="I", name="c_proj")(z.reshape(x.shape))
        # Only for those who ask: `[B, T, H, D]` is H times the stream.
        if wants(tap, "result"):
            # Not the sum of the results anew: this is exactly 0 where the tap changes nothing.
            result = self.result(z)
            out += (tap("result", result) - result).sum(axis=2)
        out = dropout(out_key, out, config.resid_pdrop)
        return tap("out", out), present

    def read_anew(
        self, heads: Float[Array, "B T H K"], change: Float[Array, "B T H D"] | None, kind: int
    ) -> Float[Array, "B T H K"]:
        """Returns queries (0), keys (1) or values (2) of heads whose inputs have changed."""
        if change is None:
            return heads
        # By way of the scope, as in `result`: `c_attn` reads one input for all heads.
        kernel = dense_kernel(self.variables["params"]["c_attn"]).astype(change.dtype)
        by_head = kernel.reshape(-1, 3, *heads.shape[2:])[:, kind]  # [D, H, K]
        precision = self.config.precision
        return heads + jnp.einsum("bthd,dhk->bthk", change, by_head, precision=precision)

    def attend_in_parts(
        self,
        q: Float[Array, "B T H K"],
        present: LayerCache,
        mask: Bool[Array, "#B #H T T"],
        tap: Tap,
        key: Array | None,
    ) -> Float[Array, "B T H K"]:
        """Returns what `attend` does for a text that sees itself, without most masked scores."""
        del tap  # nobody wants what happens inside
        parts = query_parts(q.shape[1])
        zs = []
        for (start, end), part_key in zip(parts, split_key(key, len(parts)), strict=True):
            keys_and_values = kv_cache.first_slots(present, end)
            part_mask = mask[:, :, start:end, :end]
            zs.append(self.attend(q[:, start:end], keys_and_values, part_mask, no_tap, part_key))
        return jnp.concatenate(zs, axis=1)

    def attend(
        self,
        q: Float[Array, "B T H K"],
        present: LayerCache,
        mask: Bool[Array, "#B #H T S"],
        tap: Tap,
        key: Array | None,
    ) -> Float[Array, "B T H K"]:
        """Returns the values that each query mixes."""
        config = self.config
        wide = wide_dtype(config)
        scores = kv_cache.scores(q, present, precision=config.precision, dtype=wide)
        # Tapped before the mask: no edit lets a query see what it must not. The scale is a Python
        # float, which is weakly typed: the scores stay in their dtype.
        scores = tap("scores", scores * self.scale())  # [B, H, T, S]
        # The least finite number, not -inf: a row with nothing to attend to becomes uniform instead
        # of NaN.
        pattern = nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)
        # Dropped after the softmax, as in HF's code: in training, rows do not sum to 1.
        pattern = tap("pattern", dropout(key, pattern, config.attn_pdrop))
        return kv_cache.mix(pattern, present, precision=config.precision, dtype=q.dtype)

    def result(self, z: Float[Array, "B T H K"]) -> Float[Array, "B T H D"]:
        """Returns what each head adds to the residual stream, before the bias."""
        # By way of the scope: `c_proj` gives out its product alone, in which the heads are summed.
        kernel = dense_kernel(self.variables["params"]["c_proj"]).astype(z.dtype)
        by_head = kernel.reshape(*z.shape[2:], -1)  # [H, K, D]
        return jnp.einsum("bthk,hkd->bthd", z, by_head, precision=self.config.precision)

    def scale(self) -> float:
        """Returns what the scores are multiplied by (HF's `scale_attn_*` flags)."""
        scale = 1.0
        if self.config.scale_attn_weights:
            scale = self.config.head_dim**-0.5
        if self.config.scale_attn_by_inverse_layer_idx:
            # Layers count from 0, what HF divides by from 1.
            scale /= self.layer + 1
        return scale


class MLP(nn.Module):
    """Position-wise feed-forward layer, `[B, T, D] -> [B, T, D]`."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], tap: Tap, key: Array | None
    ) -> Float[Array, "B T D"]:
        config = self.config
        width = config.mlp_width
        stddev = config.initializer_range
        x = Dense(config, width, stddev, cut="O", name="c_fc")(x)  # [B, T, F]
        x = tap("pre", x)
        x = tap("post", activated(x, config))
        stddev = residual_stddev(config)
        x = Dense(config, config.n_embd, stddev, cut="I", name="c_proj")(x)  # [B, T, D]
        return tap("out", dropout(key, x, config.resid_pdrop))


class Block(nn.Module):
    """One layer: two residual lines, each behind its LayerNorm."""

    config: GPT2Config
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: Pass,
        tap: Tap,
        key: Array | None,
    ) -> tuple[Float[Array, "rows T D"], LayerCache]:
        config = self.config
        attn_key, mlp_key = split_key(key, 2)
        x = tap("resid_pre", x)
        attn_tap = prefixed(tap, "attn")
        ln_1 = LayerNorm(config, name="ln_1")
        changes = input_changes(ln_1, x, config.n_head, attn_tap)
        normed = ln_1(x, prefixed(tap, "ln_1"))
        attn = Attention(config, self.layer, name="attn")
        attended, present = attn(normed, shared, attn_tap, attn_key, changes)
        x = tap("resid_mid", x + attended)
        mlp_tap = prefixed(tap, "mlp")
        # What the MLP reads alone: the stream goes on as it is.
        normed = LayerNorm(config, name="ln_2")(mlp_tap("in", x), prefixed(tap, "ln_2"))
        x = x + MLP(config, name="mlp")(normed, mlp_tap, mlp_key)
        return tap("resid_post", x), present


class Blocks(nn.Module):
    """The layers, or those of a range, in a Python loop.

    A scan, as in `scan_blocks`, would copy each layer's weights out of a stack on every step.
    """

    config: GPT2Config
    layers: range | None = None  # all of them by default

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: Pass,
        tap: Tap,
        key: Array | None,
        remat: str,
    ) -> tuple[Float[Array, "rows T D"], tuple[LayerCache, ...]]:
        presents = []
        n_layer = self.config.n_layer
        block_keys = split_key(key, n_layer)
        # Not `or`: a range may be empty.
        layers = range(n_layer) if self.layers is None else self.layers
        for i in layers:
            layer_tap = prefixed(tap, str(i))

            # The tap is bound here: what `remat` passes on must be arrays.
            def run(block, x, shared, key, tap=layer_tap):
                return block(x, shared, tap, key)

            if remat != "none":
                run = nn.remat(run, policy=REMAT[remat])
            block = Block(self.config, i, name=str(i))
            x, present = run(block, x, shared, block_keys[i])
            presents.append(present)
        return x, tuple(presents)


def scan_blocks(
    stack: Params,
    x: Float[Array, "B T D"],
    shared: Pass,
    key: Array | None,
    *,
    config: GPT2Config,
    remat: str,
) -> Float[Array, "B T D"]:
    """Returns what `Blocks` returns for layers that are a stack: see `stack.stack_layers`."""

    def run(x: Array, layer: tuple[Params, Array | None]) -> tuple[Array, None]:
        params, layer_key = layer
        # Its number is what no two layers differ in: `forward` has seen to that.
        block = Block(config, 0, parent=None)
        out: Any = block.apply({"params": params}, x, shared, no_tap, layer_key)
        return out[0], None

    if remat != "none":
        # A scan keeps what it recomputes apart by itself.
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=False)
    keys = None if key is None else jax.random.split(key, config.n_layer)
    x, _ = lax.scan(run, x, (stack, keys))
    return x


class GPT2(nn.Module):
    """The transformer up to the last LayerNorm, and each layer's keys and values.

    It reads ids, or embeddings in their place.

    With `shared.past`, `S`, the last axis of the mask, is the cache's length; without, `S` is `T`.
    """

    config: GPT2Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T D"],
        shared: Pass,
        tap: Tap = no_tap,
        dropout_key: Array | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "rows T D"], tuple[LayerCache, ...]]:
        config = self.config
        embed_key, blocks_key = split_key(dropout_key, 2)
        if jnp.issubdtype(tokens.dtype, jnp.integer):
            # An id beyond the table reads NaN, not the last row, as `jnp.take` does, which linen
            # calls.
            tokens = self.embed_tokens(tokens)
        tokens = constrain(tokens, BATCH_AXES)
        tokens = tap("wte.out", tokens.astype(config.dtype))  # [B, T, D]
        places = self.embed("wpe", config.n_positions)(shared.positions)  # [B or 1, T, D]
        # One row of positions may serve all rows, but a tap may want another in each.
        places = tap("wpe.out", jnp.broadcast_to(places, tokens.shape))
        x = tap("embed", dropout(embed_key, tokens + places, config.embd_pdrop))
        stack = self.variables.get("params", {}).get("h")
        if stack is not None and is_stacked({"h": stack}):
            x = scan_blocks(stack, x, shared, blocks_key, config=config, remat=remat)
            presents = ()
        else:
            blocks = Blocks(config, name="h")
            x, presents = blocks(x, shared, prefixed(tap, "h"), blocks_key, remat)
        return LayerNorm(config, name="ln_f")(x, prefixed(tap, "ln_f")), presents

    def embed_tokens(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the embeddings of tokens."""
        table = self.variables.get("params", {}).get("wte", {}).get("embedding")
        if isinstance(table, Quantised):
            return quantised.take(table, ids)
        return self.embed("wte", self.config.vocab_size)(ids)

    def embed(self, name: str, rows: int) -> nn.Embed:
        """Returns an embedding table of `rows` rows."""
        return nn.Embed(
            rows,
            self.config.n_embd,
            dtype=self.config.dtype,
            param_dtype=wide_dtype(self.config),
            embedding_init=normal(self.config.initializer_range),
            name=name,
        )


def checked_remat(remat: str | bool) -> str:
    """Returns the name of what is recomputed; True is "full" and False "none".

    Raises:
      ValueError: it is none of `REMAT`.
    """
    if isinstance(remat, bool):
        return "full" if remat else "none"
    if not isinstance(remat, str) or remat not in REMAT:
        expected = ", ".join(f'"{name}"' for name in REMAT)
        raise ValueError(f"`remat` must be one of {expected}, got {remat!r}.")
    return remat


def residual_stddev(config: GPT2Config) -> float:
    """Returns the initial deviation of what writes to the residual stream.

    The GPT-2 paper, section 2.3.
    """
    return config.initializer_range / math.sqrt(2 * config.n_layer)
