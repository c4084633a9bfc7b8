"""Reading and changing activations: the sites of a forward pass, `capture` and `patch`.

A tap is a function `tap(site, x) -> x` that the forward pass calls at each of its sites; what it
returns takes the activation's place. A tap with a method `wants(site)` is called only where that is
true, and costs nothing elsewhere. This file knows no method of research: those stand on it.

Axes are those of `modules.py`, and L, layers; `...` are the axes of a site that its name decides.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, apply
from gpt2_jax.pytrees import dataclass
from gpt2_jax.sharding import automatic

AnyArray = Array | np.ndarray
# What becomes of an activation: a function of it, or a value that broadcasts to it.
Edit = Callable[[Array], Array] | ArrayLike
Acts = dict[str, Array]  # activations by their sites

# In the order of the forward pass: site -> its axes (S is T, or the cache's slots), and the name of
# TransformerLens' hook, whose values are the same but for what the comments say. `i` stands for
# each layer.
SITES: dict[str, tuple[str, str]] = {
    "wte.out": ("B T D", "hook_embed"),
    "wpe.out": ("B T D", "hook_pos_embed"),
    "embed": ("B T D", "blocks.0.hook_resid_pre"),
    "h.i.resid_pre": ("B T D", "blocks.i.hook_resid_pre"),
    "h.i.ln_1.scale": ("B T 1", "blocks.i.ln1.hook_scale"),
    "h.i.ln_1.out": ("B T D", "blocks.i.ln1.hook_out"),
    "h.i.attn.q": ("B T H K", "blocks.i.attn.hook_q"),
    "h.i.attn.k": ("B T H K", "blocks.i.attn.hook_k"),
    "h.i.attn.v": ("B T H K", "blocks.i.attn.hook_v"),
    # Before the mask; the hook's are after it, with -inf.
    "h.i.attn.scores": ("B H T S", "blocks.i.attn.hook_attn_scores"),
    "h.i.attn.pattern": ("B H T S", "blocks.i.attn.hook_pattern"),
    "h.i.attn.z": ("B T H K", "blocks.i.attn.hook_z"),
    # Each head behind `c_proj`, without its bias.
    "h.i.attn.result": ("B T H D", "blocks.i.attn.hook_result"),
    "h.i.attn.out": ("B T D", "blocks.i.hook_attn_out"),
    "h.i.resid_mid": ("B T D", "blocks.i.hook_resid_mid"),
    "h.i.ln_2.scale": ("B T 1", "blocks.i.ln2.hook_scale"),
    "h.i.ln_2.out": ("B T D", "blocks.i.ln2.hook_out"),
    "h.i.mlp.pre": ("B T F", "blocks.i.mlp.hook_pre"),
    "h.i.mlp.post": ("B T F", "blocks.i.mlp.hook_post"),
    "h.i.mlp.out": ("B T D", "blocks.i.hook_mlp_out"),
    "h.i.resid_post": ("B T D", "blocks.i.hook_resid_post"),
    "ln_f.scale": ("B T 1", "ln_final.hook_scale"),
    "ln_f.out": ("B T D", "ln_final.hook_out"),
    # TransformerLens has no such hook. In `generate`, those of the last token alone: [B, V].
    "logits": ("B T V", ""),
}


# Sites and their names.


def site_names(config: GPT2Config) -> tuple[str, ...]:
    """Returns the name of every site, in the order of the forward pass."""
    in_table = list(SITES)
    of_each_layer = [name for name in in_table if name.startswith("h.")]
    first = in_table.index(of_each_layer[0])
    before = in_table[:first]
    after = in_table[first + len(of_each_layer) :]

    # The rows of the table that stand for a layer are repeated as a whole, layer by layer.
    of_layers = []
    for layer in range(config.n_layer):
        for name in of_each_layer:
            of_layers.append(name.replace("h.i", f"h.{layer}", 1))
    return (*before, *of_layers, *after)


def find_sites(patterns: str | Sequence[str], config: GPT2Config) -> tuple[str, ...]:
    """Returns the sites that any pattern matches: "h.3.attn.z", "h.*.attn.z", "h.[01].mlp.*".

    They come in the order of the forward pass, each once.

    Raises:
      ValueError: a pattern matches nothing; the message lists near names.
    """
    if isinstance(patterns, str):
        # A string is a sequence too, of letters.
        patterns = (patterns,)
    names = site_names(config)
    matched = set()
    for pattern in patterns:
        # The case counts, whatever the file system's rule: "q" and "Q" are not the same letter.
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
            listed = ", ".join(near) or "those of `site_names`"
            raise ValueError(
                f"There is no site {pattern!r} in {config.n_layer} layers. Near ones: {listed}."
            )
        matched.update(matches)
    return tuple(name for name in names if name in matched)


def find_site(pattern: str, config: GPT2Config) -> str:
    """Returns the one site that a pattern matches.

    Raises:
      ValueError: as `find_sites`, or it matches several.
    """
    site, *others = find_sites(pattern, config)
    if others:
        matches = ", ".join([site, *others])
        raise ValueError(f"Expected the name of one site, got {pattern!r}, which is {matches}.")
    return site


def site_axes(site: str, config: GPT2Config) -> tuple[str, ...]:
    """Returns the axes of a site's activation: those of "h.3.attn.z" are `("B", "T", "H", "K")`.

    Raises:
      ValueError: as `find_site`.
    """
    name = find_site(site, config)
    in_table = re.sub(r"^h\.\d+", "h.i", name)
    axes, _ = SITES[in_table]
    return tuple(axes.split())


# Reading and changing.


@dataclass
class Edits:
    """A tap that changes activations.

    A pytree: the arrays in it are leaves, so that other values compile nothing; the sites are its
    structure.
    """

    by_site: dict[str, Any]  # arrays, and callables that are pytrees

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.by_site:
            return x
        edit: Any = self.by_site[site]
        if callable(edit):
            new: Any = edit(x)
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


def make_tap(edits: Mapping[str, Edit], *, config: GPT2Config) -> Edits:
    """Returns the tap that makes some edits, for `apply`, `generate` and `stream`.

    Args:
      edits: patterns of sites (see `find_sites`) and what becomes of the activations: an array that
        broadcasts to them, or a function of them. `replace` and `add` are such functions whose
        arrays are leaves of the tap, so that in `generate` other ones compile nothing;
        `jax.tree_util.Partial` makes others.
      config: the model's configuration.

    Raises:
      ValueError: a site does not exist, or has two edits.
    """
    by_site: dict[str, Any] = {}
    for pattern, edit in edits.items():
        # A plain function is no pytree: as a `Partial` it becomes a part of the tap's structure.
        if callable(edit) and jax.tree_util.all_leaves([edit]):
            edit = Partial(edit)
        for site in find_sites(pattern, config):
            if site in by_site:
                raise ValueError(
                    f"Each site must have one edit, got a second one for {site}, by {pattern!r}."
                )
            by_site[site] = edit
    return Edits(by_site)


class Recorder:
    """A tap that keeps what it sees at some sites, after another tap has changed it.

    Its dict grows while the model is traced: it serves one call, inside the caller's own function.
    """

    def __init__(self, sites: Sequence[str], edits: Edits):
        self.sites = frozenset(sites)
        self.edits = edits
        self.acts: Acts = {}

    def __call__(self, site: str, x: Array) -> Array:
        # The edit first: what is kept is what the model goes on with.
        x = self.edits(site, x)
        if site in self.sites:
            self.acts[site] = x
        return x

    def wants(self, site: str) -> bool:
        """Returns whether the site is kept or edited."""
        return site in self.sites or self.edits.wants(site)


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

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      sites: names or patterns of names: see `find_sites`, and `SITES` for what there is.
      edits: see `make_tap`. What is captured is what the model goes on with.

    Raises:
      ValueError: as `apply`, or a site does not exist, or an edit changes a shape.
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

    `edits={"h.3.attn.out": lambda x: 0 * x}` takes out what the attention of layer 3 writes.

    Args:
      params, ids, lengths, config, padding_side, positions, mask, segment_ids, inputs_embeds: as
        for `apply`.
      edits: see `make_tap`.

    Raises:
      ValueError: as `capture`.
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


# Edits, and masks for them.


def replace(value: ArrayLike, where: ArrayLike = True) -> Edit:
    """Returns the edit that puts `value` in an activation's place where a mask is true.

    Both broadcast to the activation.
    """
    # A `Partial` of a module's function: equal for equal shapes, so that a jitted caller compiles
    # once for all values, which a closure over them would not.
    return Partial(_replace, value, where)


def add(vector: ArrayLike, strength: ArrayLike = 1.0) -> Edit:
    """Returns the edit that adds `strength * vector`, which broadcasts to the activation."""
    return Partial(_add, vector, strength)


def _replace(value: ArrayLike, where: ArrayLike, x: Array) -> Array:
    value = jnp.asarray(value, x.dtype)
    # Broadcast by hand, for programs that forbid ranks to be promoted in silence.
    value = jnp.broadcast_to(value, x.shape)
    where = jnp.broadcast_to(where, x.shape)
    return jnp.where(where, value, x)


def _add(vector: ArrayLike, strength: ArrayLike, x: Array) -> Array:
    # Multiplied before the cast: in bfloat16 the strength would lose digits of its own.
    offset = jnp.asarray(vector * strength, x.dtype)
    return x + jnp.broadcast_to(offset, x.shape)


def axis_masks(site: str, over: str, length: int, *, config: GPT2Config) -> Bool[Array, "N ..."]:
    """Returns a mask for each index along some axes of an activation of texts of `length` tokens.

    For "h.0.attn.z", whose axes are B T H K, and `over="H"` these are `bool[H, 1, H, 1]`, the `n`th
    true at head `n`; `over="TH"` gives `bool[T * H, T, H, 1]`, and `over=""` one mask that is true
    everywhere.

    Raises:
      ValueError: the site does not exist, or `over` is not axes of it in their order, without B.
    """
    axes = site_axes(site, config)[1:]
    in_order = [axis for axis in axes if axis in over]
    if in_order != list(over):
        raise ValueError(
            f"`over` must be axes of {site} in their order, of {''.join(axes)!r}; got {over!r}."
        )
    sizes = {
        "T": length,
        "S": length,
        "H": config.n_head,
        "K": config.head_dim,
        "D": config.n_embd,
        "F": config.mlp_width,
        "V": config.vocab_size,
        "1": 1,
    }
    shape = [sizes[axis] if axis in over else 1 for axis in axes]
    # Row `n` of the identity, seen in the activation's shape, is true at the `n`th index alone.
    masks = jnp.eye(math.prod(shape), dtype=bool)
    return masks.reshape(-1, *shape)


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
