"""What can be read off the weights: a head's circuits, and equal models that are easier to read.

The names and the simplifications are those of Elhage et al.,
https://transformer-circuits.pub/2021/framework, and of TransformerLens. Functions that simplify
take params and return the config and the params of an equal model. Nothing is jitted, everything
can be. Knows no text.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, head_matrix
from gpt2_jax.modules import dense_kernel
from gpt2_jax.quantised import dequantize
from gpt2_jax.sharding import automatic


class HeadWeights(NamedTuple):
    """The kernels of a layer's heads."""

    q: Float[Array, "H D K"]
    k: Float[Array, "H D K"]
    v: Float[Array, "H D K"]
    o: Float[Array, "H K D"]


# Circuits.


@automatic
def head_weights(params: Params, layer: int, *, config: GPT2Config) -> HeadWeights:
    """Returns the kernels of a layer's heads, cut out of `c_attn` and `c_proj`.

    Examples:
      >>> weights = gpt2_jax.interpretability.circuits.head_weights(params, 0, config=config)
      >>> weights.q.shape, weights.o.shape
      ((2, 16, 8), (2, 8, 16))
    """
    block = params["h"][str(layer)]
    attn = block["attn"]
    n_head = config.n_head
    width = config.head_dim
    # The columns are all heads' queries, then all keys, then all values; each head's lie together.
    qkv = dense_kernel(attn["c_attn"])  # [D, 3HK]
    qkv = qkv.reshape(config.n_embd, 3, n_head, width)
    qkv = jnp.moveaxis(qkv, (1, 2), (0, 1))  # [3, H, D, K]
    out = dense_kernel(attn["c_proj"])  # [HK, D]
    out = out.reshape(n_head, width, config.n_embd)
    return HeadWeights(q=qkv[0], k=qkv[1], v=qkv[2], o=out)


@automatic
def qk_circuit(params: Params, layer: int, head: int, *, config: GPT2Config) -> Float[Array, "D D"]:
    """Returns the form by which a head scores: `q(x) @ k(y) = x @ form @ y`, biases apart.

    `x` and `y` come out of `ln_1`; the scores are this times what the config scales them by. Does
    not compile itself.

    Examples:
      >>> form = gpt2_jax.qk_circuit(params, 0, 1, config=config)
      >>> form.shape, int(jnp.linalg.matrix_rank(form))  # no more than a head is wide
      ((16, 16), 8)
    """
    weights = head_weights(params, layer, config=config)
    query = weights.q[head]
    key = weights.k[head]
    return query @ key.T


@automatic
def ov_circuit(params: Params, layer: int, head: int, *, config: GPT2Config) -> Float[Array, "D D"]:
    """Returns the map from what a head attends to, to what it writes: `x @ ov`, biases apart.

    Does not compile itself.

    Examples:
      >>> weights = gpt2_jax.interpretability.circuits.head_weights(params, 0, config=config)
      >>> form = gpt2_jax.ov_circuit(params, 0, 1, config=config)
      >>> np.allclose(form, weights.v[1] @ weights.o[1], atol=1e-6)
      True
    """
    weights = head_weights(params, layer, config=config)
    value = weights.v[head]
    out = weights.o[head]
    return value @ out


class CircuitSVD(NamedTuple):
    """The singular vectors of a head's circuit, which has no more than K: `(u * s) @ vh`.

    Examples:
      >>> gpt2_jax.CircuitSVD._fields
      ('u', 's', 'vh')
    """

    u: Float[Array, "D K"]  # in the columns, what is read; the query's side of "qk"
    s: Float[Array, " K"]  # the greatest first
    vh: Float[Array, "K D"]  # in the rows, what is written; the key's side


