"""Reading and changing activations: taps, `capture` and `patch`.

A tap is a function `tap(site, x) -> x` that the forward pass calls at each of its sites; what it
returns takes the activation's place. A tap with a method `wants(site)` is called only where that is
true, and costs nothing elsewhere; one with `placed(positions)` is told where in their texts the
tokens of a pass stand, and one with `repeated(n)` that each row comes n times. What there is to
read, `sites` says, what a change may be, `edits`; this file knows no method of research: those
stand on it.

Axes are those of `modules.py`, and L, layers; `...` are the axes of a site that its name decides.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.interpretability.edits import (
    Change,
    Edit,
    check_context,
    has_positions,
    repeat_rows,
)
from gpt2_jax.interpretability.sites import axes_of, find_sites
from gpt2_jax.model import Params, apply
from gpt2_jax.modules import Tap, placed, repeated, wants
from gpt2_jax.pytrees import dataclass
from gpt2_jax.sharding import automatic

Acts = dict[str, Array]  # activations by their sites


@dataclass
class Edits:
    """A tap that changes activations.

    A pytree: the arrays in it are leaves, so that other values compile nothing; the sites are its
    structure.

    Examples:
      >>> tap = gpt2_jax.make_tap({"h.*.mlp.out": gpt2_jax.add(1.0)}, config=config)
      >>> tap.wants("h.0.mlp.out"), tap.wants("h.0.attn.out")
      (True, False)
    """

    by_site: dict[str, Any]  # arrays, and callables that are pytrees
    positions: Any = None  # `[#B, T]`, of the tokens of a pass, once it is `placed`

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.by_site:
            return x
        edit: Any = self.by_site[site]
        if has_positions(edit) and self.positions is not None:
            new: Any = self._at_positions(edit, site, x)
        elif callable(edit):
            new = edit(x)
        else:
            new = jnp.broadcast_to(edit, x.shape)
        # In the activation's dtype: a float32 donor must not widen the rest of a bfloat16 pass.
        new = jnp.asarray(new, x.dtype)
        # A function's result is not broadcast: a lost axis is a mistake more often than a wish.
        if new.shape != x.shape:
            raise ValueError(f"An edit of {site} must return the shape {x.shape}, got {new.shape}.")
        return new

    def wants(self, site: str) -> bool:
        """Returns whether the site is edited."""
        return site in self.by_site

    def placed(self, positions: Int[Array, "#B T"]) -> "Edits":
        """Returns the tap of a pass over tokens at these positions."""
        # Most edits ask for none: their taps stay what they are.
        if not any(map(has_positions, self.by_site.values())):
            return self
        return Edits(self.by_site, positions)

    def repeated(self, n: int) -> "Edits":
        """Returns the tap of a batch with each row `n` times, one after the other.

        Values have rows where they have all axes of the activation, and more than 1 along the
        first.
        """
        by_site = {}
        for site, edit in self.by_site.items():
            ranks = (len(axes_of(site)),)
            if site == "logits" and not has_positions(edit):
                ranks = (2, 3)  # those of the last token have no T
            if isinstance(edit, Change):
                edit = edit.repeated(n, ranks)
            elif not callable(edit):
                edit = repeat_rows(edit, n, ranks)
            by_site[site] = edit
        return Edits(by_site, self.positions)

    def _at_positions(self, edit: Change, site: str, x: Array) -> Array:
        axes = axes_of(site)
        # The logits of a decoding step, of one token, have no axis for it.
        lacks_tokens = x.ndim < len(axes)
        if lacks_tokens:
            x = x[:, None]
        new = edit.of_tokens(x, self.positions, axes.index("T"))
        return new[:, 0] if lacks_tokens else new


def make_tap(edits: Mapping[str, Edit], *, config: GPT2Config) -> Edits:
    """Returns the tap that makes some edits, for `apply`, `generate` and `stream`.

    Args:
      edits: patterns of sites (see `find_sites`) and what becomes of the activations: an array that
        broadcasts to them, or a function of them. `replace` and `add` are such functions whose
        arrays are leaves of the tap, so that in `generate` other ones compile nothing;
        `jax.tree_util.Partial` makes others.
      config: the model's configuration.

    Raises:
      ValueError: a site does not exist, or has two edits, or one is at a position beyond the last.

    Examples:
      >>> edits = {"h.1.mlp.out": gpt2_jax.zero_ablation()}
      >>> tap = gpt2_jax.make_tap(edits, config=config)
      >>> edited = gpt2_jax.apply(params, ids, config=config, tap=tap)
      >>> bool((edited == gpt2_jax.patch(params, ids, config=config, edits=edits)).all())
      True
    """
    by_site: dict[str, Any] = {}
    for pattern, edit in edits.items():
        # A plain function is no pytree: as a `Partial` it becomes a part of the tap's structure.
        if callable(edit) and jax.tree_util.all_leaves([edit]):
            edit = Partial(edit)
        if has_positions(edit):
            check_context(edit.at, config)
        for site in find_sites(pattern, config):
            if site in by_site:
                raise ValueError(
                    f"Each site must have one edit, got a second one for {site}, by {pattern!r}."
                )
            by_site[site] = edit
    return Edits(by_site)


@dataclass
class ChainedTaps:
    """A tap that passes each activation through several, one after the other. A pytree.

    Examples:
      >>> double = gpt2_jax.make_tap({"embed": lambda x: 2 * x}, config=config)
      >>> tap = gpt2_jax.ChainedTaps((double, double))
      >>> tap("embed", jnp.ones(2)).tolist()
      [4.0, 4.0]
    """

    taps: tuple[Any, ...]

    def __call__(self, site: str, x: Array) -> Array:
        for tap in self.taps:
            x = tap(site, x)
        return x

    def wants(self, site: str) -> bool:
        """Returns whether any of them wants the site."""
        return any(wants(tap, site) for tap in self.taps)

    def placed(self, positions: Int[Array, "#B T"]) -> "ChainedTaps":
        """Returns the taps of a pass over tokens at these positions."""
        return ChainedTaps(tuple(placed(tap, positions) for tap in self.taps))

    def repeated(self, n: int) -> "ChainedTaps":
        """Returns the taps of a batch with each row `n` times."""
        return ChainedTaps(tuple(repeated(tap, n) for tap in self.taps))


class Recorder:
    """A tap that keeps what it sees at some sites, after another tap has changed it.

    Its dict grows while the model is traced: it serves one call, inside the caller's own function.
    """

    def __init__(self, sites: Iterable[str], tap: Tap, acts: Acts | None = None):
        self.sites = frozenset(sites)
        self.tap = tap
        self.acts: Acts = {} if acts is None else acts

    def __call__(self, site: str, x: Array) -> Array:
        # The edit first: what is kept is what the model goes on with.
        x = self.tap(site, x)
        if site in self.sites:
            self.acts[site] = x
        return x

    def wants(self, site: str) -> bool:
        """Returns whether the site is kept or edited."""
        return site in self.sites or wants(self.tap, site)

    # Others of their kind keep in the same dict.

    def placed(self, positions: Int[Array, "#B T"]) -> "Recorder":
        """Returns the tap of a pass over tokens at these positions."""
        return Recorder(self.sites, placed(self.tap, positions), self.acts)

    def repeated(self, n: int) -> "Recorder":
        """Returns the tap of a batch with each row `n` times."""
        return Recorder(self.sites, repeated(self.tap, n), self.acts)


@automatic
def capture(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
) -> tuple[Float[Array, "B T V"], Acts]:
    """Returns `apply`'s logits, and the activations of some sites by their names.

    Does not compile itself.

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      sites: names or patterns of names: see `find_sites`, and `SITES` for what there is.
      edits: see `make_tap`. What is captured is what the model goes on with.

    Raises:
      ValueError: as `apply`, or a site does not exist, or an edit changes a shape.

    Examples:
      >>> logits, acts = gpt2_jax.capture(params, ids, config=config, sites="h.*.attn.pattern")
      >>> {site: x.shape for site, x in acts.items()}
      {'h.0.attn.pattern': (1, 2, 4, 4), 'h.1.attn.pattern': (1, 2, 4, 4)}
    """
    # Before the pass, so that a wrong name costs nothing.
    names = find_sites(sites, config)
    recorder = Recorder(names, make_tap(edits or {}, config=config))
    logits = apply(
        params,
        ids,
        lengths,
        config=config,
        padding_side=padding_side,
        positions=positions,
        mask=mask,
        segment_ids=segment_ids,
        inputs_embeds=inputs_embeds,
        tap=recorder,
    )
    return logits, recorder.acts


@automatic
def patch(
    params: Params,
    ids: Int[ArrayLike, "B T"] | None,
    lengths: Int[ArrayLike, " B"] | None = None,
    *,
    config: GPT2Config,
    edits: Mapping[str, Edit],
    padding_side: str = "right",
    positions: Int[ArrayLike, "#B T"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    inputs_embeds: Float[ArrayLike, "B T D"] | None = None,
) -> Float[Array, "B T V"]:
    """Returns `apply`'s logits of a model whose activations are edited.

    `edits={"h.3.attn.out": lambda x: 0 * x}` takes out what the attention of layer 3 writes. Does
    not compile itself.

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      edits: see `make_tap`.

    Raises:
      ValueError: as `capture`.

    Examples:
      >>> nothing = gpt2_jax.zero_ablation()
      >>> edits = {"h.*.attn.out": nothing, "h.*.mlp.out": nothing}
      >>> logits = gpt2_jax.patch(params, ids, config=config, edits=edits)  # of embeddings alone
      >>> _, acts = gpt2_jax.capture(params, ids, config=config, sites="embed")
      >>> of_embeddings = gpt2_jax.stream_logits(params, acts["embed"], config=config)
      >>> np.allclose(logits, of_embeddings, atol=1e-5)
      True
    """
    # Through `capture` and not `apply` with a tap, so that the two cannot differ.
    logits, _ = capture(
        params,
        ids,
        lengths,
        config=config,
        sites=(),
        edits=edits,
        padding_side=padding_side,
        positions=positions,
        mask=mask,
        segment_ids=segment_ids,
        inputs_embeds=inputs_embeds,
    )
    return logits


# Activations, once they are there.


@automatic
def by_layer(acts: Mapping[str, ArrayLike], site: str) -> Shaped[Array, "L ..."]:
    """Returns the activations of a site, such as "attn.z", in every layer that was captured."""
    layers = {}
    for name, x in acts.items():
        match = re.fullmatch(rf"h\.(\d+)\.{site}", name)
        if match:
            layers[int(match[1])] = x
    # By number: as text, "10" comes before "2".
    return jnp.stack([layers[layer] for layer in sorted(layers)])


@automatic
def at_last_token(
    x: Float[Array, "B T ..."], lengths: Int[ArrayLike, " B"] | None = None
) -> Float[Array, "B ..."]:
    """Returns what stands at each row's last token: the last column, or that before its padding."""
    if lengths is None:
        return x[:, -1]
    rows = jnp.arange(len(x))
    last = jnp.asarray(lengths) - 1
    return x[rows, last]
