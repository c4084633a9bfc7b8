"""Each intervention equals HF's model with hooks, or its own plain definition; in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.interpretability import patching
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.sites import axis_masks
from gpt2_jax.interpretability.taps import at_last_token, patch
from gpt2_jax.model import hidden_states
from gpt2_jax.modules import no_tap
from tests.interpretability.hooks import hooked, layer_norm, near, put

ROWS, LENGTH, LAYERS, HEADS = 2, 5, 3, 3


def metric(logits):
    """A difference of two logits for each row, `[B, V] -> [B]`."""
    return logits[:, 3] - logits[:, 8]


def in_every_layer(acts, site):
    """The activations at a site within each layer."""
    return {name: x for name, x in acts.items() if name.endswith(f".{site}")}


# Patching in every layer.


@pytest.mark.parametrize(
    "site, over, index",
    [
        ("resid_pre", "T", lambda t: (slice(None), t)),
        ("attn.z", "H", lambda h: (..., slice(8 * h, 8 * h + 8))),
        ("attn.z", "TH", lambda t, h: (slice(None), t, slice(8 * h, 8 * h + 8))),
        ("mlp.out", "", lambda: (...,)),
    ],
)
def test_a_sweep_equals_a_loop_of_pytorch_hooks(tiny, model, texts, acts, site, over, index):
    config, params = tiny
    donors = in_every_layer(acts[1], site)
    options = {"config": config, "site": site, "over": over, "batch_size": 3}

    @jax.jit
    def sweep(ids, donors):
        return patching.patching_sweep(params, ids, donors, metric, **options)

    found = jax.device_get(sweep(texts[0], donors))
    sizes = [LENGTH if axis == "T" else HEADS for axis in over]
    assert found.shape == (LAYERS, *sizes, ROWS)
    for i in range(LAYERS):
        modules = {
            "resid_pre": f"h.{i - 1}" if i else "drop",
            "attn.z": f"h.{i}.attn.c_proj",
            "mlp.out": f"h.{i}.mlp",
        }
        donor = donors[f"h.{i}.{site}"].reshape(ROWS, LENGTH, -1)
        for place in np.ndindex(*sizes):
            hooks = {modules[site]: put(index(*place), donor)}
            expected = hooked(model, texts[0], hooks)[:, -1]
            near(found[(i, *place)], metric(expected))


def by_definition(params, ids, donors, masks, lengths, *, config, site, edits):
    """What `patch_each` is defined as: a pass of the whole model for each layer and mask."""

    def measure(mask, name):
        of_run = edits | {name: replace(donors[name], mask)}
        logits = patch(params, ids, config=config, edits=of_run)
        return metric(at_last_token(logits, lengths))

    names = [f"h.{layer}.{site}" for layer in range(config.n_layer)]
    return jnp.stack([jax.vmap(partial(measure, name=name))(masks) for name in names])


@pytest.mark.parametrize(
    "site, lengths, is_edited",
    [
        ("resid_pre", None, False),
        ("attn.q", [5, 3], False),
        ("attn.pattern", None, True),
        ("ln_2.scale", [5, 3], True),
        ("attn.k_in", None, False),
    ],
)
def test_one_growing_batch_equals_a_pass_for_each_patch(
    tiny, texts, acts, rng, site, lengths, is_edited
):
    """At random numbers of the site's activation, also of a model that is edited in every run."""
    config, params = tiny
    shape = acts[0][f"h.0.{site}"].shape[1:]
    masks = rng.random((4, *shape)) < 0.3
    donors = in_every_layer(acts[1], site)
    lengths = lengths if lengths is None else np.array(lengths)
    edits = {
        "h.0.resid_pre": add(rng.normal(size=(2, 1, 24))),  # a value for each row
        "h.1.mlp.out": add(rng.normal(size=24), at=[2, 4]),
        "logits": add(rng.normal(size=61), at=[[4], [2]]),
    }
    options = {"lengths": lengths, "config": config, "site": site}
    options["edits"] = edits if is_edited else {}
    run = partial(patching.patch_each, metric=metric, **options)
    expected = jax.jit(partial(by_definition, **options))
    near(jax.jit(run)(params, texts[0], donors, masks), expected(params, texts[0], donors, masks))


def test_the_batch_grows_by_a_copy_for_each_mask_in_each_layer(tiny, texts, acts):
    config, params = tiny
    masks = axis_masks("h.0.mlp.out", "T", LENGTH, config=config)
    donors = in_every_layer(acts[1], "mlp.out")
    tap = patching.GrowingBatch("mlp.out", donors, masks, ROWS, no_tap)
    rows = {}

    def watching(site, x):
        rows[site] = len(x)
        return tap(site, x) if tap.wants(site) else x

    run = partial(hidden_states, config=config, tap=watching)
    hidden = jax.eval_shape(run, params, texts[0])
    assert rows["embed"] == ROWS
    assert [rows[f"h.{i}.mlp.out"] for i in range(LAYERS)] == [12, 22, 32]
    assert hidden.shape == (32, LENGTH, 24)
    assert not tap.wants("h.0.attn.out") and not tap.wants("ln_f.out")


