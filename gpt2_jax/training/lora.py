"""Low-rank adapters (LoRA, arXiv:2106.09685): a few numbers that change a model's kernels.

Adapters are a tree of their own beside the params. `merge_lora` is a pure function of both: inside
a loss it trains the adapters, outside it gives plain params. Knows no optimizer and no file.

Axes: I and O, the input and the output of a kernel; R, the rank.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Float, PRNGKeyArray

from gpt2_jax.config import as_count
from gpt2_jax.modules import Params
from gpt2_jax.quantised import refuse_quantised

TARGETS = ("*.attn.c_attn",)  # PEFT's for GPT-2


def lora(
    key: PRNGKeyArray, params: Params, *, rank: int, targets: str | Sequence[str] = TARGETS
) -> Params:
    """Returns fresh adapters of a model, with which it computes what it does without.

    Does not compile itself.

    Under the names of the layers, each has `lora_A`, `[I, R]`, uniform within `1 / sqrt(I)`, and
    `lora_B`, `[R, O]`, zeros (PEFT's initial values; its matrices are the transposes). Leaves are
    float32, or float64 where the kernel is.

    Args:
      key: the source of `lora_A`.
      params: the model's parameters.
      rank: `R`, at least 1.
      targets: patterns of layers that have kernels, such as "*.attn.*" or "h.11.mlp.c_fc".

    Raises:
      ValueError: a pattern matches no layer with a kernel, or `rank` is less than 1;
        or the params are quantised.

    Examples:
      >>> adapters = gpt2_jax.lora(jax.random.key(0), params, rank=2)
      >>> adapters["h"]["0"]["attn"]["c_attn"]["lora_A"].shape
      (16, 2)
    """
    rank = as_count("rank", rank)
    refuse_quantised(params, "Params with adapters")
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    kernels = _kernels(params)
    for pattern in patterns:
        # Each pattern must match: PEFT raises only where none of them does.
        if not any(fnmatchcase(name, pattern) for name in kernels):
            listed = ", ".join(list(kernels)[:4])
            raise ValueError(
                f"`targets` must match layers with kernels, {pattern!r} matches none. Layers are"
                f" such as {listed}."
            )
    adapters: dict[str, Any] = {}
    for number, (name, kernel) in enumerate(kernels.items()):
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        n_in, n_out = kernel.shape
        # Not of 16 bits even for such a model: small updates would vanish in them.
        dtype = jnp.promote_types(kernel.dtype, jnp.float32)
        # By the layer's number among all: other targets change no layer's draws.
        layer_key = jax.random.fold_in(key, number)
        # What PEFT's `kaiming_uniform_(a=sqrt(5))` comes to.
        bound = n_in**-0.5
        adapters[f"{name}.lora_A"] = jax.random.uniform(
            layer_key, (n_in, rank), dtype, minval=-bound, maxval=bound
        )
        # Zeros on one side alone: their product is 0, but the gradient of `lora_B` is not.
        adapters[f"{name}.lora_B"] = jnp.zeros((rank, n_out), dtype)
    return traverse_util.unflatten_dict(adapters, sep=".")


def merge_lora(params: Params, adapters: Params, *, alpha: float = 8.0) -> Params:
    """Returns plain params: each adapted kernel plus `alpha / R` times `lora_A @ lora_B`.

    It does not compile itself; it jits, and differentiates in both. The sum is made in the dtype of
    the adapters, and returned in the kernel's.

    Args:
      params: the model's parameters.
      adapters: what `lora` made, trained or not.
      alpha: as in PEFT's `lora_alpha`, whose default is 8 too.

    Raises:
      ValueError: an adapter belongs to no kernel, or to one of another shape, or the params are
        quantised.

    Examples:
      >>> adapters = gpt2_jax.lora(jax.random.key(0), params, rank=2)
      >>> merged = gpt2_jax.merge_lora(params, adapters)
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, merged, params))  # before training
      True
    """
    refuse_quantised(params, "Params with adapters")
    # A new tree around the same arrays: only the adapted kernels are made anew.
    flat_params: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    flat_adapters: dict[str, Any] = traverse_util.flatten_dict(adapters, sep=".")
    for name, a in flat_adapters.items():
        layer, _, part = name.rpartition(".")
        # Each pair is merged once, when its first half comes.
        if part != "lora_A":
            continue
        b = flat_adapters[f"{layer}.lora_B"]
        kernel: Any = flat_params.get(f"{layer}.kernel")
        expected = [a.shape[0], b.shape[1]]
        got = list(getattr(kernel, "shape", ()))
        if got != expected:
            found = f"got {got}" if got else "and there is none"
            raise ValueError(f"An adapter of {layer} needs a kernel {expected}, {found}.")
        # Into the kernel, not as a second path beside it: the forward pass knows of no adapters.
        change = alpha / a.shape[1] * (a @ b)
        merged = kernel.astype(change.dtype) + change
        flat_params[f"{layer}.kernel"] = merged.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat_params, sep=".")


def _kernels(params: Params) -> dict[str, Float[jax.Array, "I O"]]:
    """Returns the kernels by the names of their layers."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    return {
        name.removesuffix(".kernel"): leaf
        for name, leaf in flat.items()
        if name.endswith(".kernel")
    }
