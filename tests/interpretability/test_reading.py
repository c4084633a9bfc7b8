"""Each method equals an independent computation: numpy, or a loop over HF's model with hooks; in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax.interpretability import circuits
from gpt2_jax.interpretability import reading as lens
from gpt2_jax.interpretability.taps import axis_masks, capture, patch, replace
from tests.reference import TINY, hf_model, ours

ROWS, LENGTH, LAYERS, HEADS = 2, 5, 3, 3
near = partial(np.testing.assert_allclose, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def model():
    return hf_model(**TINY | {"n_layer": LAYERS})


@pytest.fixture(scope="module")
def tiny(model):
    return ours(model)


@pytest.fixture(scope="module")
def texts():
    """Two batches: one to work on, and one to take activations from."""
    return np.random.default_rng(0).integers(0, 61, (2, ROWS, LENGTH))


@pytest.fixture(scope="module")
def acts(tiny, texts):
    """Every activation of both batches."""
    config, params = tiny
    run = jax.jit(lambda ids: capture(params, ids, config=config, sites="*")[1])
    return [jax.device_get(run(ids)) for ids in texts]


def metric(logits):
    """A difference of two logits for each row, `[B, V] -> [B]`."""
    return logits[:, 3] - logits[:, 8]


def hooked(model, ids, hooks):
    """Logits of HF's model with hooks: `{name: change}`, of the output, or of the input for a `c_proj`."""

    def after(change, module, args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    def before(change, module, args):
        return (change(args[0]),)

    handles = []
    for name, change in hooks.items():
        module, pre = model.get_submodule(f"transformer.{name}"), name.endswith("attn.c_proj")
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        handles.append(register(partial(before if pre else after, change)))
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
    for handle in handles:
        handle.remove()
    return logits


def put(place, donor):
    """The hook that puts a donor's values at a place."""

    def change(x):
        x = x.clone()
        x[place] = torch.tensor(np.asarray(donor))[place]
        return x

    return change


def norm(x, weights, eps=1e-5):
    """LayerNorm in numpy."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weights["scale"] + weights["bias"]


def test_attention_patterns_equal_hfs(tiny, model, texts):
    config, params = tiny
    expected = [
        x.detach().numpy() for x in model(torch.tensor(texts[0]), output_attentions=True).attentions
    ]
    near(lens.attention_patterns(params, texts[0], config=config), np.stack(expected))


def test_layers_are_stacked_by_number():
    acts = {f"h.{i}.attn.z": np.full(1, i) for i in (10, 2, 0, 9, 1)} | {
        "h.3.z": np.full(1, 7),
        "ln_f.out": 0,
    }
    np.testing.assert_array_equal(lens.by_layer(acts, "attn.z")[:, 0], [0, 1, 2, 9, 10])


def test_the_logit_lens_equals_numpy_and_ends_in_the_models_logits(tiny, texts, acts, rng):
    config, params = tiny
    weights = jax.device_get(params)
    streams = np.stack([acts[0][f"h.{i}.resid_pre"] for i in range(LAYERS)])
    final = acts[0][f"h.{LAYERS - 1}.resid_post"][None]
    head = weights["wte"]["embedding"].T
    found = jax.jit(partial(lens.logit_lens, config=config))(params, texts[0])
    near(found, norm(np.concatenate([streams, final]), weights["ln_f"]) @ head)
    near(found[-1], acts[0]["logits"])

    kernels, biases = rng.normal(0, 0.1, (LAYERS, 24, 24)), rng.normal(0, 0.1, (LAYERS, 24))
    tuned = np.stack(
        [x + x @ kernel + bias for x, kernel, bias in zip(streams, kernels, biases, strict=True)]
    )
    found = lens.logit_lens(params, texts[0], config=config, translators=(kernels, biases))
    near(found, norm(np.concatenate([tuned, final]), weights["ln_f"]) @ head)
    with pytest.raises(
        ValueError, match=r"must be kernels \[3, 24, 24\] and biases, got \[2, 24, 24\]"
    ):
        lens.logit_lens(params, texts[0], config=config, translators=(kernels[:2], biases))


def test_direct_attributions_sum_to_the_logit_and_equal_each_parts_share(tiny, texts, acts):
    config, params = tiny
    targets, weights, seen = texts[1], jax.device_get(params), acts[0]
    found = jax.device_get(
        jax.jit(partial(lens.direct_logit_attribution, config=config))(params, texts[0], targets)
    )
    total = found.wte + found.wpe + found.ln_f_bias + sum(
        x.sum(axis=0) for x in (found.heads.sum(axis=-1), found.attn_bias, found.mlps)
    )  # fmt: skip
    near(total, np.take_along_axis(seen["logits"], targets[..., None], axis=-1)[..., 0])

    def share(part):  # of the logits with the part, and those without, the last scale being held
        centred = (
            (part - part.mean(axis=-1, keepdims=True))
            / seen["ln_f.scale"]
            * weights["ln_f"]["scale"]
        )
        return np.take_along_axis(
            centred @ weights["wte"]["embedding"].T, targets[..., None], axis=-1
        )[..., 0]

    near(found.wpe, share(seen["wpe.out"]))
    for i in range(LAYERS):
        near(found.mlps[i], share(seen[f"h.{i}.mlp.out"]))
        for head in range(HEADS):
            near(found.heads[i, ..., head], share(seen[f"h.{i}.attn.result"][:, :, head]))


def test_gradient_times_activation_equals_pytorchs(tiny, model, texts, acts):
    config, params = tiny
    kept = {}

    def keep(name, module, args, out):
        kept[name] = out[0] if isinstance(out, tuple) else out
        kept[name].retain_grad()

    names = {
        "h.0": "h.0.resid_post",
        "h.1.mlp": "h.1.mlp.out",
        "h.2.ln_1": "h.2.ln_1.out",
        "h.1.attn": "h.1.attn.out",
    }
    modules = [(name, model.get_submodule(f"transformer.{name}")) for name in names]
    handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules]
    metric(model(torch.tensor(texts[0])).logits[:, -1]).sum().backward()
    for handle in handles:
        handle.remove()
    sites, total = tuple(names.values()), lambda logits: metric(logits).sum()
    run = jax.jit(
        lambda donors: lens.attribution(
            params, texts[0], total, config=config, sites=sites, donors=donors
        )
    )
    itself, other = run(None), run({site: acts[1][site] for site in sites})
    for name, site in names.items():
        gradient = kept[name].grad.numpy()
        near(itself[site], gradient * acts[0][site])
        near(other[site], gradient * (acts[1][site] - acts[0][site]))

    # A sweep whose donors are the text's own has the same derivative with respect to them.
    own, everywhere = (
        {name: x for name, x in acts[0].items() if name.endswith("mlp.out")},
        jnp.ones((1, 1, 1), bool),
    )
    sweep = partial(lens.patch_each, metric=total, config=config, site="mlp.out")
    gradients = jax.jit(jax.grad(lambda donors: sweep(params, texts[0], donors, everywhere)[1, 0]))(
        own
    )
    near(gradients["h.1.mlp.out"], kept["h.1.mlp"].grad.numpy())
    assert not gradients["h.0.mlp.out"].any()


@pytest.mark.parametrize(
    "site, over, place",
    [
        ("resid_pre", "T", lambda t: (slice(None), t)),
        ("attn.z", "H", lambda h: (..., slice(8 * h, 8 * h + 8))),
        ("attn.z", "TH", lambda t, h: (slice(None), t, slice(8 * h, 8 * h + 8))),
        ("mlp.out", "", lambda: (...,)),
    ],
)
def test_a_patching_sweep_equals_a_loop_of_pytorch_hooks(
    tiny, model, texts, acts, site, over, place
):
    config, params = tiny
    ids, donors = texts[0], {name: x for name, x in acts[1].items() if name.endswith(site)}
    sweep = jax.jit(
        partial(
            lens.patching_sweep, metric=metric, config=config, site=site, over=over, batch_size=3
        )
    )
    found = jax.device_get(sweep(params, ids, donors))
    sizes = [LENGTH if axis == "T" else HEADS for axis in over]
    assert found.shape == (LAYERS, *sizes, ROWS)
    for i in range(LAYERS):
        hook = {
            "resid_pre": f"h.{i - 1}" if i else "drop",
            "attn.z": f"h.{i}.attn.c_proj",
            "mlp.out": f"h.{i}.mlp",
        }
        donor = donors[f"h.{i}.{site}"].reshape(ROWS, LENGTH, -1)
        for index in np.ndindex(*sizes):
            expected = hooked(model, ids, {hook[site]: put(place(*index), donor)})[:, -1]
            near(found[(i, *index)], metric(expected))


def test_a_sweep_of_ragged_texts_measures_each_rows_last_token_in_one_program(tiny, texts, acts):
    config, params = tiny
    lengths, donors = (
        np.array([5, 3]),
        {name: x for name, x in acts[1].items() if name.endswith("resid_mid")},
    )
    traces = []

    @jax.jit
    def sweep(ids, donors):
        traces.append(1)
        return lens.patching_sweep(
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


def test_a_sweep_with_donors_of_its_own_changes_nothing(tiny, texts, acts):
    config, params = tiny
    for site, over in (("attn.pattern", "H"), ("ln_2.scale", "")):
        donors = {name: x for name, x in acts[0].items() if name.endswith(site)}
        found = lens.patching_sweep(
            params, texts[0], donors, metric, config=config, site=site, over=over
        )
        near(found, np.broadcast_to(metric(acts[0]["logits"][:, -1]), found.shape))


def test_path_patching_equals_three_hooked_passes_of_pytorch(tiny, model, texts, acts):
    config, params = tiny
    head = axis_masks("h.0.attn.z", "H", LENGTH, config=config)[1]
    edits = {"h.0.attn.z": replace(acts[1]["h.0.attn.z"], head)}
    flat = [{i: x[f"h.{i}.attn.z"].reshape(ROWS, LENGTH, 24) for i in range(LAYERS)} for x in acts]
    sender = flat[0][0].copy()
    sender[..., 8:16] = flat[1][0][..., 8:16]
    for freeze in (("h.*.attn.z", "h.*.mlp.out"), ("h.*.attn.z",)):
        found = lens.path_patch(
            params,
            texts[0],
            edits,
            config=config,
            receivers={"h.2.attn.q": True, "h.1.mlp.pre": True},
            freeze=freeze,
        )
        carried = {}

        def keep(name, x, carried=carried):
            carried[name] = x.clone()
            return x

        hold = {f"h.{i}.attn.c_proj": put(..., flat[0][i]) for i in (1, 2)}
        hold["h.0.attn.c_proj"] = put(..., sender)
        if len(freeze) == 2:
            hold |= {f"h.{i}.mlp": put(..., acts[0][f"h.{i}.mlp.out"]) for i in range(LAYERS)}
        receivers = {"h.2.attn.c_attn": slice(0, 24), "h.1.mlp.c_fc": slice(None)}
        hooked(model, texts[0], hold | {name: partial(keep, name) for name in receivers})
        third = {name: put((..., part), carried[name].numpy()) for name, part in receivers.items()}
        near(found, hooked(model, texts[0], third))
        assert np.abs(found - acts[0]["logits"]).max() > 1e-4


def test_a_path_from_a_head_to_the_logits_is_its_direct_effect(tiny, texts, acts):
    config, params = tiny
    weights, edits = jax.device_get(params), {"h.0.attn.result": lambda x: x.at[:, :, 2].set(0)}
    found = lens.path_patch(
        params,
        texts[0],
        edits,
        config=config,
        receivers={"ln_f.out": True},
        freeze=("h.[12].attn.z", "h.*.mlp.out"),
    )
    stream = acts[0]["h.2.resid_post"] - acts[0]["h.0.attn.result"][:, :, 2]
    near(found, norm(stream, weights["ln_f"]) @ weights["wte"]["embedding"].T)


def test_a_receiver_is_not_held(tiny, texts):
    config, params = tiny
    run = partial(lens.path_patch, params, texts[0], {"h.0.attn.z": lambda x: 2 * x}, config=config)
    near(run(receivers={"h.1.mlp.out": True}), run(receivers={"h.1.mlp.pre": True}))


def test_bad_arguments_of_a_sweep_are_named(tiny, texts, acts):
    config, params = tiny
    run = partial(lens.patching_sweep, params, texts[0], metric=metric, config=config)
    with pytest.raises(
        ValueError, match="must hold mlp.out of every layer, got none for h.1.mlp.out"
    ):
        run({"h.0.mlp.out": acts[1]["h.0.mlp.out"]}, site="mlp.out")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        run({}, site="mlp.out", batch_size=0)
    with pytest.raises(ValueError, match="There is no site 'h.0.mlp.oot'"):
        run({}, site="mlp.oot")
    with pytest.raises(ValueError, match="`donors` must have every site, they lack h.0.attn.z"):
        lens.attribution(
            params, texts[0], metric, config=config, sites="h.*.attn.z", donors={"h.1.attn.z": 0}
        )


def test_ablations_equal_pytorch_hooks(tiny, model, texts, acts):
    config, params = tiny
    head, reference = axis_masks("h.1.attn.z", "H", LENGTH, config=config)[2], acts[1]["h.1.attn.z"]
    flat, run = reference.reshape(ROWS, LENGTH, 24), partial(patch, params, texts[0], config=config)
    ablations = {
        "zero": (lens.zero_ablation(head), 0 * flat),
        "mean": (
            lens.mean_ablation(reference, head),
            np.broadcast_to(flat.mean(axis=(0, 1)), flat.shape),
        ),
        "resample": (lens.resample_ablation(jax.random.key(0), reference, head), flat[::-1].copy()),
    }
    for edit, donor in ablations.values():
        expected = hooked(model, texts[0], {"h.1.attn.c_proj": put((..., slice(16, 24)), donor)})
        near(run(edits={"h.1.attn.z": edit}), expected)
    without = hooked(model, texts[0], {"h.0.mlp": lambda x: 0 * x})
    near(run(edits={"h.0.mlp.out": lens.zero_ablation()}), without)
    with pytest.raises(ValueError, match="at least 2 rows to choose among, got 1"):
        lens.resample_ablation(jax.random.key(0), reference[:1])


def test_resampling_gives_no_row_its_own():
    reference = np.arange(4)[:, None]
    draws = np.stack(
        [
            lens.resample_ablation(jax.random.key(i), reference)(reference * 0)[:, 0]
            for i in range(20)
        ]
    )
    assert (np.sort(draws) == np.arange(4)).all() and (draws != np.arange(4)).all()
    assert len(np.unique(draws, axis=0)) == 3


def test_a_steering_vector_is_a_difference_of_mean_last_activations(tiny, texts, acts):
    config, params = tiny
    lengths = np.array([5, 2])
    found = lens.steering_vector(params, *texts, lengths, config=config, site="h.1.resid_post")
    one, other = (x["h.1.resid_post"] for x in acts)
    near(found, one[[0, 1], lengths - 1].mean(axis=0) - other[:, -1].mean(axis=0))


# Weights.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "function", ["fold_layer_norm", "center_writing_weights", "center_unembed", "all"]
)
def test_simplified_models_have_the_same_probabilities(texts, function, tied):
    config, params = ours(hf_model(**TINY | {"tie_word_embeddings": tied}))
    expected = jax.nn.log_softmax(
        jax.jit(gpt2_jax.apply, static_argnames="config")(params, texts[0], config=config)
    )
    names = (
        [function]
        if function != "all"
        else ["fold_layer_norm", "center_writing_weights", "center_unembed"]
    )
    folded_config, folded = config, params
    for name in names:
        folded_config, folded = getattr(circuits, name)(folded, config=folded_config)
    logits, acts = jax.jit(partial(capture, config=folded_config, sites="h.*.resid_post"))(
        folded, texts[0]
    )
    near(jax.nn.log_softmax(logits), expected)

    if "fold_layer_norm" in names:
        for block in folded["h"].values():
            assert all(
                (block[ln]["scale"] == 1).all() and not block[ln]["bias"].any()
                for ln in ("ln_1", "ln_2")
            )
        assert (folded["ln_f"]["scale"] == 1).all()
    if "center_writing_weights" in names:
        assert all(np.abs(x.mean(axis=-1)).max() < 1e-12 for x in acts.values())
    if "center_unembed" in names and function != "all":
        assert np.abs(logits.mean(axis=-1)).max() < 1e-12


def test_a_weight_of_zero_in_the_last_layer_norm_stays(texts):
    config, params = ours(hf_model(**TINY))
    ln_f = params["ln_f"] | {"scale": params["ln_f"]["scale"].at[3].set(0.0)}
    params = params | {"ln_f": ln_f}
    folded_config, folded = circuits.fold_layer_norm(params, config=config)
    run = jax.jit(gpt2_jax.apply, static_argnames="config")
    near(run(folded, texts[0], config=folded_config), run(params, texts[0], config=config))


def test_the_circuits_of_a_head_are_its_scores_and_its_output(tiny, texts, acts):
    config, params = tiny
    weights = jax.device_get(params["h"]["1"]["attn"])
    for head in range(HEADS):
        qk = np.asarray(circuits.qk_circuit(params, 1, head, config=config))
        ov = np.asarray(circuits.ov_circuit(params, 1, head, config=config))
        x, y = acts[0]["h.1.ln_1.out"], weights["c_attn"]["bias"].reshape(3, HEADS, 8)[:, head]
        wq, wk = (weights["c_attn"]["kernel"][:, 24 * i + 8 * head :][:, :8] for i in (0, 1))
        scores = (
            x @ qk @ x.swapaxes(1, 2)
            + (x @ wq @ y[1])[:, :, None]
            + (x @ wk @ y[0])[:, None]
            + y[0] @ y[1]
        )
        near(scores / np.sqrt(8), acts[0]["h.1.attn.scores"][:, head])
        mixed = acts[0]["h.1.attn.pattern"][:, head] @ x
        out = mixed @ ov + y[2] @ weights["c_proj"]["kernel"][8 * head : 8 * head + 8]
        near(out, acts[0]["h.1.attn.result"][:, :, head])
    assert np.linalg.matrix_rank(qk) == np.linalg.matrix_rank(ov) == 8