def test_a_sweep_of_ragged_texts_measures_each_rows_last_token_in_one_program(tiny, texts, acts):
    config, params = tiny
    lengths = np.array([5, 3])
    donors = in_every_layer(acts[1], "resid_mid")
    traces = []

    @jax.jit
    def sweep(ids, donors):
        traces.append(1)
        return patching.patching_sweep(
            params, ids, donors, metric, lengths, config=config, site="resid_mid"
        )

    found = sweep(texts[0], donors)
    masks = axis_masks("h.1.resid_mid", "T", LENGTH, config=config)
    for t in (1, 4):
        edits = {"h.1.resid_mid": replace(donors["h.1.resid_mid"], masks[t])}
        logits = np.asarray(patch(params, texts[0], config=config, edits=edits))
        near(found[1, t], metric(logits[np.arange(ROWS), lengths - 1]))
    plain = metric(acts[0]["logits"][np.arange(ROWS), lengths - 1])
    near(found[:, 3:, 1], np.broadcast_to(plain[1], (LAYERS, 2)))  # the second row ends before
    sweep(texts[1], jax.tree.map(lambda x: 0 * x, donors))
    assert len(traces) == 1


def test_the_size_of_batches_changes_nothing(tiny, texts, acts):
    config, params = tiny
    donors = in_every_layer(acts[1], "attn.z")
    options = {"config": config, "site": "attn.z", "over": "TH"}

    @partial(jax.jit, static_argnums=0)
    def sweep(batch_size):
        return patching.patching_sweep(
            params, texts[0], donors, metric, batch_size=batch_size, **options
        )

    at_once = sweep(None)
    near(sweep(4), at_once)  # the last batch is filled up
    near(sweep(100), at_once)


def test_a_metric_of_any_shape_is_returned_behind_the_axes(tiny, texts, acts):
    config, params = tiny
    donors = in_every_layer(acts[1], "mlp.out")

    @partial(jax.jit, static_argnums=0)
    def sweep(metric):
        return patching.patching_sweep(
            params, texts[0], donors, metric, config=config, site="mlp.out"
        )

    logits = sweep(lambda logits: logits)
    assert logits.shape == (LAYERS, LENGTH, ROWS, 61)
    best = sweep(lambda logits: logits.argmax(axis=-1))
    np.testing.assert_array_equal(best, logits.argmax(axis=-1))


@pytest.mark.parametrize("site, over", [("attn.pattern", "H"), ("ln_2.scale", "")])
def test_a_sweep_with_donors_of_its_own_changes_nothing(tiny, texts, acts, site, over):
    config, params = tiny
    donors = in_every_layer(acts[0], site)
    options = {"config": config, "site": site, "over": over}
    found = patching.patching_sweep(params, texts[0], donors, metric, **options)
    near(found, np.broadcast_to(metric(acts[0]["logits"][:, -1]), found.shape))


def test_bad_arguments_of_a_sweep_are_named(tiny, texts, acts):
    config, params = tiny
    run = partial(patching.patching_sweep, params, texts[0], metric=metric, config=config)
    with pytest.raises(ValueError, match="must hold mlp.out of every layer, got none for h.1.mlp"):
        run({"h.0.mlp.out": acts[1]["h.0.mlp.out"]}, site="mlp.out")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        run({}, site="mlp.out", batch_size=0)
    with pytest.raises(ValueError, match="There is no site 'h.0.mlp.oot'"):
        run({}, site="mlp.oot")
    with pytest.raises(ValueError, match=r"one site, got 'h.0.attn.\[qk\]', which is h.0.attn.q"):
        run({}, site="attn.[qk]")


# Patching along paths.


