"""Each reading equals an independent computation: numpy, or PyTorch's own gradients; in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt2_jax.interpretability import reading
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.patching import patch_each
from gpt2_jax.interpretability.taps import patch
from tests.interpretability.hooks import layer_norm, near

LAYERS, HEADS = 3, 3


def metric(logits):
    """A difference of two logits, summed over the rows, `[B, V] -> []`."""
    return (logits[:, 3] - logits[:, 8]).sum()


def test_attention_patterns_equal_hfs(tiny, model, texts):
    config, params = tiny
    theirs = model(torch.tensor(texts[0]), output_attentions=True).attentions
    expected = np.stack([pattern.detach().numpy() for pattern in theirs])
    near(reading.attention_patterns(params, texts[0], config=config), expected)


@pytest.fixture(scope="module")
def streams(acts):
    """The residual streams before each layer, and the last one."""
    before = np.stack([acts[0][f"h.{i}.resid_pre"] for i in range(LAYERS)])
    return before, acts[0][f"h.{LAYERS - 1}.resid_post"][None]


def test_the_logit_lens_equals_numpy_and_ends_in_the_models_logits(tiny, texts, acts, streams):
    config, params = tiny
    weights = jax.device_get(params)
    lens = jax.jit(reading.logit_lens)(params, texts[0], config=config)
    head = weights["wte"]["embedding"].T
    near(lens, layer_norm(np.concatenate(streams), weights["ln_f"]) @ head)
    near(lens[-1], acts[0]["logits"])


def test_a_tuned_lens_translates_every_stream_but_the_last(tiny, texts, streams, rng):
    config, params = tiny
    weights = jax.device_get(params)
    before, final = streams
    kernels = rng.normal(0, 0.1, (LAYERS, 24, 24))
    biases = rng.normal(0, 0.1, (LAYERS, 24))
    tuned = [before[i] + before[i] @ kernels[i] + biases[i] for i in range(LAYERS)]
    lens = reading.logit_lens(params, texts[0], config=config, translators=(kernels, biases))
    normed = layer_norm(np.concatenate([tuned, final]), weights["ln_f"])
    near(lens, normed @ weights["wte"]["embedding"].T)

    message = r"must be kernels \[3, 24, 24\] and biases \[3, 24\], got \[2, 24, 24\] and \[3, 24\]"
    with pytest.raises(ValueError, match=message):
        reading.logit_lens(params, texts[0], config=config, translators=(kernels[:2], biases))


def at(logits, targets):
    """The logits of some tokens."""
    return np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_direct_attributions_sum_to_the_logit_and_equal_each_parts_share(tiny, texts, acts):
    config, params = tiny
    targets, weights, seen = texts[1], jax.device_get(params), acts[0]
    run = jax.jit(reading.direct_logit_attribution)
    found = jax.device_get(run(params, texts[0], targets, config=config))

    total = found.wte + found.wpe + found.ln_f_bias
    total = total + found.attn_bias.sum(axis=0) + found.mlps.sum(axis=0)
    total = total + found.heads.sum(axis=(0, 3))
    near(total, at(seen["logits"], targets))

    def share(part):  # the logits that a part alone gives, the last scale being held
        centred = part - part.mean(axis=-1, keepdims=True)
        normed = centred / seen["ln_f.scale"] * weights["ln_f"]["scale"]
        return at(normed @ weights["wte"]["embedding"].T, targets)

    near(found.wte, share(seen["wte.out"]))
    near(found.wpe, share(seen["wpe.out"]))
    for i in range(LAYERS):
        near(found.mlps[i], share(seen[f"h.{i}.mlp.out"]))
        for head in range(HEADS):
            near(found.heads[i, ..., head], share(seen[f"h.{i}.attn.result"][:, :, head]))


@pytest.fixture(scope="module")
def gradients(model, texts):
    """PyTorch's gradients of the metric with respect to some modules' outputs, by our sites."""
    sites = {
        "h.0": "h.0.resid_post",
        "h.1.mlp": "h.1.mlp.out",
        "h.2.ln_1": "h.2.ln_1.out",
        "h.1.attn": "h.1.attn.out",
    }
    kept = {}

    def keep(site, module, args, out):
        kept[site] = out[0] if isinstance(out, tuple) else out
        kept[site].retain_grad()

    handles = []
    for name, site in sites.items():
        module = model.get_submodule(f"transformer.{name}")
        handles.append(module.register_forward_hook(partial(keep, site)))
    metric(model(torch.tensor(texts[0])).logits[:, -1]).backward()
    for handle in handles:
        handle.remove()
    return {site: x.grad.numpy() for site, x in kept.items()}


def test_gradient_times_activation_equals_pytorchs(tiny, texts, acts, gradients):
    config, params = tiny
    own, other = acts

    @jax.jit
    def run(donors):
        return reading.attribution(
            params, texts[0], metric, config=config, sites=tuple(gradients), donors=donors
        )

    itself = run(None)
    changed = run({site: other[site] for site in gradients})
    assert set(itself) == set(gradients)
    for site, gradient in gradients.items():
        near(itself[site], gradient * own[site])
        near(changed[site], gradient * (other[site] - own[site]))


def test_a_sweep_has_the_derivative_of_attribution(tiny, texts, acts, gradients):
    """Its donors being the text's own activations."""
    config, params = tiny
    own = {site: x for site, x in acts[0].items() if site.endswith("mlp.out")}
    everywhere = jnp.ones((1, 1, 1), bool)

    @jax.jit
    @jax.grad
    def run(donors):
        measured = patch_each(
            params, texts[0], donors, everywhere, metric, config=config, site="mlp.out"
        )
        return measured[1, 0]

    derivative = run(own)
    near(derivative["h.1.mlp.out"], gradients["h.1.mlp.out"])
    assert not derivative["h.0.mlp.out"].any()  # it is patched in a run of its own


