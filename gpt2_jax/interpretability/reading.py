"""Methods of interpretability, each a few lines over `capture` and `patch`: to read, to find what matters, to change.

Building blocks as `apply` is: nothing is jitted, everything jits, vmaps and differentiates. Texts are right-padded. A
`metric` is a function of the logits after each row's last token, `[B, V]`, such as a difference of two logits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.circuits import head_weights, unembedding
from gpt2_jax.interpretability.taps import (
    Acts,
    Edit,
    add,
    axis_masks,
    capture,
    find_sites,
    make_tap,
    patch,
    replace,
    site_axes,
)
from gpt2_jax.model import Params, check_ids, hidden_states, unembed
from gpt2_jax.modules import LayerNorm

Metric = Callable[[Array], Array]


# Reading.


def attention_patterns(params: Params, ids: Array, *, config: GPT2Config) -> Array:
    """Returns how much each token attends to each, `int[B, T] -> [L, B, H, T, T]`; rows sum to 1."""
    return by_layer(
        capture(params, ids, config=config, sites="h.*.attn.pattern")[1], "attn.pattern"
    )


def logit_lens(
    params: Params,
    ids: Array,
    *,
    config: GPT2Config,
    translators: tuple[Array, Array] | None = None,
) -> Array:
    """Returns what each residual stream would predict if it were the last, `int[B, T] -> [L + 1, B, T, V]` logits.

    The streams are those before each layer, and the one after the last, whose logits are the model's own
    (nostalgebraist, https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru, 2020).

    Args:
      params, ids, config: as for `apply`.
      translators: a tuned lens (Belrose et al., https://arxiv.org/abs/2303.08112), kernels `[L, D, D]` and biases
        `[L, D]`: the stream `x` before layer `i` is read as `x + x @ kernel[i] + bias[i]`.
    """
    _, acts = capture(
        params, ids, config=config, sites=("h.*.resid_pre", f"h.{config.n_layer - 1}.resid_post")
    )
    streams = by_layer(acts, "resid_pre")  # [L, B, T, D]
    if translators is not None:
        kernels, biases = translators
        wanted = (config.n_layer, config.n_embd)
        if kernels.shape != (*wanted, config.n_embd) or biases.shape != wanted:
            shapes = f"{list(kernels.shape)} and {list(biases.shape)}"
            raise ValueError(
                f"`translators` must be kernels {[*wanted, config.n_embd]} and biases, got {shapes}."
            )
        streams += jnp.einsum("lbtd,lde->lbte", streams, kernels) + biases[:, None, None]
    return stream_logits(
        params, jnp.concatenate([streams, by_layer(acts, "resid_post")]), config=config
    )


def stream_logits(params: Params, x: Array, *, config: GPT2Config) -> Array:
    """Returns the logits of residual streams, `[..., D] -> [..., V]`: the last LayerNorm, and the head."""
    return unembed(params, LayerNorm(config).apply({"params": params["ln_f"]}, x), config=config)


class LogitAttribution(NamedTuple):
    """What each part adds to the logit of a token at each position. The parts sum to the logit."""

    wte: Array  # [B, T]
    wpe: Array  # [B, T]
    heads: Array  # [L, B, T, H]
    attn_bias: Array  # [L, B, T], `c_proj`'s
    mlps: Array  # [L, B, T]
    ln_f_bias: Array  # [B, T]


def direct_logit_attribution(
    params: Params, ids: Array, targets: Array, *, config: GPT2Config
) -> LogitAttribution:
    """Divides the logits of `targets`, `int[B, T]`, among what was written to the residual stream.

    The last LayerNorm is linear once its scale is held: a part `c` adds `(c - mean(c)) / scale * weight @ head`.
    A difference of two logits is divided by the difference of two results.
    """
    sites = ("wte.out", "wpe.out", "h.*.attn.z", "h.*.mlp.out", "ln_f.scale")
    _, acts = capture(params, ids, config=config, sites=sites)
    head = unembedding(params, config)[targets].astype(acts["ln_f.scale"].dtype)  # [B, T, D]
    along = head * params["ln_f"]["scale"][None, None]
    along = (along - along.mean(axis=-1, keepdims=True)) / acts[
        "ln_f.scale"
    ]  # [B, T, D], at the stream
    out = jnp.stack(
        [head_weights(params, i, config=config).o for i in range(config.n_layer)]
    )  # [L, H, K, D]
    bias = jnp.stack([params["h"][str(i)]["attn"]["c_proj"]["bias"] for i in range(config.n_layer)])
    return LogitAttribution(
        wte=(acts["wte.out"] * along).sum(axis=-1),
        wpe=(acts["wpe.out"] * along).sum(axis=-1),
        heads=jnp.einsum("lbthk,lhkd,btd->lbth", by_layer(acts, "attn.z"), out, along),
        attn_bias=jnp.einsum("ld,btd->lbt", bias, along),
        mlps=jnp.einsum("lbtd,btd->lbt", by_layer(acts, "mlp.out"), along),
        ln_f_bias=head @ params["ln_f"]["bias"],
    )


# Finding what matters.


def attribution(
    params: Params,
    ids: Array,
    metric: Metric,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    donors: Acts | None = None,
) -> Acts:
    """Returns gradient times activation for every number at some sites.

    With `donors`, other activations at these sites, it is the gradient times what would change: the first-order
    estimate of patching each of them in, for two passes in all (attribution patching).

    Raises:
      ValueError: as `capture`, or `donors` lack a site.
    """
    if donors is not None and (
        missing := [site for site in find_sites(sites, config) if site not in donors]
    ):
        raise ValueError(f"`donors` must have every site, they lack {', '.join(missing)}.")

    def measured(offsets):
        edits = {site: add(offset) for site, offset in offsets.items()}
        logits, acts = capture(params, ids, config=config, sites=sites, edits=edits)
        return metric(last(logits, lengths)), acts

    shapes = jax.eval_shape(lambda: capture(params, ids, config=config, sites=sites)[1])
    offsets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    gradients, acts = jax.grad(measured, has_aux=True)(offsets)
    changes = acts if donors is None else {site: donors[site] - acts[site] for site in acts}
    return {site: gradients[site] * changes[site] for site in acts}


def patching_sweep(
    params: Params,
    ids: Array,
    donors: Acts,
    metric: Metric,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    site: str,
    over: str = "T",
    batch_size: int | None = None,
) -> Array:
    """Patches each layer at each index of some axes, one at a time, and returns the metric of each, `[L, *over, ...]`.

    Args:
      params, config: as for `apply`.
      ids: `int[B, T]`, the texts to patch.
      donors: the activations that are put in, of every layer: `capture(params, other_ids, sites="h.*.attn.z")[1]` for
        activation patching (Meng et al., https://arxiv.org/abs/2202.05262); zeros or means for ablations.
      metric: see the head of this file; its result may have any shape.
      lengths: `int[B]`, how many ids of each row are real; all of them by default.
      site: the site's name within its layer, such as "resid_pre" or "attn.z".
      over: the axes to go over, in their order: "T" for positions, "H" for heads, "TH" for both, "" for whole layers.
      batch_size: how many indices go into one pass, which bounds the memory; by default all.

    Raises:
      ValueError: as `apply`, or the site does not exist or lacks an axis, or `donors` lack a layer.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    ids = check_ids(ids, config, longest=config.n_positions)
    masks = axis_masks(f"h.0.{site}", over, ids.shape[1], config=config)  # [N, ...]
    count = len(masks)
    size = min(batch_size or count, count)
    parts = jnp.pad(masks, [(0, -count % size)] + [(0, 0)] * (masks.ndim - 1)).reshape(
        -1, size, *masks.shape[1:]
    )
    options = {"config": config, "site": site}
    out = jax.lax.map(
        lambda part: patch_each(params, ids, donors, part, metric, lengths, **options), parts
    )
    out = jnp.moveaxis(out, 0, 1)  # [L, parts, size, ...]
    out = out.reshape(config.n_layer, -1, *out.shape[3:])[:, :count]
    axes = zip(site_axes(f"h.0.{site}", config)[1:], masks.shape[1:], strict=True)
    return out.reshape(config.n_layer, *(n for axis, n in axes if axis in over), *out.shape[2:])


def patch_each(
    params: Params,
    ids: Array,
    donors: Acts,
    masks: Array,
    metric: Metric,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    site: str,
) -> Array:
    """Patches each layer where each of `masks`, `bool[N, ...]`, is true: the metric of each, `[L, N, ...]`.

    One pass for all: at every layer the batch grows by `N` copies of the unpatched rows, which are patched there. So
    no run recomputes the layers before its patch, and only the last tokens are unembedded. See `patching_sweep`.
    """
    ids = check_ids(ids, config, longest=config.n_positions)
    site = find_sites(f"h.0.{site}", config)[0].removeprefix("h.0.")
    for i in range(config.n_layer):
        if f"h.{i}.{site}" not in donors:
            raise ValueError(
                f"`donors` must hold {site} of every layer, got none for h.{i}.{site}."
            )
    hidden = hidden_states(params, ids, config=config, tap=_Growing(site, donors, masks, len(ids)))
    lengths = None if lengths is None else jnp.tile(lengths, len(hidden) // len(ids))
    ends = last(hidden, lengths).reshape(-1, *ids.shape[:1], config.n_embd)[1:]  # [L * N, B, D]
    measured = jax.vmap(metric)(unembed(params, ends, config=config))
    return measured.reshape(config.n_layer, len(masks), *measured.shape[1:])


class _Growing:
    """The tap of `patch_each`. The first `rows` rows of the batch stay unpatched."""

    def __init__(self, site: str, donors: Acts, masks: Array, rows: int):
        self.site, self.donors, self.masks, self.rows = site, donors, masks, rows

    def __call__(self, site: str, x: Array) -> Array:
        copies = len(self.masks)
        if site.endswith(".resid_pre"):
            x = jnp.concatenate([x, jnp.tile(x[: self.rows], (copies, 1, 1))])
        if site.endswith(f".{self.site}"):
            old, new = jnp.split(x, [len(x) - copies * self.rows])
            new = new.reshape(copies, self.rows, *x.shape[1:])
            donor = jnp.broadcast_to(self.donors[site][None], new.shape).astype(x.dtype)
            new = jnp.where(self.masks[:, None], donor, new)
            x = jnp.concatenate([old, new.reshape(-1, *x.shape[1:])])
        return x

    def wants(self, site: str) -> bool:
        return site.endswith((".resid_pre", f".{self.site}"))


def path_patch(
    params: Params,
    ids: Array,
    edits: Mapping[str, Edit],
    *,
    config: GPT2Config,
    receivers: Mapping[str, Any],
    freeze: Sequence[str] = ("h.*.attn.z", "h.*.mlp.out"),
) -> Array:
    """Returns the logits when edits reach the rest of the model through some receivers alone, `[B, T, V]`.

    Three passes (Wang et al., https://arxiv.org/abs/2211.00593, appendix B): one as it is; one with the edits, and all
    that could carry them on held at its values from the first; one in which the receivers get theirs from the second.

    Args:
      params, ids, config: as for `apply`.
      edits: what the senders write, as for `patch`: `{"h.1.attn.z": replace(donor, where=head)}`.
      receivers: sites, and a mask that broadcasts to each, or True: `{"h.3.attn.q": True}`.
      freeze: sites to hold. By default heads and MLPs, so that only the direct paths from senders to receivers count;
        without MLPs, the paths through them count too.
    """
    receivers = {
        site: where for name, where in receivers.items() for site in find_sites(name, config)
    }
    senders = make_tap(edits, config=config)
    _, clean = capture(params, ids, config=config, sites=freeze)
    held = senders.by_site | {
        site: senders(site, x) for site, x in clean.items() if site not in receivers
    }
    _, carried = capture(params, ids, config=config, sites=tuple(receivers), edits=held)
    edits = {site: replace(carried[site], where) for site, where in receivers.items()}
    return patch(params, ids, config=config, edits=edits)


# Edits.


def zero_ablation(where: Any = True) -> Edit:
    """Returns the edit that puts zeros where a mask is true."""
    return replace(0.0, where)


def mean_ablation(reference: Array, where: Any = True) -> Edit:
    """Returns the edit that puts the mean over rows and positions of other activations, `[B, T, ...]`."""
    return replace(reference.mean(axis=(0, 1), keepdims=True), where)


def resample_ablation(key: Array, reference: Array, where: Any = True) -> Edit:
    """Returns the edit that puts another row's activation in the place of each row's, out of `[B, ...]`.

    Rows are rotated by a random number, so that none gets its own.
    """
    if len(reference) < 2:
        raise ValueError(
            f"`reference` must have at least 2 rows to choose among, got {len(reference)}."
        )
    return replace(
        jnp.roll(reference, jax.random.randint(key, (), 1, len(reference)), axis=0), where
    )


def steering_vector(
    params: Params,
    ids: Array,
    other_ids: Array,
    lengths: Array | None = None,
    other_lengths: Array | None = None,
    *,
    config: GPT2Config,
    site: str,
) -> Array:
    """Returns the direction from some texts to others at a site, for `add`: the difference of mean last activations.

    See Turner et al., https://arxiv.org/abs/2308.10248. The texts are `int[B, T]`; the result has the site's shape
    without B and T.
    """

    def mean(ids, lengths):
        return last(capture(params, ids, config=config, sites=site)[1][site], lengths).mean(axis=0)

    return mean(ids, lengths) - mean(other_ids, other_lengths)


# Common.


def by_layer(acts: Acts, site: str) -> Array:
    """Returns the activations of a site in every layer that was captured, stacked, `[L, ...]`."""
    layers = {
        int(name.split(".")[1]): x
        for name, x in acts.items()
        if re.fullmatch(rf"h\.\d+\.{site}", name)
    }
    return jnp.stack([layers[i] for i in sorted(layers)])


def last(x: Array, lengths: Array | None = None) -> Array:
    """Returns what stands at each row's last token, `[B, T, ...] -> [B, ...]`."""
    return x[:, -1] if lengths is None else x[jnp.arange(len(x)), jnp.asarray(lengths) - 1]
