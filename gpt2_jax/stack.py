"""The layers' params as one stack, `[L, ...]`, over which the forward pass scans.

A program of 48 layers in a row takes as many times one layer's time to compile; of a stack it takes
that of one. In training on accelerators that is all it costs. On CPU, and in decoding, each layer's
weights would be copied out of the stack at each step: there the layers stay apart.

What is saved, tapped and decoded is the tree of separate layers: `unstack_layers` gives it back.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

Params = dict[str, Any]

_IN_STACK = re.compile(r"(^|\.)h\.(?!\d)")


def stack_layers(params: Params) -> Params:
    """Returns params whose layers are one: `h.attn.c_attn.kernel[L, I, O]` and so on.

    `apply`, `next_token_loss` and `train_step` take them as they take others, with the same values.
    What reads or decodes layer by layer, with a tap or a cache, raises. It does not compile itself.

    Raises:
      ValueError: the layers are a stack already.

    Examples:
      >>> stacked = gpt2_jax.stack_layers(params)
      >>> stacked["h"]["mlp"]["c_fc"]["kernel"].shape
      (2, 16, 64)
    """
    if is_stacked(params):
        raise ValueError("The layers of `params` are a stack already.")
    # By number: as text, "10" comes before "2".
    layers = [params["h"][name] for name in sorted(params["h"], key=int)]
    return params | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """Undoes `stack_layers`. It does not compile itself.

    Raises:
      ValueError: the layers are no stack.

    Examples:
      >>> apart = gpt2_jax.unstack_layers(gpt2_jax.stack_layers(params))
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, apart, params))
      True
    """
    if not is_stacked(params):
        raise ValueError("The layers of `params` must be a stack, as `stack_layers` makes it.")
    n_layers = len(jax.tree.leaves(params["h"])[0])
    layers = {}
    for number in range(n_layers):
        layers[str(number)] = jax.tree.map(lambda leaf, number=number: leaf[number], params["h"])
    return params | {"h": layers}


def is_stacked(params: Params) -> bool:
    """Returns whether the layers are a stack."""
    return "h" in params and not any(name.isdecimal() for name in params["h"])


def is_in_stack(name: str) -> bool:
    """Returns whether a leaf of this name, as "h.attn.c_attn.kernel", is a stack of layers'."""
    return _IN_STACK.search(name) is not None


def n_axes(path: Any, leaf: Any) -> int:
    """Returns how many axes a param has, without that of a stack. `path` is as JAX gives it."""
    return leaf.ndim - is_in_stack(keystr(path, simple=True, separator="."))
