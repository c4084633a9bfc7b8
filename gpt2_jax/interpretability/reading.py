"""Methods that read a model: attention patterns, lenses, who wrote a logit, directions.

Each is a few lines over `capture`. Building blocks as `apply` is: nothing is jitted, everything
jits, vmaps and differentiates. Texts are right-padded. Knows nothing of patching.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.circuits import head_weights
from gpt2_jax.interpretability.taps import (
    Acts,
    AnyArray,
    add,
    at_last_token,
    by_layer,
    capture,
    find_sites,
)
from gpt2_jax.model import Params, head_matrix, unembed
from gpt2_jax.modules import LayerNorm, wide_dtype
from gpt2_jax.sharding import automatic

# A function of the logits after each row's last token, `[B, V]`, such as a difference of two.
Metric = Callable[[Array], Array]


@automatic
def attention_patterns(
    params: Params, ids: Int[ArrayLike, "B T"], *, config: GPT2Config
) -> Float[Array, "L B H T T"]:
    """Returns how much each token attends to each; rows sum to 1.

    Raises:
      ValueError: as `apply`.
    """
    _, acts = capture(params, ids, config=config, sites="h.*.attn.pattern")
    return by_layer(acts, "attn.pattern")


# Lenses: what a residual stream says of the next token.


@automatic
def logit_lens(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    translators: tuple[Float[AnyArray, "_ D D"], Float[AnyArray, "_ D"]] | None = None,
) -> Float[Array, "N B T V"]:
    """Returns the logits that each residual stream would give if it were the last, `N = L + 1`.

    The streams are those before each layer, and the one after the last, whose logits are the
    model's own (nostalgebraist, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru, 2020).

    Args:
      params, ids, config: as for `apply`.
      translators: a tuned lens (Belrose et al., https://arxiv.org/abs/2303.08112), kernels
        `[L, D, D]` and biases `[L, D]`: the stream `x` before layer `i` is read as
        `x + x @ kernels[i] + biases[i]`.

    Raises:
      ValueError: as `apply`, or `translators` are not of these shapes.
    """
    sites = ("h.*.resid_pre", f"h.{config.n_layer - 1}.resid_post")
    _, acts = capture(params, ids, config=config, sites=sites)
    # Each layer's `resid_post` is the next one's `resid_pre`: only the last adds a stream.
    streams = by_layer(acts, "resid_pre")  # [L, B, T, D]
    final = by_layer(acts, "resid_post")  # [1, B, T, D]
    if translators is not None:
        kernels, biases = translators
        _check_translators(kernels, biases, config)
        translated = jnp.einsum("lbtd,lde->lbte", streams, kernels)
        streams += translated + biases[:, None, None]
    streams = jnp.concatenate([streams, final])
    return stream_logits(params, streams, config=config)


def _check_translators(kernels: AnyArray, biases: AnyArray, config: GPT2Config) -> None:
    biases_shape = [config.n_layer, config.n_embd]
    kernels_shape = [*biases_shape, config.n_embd]
    got_kernels = list(kernels.shape)
    got_biases = list(biases.shape)
    if got_kernels != kernels_shape or got_biases != biases_shape:
        expected = f"kernels {kernels_shape} and biases {biases_shape}"
        raise ValueError(f"`translators` must be {expected}, got {got_kernels} and {got_biases}.")


@automatic
def stream_logits(
    params: Params, x: Float[Array, "... D"], *, config: GPT2Config
) -> Float[Array, "... V"]:
    """Returns the logits of residual streams: the last LayerNorm, and the head."""
    final_norm = LayerNorm(config)
    # The layer by itself: linen asks only for the params of the module that is applied.
    normed: Any = final_norm.apply({"params": params["ln_f"]}, x)
    return unembed(params, normed, config=config)


# Who wrote a logit.


class LogitAttribution(NamedTuple):
    """What each part adds to the logit of a token at each position. The parts sum to the logit."""

    wte: Float[Array, "B T"]
    wpe: Float[Array, "B T"]
    heads: Float[Array, "L B T H"]
    attn_bias: Float[Array, "L B T"]  # `c_proj`'s
    mlps: Float[Array, "L B T"]
    ln_f_bias: Float[Array, "B T"]


@automatic
def direct_logit_attribution(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    targets: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
) -> LogitAttribution:
    """Divides the logits of `targets` among what was written to the residual stream.

    The last LayerNorm is linear once its scale is held: a part `c` of the stream adds
    `(c - mean(c)) / scale * weight @ head` to a logit. A difference of two logits is divided by the
    difference of two results.

    Raises:
      ValueError: as `apply`.
    """
    sites = ("wte.out", "wpe.out", "h.*.attn.z", "h.*.mlp.out", "ln_f.scale")
    _, acts = capture(params, ids, config=config, sites=sites)
    scale = acts["ln_f.scale"]  # [B, T, 1]
    head = head_matrix(params, config=config)[targets].astype(scale.dtype)  # [B, T, D]
    # The mean is taken off the direction instead of off each part: the product is the same.
    weighted = head * params["ln_f"]["scale"][None, None]
    centred = weighted - weighted.mean(axis=-1, keepdims=True)
    direction = centred / scale  # [B, T, D]

    projections = []
    biases = []
    for layer in range(config.n_layer):
        weights = head_weights(params, layer, config=config)
        projections.append(weights.o)
        attn = params["h"][str(layer)]["attn"]
        biases.append(_bias_or_zeros(attn["c_proj"], config))
    out = jnp.stack(projections)  # [L, H, K, D]
    bias = jnp.stack(biases)  # [L, D]
    z = by_layer(acts, "attn.z")  # [L, B, T, H, K]
    mlps = by_layer(acts, "mlp.out")  # [L, B, T, D]
    return LogitAttribution(
        wte=(acts["wte.out"] * direction).sum(axis=-1),
        wpe=(acts["wpe.out"] * direction).sum(axis=-1),
        # In one product: the heads' results, `[L, B, T, H, D]`, are never there as a whole.
        heads=jnp.einsum("lbthk,lhkd,btd->lbth", z, out, direction),
        attn_bias=jnp.einsum("ld,btd->lbt", bias, direction),
        mlps=jnp.einsum("lbtd,btd->lbt", mlps, direction),
        ln_f_bias=head @ _bias_or_zeros(params["ln_f"], config),
    )


def _bias_or_zeros(layer: Params, config: GPT2Config) -> Float[Array, " D"]:
    """Returns what a layer adds to the stream, zeros in a model without biases."""
    return layer["bias"] if config.bias else jnp.zeros(config.n_embd, wide_dtype(config))


@automatic
def attribution(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    donors: Mapping[str, ArrayLike] | None = None,
) -> Acts:
    """Returns gradient times activation for every number at some sites.

    With `donors`, other activations at these sites, it is the gradient times what would change: the
    first-order estimate of patching each of them in, for two passes in all (attribution patching,
    Syed et al., https://arxiv.org/abs/2310.10348).

    Args:
      params, ids, config: as for `apply`.
      metric: a function of the logits after each row's last token, `[B, V]`, to one number.
      lengths: how many ids of each row are real; all of them by default.
      sites: see `find_sites`.
      donors: activations by their sites, as `capture` returns them.

    Raises:
      ValueError: as `capture`, or `donors` lack a site.
    """
    names = find_sites(sites, config)
    if donors is not None:
        missing = [site for site in names if site not in donors]
        if missing:
            lacking = ", ".join(missing)
            raise ValueError(f"`donors` must have every site, they lack {lacking}.")

    def measured(offsets: Acts) -> tuple[Array, Acts]:
        edits = {site: add(offset) for site, offset in offsets.items()}
        logits, acts = capture(params, ids, config=config, sites=names, edits=edits)
        ends = at_last_token(logits, lengths)
        return metric(ends), acts

    def activations() -> Acts:
        _, acts = capture(params, ids, config=config, sites=names)
        return acts

    # The gradient with respect to an activation is that with respect to a zero added to it, whose
    # shape tracing alone tells.
    shapes = jax.eval_shape(activations)
    offsets = {site: jnp.zeros(leaf.shape, leaf.dtype) for site, leaf in shapes.items()}
    gradients, acts = jax.grad(measured, has_aux=True)(offsets)

    products = {}
    for site, gradient in gradients.items():
        change = acts[site]
        if donors is not None:
            change = donors[site] - acts[site]
        products[site] = gradient * change
    return products


# Directions.


@automatic
def steering_vector(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    other_ids: Int[ArrayLike, "B2 T2"],
    lengths: Int[ArrayLike, " B"] | None = None,
    other_lengths: Int[ArrayLike, " B2"] | None = None,
    *,
    config: GPT2Config,
    site: str,
) -> Float[Array, "..."]:
    """Returns the direction from `other_ids` to `ids` at a site, for `add`.

    It is the difference of the mean activations at the texts' last tokens (Turner et al.,
    https://arxiv.org/abs/2308.10248), and has the site's shape without B and T.

    Raises:
      ValueError: as `capture`.
    """
    mean = _mean_at_last_token(params, ids, lengths, config=config, site=site)
    other_mean = _mean_at_last_token(params, other_ids, other_lengths, config=config, site=site)
    return mean - other_mean


def _mean_at_last_token(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    lengths: Int[ArrayLike, " B"] | None,
    *,
    config: GPT2Config,
    site: str,
) -> Float[Array, "..."]:
    _, acts = capture(params, ids, config=config, sites=site)
    ends = at_last_token(acts[site], lengths)
    return ends.mean(axis=0)
