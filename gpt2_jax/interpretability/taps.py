"""Reading and changing activations: the sites of a forward pass, `capture` and `patch`. Knows no method of research.

A tap is a function `tap(site, x) -> x` that the forward pass calls at each of its sites; what it returns takes the
activation's place. One that has a method `wants(site)` is called for what it wants, and costs nothing elsewhere.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import Params, apply

Edit = (
    Callable[[Array], Array] | Array
)  # what becomes of an activation: a function of it, or a value
Acts = dict[str, Array]  # activations by their sites

# In the order of the forward pass: site -> its axes (see `modules`; S is T, or the cache's slots), and the name of
# TransformerLens' hook, whose values are the same but for what the comments say. `i` stands for each layer.
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
    "h.i.attn.scores": (
        "B H T S",
        "blocks.i.attn.hook_attn_scores",
    ),  # before the mask; the hook: after, with -inf
    "h.i.attn.pattern": ("B H T S", "blocks.i.attn.hook_pattern"),
    "h.i.attn.z": ("B T H K", "blocks.i.attn.hook_z"),
    "h.i.attn.result": (
        "B T H D",
        "blocks.i.attn.hook_result",
    ),  # each head behind `c_proj`, without its bias
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
    "logits": ("B T V", ""),  # in `generate`, of the last token alone: [B, V]
}


def site_names(config: GPT2Config) -> tuple[str, ...]:
    """Returns the name of every site, in the order of the forward pass."""
    names = list(SITES)
    layer = [name for name in names if name.startswith("h.")]
    layers = [name.replace("h.i", f"h.{i}", 1) for i in range(config.n_layer) for name in layer]
    start = names.index(layer[0])
    return (*names[:start], *layers, *names[start + len(layer) :])


def site_axes(site: str, config: GPT2Config) -> tuple[str, ...]:
    """Returns the axes of a site's activation: those of "h.3.attn.z" are `("B", "T", "H", "K")`."""
    (site,) = find_sites(site, config)
    return tuple(SITES[re.sub(r"^h\.\d+", "h.i", site)][0].split())


