"""Edge attribution: what each connection between two parts of the model does to a metric.

A part that writes to the residual stream is a sender; a place where the stream is read, a receiver.
An edge leads from each sender to each receiver behind it.

Axes beside those of `modules.py`: U senders, R receivers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.circuits import head_weights
from gpt2_jax.interpretability.edits import Edit
from gpt2_jax.interpretability.reading import (
    Metric,
    SiteGradients,
    check_donors,
    gradients_under,
)
from gpt2_jax.interpretability.sites import find_sites
from gpt2_jax.interpretability.taps import ChainedTaps, make_tap
from gpt2_jax.model import Params
from gpt2_jax.modules import wide_dtype
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.sharding import automatic

# What the donors of `edge_attribution` must hold: what each sender writes, heads before `c_proj`.
EDGE_SITES = ("embed", "h.*.attn.z", "h.*.mlp.out")


class Edge(NamedTuple):
    """A connection of two parts, and what it does.

    Examples:
      >>> gpt2_jax.Edge("embed", "logits", -2.0).receiver
      'logits'
    """

    sender: str
    receiver: str
    score: float


@dataclass
class EdgeScores:
    """The score of each edge. A pytree: its names are structure.

    Examples:
      >>> found = gpt2_jax.EdgeScores(jnp.array([[0.5, -2.0]]), ("embed",), ("h.0.mlp", "logits"))
      >>> found.strongest(1)
      [Edge(sender='embed', receiver='logits', score=-2.0)]
    """

    scores: Float[Array, "U R"]  # 0 where the receiver does not come behind the sender
    # "embed", and of each layer "h.0.attn[1]", its heads, and "h.0.mlp".
    senders: tuple[str, ...] = static()
    # Of each layer "h.0.attn[1].q", `.k` and `.v`, and "h.0.mlp"; "logits".
    receivers: tuple[str, ...] = static()

    def strongest(self, count: int) -> list[Edge]:
        """Returns the edges of the greatest scores, of either sign. Outside `jit` alone."""
        scores = np.asarray(self.scores)
        edges = []
        for flat in np.argsort(-np.abs(scores), axis=None, kind="stable")[:count]:
            sender, receiver = np.unravel_index(flat, scores.shape)
            score = float(scores[sender, receiver])
            edges.append(Edge(self.senders[sender], self.receivers[receiver], score))
        return edges


@automatic
def edge_attribution(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    donors: Mapping[str, ArrayLike],
    metric: Metric,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    steps: int = 1,
    edits: Mapping[str, Edit] | None = None,
) -> EdgeScores:
    """Returns to first order how a metric changes as each edge alone carries another's activation.

    Edge attribution patching (Syed et al., https://arxiv.org/abs/2310.10348): what the sender would
    write otherwise, times the gradient at the receiver, summed over rows, tokens and the width. For
    all edges that is one pass and its gradient, beside the pass that made the donors. Does not
    compile itself.

    Args:
      params, ids, metric, lengths, config: see `site_gradients`.
      donors: the activations to be carried: `capture(params, other_ids, sites=EDGE_SITES)[1]` of as
        many tokens, or zeros or means.
      steps: more than 1 takes the mean of the gradients at so many points on the way from the
        donors' embeddings to the text's own, the last of them the text (EAP with integrated
        gradients, Hanna et al., https://arxiv.org/abs/2403.17806).
      edits: see `capture`.

    Raises:
      ValueError: as `capture`, or `donors` lack a site, or `steps` is less than 1.

    Examples:
      >>> other = np.array([[5, 6, 7, 8]])
      >>> _, donors = gpt2_jax.capture(params, other, config=config, sites=gpt2_jax.EDGE_SITES)
      >>> attribute = jax.jit(gpt2_jax.edge_attribution, static_argnames="metric")
      >>> found = attribute(params, ids, donors, lambda logits: logits[0, 9], config=config)
      >>> found.senders
      ('embed', 'h.0.attn[0]', 'h.0.attn[1]', 'h.0.mlp', 'h.1.attn[0]', 'h.1.attn[1]', 'h.1.mlp')
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    senders = find_sites(EDGE_SITES, config)
    check_donors(donors, senders)
    last = f"h.{config.n_layer - 1}.resid_post"
    receivers = find_sites(("h.*.attn.[qkv]_in", "h.*.mlp.in", last), config)
    edited = make_tap(edits or {}, config=config)
    donor_embed = jnp.asarray(donors["embed"])

    def gradients_at(fraction: Float[Array, ""]) -> SiteGradients:
        """Returns the gradients with the embeddings so far on their way to the donors'."""
        moved = make_tap({"embed": lambda x: x + fraction * (donor_embed - x)}, config=config)
        found = gradients_under(
            params,
            ids,
            metric,
            lengths,
            config=config,
            sites=(*senders, *receivers),
            tap=ChainedTaps((edited, moved)),
        )
        return found._replace(gradients={site: found.gradients[site] for site in receivers})

    found = _mean_gradients(gradients_at, steps)
    wide = wide_dtype(config)
    changes = []
    for site in senders:
        change = jnp.asarray(donors[site]) - found.acts[site]
        changes.append(_written(site, change.astype(wide), params, config))
    written = jnp.concatenate(changes)  # [U, B, T, D]
    columns = []
    for site in receivers:
        gradient = found.gradients[site].astype(wide)
        # By heads, of which an MLP and the logits are one.
        by_head = gradient if gradient.ndim == 4 else gradient[:, :, None]
        columns.append(jnp.einsum("ubtd,bthd->uh", written, by_head))
    scores = jnp.concatenate(columns, axis=1)  # [U, R]
    sender_names, sender_order = _named(senders, config)
    receiver_names, receiver_order = _named(receivers, config)
    is_behind = sender_order[:, None] < receiver_order[None]
    return EdgeScores(jnp.where(is_behind, scores, 0), sender_names, receiver_names)


def _mean_gradients(at_point: Callable[[Array], SiteGradients], steps: int) -> SiteGradients:
    """Returns the mean of the gradients on the way to the text, and the activations there."""

    def add_point(before: SiteGradients, fraction: Float[Array, ""]) -> tuple[SiteGradients, None]:
        found = at_point(fraction)
        total = jax.tree.map(jnp.add, before.gradients, found.gradients)
        return found._replace(gradients=total), None

    # The last point, 0, is the text itself.
    fractions = jnp.arange(steps)[::-1] / steps
    shapes = jax.eval_shape(at_point, fractions[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # One program for a point, however many there are.
    found, _ = jax.lax.scan(add_point, zeros, fractions)
    mean = jax.tree.map(lambda total: total / steps, found.gradients)
    return found._replace(gradients=mean)


def _written(
    site: str, x: Float[Array, "B T ..."], params: Params, config: GPT2Config
) -> Float[Array, "_ B T D"]:
    """Returns what a sender writes to the stream, a layer's heads each on its own."""
    if not site.endswith("attn.z"):
        return x[None]
    layer = int(site.split(".")[1])
    out = head_weights(params, layer, config=config).o.astype(x.dtype)
    return jnp.einsum("bthk,hkd->hbtd", x, out)


def _named(sites: Sequence[str], config: GPT2Config) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of senders or receivers, and their places in the order of the pass.

    A sender's effect is read at greater places than its own.
    """
    names: list[str] = []
    places: list[int] = []
    last = 2 * config.n_layer
    for site in sites:
        module = re.fullmatch(r"(h\.(\d+)\.(?:attn|mlp))\.(\w+)", site)
        if module is None:
            # The embeddings come before all layers, the last stream is what the logits read.
            is_first = site == "embed"
            names.append("embed" if is_first else "logits")
            places.append(-1 if is_first else last)
            continue
        block, layer, part = module.groups()
        if block.endswith("mlp"):
            names.append(block)
            places.append(2 * int(layer) + 1)
            continue
        # "q_in" is a head's "q"; what a head writes, "z", is the head itself.
        suffix = "" if part == "z" else f".{part[0]}"
        names += [f"{block}[{head}]{suffix}" for head in range(config.n_head)]
        places += [2 * int(layer)] * config.n_head
    return tuple(names), np.array(places)