def test_what_is_read_is_of_the_edited_model(tiny, texts, rng):
    config, params = tiny
    offset = rng.normal(size=(2, 5, 24))
    targets = texts[1]

    @jax.jit
    def run(offset):
        edits = {"h.1.mlp.out": add(offset)}

        def patched(offset):
            logits = patch(params, texts[0], config=config, edits={"h.1.mlp.out": add(offset)})
            return metric(logits[:, -1]), logits

        # The gradient at a site, written out.
        (value, logits), gradient = jax.value_and_grad(patched, has_aux=True)(offset)
        options = {"config": config, "edits": edits}
        found = reading.site_gradients(
            params, texts[0], metric, sites=("h.1.mlp.out", "h.2.attn.pattern"), **options
        )
        lens = reading.logit_lens(params, texts[0], **options)
        patterns = reading.attention_patterns(params, texts[0], **options)
        parts = reading.direct_logit_attribution(params, texts[0], targets, **options)
        return value, logits, gradient, found, lens, patterns, parts

    value, logits, gradient, found, lens, patterns, parts = run(offset)
    near(found.value, value)
    near(found.gradients["h.1.mlp.out"], gradient)
    near(lens[-1], logits)
    near(patterns[2], found.acts["h.2.attn.pattern"])
    total = parts.wte + parts.wpe + parts.ln_f_bias + parts.attn_bias.sum(axis=0)
    near(total + parts.mlps.sum(axis=0) + parts.heads.sum(axis=(0, 3)), at(logits, targets))


def test_heads_are_known_by_where_they_attend(tiny):
    """A pattern that is put in attends as it says; the others as an own count of them does."""
    config, params = tiny
    length = 6
    steps = np.arange(12)[:, None] - np.arange(12)[None]
    put = {"previous": 1, "duplicate": length, "induction": length - 1}
    patterns = np.stack([steps == distance for distance in put.values()]).astype(float)
    key = jax.random.key(0)

    @jax.jit
    def run(patterns):
        edits = {"h.1.attn.pattern": replace(patterns[None])}
        options = {"config": config, "length": length, "n_texts": 3}
        found = reading.head_scores(params, key, edits=edits, **options)
        tokens = jax.random.randint(key, (3, length), 0, 61)
        ids = jnp.tile(tokens, (1, 2))
        return found, reading.attention_patterns(params, ids, config=config)

    found, seen = jax.device_get(run(patterns))
    for head, (name, distance) in enumerate(put.items()):
        scores = getattr(found, name)
        assert scores[1].tolist() == [float(other == head) for other in range(HEADS)]
        of_layer = seen[0][:, :, steps == distance].mean(axis=(0, 2))
        near(scores[0], of_layer)
    with pytest.raises(ValueError, match="`length` must be 2 to 12, half of `n_positions`, got 13"):
        reading.head_scores(params, key, config=config, length=13)


def test_attribution_of_ragged_texts_is_that_of_each_rows_last_token(tiny, texts):
    config, params = tiny
    site = "h.1.mlp.out"

    @jax.jit
    def run(ids, lengths=None):
        found = reading.attribution(params, ids, metric, lengths, config=config, sites=site)
        return found[site]

    ragged = run(texts[0], np.array([5, 3]))
    near(ragged[1, :3], run(texts[0][1:, :3])[0])
    assert not ragged[1, 3:].any()


def test_donors_that_lack_a_site_are_named(tiny, texts):
    config, params = tiny
    run = partial(reading.attribution, params, texts[0], metric, config=config)
    with pytest.raises(ValueError, match="`donors` must have every site, they lack h.0.attn.z"):
        run(sites="h.*.attn.z", donors={"h.1.attn.z": 0, "h.2.attn.z": 0})


def test_a_steering_vector_is_a_difference_of_mean_last_activations(tiny, texts, acts):
    config, params = tiny
    lengths = np.array([5, 2])
    vector = reading.steering_vector(params, *texts, lengths, config=config, site="h.1.resid_post")
    x, other = (seen["h.1.resid_post"] for seen in acts)
    near(vector, x[[0, 1], lengths - 1].mean(axis=0) - other[:, -1].mean(axis=0))