def find_sites(patterns: str | Sequence[str], config: GPT2Config) -> tuple[str, ...]:
    """Returns the sites that any pattern matches: "h.3.attn.z", "h.*.attn.z", "h.[01].mlp.*".

    Raises:
      ValueError: a pattern matches nothing; the message lists near names.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = site_names(config)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = (
                ", ".join(difflib.get_close_matches(pattern, names, n=4, cutoff=0.5))
                or "those of `site_names`"
            )
            raise ValueError(
                f"There is no site {pattern!r} in {config.n_layer} layers. Near ones: {near}."
            )
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


@struct.dataclass
class Edits:
    """A tap that changes activations. A pytree: the arrays in it are leaves, the sites are its structure."""

    by_site: dict[str, Any]  # arrays, and callables that are pytrees

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.by_site:
            return x
        edit = self.by_site[site]
        new = edit(x) if callable(edit) else jnp.broadcast_to(edit, x.shape)
        if jnp.shape(new) != x.shape:
            raise ValueError(
                f"An edit of {site} must return the shape {x.shape}, got {jnp.shape(new)}."
            )
        return jnp.asarray(new, x.dtype)

    def wants(self, site: str) -> bool:
        """Whether the site is edited."""
        return site in self.by_site


def make_tap(edits: Mapping[str, Edit], *, config: GPT2Config) -> Edits:
    """Returns the tap that makes some edits, for `apply`, `generate` and `stream`.

    Args:
      edits: patterns of sites (see `find_sites`) and what becomes of the activations: an array that broadcasts to
        them, or a function of them. `replace` and `add` are such functions whose arrays are leaves of the tap, so that
        in `generate` other ones compile nothing; `jax.tree_util.Partial` makes others.
      config: the model's configuration.

    Raises:
      ValueError: a site does not exist, or has two edits.
    """
    by_site: dict[str, Any] = {}
    for pattern, edit in edits.items():
        plain = callable(edit) and jax.tree_util.all_leaves([edit])
        for site in find_sites(pattern, config):
            if site in by_site:
                raise ValueError(
                    f"Each site must have one edit, got a second one for {site}, by {pattern!r}."
                )
            by_site[site] = Partial(edit) if plain else edit
    return Edits(by_site)


class _Recorder:
    """A tap that keeps what it sees at some sites, after another tap has changed it."""

    def __init__(self, sites: Sequence[str], edits: Edits):
        self.sites, self.edits, self.acts = frozenset(sites), edits, {}

    def __call__(self, site: str, x: Array) -> Array:
        x = self.edits(site, x)
        if site in self.sites:
            self.acts[site] = x
        return x

    def wants(self, site: str) -> bool:
        return site in self.sites or self.edits.wants(site)


def capture(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    sites: str | Sequence[str],
    edits: Mapping[str, Edit] | None = None,
    padding_side: str = "right",
) -> tuple[Array, Acts]:
    """Returns `apply`'s logits, and the activations of some sites by their names.

    Args:
      params, ids, lengths, config, padding_side: as for `apply`.
      sites: names or patterns of names: see `find_sites`, and `SITES` for what there is.
      edits: see `patch`. What is captured is what the model goes on with.

    Raises:
      ValueError: as `apply`, or a site does not exist, or an edit changes a shape.
    """
    tap = _Recorder(find_sites(sites, config), make_tap(edits or {}, config=config))
    logits = apply(params, ids, lengths, config=config, padding_side=padding_side, tap=tap)
    return logits, tap.acts


def patch(
    params: Params,
    ids: Array,
    lengths: Array | None = None,
    *,
    config: GPT2Config,
    edits: Mapping[str, Edit],
    padding_side: str = "right",
) -> Array:
    """Returns `apply`'s logits of a model whose activations are edited: `edits={"h.3.attn.out": lambda x: 0 * x}`.

    Args:
      params, ids, lengths, config, padding_side: as for `apply`.
      edits: see `make_tap`.

    Raises:
      ValueError: as `capture`.
    """
    return capture(
        params, ids, lengths, config=config, sites=(), edits=edits, padding_side=padding_side
    )[0]


def replace(value: Any, where: Any = True) -> Edit:
    """Returns the edit that puts `value` in the place of an activation where a mask is true; both broadcast to it."""
    return Partial(_replace, value, where)


def add(vector: Any, strength: Any = 1.0) -> Edit:
    """Returns the edit that adds `strength * vector`, which broadcasts to the activation."""
    return Partial(_add, vector, strength)


def axis_masks(site: str, over: str, length: int, *, config: GPT2Config) -> Array:
    """Returns a mask for each index along some axes of an activation of texts of `length` tokens, `bool[N, ...]`.

    For "h.0.attn.z", whose axes are B T H K, and `over="H"` these are `bool[H, 1, H, 1]`, the `n`th true at head `n`;
    `over="TH"` gives `bool[T * H, T, H, 1]`, and `over=""` one mask that is true everywhere.

    Raises:
      ValueError: the site does not exist, or `over` is not axes of it in their order, without B.
    """
    _, *axes = site_axes(site, config)
    if [axis for axis in axes if axis in over] != list(over):
        raise ValueError(
            f"`over` must be axes of {site} in their order, of {''.join(axes)!r}; got {over!r}."
        )
    sizes = {"T": length, "S": length, "H": config.n_head, "K": config.head_dim, "D": config.n_embd}
    sizes |= {"F": config.mlp_width, "V": config.vocab_size, "1": 1}
    shape = [sizes[axis] if axis in over else 1 for axis in axes]
    return jnp.eye(math.prod(shape), dtype=bool).reshape(-1, *shape)


def _replace(value, where, x):
    value = jnp.asarray(value, x.dtype)
    return jnp.where(jnp.broadcast_to(where, x.shape), jnp.broadcast_to(value, x.shape), x)


def _add(vector, strength, x):
    return x + jnp.broadcast_to(jnp.asarray(vector * strength, x.dtype), x.shape)
