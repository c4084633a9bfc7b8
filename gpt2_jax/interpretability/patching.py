"""Methods that change a model to find what matters: patching sweeps, path patching, ablations.

Each stands on `patch` and its edits. Building blocks as `apply` is: nothing is jitted, everything
jits, vmaps and differentiates. Texts are right-padded. Donors are activations by their sites, as
`capture` returns them; where they come from is the caller's choice.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.inputs import check_ids
from gpt2_jax.interpretability.edits import AnyArray, Edit, Positions, replace
from gpt2_jax.interpretability.reading import Metric
from gpt2_jax.interpretability.sites import axis_masks, find_site, find_sites, site_axes
from gpt2_jax.interpretability.taps import at_last_token, capture, make_tap, patch
from gpt2_jax.model import Params, hidden_states, unembed
from gpt2_jax.modules import Tap, placed, wants
from gpt2_jax.sharding import automatic

# Patching in every layer.


@automatic
def patching_sweep(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    donors: Mapping[str, ArrayLike],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    site: str,
    over: str = "T",
    batch_size: int | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> Shaped[Array, "L ..."]:
    """Patches each layer at each index of some axes, one at a time: the metric of each.

    Does not compile itself.

    Args:
      params, config: as for `apply`.
      ids: the texts to patch.
      donors: the activations that are put in, of every layer:
        `capture(params, other_ids, sites="h.*.attn.z")[1]` for activation patching (Meng et al.,
        https://arxiv.org/abs/2202.05262); zeros or means for ablations.
      metric: a function of the logits after each row's last token, `[B, V]`; its result may have
        any shape.
      lengths: how many ids of each row are real; all of them by default.
      site: the site's name within its layer, such as "resid_pre" or "attn.z".
      over: the axes to go over, in their order: "T" for positions, "H" for heads, "TH" for both, ""
        for whole layers.
      batch_size: how many indices go into one pass, which bounds the memory; by default all.
      edits: what is changed in every run, before it is patched: see `make_tap`.

    Returns:
      `[L, *over, ...]`, the layers, the axes in `over`, and those of the metric's result.

    Raises:
      ValueError: as `apply`, or the site does not exist or lacks an axis, or `donors` lack a layer.

    Examples:
      >>> other = np.array([[5, 6, 7, 8]])
      >>> _, donors = gpt2_jax.capture(params, other, config=config, sites="h.*.resid_pre")
      >>> sweep = jax.jit(gpt2_jax.patching_sweep, static_argnames=("metric", "site", "over"))
      >>> metric = lambda logits: logits[0, 9]
      >>> found = sweep(params, ids, donors, metric, config=config, site="resid_pre", over="")
      >>> logit = gpt2_jax.apply(params, other, config=config)[0, -1, 9]
      >>> found.shape, np.allclose(found, logit, atol=1e-5)  # of a whole stream: the donor's
      ((2,), True)
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    ids = check_ids(ids, config, longest=config.n_positions)
    in_first_layer = f"h.0.{site}"  # where masks are as in every other layer
    masks = axis_masks(in_first_layer, over, ids.shape[1], config=config)  # [N, ...]
    n_masks = len(masks)
    batch_size = min(batch_size or n_masks, n_masks)

    def measure(batch: Bool[Array, "N ..."]) -> Shaped[Array, "L N ..."]:
        return patch_each(
            params, ids, donors, batch, metric, lengths, config=config, site=site, edits=edits
        )

    # Not `lax.map(..., batch_size=)`, which would vmap over single masks: each would then carry an
    # unpatched batch of its own through the layers (see `GrowingBatch`), a seventh more in GPT-2.
    batches = _in_batches(masks, batch_size)
    by_batch = jax.lax.map(measure, batches)  # [batches, L, batch_size, ...]
    by_mask = _out_of_batches(by_batch, n_masks)  # [L, N, ...]

    mask_axes = site_axes(in_first_layer, config)[1:]
    mask_shape = masks.shape[1:]
    sizes = dict(zip(mask_axes, mask_shape, strict=True))
    swept_shape = [sizes[axis] for axis in over]
    result_shape = by_mask.shape[2:]
    return by_mask.reshape(config.n_layer, *swept_shape, *result_shape)


def _in_batches(masks: Bool[Array, "N ..."], batch_size: int) -> Bool[Array, "batches size ..."]:
    """Returns masks in equal batches, the last filled up with masks that patch nothing."""
    n_missing = -len(masks) % batch_size
    filler = jnp.zeros((n_missing, *masks.shape[1:]), bool)
    filled = jnp.concatenate([masks, filler])
    return filled.reshape(-1, batch_size, *masks.shape[1:])


def _out_of_batches(x: Shaped[Array, "batches L size ..."], count: int) -> Shaped[Array, "L N ..."]:
    """Returns what was measured under the first `count` masks, in their order."""
    batches, n_layers, size, *rest = x.shape
    by_layer = jnp.moveaxis(x, 0, 1)  # [L, batches, size, ...]
    by_mask = by_layer.reshape(n_layers, batches * size, *rest)
    return by_mask[:, :count]


@automatic
def patch_each(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    donors: Mapping[str, ArrayLike],
    masks: Bool[AnyArray, "N ..."],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    site: str,
    edits: Mapping[str, Edit] | None = None,
) -> Shaped[Array, "L N ..."]:
    """Patches each layer where each of `masks` is true: the metric of each, `[L, N, ...]`.

    By definition, row `layer` of the result is

        def measure(mask):
            edits = {f"h.{layer}.{site}": replace(donors[f"h.{layer}.{site}"], mask)}
            logits = patch(params, ids, config=config, edits=edits)
            return metric(at_last_token(logits, lengths))

        jax.vmap(measure)(masks)

    which takes L * N runs of all L layers. Here it is one pass whose batch grows (`GrowingBatch`):
    no run computes the layers before its patch, which halves the work, and only last tokens are
    unembedded. Does not compile itself.

    Args:
      params, ids, donors, metric, lengths, config, site, edits: see `patching_sweep`.
      masks: each broadcasts to the site's activation without its B: see `axis_masks`.

    Raises:
      ValueError: as `apply`, or the site does not exist, or `donors` lack a layer.

    Examples:
      >>> _, donors = gpt2_jax.capture(params, ids, config=config, sites="h.*.attn.z")
      >>> masks = gpt2_jax.axis_masks("h.0.attn.z", "H", 4, config=config)
      >>> found = jax.jit(gpt2_jax.patch_each, static_argnames=("metric", "site"))(
      ...     params, ids, donors, masks, lambda logits: logits[0, 9], config=config, site="attn.z"
      ... )
      >>> logit = gpt2_jax.apply(params, ids, config=config)[0, -1, 9]
      >>> found.shape, np.allclose(found, logit, atol=1e-5)  # patched with its own
      ((2, 2), True)
    """
    ids = check_ids(ids, config, longest=config.n_positions)
    site = find_site(f"h.0.{site}", config).removeprefix("h.0.")
    for layer in range(config.n_layer):
        name = f"h.{layer}.{site}"
        if name not in donors:
            raise ValueError(f"`donors` must hold {site} of every layer, got none for {name}.")

    n_texts, length = ids.shape
    n_masks = len(masks)
    edited = make_tap(edits or {}, config=config)
    tap = GrowingBatch(site, donors, masks, n_texts, edited)
    # Not `apply`, which would unembed every token: [B + L * N * B, T, V].
    hidden = hidden_states(params, ids, config=config, tap=tap)  # [B + L * N * B, T, D]
    n_copies = len(hidden) // n_texts
    if lengths is None:
        lengths = jnp.full(n_texts, length)
    ends = at_last_token(hidden, jnp.tile(jnp.asarray(lengths), n_copies))
    ends = ends.reshape(-1, n_texts, config.n_embd)  # [1 + L * N, B, D]
    patched = ends[1:]  # the first are the unpatched texts
    logits = unembed(params, patched, config=config)  # [L * N, B, V]
    last = jnp.asarray(lengths)[:, None] - 1  # [B, 1], these are the logits of
    logits = jax.vmap(partial(edited.placed(last), "logits"))(logits)
    measured = jax.vmap(metric)(logits)  # [L * N, ...]
    result_shape = measured.shape[1:]
    return measured.reshape(config.n_layer, n_masks, *result_shape)


# The rows of the batch in one pass of the model, with B texts, N masks and L layers:
#
#     embeddings       texts                                              B
#     layer 0          texts | layer 0                                    B + N * B
#     layer 1          texts | layer 0 | layer 1                          B + 2 * N * B
#     ...
#     layer L - 1      texts | layer 0 | layer 1 | ... | layer L - 1      B + L * N * B
#
# `texts` is never patched; each other group is N * B rows, those of the runs that are patched in
# one layer. A group appears at its layer's `resid_pre`, as N copies of `texts`: up to there a
# patched run is what an unpatched one is, so that the layers before are computed once for all. At
# the patched site its layer's group, which is then the last, takes the donor's values where the
# masks are true; from there on it only runs along. Within a group, row `n * B + b` is text `b`
# under mask `n`.


class GrowingBatch:
    """The tap of `patch_each`: the batch gains, at every layer, the runs that are patched there.

    A tap may change the number of rows, because nothing else in a pass of right-padded texts knows
    it: positions and masks have one row, which serves all.
    """

    def __init__(
        self,
        site: str,
        donors: Mapping[str, ArrayLike],
        masks: Bool[AnyArray, "N ..."],
        n_texts: int,
        tap: Tap,
    ):
        self.site = site  # its name within a layer
        self.donors = donors
        self.masks = masks
        self.n_texts = n_texts
        self.tap = tap  # of every run alike

    def __call__(self, site: str, x: Array) -> Array:
        # In this order, and all where `resid_pre` is what is edited and patched.
        if wants(self.tap, site):
            x = self.edit_each_run(site, x)
        if site.endswith(".resid_pre"):
            x = self.grow(x)
        if site.endswith(f".{self.site}"):
            x = self.patch_last_group(x, self.donors[site])
        return x

    def wants(self, site: str) -> bool:
        """Returns whether the site is where the batch grows, or is patched or edited."""
        return site.endswith((".resid_pre", f".{self.site}")) or wants(self.tap, site)

    def placed(self, positions: Int[Array, "#B T"]) -> "GrowingBatch":
        """Returns the tap of a pass over tokens at these positions."""
        tap = placed(self.tap, positions)
        return GrowingBatch(self.site, self.donors, self.masks, self.n_texts, tap)

    def edit_each_run(self, site: str, x: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
        """Returns the batch after the tap, which sees the texts of one run at a time."""
        runs = x.reshape(-1, self.n_texts, *x.shape[1:])
        return jax.vmap(partial(self.tap, site))(runs).reshape(x.shape)

    def grow(self, x: Float[Array, "rows T D"]) -> Float[Array, "more T D"]:
        """Returns the batch with a copy of the texts for each mask at its end."""
        texts = x[: self.n_texts]
        copies = jnp.tile(texts, (len(self.masks), 1, 1))
        return jnp.concatenate([x, copies])

    def patch_last_group(
        self, x: Float[Array, "rows ..."], donor: ArrayLike
    ) -> Float[Array, "rows ..."]:
        """Returns the batch with a donor's values in its last group, where the masks are true."""
        n_masks = len(self.masks)
        group_size = n_masks * self.n_texts
        n_before = len(x) - group_size
        before, group = jnp.split(x, [n_before])
        group = group.reshape(n_masks, self.n_texts, *x.shape[1:])  # [N, B, ...]
        # The same donor under each mask, the same mask for each text.
        donor = jnp.asarray(donor)[None]
        donor = jnp.broadcast_to(donor, group.shape).astype(x.dtype)
        masks = self.masks[:, None]
        patched = jnp.where(masks, donor, group)
        patched = patched.reshape(group_size, *x.shape[1:])
        return jnp.concatenate([before, patched])


# Patching along paths.


@automatic
def path_patch(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    edits: Mapping[str, Edit],
    *,
    config: GPT2Config,
    receivers: Mapping[str, ArrayLike],
    freeze: Sequence[str] = ("h.*.attn.z", "h.*.mlp.out"),
) -> Float[Array, "B T V"]:
    """Returns the logits when edits reach the rest of the model through some receivers alone.

    Three passes (Wang et al., https://arxiv.org/abs/2211.00593, appendix B): one as it is; one with
    the edits, and all that could carry them on held at its values from the first; one in which the
    receivers get theirs from the second. Does not compile itself.

    Args:
      params, ids, config: as for `apply`.
      edits: what the senders write, as for `patch`: `{"h.1.attn.z": replace(donor, where=head)}`.
      receivers: sites, and a mask that broadcasts to each, or True: `{"h.3.attn.q": True}`.
      freeze: sites to hold. By default heads and MLPs, so that only the direct paths from senders
        to receivers count; without MLPs, the paths through them count too.

    Raises:
      ValueError: as `patch`, or a receiver does not exist.

    Examples:
      >>> edits = {"h.0.mlp.out": gpt2_jax.zero_ablation()}
      >>> logits = gpt2_jax.path_patch(
      ...     params, ids, edits, config=config, receivers={"h.1.attn.q": True}
      ... )
      >>> logits.shape
      (1, 4, 4096)
    """
    received: dict[str, ArrayLike] = {}  # the mask of each site that receives
    for pattern, where in receivers.items():
        for site in find_sites(pattern, config):
            received[site] = where
    senders = make_tap(edits, config=config)

    _, clean = capture(params, ids, config=config, sites=freeze)
    # Outside a pass nobody else would tell it.
    positions = jnp.arange(np.shape(ids)[1])[None]
    placed_senders = senders.placed(positions)
    held: dict[str, Any] = dict(senders.by_site)
    for site, x in clean.items():
        # A receiver must hear, so it is not held. A sender among the frozen writes its edit of the
        # clean activation: what other senders would tell it does not reach it.
        if site not in received:
            held[site] = placed_senders(site, x)
    sites = tuple(received)
    _, carried = capture(params, ids, config=config, sites=sites, edits=held)
    arriving = {site: replace(carried[site], where) for site, where in received.items()}
    return patch(params, ids, config=config, edits=arriving)


# Ablations: edits that take something out.


def zero_ablation(where: ArrayLike = True, *, at: Positions | None = None) -> Edit:
    """Returns the edit that puts zeros where a mask is true, at some positions: see `replace`.

    Examples:
      >>> gpt2_jax.zero_ablation()(jnp.ones(2)).tolist()
      [0.0, 0.0]
    """
    return replace(0.0, where, at=at)


def mean_ablation(
    reference: Float[AnyArray, "B T ..."],
    where: ArrayLike = True,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    at: Positions | None = None,
) -> Edit:
    """Returns the edit that puts the mean of other activations over rows and tokens.

    Args:
      reference: the other activations. A site whose second axis is none of tokens, as that of
        `scores` and `pattern`, has no such mean.
      where, at: see `replace`.
      lengths: how many tokens of each row are real: padding is left out. All by default.

    Examples:
      >>> edit = gpt2_jax.mean_ablation(jnp.array([[[1.0], [3.0]]]))  # [B, T, D]
      >>> edit(jnp.zeros((1, 2, 1))).tolist()
      [[[2.0], [2.0]]]
    """
    if lengths is None:
        return replace(reference.mean(axis=(0, 1), keepdims=True), where, at=at)
    is_real = _real_tokens(reference, lengths)
    total = jnp.where(is_real, reference, 0).sum(axis=(0, 1), keepdims=True)
    return replace(total / is_real.sum(), where, at=at)


def resample_ablation(
    key: PRNGKeyArray,
    reference: Shaped[AnyArray, "B ..."],
    where: ArrayLike = True,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    at: Positions | None = None,
) -> Edit:
    """Returns the edit that puts another row's activation in the place of each row's.

    Rows are rotated by a random number from 1 to B - 1, so that none gets its own.

    Args:
      key: of the random number.
      reference: the activations to choose among.
      where, at: see `replace`.
      lengths: how many tokens of each row of `reference`, `[B, T, ...]` then, are real: behind the
        last its tokens begin anew, so that none gets what stands at padding. All by default.

    Raises:
      ValueError: `reference` has one row.

    Examples:
      >>> edit = gpt2_jax.resample_ablation(jax.random.key(0), jnp.array([[1.0], [2.0]]))
      >>> edit(jnp.zeros((2, 1))).tolist()  # each row gets another's
      [[2.0], [1.0]]
    """
    n_rows = len(reference)
    if n_rows < 2:
        raise ValueError(f"`reference` must have at least 2 rows to choose among, got {n_rows}.")
    if lengths is not None:
        tokens = jnp.arange(reference.shape[1])[None] % jnp.asarray(lengths)[:, None]
        tokens = tokens.reshape(*tokens.shape, *(1,) * (reference.ndim - 2))
        reference = jnp.take_along_axis(jnp.asarray(reference), tokens, axis=1)
    shift = jax.random.randint(key, (), 1, n_rows)
    return replace(jnp.roll(reference, shift, axis=0), where, at=at)


def _real_tokens(
    reference: Shaped[AnyArray, "B T ..."], lengths: Int[ArrayLike, " B"]
) -> Bool[Array, "B T ..."]:
    """Returns which tokens are no padding, with axes of 1 behind."""
    is_real = jnp.arange(reference.shape[1])[None] < jnp.asarray(lengths)[:, None]
    return is_real.reshape(*is_real.shape, *(1,) * (reference.ndim - 2))