@pytest.mark.parametrize("freeze", [("h.*.attn.z", "h.*.mlp.out"), ("h.*.attn.z",)])
def test_path_patching_equals_three_hooked_passes_of_pytorch(tiny, model, texts, acts, freeze):
    config, params = tiny
    head = axis_masks("h.0.attn.z", "H", LENGTH, config=config)[1]
    found = patching.path_patch(
        params,
        texts[0],
        {"h.0.attn.z": replace(acts[1]["h.0.attn.z"], head)},
        config=config,
        receivers={"h.2.attn.q": True, "h.1.mlp.pre": True},
        freeze=freeze,
    )

    z, other_z = ([x[f"h.{i}.attn.z"].reshape(2, 5, 24) for i in range(LAYERS)] for x in acts)
    sender = z[0].copy()
    sender[..., 8:16] = other_z[0][..., 8:16]
    hold = {f"h.{i}.attn.c_proj": put(..., z[i]) for i in (1, 2)}
    hold["h.0.attn.c_proj"] = put(..., sender)
    if "h.*.mlp.out" in freeze:
        hold |= {f"h.{i}.mlp": put(..., acts[0][f"h.{i}.mlp.out"]) for i in range(LAYERS)}
    carried = {}

    def keep(name, x):
        carried[name] = x.clone()
        return x

    receivers = {"h.2.attn.c_attn": slice(0, 24), "h.1.mlp.c_fc": slice(None)}
    hooked(model, texts[0], hold | {name: partial(keep, name) for name in receivers})
    third = {name: put((..., part), carried[name].numpy()) for name, part in receivers.items()}
    near(found, hooked(model, texts[0], third))
    assert np.abs(found - acts[0]["logits"]).max() > 1e-4


def test_a_path_from_a_head_to_the_logits_is_its_direct_effect(tiny, texts, acts):
    config, params = tiny
    weights = jax.device_get(params)
    found = patching.path_patch(
        params,
        texts[0],
        {"h.0.attn.result": lambda x: x.at[:, :, 2].set(0)},
        config=config,
        receivers={"ln_f.out": True},
        freeze=("h.[12].attn.z", "h.*.mlp.out"),
    )
    stream = acts[0]["h.2.resid_post"] - acts[0]["h.0.attn.result"][:, :, 2]
    near(found, layer_norm(stream, weights["ln_f"]) @ weights["wte"]["embedding"].T)


def test_a_receiver_is_not_held(tiny, texts):
    config, params = tiny
    edits = {"h.0.attn.z": add(1.0, at=[1, 3])}
    run = partial(patching.path_patch, params, texts[0], edits, config=config)
    near(run(receivers={"h.1.mlp.out": True}), run(receivers={"h.1.mlp.pre": True}))


# Ablations.


def test_ablations_equal_pytorch_hooks(tiny, model, texts, acts):
    config, params = tiny
    head = axis_masks("h.1.attn.z", "H", LENGTH, config=config)[2]
    reference = acts[1]["h.1.attn.z"]
    flat = reference.reshape(ROWS, LENGTH, 24)
    mean = np.broadcast_to(flat.mean(axis=(0, 1)), flat.shape)
    key = jax.random.key(0)
    ablations = [
        (patching.zero_ablation(head), 0 * flat),
        (patching.mean_ablation(reference, head), mean),
        (patching.resample_ablation(key, reference, head), flat[::-1].copy()),
    ]
    for edit, donor in ablations:
        expected = hooked(model, texts[0], {"h.1.attn.c_proj": put((..., slice(16, 24)), donor)})
        near(patch(params, texts[0], config=config, edits={"h.1.attn.z": edit}), expected)


def test_padding_is_no_part_of_what_an_ablation_puts(acts):
    reference = acts[1]["h.1.attn.z"].copy()
    lengths = np.array([5, 2])
    mean = np.concatenate([reference[0], reference[1, :2]]).mean(axis=0)
    reference[1, 2:] = 1e9
    zeros = jnp.zeros_like(reference)
    found = patching.mean_ablation(reference, lengths=lengths)(zeros)
    near(found, np.broadcast_to(mean, zeros.shape))
    found = patching.resample_ablation(jax.random.key(0), reference, lengths=lengths)(zeros)
    near(found[0], reference[1, [0, 1, 0, 1, 0]])
    near(found[1], reference[0])


def test_without_a_mask_an_ablation_is_of_the_whole_activation(tiny, model, texts):
    config, params = tiny
    without = hooked(model, texts[0], {"h.0.mlp": lambda x: 0 * x})
    edits = {"h.0.mlp.out": patching.zero_ablation()}
    near(patch(params, texts[0], config=config, edits=edits), without)


def test_resampling_gives_no_row_its_own():
    reference = np.arange(4)[:, None]
    draws = []
    for seed in range(20):
        edit = patching.resample_ablation(jax.random.key(seed), reference)
        draws.append(edit(jnp.zeros_like(reference))[:, 0])
    draws = np.stack(draws)
    assert (np.sort(draws) == np.arange(4)).all()
    assert (draws != np.arange(4)).all()
    assert len(np.unique(draws, axis=0)) == 3


def test_resampling_needs_another_row(acts):
    with pytest.raises(ValueError, match="at least 2 rows to choose among, got 1"):
        patching.resample_ablation(jax.random.key(0), acts[0]["h.1.attn.z"][:1])
