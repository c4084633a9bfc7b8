"""The sites of a forward pass: their names, their axes, and masks over these.

Knows names and shapes; nothing of what is done at a site.

Axes are those of `modules.py`; `...` are the axes of a site that its name decides.
"""

import difflib
import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jaxtyping import Array, Bool

from gpt2_jax.config import GPT2Config

# In the order of the forward pass: site -> its axes (S is T, or the cache's slots), and the name of
# TransformerLens' hook, whose values are the same but for what the comments say. `i` stands for
# each layer.
SITES: dict[str, tuple[str, str]] = {
    "wte.out": ("B T D", "hook_embed"),
    "wpe.out": ("B T D", "hook_pos_embed"),
    "embed": ("B T D", "blocks.0.hook_resid_pre"),
    "h.i.resid_pre": ("B T D", "blocks.i.hook_resid_pre"),
    # The stream as each head reads it, with `use_attn_in`: what is changed here reaches its
    # queries, keys and values, and nothing else.
    "h.i.attn.in": ("B T H D", "blocks.i.hook_attn_in"),
    # Likewise its queries, keys or values alone, with `use_split_qkv_input`.
    "h.i.attn.q_in": ("B T H D", "blocks.i.hook_q_input"),
    "h.i.attn.k_in": ("B T H D", "blocks.i.hook_k_input"),
    "h.i.attn.v_in": ("B T H D", "blocks.i.hook_v_input"),
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
    # The stream as the MLP reads it, with `use_hook_mlp_in`.
    "h.i.mlp.in": ("B T D", "blocks.i.hook_mlp_in"),
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


def site_names(config: GPT2Config) -> tuple[str, ...]:
    """Returns the name of every site, in the order of the forward pass.

    Examples:
      >>> names = gpt2_jax.site_names(config)
      >>> names[:3], names[-1], len(names)
      (('wte.out', 'wpe.out', 'embed'), 'logits', 52)
    """
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

    Examples:
      >>> gpt2_jax.find_sites("h.*.attn.z", config)
      ('h.0.attn.z', 'h.1.attn.z')
      >>> gpt2_jax.find_sites("h.0.attn.zz", config)
      Traceback (most recent call last):
          ...
      ValueError: There is no site 'h.0.attn.zz' in 2 layers. Near ones: ...
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
    return axes_of(find_site(site, config))


def axes_of(site: str) -> tuple[str, ...]:
    """Returns the axes of a site that exists."""
    in_table = re.sub(r"^h\.\d+", "h.i", site)
    axes, _ = SITES[in_table]
    return tuple(axes.split())


def axis_masks(site: str, over: str, length: int, *, config: GPT2Config) -> Bool[Array, "N ..."]:
    """Returns a mask for each index along some axes of an activation of texts of `length` tokens.

    For "h.0.attn.z", whose axes are B T H K, and `over="H"` these are `bool[H, 1, H, 1]`, the `n`th
    true at head `n`; `over="TH"` gives `bool[T * H, T, H, 1]`, and `over=""` one mask that is true
    everywhere.

    Raises:
      ValueError: the site does not exist, or `over` is not axes of it in their order, without B.

    Examples:
      >>> masks = gpt2_jax.axis_masks("h.0.attn.z", "H", 4, config=config)
      >>> masks.shape, masks[1, 0, :, 0].tolist()  # [N, T, H, K]
      ((2, 1, 2, 1), [False, True])
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
