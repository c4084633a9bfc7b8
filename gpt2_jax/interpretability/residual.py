"""Who wrote a residual stream: the stream as a sum of its parts, down to heads and neurons.

As building blocks as the rest of this folder: nothing is jitted, everything jits, vmaps and
differentiates.

Axes beside those of `modules.py`: N parts.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.edits import Edit
from gpt2_jax.interpretability.sites import find_site, site_axes, site_names
from gpt2_jax.interpretability.taps import Acts, at_last_token, capture
from gpt2_jax.model import Params
from gpt2_jax.modules import dense_kernel
from gpt2_jax.pytrees import dataclass, static
from gpt2_jax.sharding import automatic

# Into what the writers of each layer are divided.
BY = ("layer", "head", "neuron")


@dataclass
class ResidStack:
    """The parts of a residual stream, which sum to it. A pytree.

    Examples:
      >>> gpt2_jax.resid_stack(params, ids, config=config).names[:4]
      ('wte.out', 'wpe.out', 'h.0.attn.out', 'h.0.mlp.out')
    """

    parts: Float[Array, "N B T D"] | Float[Array, "N B D"]
    names: tuple[str, ...] = static()  # sites; "h.0.attn.result[3]" is that of a head


@automatic
def resid_stack(
    params: Params,
    ids: Int[ArrayLike, "B T"],
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    stream: str | None = None,
    by: str = "layer",
    last_only: bool = False,
    edits: Mapping[str, Edit] | None = None,
) -> ResidStack:
    """Returns what embeddings, heads and MLPs have written to a residual stream.

    TransformerLens' `decompose_resid`, or with heads or neurons `get_full_resid_decomposition`. The
    streams themselves are `capture`'s, `sites="h.*.resid_pre"`. Does not compile itself.

    Args:
      params, ids, config: as for `apply`.
      lengths: how many ids of each row are real; needed only for the last ones.
      stream: the site of the stream, such as "h.3.resid_mid"; by default the last one.
      by: "layer" for `attn.out` and `mlp.out` of each; "head" for each head's `attn.result` in the
        place of the former, and `c_proj`'s bias; "neuron" for each neuron in the place of the
        latter, and its bias.
      last_only: whether only each row's last token is looked at, which `neuron` may need for
        memory's sake: N is more than `n_layer * mlp_width` there.
      edits: see `capture`. What they write to the stream itself is no part's.

    Raises:
      ValueError: as `capture`, or `stream` is none, or `by` is another word.

    Examples:
      >>> stack = gpt2_jax.resid_stack(params, ids, config=config)
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="h.1.resid_post")
      >>> np.allclose(stack.parts.sum(axis=0), acts["h.1.resid_post"], atol=1e-5)
      True
    """
    if by not in BY:
        raise ValueError(f'`by` must be "layer", "head" or "neuron", got {by!r}.')
    site = f"h.{config.n_layer - 1}.resid_post" if stream is None else find_site(stream, config)
    if not site.endswith(("embed", "resid_pre", "resid_mid", "resid_post")):
        axes = " ".join(site_axes(site, config))
        raise ValueError(f"`stream` must be a residual stream, got {site} ({axes}).")

    names = site_names(config)
    kinds = ["wte.out", "wpe.out"]
    kinds.append("attn.out" if by == "layer" else "attn.result")
    kinds.append("mlp.post" if by == "neuron" else "mlp.out")
    before = names[: names.index(site)]
    writers = [name for name in before if name.endswith(tuple(kinds))]
    _, acts = capture(params, ids, config=config, sites=writers, edits=edits)
    if last_only:
        acts = {name: at_last_token(x, lengths) for name, x in acts.items()}

    stacks = []
    labels: list[str] = []
    for writer in writers:
        stack = _parts_of(writer, acts, params)
        stacks.append(stack.parts)
        labels.extend(stack.names)
    return ResidStack(jnp.concatenate(stacks), tuple(labels))


def _parts_of(site: str, acts: Acts, params: Params) -> ResidStack:
    """Returns what one writer has written, by its heads or neurons where these are seen."""
    x = acts[site]
    if site.endswith("attn.result"):
        parts = jnp.moveaxis(x, -2, 0)  # [H, B, T, D]
    elif site.endswith("mlp.post"):
        layer = site.split(".")[1]
        kernel = dense_kernel(params["h"][layer]["mlp"]["c_proj"]).astype(x.dtype)
        neurons = jnp.moveaxis(x, -1, 0)  # [F, B, T]
        parts = jnp.einsum("f...,fd->f...d", neurons, kernel)
    else:
        return ResidStack(x[None], (site,))
    names = tuple(f"{site}[{number}]" for number in range(len(parts)))
    _, layer, module, _ = site.split(".")
    projection = params["h"][layer][module]["c_proj"]
    if "bias" not in projection:
        return ResidStack(parts, names)
    bias = projection["bias"].astype(x.dtype)
    alone = jnp.broadcast_to(bias, (1, *parts.shape[1:]))
    return ResidStack(jnp.concatenate([parts, alone]), (*names, f"h.{layer}.{module}.c_proj.bias"))