def circuit_svd(
    params: Params, layer: int, head: int, *, config: GPT2Config, circuit: str = "ov"
) -> CircuitSVD:
    """Returns the singular value decomposition of `ov_circuit` or `qk_circuit`.

    `unembed` of a row of `vh` is what a head that has read a column of `u` says (Millidge and
    Black, https://www.lesswrong.com/posts/mkbGjzxD8d8XqKHzA, 2022). Does not compile itself.

    Raises:
      ValueError: `circuit` is neither "ov" nor "qk".

    Examples:
      >>> svd = gpt2_jax.circuit_svd(params, 0, 1, config=config)
      >>> form = gpt2_jax.ov_circuit(params, 0, 1, config=config)
      >>> np.allclose((svd.u * svd.s[None]) @ svd.vh, form, atol=1e-6)
      True
    """
    if circuit not in ("ov", "qk"):
        raise ValueError(f'`circuit` must be "ov" or "qk", got {circuit!r}.')
    weights = head_weights(params, layer, config=config)
    left = weights.v[head] if circuit == "ov" else weights.q[head]  # [D, K]
    right = weights.o[head] if circuit == "ov" else weights.k[head].T  # [K, D]
    # By way of the factors: the product is K numbers in the place of D, and the rest are zeros.
    left_basis, left_part = jnp.linalg.qr(left)
    right_basis, right_part = jnp.linalg.qr(right.T)
    u, s, vh = jnp.linalg.svd(left_part @ right_part.T)
    return CircuitSVD(left_basis @ u, s, vh @ right_basis.T)


class CompositionScores(NamedTuple):
    """How much each head reads what each other wrote: `[L, H, L, H]`, the writer first.

    0 where the writer's layer does not come before the reader's.

    Examples:
      >>> gpt2_jax.CompositionScores._fields
      ('q', 'k', 'v')
    """

    q: Float[Array, "L H L H"]  # in its queries
    k: Float[Array, "L H L H"]
    v: Float[Array, "L H L H"]


def composition_scores(params: Params, *, config: GPT2Config) -> CompositionScores:
    """Returns Q-, K- and V-composition of every two heads, from 0 to 1.

    Frobenius norms of products of two circuits over the products of their norms (Elhage et al.,
    "Two-layer attention-only transformers"), of the weights as they are: `fold_layer_norm` first
    puts the LayerNorms into them, as TransformerLens does. Does not compile itself.

    Examples:
      >>> scores = gpt2_jax.composition_scores(params, config=config)
      >>> scores.q.shape, float(scores.q[1, 0, 0, 0])  # nothing flows back from layer 1 to layer 0
      ((2, 2, 2, 2), 0.0)
    """
    layers = [head_weights(params, layer, config=config) for layer in range(config.n_layer)]
    stacked = jax.tree.map(lambda *kernels: jnp.concatenate(kernels), *layers)  # [LH, ...]
    n_heads = len(stacked.q)
    flipped = stacked.o.swapaxes(1, 2)  # [LH, D, K]
    grams = {
        name: jnp.einsum("ndk,ndj->nkj", kernel, kernel)
        for name, kernel in (("q", stacked.q), ("k", stacked.k), ("v", stacked.v), ("o", flipped))
    }
    ov_norms = _product_norms(grams["v"], grams["o"])

    def scores(reads: str, other: str) -> Float[Array, "LH LH"]:
        """Returns the scores of readers whose circuit is `reads @ other.T`."""
        kernels = getattr(stacked, reads)
        norms = _product_norms(grams[reads], grams[other])

        # A writer at a time: all pairs at once would be a billion numbers in GPT-2 XL.
        def of_writer(writer: tuple[Array, Array]) -> Float[Array, " LH"]:
            out, gram = writer  # [K, D], [K, K]
            # `v @ (out @ reads) @ other.T`, by its K x K middle and the squares of its sides.
            middle = jnp.einsum("kd,ndj->nkj", out, kernels)
            squares = jnp.einsum("kl,nlj,nji,nki->n", gram, middle, grams[other], middle)
            return jnp.sqrt(jnp.maximum(squares, 0))

        product_norms = jax.lax.map(of_writer, (stacked.o, grams["v"]))
        return product_norms / (ov_norms[:, None] * norms[None])

    layer = jnp.arange(n_heads) // config.n_head
    is_before = layer[:, None] < layer[None]
    shape = (config.n_layer, config.n_head) * 2
    found = [scores("q", "k"), scores("k", "q"), scores("v", "o")]
    return CompositionScores(*(jnp.where(is_before, x, 0).reshape(shape) for x in found))


def _product_norms(
    left: Float[Array, "LH K K"], right: Float[Array, "LH K K"]
) -> Float[Array, " LH"]:
    """Returns the Frobenius norm of `a @ b.T` from `a.T @ a` and `b.T @ b`, of each head."""
    return jnp.sqrt((left * right).sum(axis=(1, 2)))


# Equal models.


