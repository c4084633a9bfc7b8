"""What can be read off the weights: each head's own, its QK and OV circuits, and equal models that are easier to read.

The names and the simplifications are those of Elhage et al., https://transformer-circuits.pub/2021/framework, and of
TransformerLens. Functions that simplify take params and return the config and the params of an equal model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params


class HeadWeights(NamedTuple):
    """The kernels of a layer's heads."""

    q: Array  # [H, D, K]
    k: Array  # [H, D, K]
    v: Array  # [H, D, K]
    o: Array  # [H, K, D]


def head_weights(params: Params, layer: int, *, config: GPT2Config) -> HeadWeights:
    """Returns the kernels of a layer's heads, cut out of `c_attn` and `c_proj`."""
    attn = params["h"][str(layer)]["attn"]
    qkv = attn["c_attn"]["kernel"].reshape(config.n_embd, 3, config.n_head, config.head_dim)
    q, k, v = jnp.moveaxis(qkv, (1, 2), (0, 1))  # [H, D, K] each
    return HeadWeights(
        q, k, v, attn["c_proj"]["kernel"].reshape(config.n_head, config.head_dim, config.n_embd)
    )


def qk_circuit(params: Params, layer: int, head: int, *, config: GPT2Config) -> Array:
    """Returns the bilinear form `[D, D]` by which a head scores: `q(x) @ k(y) = x @ qk @ y`, biases apart."""
    weights = head_weights(params, layer, config=config)
    return weights.q[head] @ weights.k[head].T


def ov_circuit(params: Params, layer: int, head: int, *, config: GPT2Config) -> Array:
    """Returns the map `[D, D]` from what a head attends to, to what it writes: `x @ ov`, biases apart."""
    weights = head_weights(params, layer, config=config)
    return weights.v[head] @ weights.o[head]


def unembedding(params: Params, config: GPT2Config) -> Array:
    """Returns the head's matrix, `[V, D]`."""
    return params["wte" if config.tie_word_embeddings else "lm_head"]["embedding"]


def untie(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns the same model with a head of its own, a copy of its embeddings unless it has one."""
    return config.replace(tie_word_embeddings=False), params | {
        "lm_head": {"embedding": unembedding(params, config)}
    }


def fold_layer_norm(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns an equal model whose LayerNorms only normalise: their weights and biases are in the layers that follow.

    The head has no bias that could take up `ln_f`'s, so this one stays, divided by the weight. Weights of `ln_f` that
    are 0 stay too.
    """
    config, params = untie(params, config=config)
    blocks = {}
    for name, block in params["h"].items():
        ln_1, c_attn = _fold(block["ln_1"], block["attn"]["c_attn"])
        ln_2, c_fc = _fold(block["ln_2"], block["mlp"]["c_fc"])
        blocks[name] = {"ln_1": ln_1, "attn": block["attn"] | {"c_attn": c_attn}}
        blocks[name] |= {"ln_2": ln_2, "mlp": block["mlp"] | {"c_fc": c_fc}}
    weight, bias = params["ln_f"]["scale"], params["ln_f"]["bias"]
    by = jnp.where(weight == 0, 1, weight)
    ln_f, head = (
        {"scale": weight / by, "bias": bias / by},
        {"embedding": unembedding(params, config) * by[None]},
    )
    return config, params | {"h": blocks, "ln_f": ln_f, "lm_head": head}


def center_writing_weights(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns an equal model that writes nothing along (1, 1, ..., 1), which every LayerNorm takes away."""
    config, params = untie(params, config=config)

    def center(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        writes = name.startswith(("wte", "wpe")) or ".c_proj." in name
        return leaf - leaf.mean(axis=-1, keepdims=True) if writes else leaf

    return config, jax.tree_util.tree_map_with_path(center, params)


def center_unembed(params: Params, *, config: GPT2Config) -> tuple[GPT2Config, Params]:
    """Returns a model of equal probabilities whose logits have a mean of 0 over the vocabulary."""
    config, params = untie(params, config=config)
    head = params["lm_head"]["embedding"]
    return config, params | {"lm_head": {"embedding": head - head.mean(axis=0, keepdims=True)}}


def _fold(norm: Params, dense: Params) -> tuple[Params, Params]:
    """Returns a LayerNorm that only normalises, and the layer behind it that does the rest."""
    kernel, weight, bias = dense["kernel"], norm["scale"], norm["bias"]
    folded = {"kernel": kernel * weight[:, None], "bias": dense["bias"] + bias @ kernel}
    return {"scale": jnp.ones_like(weight), "bias": jnp.zeros_like(bias)}, folded
