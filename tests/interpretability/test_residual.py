"""A residual stream is the sum of its parts, and its layers run on from any of them."""

import jax
import numpy as np
import pytest

from gpt2_jax.interpretability.edits import add
from gpt2_jax.interpretability.reading import stream_logits
from gpt2_jax.interpretability.residual import resid_stack
from gpt2_jax.interpretability.taps import make_tap
from gpt2_jax.model import run_layers
from tests.interpretability.hooks import near


def test_parts_sum_to_their_stream_and_are_what_was_written(tiny, texts, acts):
    config, params = tiny
    seen = acts[0]
    lengths = np.array([5, 3])

    @jax.jit
    def run(ids):
        return (
            resid_stack(params, ids, config=config),
            resid_stack(params, ids, config=config, by="head", stream="h.1.resid_mid"),
            resid_stack(params, ids, lengths, config=config, by="neuron", last_only=True),
        )

    layers, heads, neurons = jax.device_get(run(texts[0]))
    near(layers.parts.sum(axis=0), seen["h.2.resid_post"])
    for name, part in zip(layers.names, layers.parts, strict=True):
        near(part, seen[name])
    assert layers.names[:4] == ("wte.out", "wpe.out", "h.0.attn.out", "h.0.mlp.out")

    near(heads.parts.sum(axis=0), seen["h.1.resid_mid"])
    parts = dict(zip(heads.names, heads.parts, strict=True))
    near(parts["h.1.attn.result[2]"], seen["h.1.attn.result"][:, :, 2])
    near(parts["h.0.mlp.out"], seen["h.0.mlp.out"])
    bias = np.asarray(params["h"]["1"]["attn"]["c_proj"]["bias"])
    near(parts["h.1.attn.c_proj.bias"], np.broadcast_to(bias, (2, 5, 24)))

    rows, ends = [0, 1], lengths - 1
    near(neurons.parts.sum(axis=0), seen["h.2.resid_post"][rows, ends])
    parts = dict(zip(neurons.names, neurons.parts, strict=True))
    kernel = np.asarray(params["h"]["2"]["mlp"]["c_proj"]["kernel"])
    near(parts["h.2.mlp.post[17]"], seen["h.2.mlp.post"][rows, ends, 17:18] * kernel[17])
    assert len(parts) == 2 + 3 * (3 + 1 + 96 + 1)


def test_other_streams_and_parts_are_refused(tiny, texts):
    config, params = tiny
    with pytest.raises(ValueError, match="must be a residual stream, got h.0.attn.z .B T H K."):
        resid_stack(params, texts[0], config=config, stream="h.0.attn.z")
    with pytest.raises(ValueError, match='`by` must be "layer", "head" or "neuron", got .token.'):
        resid_stack(params, texts[0], config=config, by="token")


def test_layers_run_on_from_a_stream(tiny, acts):
    config, params = tiny
    seen = acts[0]
    edits = {"h.2.mlp.out": add(np.ones(24), at=[3])}
    tap = make_tap(edits, config=config)

    @jax.jit
    def run(stream):
        last = run_layers(params, stream, config=config, start=1)
        part = run_layers(params, stream, config=config, start=1, stop=2)
        edited = run_layers(params, stream, config=config, start=1, tap=tap)
        return last, stream_logits(params, last, config=config), part, edited

    last, logits, part, edited = run(seen["h.1.resid_pre"])
    near(last, seen["h.2.resid_post"])
    near(logits, seen["logits"])
    near(part, seen["h.1.resid_post"])
    near(edited, last + (np.arange(5) == 3)[None, :, None])
    near(run_layers(params, part, config=config, start=2, stop=2), part)
    for start, stop in ((2, 1), (0, 4), (-1, 2)):
        with pytest.raises(ValueError, match=rf"<= 3 .`n_layer`., got {start} and {stop}"):
            run_layers(params, part, config=config, start=start, stop=stop)
    with pytest.raises(ValueError, match=r"`stream` must be floats of shape \[B, T, 24\], got"):
        run_layers(params, part[..., :3], config=config)
