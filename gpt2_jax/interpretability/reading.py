"""Methods that read a model: attention patterns, lenses, who wrote a logit, directions.

Each is a few lines over `capture`. Building blocks as `apply` is: nothing is jitted, everything
jits, vmaps and differentiates. Texts are right-padded. Knows nothing of patching.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.circuits import head_weights
from gpt2_jax.interpretability.edits import AnyArray, Edit, add
from gpt2_jax.interpretability.sites import find_sites
from gpt2_jax.interpretability.taps import (
    Acts,
    ChainedTaps,
    Edits,
    Recorder,
    at_last_token,
    by_layer,
    capture,
    make_tap,
)
from gpt2_jax.model import Params, apply, head_matrix, unembed
from gpt2_jax.modules import LayerNorm, Tap, wide_dtype
from gpt2_jax.sharding import automatic

# A function of the logits after each row's last token, `[B, V]`, such as a difference of two.
Metric = Callable[[Array], Array]


# Heads by their patterns.


@automatic
def attention_patterns(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    edits: Mapping[str, Edit] | None = None,
) -> Float[Array, "L B H T T"]:
    """Returns how much each token attends to each; rows sum to 1. Does not compile itself.

    With `edits` it is that of the edited model, as in `capture`.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> patterns = gpt2_jax.attention_patterns(params, ids, config=config)
      >>> patterns.shape, np.allclose(patterns.sum(axis=-1), 1)
      ((2, 1, 2, 4, 4), True)
    """
    _, acts = capture(params, ids, config=config, sites="h.*.attn.pattern", edits=edits)
    return by_layer(acts, "attn.pattern")


class HeadScores(NamedTuple):
    """How much each head attends to certain tokens, on the average, where random ones repeat.

    Examples:
      >>> gpt2_jax.HeadScores._fields
      ('previous', 'duplicate', 'induction')
    """

    previous: Float[Array, "L H"]  # the token before
    duplicate: Float[Array, "L H"]  # the same token, where it stood first
    induction: Float[Array, "L H"]  # the token that followed it there


def head_scores(
    params: Params,
    key: PRNGKeyArray,
    *,
    config: GPT2Config,
    length: int | None = None,
    n_texts: int = 4,
    edits: Mapping[str, Edit] | None = None,
) -> HeadScores:
    """Returns which heads are previous-token heads and induction heads, from 0 to 1.

    Texts are random tokens that come twice, so that nothing but their order helps to predict the
    second half (Olsson et al., https://arxiv.org/abs/2209.11895). The scores are means along
    diagonals of the patterns, as in TransformerLens' demos. Does not compile itself.

    Args:
      params, config: as for `apply`.
      key: of the random tokens.
      length: how many tokens come twice, at least 2; by default 50, or as many as the context has
        room for.
      n_texts: how many texts.
      edits: see `capture`.

    Raises:
      ValueError: `length` is less than 2, or the context has no room for two of it.

    Examples:
      >>> find = jax.jit(gpt2_jax.head_scores, static_argnames="length")
      >>> scores = find(params, jax.random.key(0), config=config, length=8)
      >>> scores.induction.shape, bool((scores.induction <= 1).all())
      ((2, 2), True)
    """
    half = config.n_positions // 2
    length = min(50, half) if length is None else length
    if not 2 <= length <= half:
        expected = f"2 to {half}, half of `n_positions`"
        raise ValueError(f"`length` must be {expected}, got {length}.")
    tokens = jax.random.randint(key, (n_texts, length), 0, config.vocab_size)
    ids = jnp.concatenate([tokens, tokens], axis=1)
    patterns = attention_patterns(params, ids, config=config, edits=edits)

    def mean_at(distance: int) -> Float[Array, "L H"]:
        diagonals = jnp.diagonal(patterns, offset=-distance, axis1=-2, axis2=-1)
        return diagonals.mean(axis=(1, 3))

    return HeadScores(
        previous=mean_at(1),
        duplicate=mean_at(length),
        # As far back as the token itself, less the one step to what followed.
        induction=mean_at(length - 1),
    )


# Lenses: what a residual stream says of the next token.


@automatic
def logit_lens(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    *,
    config: GPT2Config,
    translators: tuple[Float[AnyArray, "_ D D"], Float[AnyArray, "_ D"]] | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> Float[Array, "N B T V"]:
    """Returns the logits that each residual stream would give if it were the last, `N = L + 1`.

    The streams are those before each layer, and the one after the last, whose logits are the
    model's own (nostalgebraist, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru, 2020). Does not
    compile itself.

    Args:
      params, ids, config: as for `apply`.
      translators: a tuned lens (Belrose et al., https://arxiv.org/abs/2303.08112), kernels
        `[L, D, D]` and biases `[L, D]`: the stream `x` before layer `i` is read as
        `x + x @ kernels[i] + biases[i]`.
      edits: see `capture`. Those of the last LayerNorm and of the logits do not reach the lens.

    Raises:
      ValueError: as `capture`, or `translators` are not of these shapes.

    Examples:
      >>> lens = gpt2_jax.logit_lens(params, ids, config=config)
      >>> lens.shape
      (3, 1, 4, 4096)
      >>> np.allclose(lens[-1], gpt2_jax.apply(params, ids, config=config), atol=1e-5)
      True
    """
    sites = ("h.*.resid_pre", f"h.{config.n_layer - 1}.resid_post")
    _, acts = capture(params, ids, config=config, sites=sites, edits=edits)
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
    """Returns the logits of residual streams: the last LayerNorm, and the head.

    Does not compile itself.

    Examples:
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="h.1.resid_post")
      >>> logits = gpt2_jax.stream_logits(params, acts["h.1.resid_post"], config=config)
      >>> np.allclose(logits, gpt2_jax.apply(params, ids, config=config), atol=1e-5)
      True
    """
    final_norm = LayerNorm(config)
    # The layer by itself: linen asks only for the params of the module that is applied.
    normed: Any = final_norm.apply({"params": params["ln_f"]}, x)
    return unembed(params, normed, config=config)


# Who wrote a logit.


class LogitAttribution(NamedTuple):
    """What each part adds to the logit of a token at each position. The parts sum to the logit.

    Examples:
      >>> gpt2_jax.LogitAttribution._fields
      ('wte', 'wpe', 'heads', 'attn_bias', 'mlps', 'ln_f_bias')
    """

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
    edits: Mapping[str, Edit] | None = None,
) -> LogitAttribution:
    """Divides the logits of `targets` among what was written to the residual stream.

    The last LayerNorm is linear once its scale is held: a part `c` of the stream adds
    `(c - mean(c)) / scale * weight @ head` to a logit. A difference of two logits is divided by the
    difference of two results. Does not compile itself.

    With `edits`, as in `capture`, the parts are those of the edited model. They sum to its logit
    where only `wte.out`, `wpe.out`, `z` and `mlp.out`, and what these are made of, are edited: what
    is written to the stream elsewhere is no part's.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> parts = gpt2_jax.direct_logit_attribution(params, ids, ids, config=config)
      >>> of_layers = parts.heads.sum(axis=(0, 3)) + (parts.attn_bias + parts.mlps).sum(axis=0)
      >>> total = parts.wte + parts.wpe + parts.ln_f_bias + of_layers
      >>> logits = gpt2_jax.apply(params, ids, config=config)
      >>> np.allclose(total, np.take_along_axis(logits, ids[..., None], axis=-1)[..., 0], atol=1e-4)
      True
    """
    sites = ("wte.out", "wpe.out", "h.*.attn.z", "h.*.mlp.out", "ln_f.scale")
    _, acts = capture(params, ids, config=config, sites=sites, edits=edits)
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


class SiteGradients(NamedTuple):
    """A metric, activations, and the derivatives of the one with respect to the others.

    Examples:
      >>> gpt2_jax.SiteGradients._fields
      ('value', 'gradients', 'acts')
    """

    value: Float[Array, ""]
    gradients: Acts
    acts: Acts


@automatic
def site_gradients(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
) -> SiteGradients:
    """Returns the gradient of a metric at some sites, beside the activations there.

    It is the gradient with respect to a zero that is added to each, so that `jax.grad` over
    `add(offset)` does the same for any other function of a pass. Does not compile itself.

    Args:
      params, ids, config: as for `apply`.
      metric: a function of the logits after each row's last token, `[B, V]`, to one number.
      lengths: how many ids of each row are real; all of them by default.
      sites: see `find_sites`.
      edits: see `capture`; the zeros are added behind them.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> found = gpt2_jax.site_gradients(
      ...     params, ids, lambda logits: logits[0, 9], config=config, sites="logits"
      ... )
      >>> float(found.gradients["logits"][0, -1, 9]), float(found.gradients["logits"][0, -1, 8])
      (1.0, 0.0)
    """
    tap = make_tap(edits or {}, config=config)
    return gradients_under(params, ids, metric, lengths, config=config, sites=sites, tap=tap)


def gradients_under(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    tap: Tap,
) -> SiteGradients:
    """Returns what `site_gradients` does, of a model that a tap has changed."""
    names = find_sites(sites, config)

    def activations() -> Acts:
        recorder = Recorder(names, tap)
        apply(params, ids, config=config, tap=recorder)
        return recorder.acts

    def measured(offsets: Acts) -> tuple[Array, Acts]:
        added = Edits({site: add(offset) for site, offset in offsets.items()})
        recorder = Recorder(names, ChainedTaps((tap, added)))
        logits = apply(params, ids, config=config, tap=recorder)
        ends = at_last_token(logits, lengths)
        return metric(ends), recorder.acts

    # Their shapes, which tracing alone tells.
    shapes = jax.eval_shape(activations)
    offsets = {site: jnp.zeros(leaf.shape, leaf.dtype) for site, leaf in shapes.items()}
    (value, acts), gradients = jax.value_and_grad(measured, has_aux=True)(offsets)
    return SiteGradients(value, gradients, acts)


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
    edits: Mapping[str, Edit] | None = None,
) -> Acts:
    """Returns gradient times activation for every number at some sites.

    With `donors`, other activations at these sites, it is the gradient times what would change: the
    first-order estimate of patching each of them in, for two passes in all (attribution patching,
    Syed et al., https://arxiv.org/abs/2310.10348). Does not compile itself.

    Args:
      params, ids, metric, lengths, config, sites, edits: see `site_gradients`.
      donors: activations by their sites, as `capture` returns them.

    Raises:
      ValueError: as `capture`, or `donors` lack a site.

    Examples:
      >>> found = gpt2_jax.attribution(
      ...     params, ids, lambda logits: logits[0, 9], config=config, sites="ln_f.out"
      ... )
      >>> logit = gpt2_jax.apply(params, ids, config=config)[0, -1, 9]
      >>> np.allclose(found["ln_f.out"].sum(), logit, atol=1e-5)  # the head is linear
      True
    """
    names = find_sites(sites, config)
    if donors is not None:
        check_donors(donors, names)
    found = site_gradients(params, ids, metric, lengths, config=config, sites=names, edits=edits)
    products = {}
    for site, gradient in found.gradients.items():
        change = found.acts[site]
        if donors is not None:
            change = donors[site] - change
        products[site] = gradient * change
    return products


def check_donors(donors: Mapping[str, ArrayLike], sites: Sequence[str]) -> None:
    """Raises `ValueError` unless there are activations of all sites."""
    missing = [site for site in sites if site not in donors]
    if missing:
        raise ValueError(f"`donors` must have every site, they lack {', '.join(missing)}.")


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
    edits: Mapping[str, Edit] | None = None,
) -> Float[Array, "..."]:
    """Returns the direction from `other_ids` to `ids` at a site, for `add`.

    Does not compile itself.

    It is the difference of the mean activations at the texts' last tokens (Turner et al.,
    https://arxiv.org/abs/2308.10248), and has the site's shape without B and T. With `edits`, as in
    `capture`, it is that of the edited model.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> vector = gpt2_jax.steering_vector(
      ...     params, ids, ids[:, ::-1], config=config, site="h.0.resid_post"
      ... )
      >>> vector.shape
      (16,)
    """
    mean_of = partial(_mean_at_last_token, params, config=config, site=site, edits=edits)
    return mean_of(ids, lengths) - mean_of(other_ids, other_lengths)


def _mean_at_last_token(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    lengths: Int[ArrayLike, " B"] | None,
    *,
    config: GPT2Config,
    site: str,
    edits: Mapping[str, Edit] | None,
) -> Float[Array, "..."]:
    _, acts = capture(params, ids, config=config, sites=site, edits=edits)
    ends = at_last_token(acts[site], lengths)
    return ends.mean(axis=0)