@automatic
def untie(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns the same model with a head of its own, a copy of its embeddings unless it has one."""
    # What is folded into the head must not reach the embeddings, with which it is one matrix.
    lm_head = {"embedding": head_matrix(params, config=config)}
    untied = config.replace(tie_word_embeddings=False)
    # A new dict at the top: the caller's params stay what they were.
    return untied, params | {"lm_head": lm_head}


@automatic
def fold_layer_norm(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns an equal model whose LayerNorms only normalise.

    Their weights and biases are in the layers that follow. The head has no bias that could take up
    `ln_f`'s, so this one stays, divided by the weight. Weights of `ln_f` that are 0 stay too. Does
    not compile itself.

    Examples:
      >>> same_config, same = gpt2_jax.fold_layer_norm(params, config=config)
      >>> logits = gpt2_jax.apply(same, ids, config=same_config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config), atol=1e-5)
      True
    """
    config, params = untie(params, config=config)
    blocks = {name: _fold_block(block) for name, block in params["h"].items()}

    norm = params["ln_f"]
    weight = norm["scale"]
    # Where the weight is 0 the head reads nothing, and 0 / 0 would be NaN.
    divisor = jnp.where(weight == 0, 1, weight)
    ln_f = {"scale": weight / divisor}
    if "bias" in norm:
        ln_f["bias"] = norm["bias"] / divisor
    head = head_matrix(params, config=config)
    lm_head = {"embedding": head * divisor[None]}
    folded = {"h": blocks, "ln_f": ln_f, "lm_head": lm_head}
    return config, params | folded


def _fold_block(block: Params) -> Params:
    """Returns a block whose LayerNorms only normalise."""
    attn = block["attn"]
    mlp = block["mlp"]
    c_attn = _behind_plain_norm(attn["c_attn"], block["ln_1"])
    c_fc = _behind_plain_norm(mlp["c_fc"], block["ln_2"])
    return {
        "ln_1": _plain_norm(block["ln_1"]),
        "attn": attn | {"c_attn": c_attn},
        "ln_2": _plain_norm(block["ln_2"]),
        "mlp": mlp | {"c_fc": c_fc},
    }


def _plain_norm(norm: Params) -> Params:
    """Returns a LayerNorm that only normalises."""
    plain = {"scale": jnp.ones_like(norm["scale"])}
    if "bias" in norm:
        plain["bias"] = jnp.zeros_like(norm["bias"])
    return plain


def _behind_plain_norm(dense: Params, norm: Params) -> Params:
    """Returns a layer that does what a LayerNorm's weight and bias did before it.

    `(n * weight + bias) @ kernel = n @ (weight * kernel) + bias @ kernel`.
    """
    kernel = dense_kernel(dense)
    behind = {"kernel": norm["scale"][:, None] * kernel}
    if "bias" in norm:
        behind["bias"] = dense["bias"] + norm["bias"] @ kernel
    return behind


@automatic
def center_writing_weights(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns an equal model that writes nothing along (1, 1, ..., 1).

    Every LayerNorm takes that direction away, so that nobody reads what is written along it. Does
    not compile itself.

    Examples:
      >>> same_config, same = gpt2_jax.center_writing_weights(params, config=config)
      >>> logits = gpt2_jax.apply(same, ids, config=same_config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config), atol=1e-5)
      True
    """
    # Untied first: as the head, the centred table would give other logits.
    config, params = untie(dequantize(params), config=config)

    def center(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        embeds = name.startswith(("wte", "wpe"))
        projects = ".c_proj." in name  # the kernel, whose last axis is D, and the bias
        if embeds or projects:
            return _centred(leaf, axis=-1)
        return leaf

    return config, jax.tree_util.tree_map_with_path(center, params)


@automatic
def center_unembed(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns a model of equal probabilities whose logits have a mean of 0 over the vocabulary.

    Does not compile itself.

    Examples:
      >>> same_config, same = gpt2_jax.center_unembed(params, config=config)
      >>> logits = gpt2_jax.apply(same, ids, config=same_config)
      >>> np.allclose(logits.mean(axis=-1), 0, atol=1e-5)
      True
    """
    # A number that is added to all logits alike is nothing to the softmax.
    config, params = untie(params, config=config)
    head = head_matrix(params, config=config)
    lm_head = {"embedding": _centred(head, axis=0)}
    return config, params | {"lm_head": lm_head}


def _centred(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    mean = x.mean(axis=axis, keepdims=True)
    return x - mean
