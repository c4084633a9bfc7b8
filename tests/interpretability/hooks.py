"""PyTorch's hooks on HF's model: what interventions are compared with."""

from functools import partial

import numpy as np
import torch

near = partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


def hooked(model, ids, hooks):
    """Logits of HF's model whose modules' outputs go through functions, `{name: change}`.

    For `h.i.attn.c_proj` and `h.i.mlp.c_proj` it is the inputs that do.
    """

    def after(change, module, args, out):
        if isinstance(out, tuple):
            return (change(out[0]), *out[1:])
        return change(out)

    def before(change, module, args):
        return (change(args[0]), *args[1:])

    handles = []
    for name, change in hooks.items():
        module = model.get_submodule(f"transformer.{name}")
        if name.endswith("c_proj"):
            handle = module.register_forward_pre_hook(partial(before, change))
        else:
            handle = module.register_forward_hook(partial(after, change))
        handles.append(handle)
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
    for handle in handles:
        handle.remove()
    return logits


def put(where, donor):
    """The hook that puts a donor's values at an index."""

    def change(x):
        x = x.clone()
        x[where] = torch.tensor(np.asarray(donor))[where]
        return x

    return change


def layer_norm(x, weights, eps=1e-5):
    """LayerNorm in numpy."""
    x = x - x.mean(axis=-1, keepdims=True)
    normed = x / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return normed * weights["scale"] + weights["bias"]
