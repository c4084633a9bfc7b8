"""Every site equals PyTorch's, in float64; taps cost what they want; edits compose with JAX."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import gpt2_jax
from gpt2_jax.generation.decode import advance
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.sites import (
    SITES,
    axis_masks,
    find_site,
    find_sites,
    site_axes,
    site_names,
)
from gpt2_jax.interpretability.taps import at_last_token, by_layer, capture, make_tap, patch
from gpt2_jax.modules import LayerNorm, repeated
from gpt2_jax.pretrained.weights import to_hf
from tests.interpretability.hooks import hooked, layer_norm, near
from tests.reference import TINY, hf_model, ours

ROWS, LENGTH, LAYER = 2, 7, 1
capture_jit = jax.jit(capture, static_argnames="sites")


@pytest.fixture(scope="module")
def model():
    return hf_model(**TINY | {"scale_attn_by_inverse_layer_idx": True})


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 61, (ROWS, LENGTH))


@pytest.fixture(scope="module")
def tiny(model):
    return ours(model)


@pytest.fixture(scope="module")
def everything(tiny, ids):
    """Logits, and the activation of every site."""
    config, params = tiny
    return jax.device_get(capture_jit(params, ids, config=config, sites="*"))


@pytest.fixture(scope="module")
def seen_by_hooks(model, ids):
    """What goes into and comes out of each module of HF's model, its hidden states, attentions."""
    ins, outs = {}, {}

    def keep(name, module, args, kwargs, out):
        ins[name] = (args or tuple(kwargs.values()))[0].detach().numpy()
        outs[name] = (out[0] if isinstance(out, tuple) else out).detach().numpy()

    handles = [
        module.register_forward_hook(
            partial(keep, name.removeprefix("transformer.")), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name.startswith("transformer.") or name == "lm_head"
    ]
    out = model(torch.tensor(ids), output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    return (
        ins,
        outs,
        [x.detach().numpy() for x in out.hidden_states],
        [x.detach().numpy() for x in out.attentions],
    )


def pytorch_sites(model, seen_by_hooks):
    """The same sites, out of what PyTorch's hooks saw."""
    ins, outs, hidden, attentions = seen_by_hooks
    heads = (ROWS, LENGTH, 3, 8)

    def scale(x):
        return np.sqrt(x.var(axis=-1, keepdims=True) + model.config.layer_norm_epsilon)

    acts = {
        "wte.out": outs["wte"],
        "wpe.out": np.broadcast_to(outs["wpe"], (ROWS, LENGTH, 24)),
        "embed": hidden[0],
    }
    for i in range(2):
        h, block = f"h.{i}", {}
        q, k, v = (x.reshape(heads) for x in np.split(outs[f"{h}.attn.c_attn"], 3, axis=-1))
        out = model.transformer.h[i].attn.c_proj.weight.detach().numpy().reshape(3, 8, 24)
        z = ins[f"{h}.attn.c_proj"].reshape(heads)
        block["resid_pre"] = ins[h]
        by_head = np.broadcast_to(ins[h][:, :, None], (ROWS, LENGTH, 3, 24))
        block |= {f"attn.{site}": by_head for site in ("in", "q_in", "k_in", "v_in")}
        block["mlp.in"] = ins[f"{h}.ln_2"]
        block |= {"ln_1.scale": scale(ins[h]), "ln_1.out": outs[f"{h}.ln_1"]}
        block |= {"attn.q": q, "attn.k": k, "attn.v": v}
        block["attn.scores"] = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8) / (i + 1)
        block |= {"attn.pattern": attentions[i], "attn.z": z}
        block["attn.result"] = np.einsum("bthk,hkd->bthd", z, out)
        block |= {"attn.out": outs[f"{h}.attn"], "resid_mid": ins[f"{h}.ln_2"]}
        block |= {"ln_2.scale": scale(ins[f"{h}.ln_2"]), "ln_2.out": outs[f"{h}.ln_2"]}
        block |= {
            "mlp.pre": outs[f"{h}.mlp.c_fc"],
            "mlp.post": outs[f"{h}.mlp.act"],
            "mlp.out": outs[f"{h}.mlp"],
        }
        acts |= {f"{h}.{site}": x for site, x in block.items()} | {f"{h}.resid_post": outs[h]}
    return acts | {
        "ln_f.scale": scale(ins["ln_f"]),
        "ln_f.out": outs["ln_f"],
        "logits": outs["lm_head"],
    }


def test_every_site_equals_pytorch(tiny, model, everything, seen_by_hooks):
    logits, acts = everything
    expected = pytorch_sites(model, seen_by_hooks)
    assert set(acts) == set(expected) == set(site_names(tiny[0]))
    for site, x in acts.items():
        np.testing.assert_allclose(x, expected[site], rtol=0, atol=1e-10, err_msg=site)
    near(acts["h.0.resid_post"], seen_by_hooks[2][1])
    np.testing.assert_array_equal(acts["logits"], logits)


def test_the_table_of_sites_gives_their_axes(tiny, everything):
    config, _ = tiny
    sizes = {"B": ROWS, "T": LENGTH, "S": LENGTH, "H": 3, "K": 8, "D": 24, "F": 96, "V": 61, "1": 1}
    assert {site: x.shape for site, x in everything[1].items()} == {
        site: tuple(sizes[axis] for axis in site_axes(site, config)) for site in site_names(config)
    }


def test_every_site_equals_transformer_lens(model, tiny, ids, everything):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    folder = gpt2_jax.resolve("demo")  # for its tokenizer, which it insists on
    theirs = bridge.boot_transformers(
        str(folder), hf_model=copy.deepcopy(model), dtype=torch.float64, device="cpu"
    )
    theirs.set_use_attn_result(True)
    theirs.set_use_hook_mlp_in(True)
    theirs.set_use_attn_in(True)
    _, cache = theirs.run_with_cache(torch.tensor(ids))
    theirs.set_use_attn_in(False)
    theirs.set_use_split_qkv_input(True)
    _, split = theirs.run_with_cache(torch.tensor(ids))
    cache = {**split, **cache}
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    for site, (_, hook) in SITES.items():
        if hook:
            x, y = (
                everything[1][site.replace("h.i", "h.1")],
                cache[hook.replace(".i.", ".1.")].detach().numpy(),
            )
            x, y = (np.where(causal, z, 0) if site.endswith("scores") else z for z in (x, y))
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10, err_msg=site)

    config, params = tiny
    run = jax.jit(lambda edits: patch(params, ids, config=config, edits=edits))
    for site in ("attn.q_in", "attn.k_in", "attn.v_in", "mlp.in"):
        x = everything[1][f"h.1.{site}"][::-1, ::-1]
        hook = SITES[f"h.i.{site}"][1].replace(".i.", ".1.")
        put = [(hook, lambda _, hook, x=x: torch.tensor(x.copy()))]
        with torch.no_grad():
            expected = theirs.run_with_hooks(torch.tensor(ids), fwd_hooks=put).numpy()
        near(run({f"h.1.{site}": x}), expected)


def test_a_site_that_does_not_exist_is_named_with_near_ones(tiny, ids):
    config, params = tiny
    with pytest.raises(
        ValueError, match=r"no site 'h.2.attn.z' in 2 layers. Near ones: h.1.attn.z, h.0.attn.z"
    ):
        capture(params, ids, config=config, sites="h.2.attn.z")
    with pytest.raises(ValueError, match=r"no site 'resid_post' .* Near ones: h\.[01]\.resid_post"):
        patch(params, ids, config=config, edits={"resid_post": 0.0})
    with pytest.raises(ValueError, match="one edit, got a second one for h.0.attn.z"):
        make_tap({"h.*.attn.z": 0.0, "h.0.*": 0.0}, config=config)
    with pytest.raises(
        ValueError, match=r"edit of h.0.attn.z must return the shape \(2, 7, 3, 8\), got \(3, 8\)"
    ):
        patch(params, ids, config=config, edits={"h.0.attn.z": lambda x: x[0, 0]})
    with pytest.raises(ValueError, match="`tap` must be callable"):
        gpt2_jax.generate(params, ids, config=config, max_new_tokens=1, tap={"h.0.attn.z": 0.0})
    with pytest.raises(
        ValueError, match="`over` must be axes of h.0.attn.z in their order, of 'THK'; got 'HT'"
    ):
        axis_masks("h.0.attn.z", "HT", 5, config=config)


def test_one_site_is_found_or_the_several_are_named(tiny):
    config, _ = tiny
    assert find_site("h.1.*.z", config) == "h.1.attn.z"
    with pytest.raises(ValueError, match="one site, got 'h.1.attn.[?]', which is h.1.attn.q, h.1"):
        find_site("h.1.attn.?", config)


def test_patterns_find_sites_in_the_order_of_the_forward_pass(tiny):
    config, _ = tiny
    assert find_sites(("ln_f.*", "h.*.attn.[qk]"), config) == (
        "h.0.attn.q", "h.0.attn.k", "h.1.attn.q", "h.1.attn.k", "ln_f.scale", "ln_f.out",
    )  # fmt: skip
    assert find_sites((), config) == ()


def program(function, params, ids):
    """The program that XLA gets, which names every function alike."""

    def same_name(params, ids):
        return function(params, ids)

    return jax.jit(same_name).lower(params, ids).as_text()


def test_what_is_not_asked_for_costs_nothing(tiny):
    config, params = tiny
    ids = np.zeros((1, 24), np.int32)
    plain = program(partial(gpt2_jax.apply, config=config), params, ids)
    assert program(lambda p, x: capture(p, x, config=config, sites=())[0], params, ids) == plain
    assert program(lambda p, x: patch(p, x, config=config, edits={}), params, ids) == plain

    sites = ("h.0.resid_post", "h.1.attn.q", "h.1.ln_2.out", "h.0.mlp.post")
    one = program(lambda p, x: capture(p, x, config=config, sites=sites), params, ids)
    differ = set(one.splitlines()) ^ set(plain.splitlines())
    assert all(line.strip().startswith(("func.func public @main", "return")) for line in differ)


def test_what_would_cost_something_is_computed_when_asked_for(tiny):
    config, params = tiny
    ids = np.zeros((1, 24), np.int32)
    plain = program(partial(gpt2_jax.apply, config=config), params, ids)
    for site, operation in (
        ("h.0.attn.result", "dot_general"),
        ("h.0.ln_1.scale", "stablehlo.sqrt"),
    ):
        text = program(partial(capture, config=config, sites=site), params, ids)
        assert text.count(operation) == plain.count(operation) + 1
    # What each head reads is only shown: its own products come with an edit.
    for edits, more in (({}, 0), ({"h.1.attn.q_in": 0.0}, 1)):
        run = partial(capture, config=config, sites="h.*.attn.*in", edits=edits)
        text = program(run, params, ids)
        assert text.count("dot_general") == plain.count("dot_general") + more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_identity_edit_leaves_the_logits_bit_identical(tiny, ids, dtype):
    config, params = tiny
    config = config.replace(dtype=dtype)
    plain = jax.jit(partial(gpt2_jax.apply, config=config))(params, ids)
    edited = jax.jit(partial(patch, config=config, edits={"*": lambda x: x}))(params, ids)
    np.testing.assert_array_equal(plain, edited)


def test_layer_norm_is_linens(rng):
    import flax.linen as nn

    x = jnp.asarray(rng.normal(3, 2, (2, 5, 24)))
    weights = {"scale": jnp.asarray(rng.normal(size=24)), "bias": jnp.asarray(rng.normal(size=24))}
    for dtype in ("float64", "float32", "bfloat16"):
        config = gpt2_jax.GPT2Config(n_embd=24, n_head=3, dtype=dtype)
        linen = nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False)
        for params in (weights, jax.tree.map(lambda leaf, to=dtype: leaf.astype(to), weights)):
            expected = linen.apply({"params": params}, x.astype(dtype))
            ours = LayerNorm(config).apply({"params": params}, x.astype(dtype))
            assert ours.dtype == expected.dtype
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "site, module",
    [
        ("wte.out", "wte"),
        ("h.1.resid_pre", "h.0"),
        ("h.0.ln_1.out", "h.0.ln_1"),
        ("h.1.attn.z", "h.1.attn.c_proj"),
        ("h.0.attn.out", "h.0.attn"),
        ("h.1.mlp.pre", "h.1.mlp.c_fc"),
        ("h.1.mlp.post", "h.1.mlp.c_proj"),
        ("h.0.mlp.out", "h.0.mlp"),
        ("h.0.resid_post", "h.0"),
        ("ln_f.out", "ln_f"),
    ],
)
def test_an_edit_does_what_a_pytorch_hook_does(tiny, model, ids, site, module):
    config, params = tiny
    expected = hooked(model, ids, {module: lambda x: 1.5 * x.flip(0) - 0.25})
    logits = patch(params, ids, config=config, edits={site: lambda x: 1.5 * x[::-1] - 0.25})
    near(logits, expected)
    assert np.abs(logits - gpt2_jax.apply(params, ids, config=config)).max() > 1e-3


def test_equal_edits_at_different_sites_agree(tiny, ids, everything):
    """Each edit of an inner site is written as one further on, in numpy."""
    config, params = tiny
    acts, run = everything[1], partial(patch, params, ids, config=config)
    pattern, v = acts["h.1.attn.pattern"][::-1], acts["h.1.attn.v"]
    mixed = np.einsum("bhts,bshk->bthk", pattern, v)
    through_pattern = run(edits={"h.1.attn.pattern": pattern})
    near(run(edits={"h.1.attn.z": mixed}), through_pattern)
    scores = np.log(np.maximum(pattern, 1e-300))
    near(run(edits={"h.1.attn.scores": scores}), through_pattern)
    less = acts["h.1.attn.out"] - acts["h.1.attn.result"][:, :, 2]
    one_head = run(edits={"h.1.attn.result": lambda x: x.at[:, :, 2].set(0)})
    near(run(edits={"h.1.attn.out": less}), one_head)
    bias = np.asarray(params["h"]["1"]["ln_2"]["bias"])
    halved = run(edits={"h.1.ln_2.out": (acts["h.1.ln_2.out"] - bias) / 2 + bias})
    near(run(edits={"h.1.ln_2.scale": lambda x: 2 * x}), halved)


def test_what_a_head_or_mlp_reads_is_changed_for_it_alone(tiny, ids, everything, rng):
    """Each copy of the stream passes the LayerNorm on its own, in numpy."""
    config, params = tiny
    block = jax.device_get(params["h"]["1"])
    acts = everything[1]
    run = jax.jit(lambda edits: patch(params, ids, config=config, edits=edits))
    c_attn = block["attn"]["c_attn"]
    kernels = c_attn["kernel"].reshape(24, 3, 3, 8)
    biases = c_attn["bias"].reshape(3, 3, 8)
    copies = acts["h.1.attn.in"] + rng.normal(size=(3, *acts["h.1.attn.in"].shape))
    normed = layer_norm(copies, block["ln_1"])

    def heads(normed):
        of_kinds = zip("qkv", normed, kernels.swapaxes(0, 1), biases, strict=True)
        return {
            f"h.1.attn.{kind}": np.einsum("bthd,dhk->bthk", x, kernel) + bias
            for kind, x, kernel, bias in of_kinds
        }

    stream = copies[0, :, :, 1]
    c_fc = block["mlp"]["c_fc"]
    pre = layer_norm(stream, block["ln_2"]) @ c_fc["kernel"] + c_fc["bias"]
    split = {f"h.1.attn.{kind}_in": x for kind, x in zip("qkv", copies, strict=True)}
    apart = run(split | {"h.1.mlp.in": stream})
    near(apart, run(heads(normed) | {"h.1.mlp.pre": pre}))
    at_once = run({"h.1.attn.in": copies[2], "h.1.mlp.in": stream})
    near(at_once, run(heads(normed[[2, 2, 2]]) | {"h.1.mlp.pre": pre}))


def test_capture_sees_what_the_edits_made(tiny, ids):
    config, params = tiny
    sites, edits = ("embed", "h.0.mlp.out", "h.1.resid_pre"), {"h.0.*.out": 0.0}
    logits, acts = capture(params, ids, config=config, sites=sites, edits=edits)
    assert not acts["h.0.mlp.out"].any()
    np.testing.assert_array_equal(acts["h.1.resid_pre"], acts["embed"])
    np.testing.assert_array_equal(logits, patch(params, ids, config=config, edits=edits))


# Edits at positions.


def test_an_edit_at_positions_changes_these_tokens_alone(tiny, model, ids, everything, rng):
    config, params = tiny
    vectors = rng.normal(size=(2, 3, 24))
    offset = np.zeros((ROWS, LENGTH, 24))
    offset[0, [5, 1]] = vectors[0, :2]
    offset[1, [0, 6]] = vectors[1, 1:]
    edit = add(vectors, at=[[5, 1, 20], [20, 0, 6]])  # positions 20 are beyond the text
    logits = patch(params, ids, config=config, edits={"h.0.resid_post": edit})
    near(logits, hooked(model, ids, {"h.0": lambda x: x + torch.tensor(offset)}))

    # At one position for all rows, and of some heads' queries, the axes of which are others.
    pattern = everything[1]["h.1.attn.pattern"]
    head = np.array([False, True, False])[None, :, None, None]
    edits = {
        "h.1.attn.pattern": replace(pattern[::-1, :, 4:5], head, at=[4]),
        "h.0.mlp.out": add(vectors[0, 0], at=2),
    }
    tap = make_tap(edits, config=config).placed(jnp.arange(LENGTH)[None])
    expected = pattern.copy()
    expected[:, 1, 4] = pattern[::-1, 1, 4]
    np.testing.assert_array_equal(tap("h.1.attn.pattern", pattern), expected)
    x = everything[1]["h.0.mlp.out"]
    is_second = (np.arange(LENGTH) == 2)[None, :, None]
    near(tap("h.0.mlp.out", x), x + is_second * vectors[0, 0])


def test_positions_are_those_of_the_text_wherever_its_tokens_are_read(tiny, ids, rng):
    config, params = tiny
    lengths = np.array([7, 4])
    edits = {
        "h.0.resid_post": add(rng.normal(size=(2, 24)), at=[[2, 6], [3, 5]]),
        "logits": add(rng.normal(size=61), at=[3, 6]),
    }
    tap = make_tap(edits, config=config)

    @jax.jit
    def read(tap):
        whole = gpt2_jax.apply(params, ids, config=config, tap=tap)
        left = np.stack([ids[0], np.roll(ids[1], 3)])
        options = {"config": config, "padding_side": "left", "tap": tap}
        left = gpt2_jax.apply(params, left, lengths, **options)
        firsts = np.array([4, 2])
        first, cache = gpt2_jax.prefill(params, ids[:, :4], firsts, config=config, tap=tap)
        others = np.stack([ids[0, 4:7], np.append(ids[1, 2:4], 0)])
        rest, cache = gpt2_jax.extend(params, others, cache, firsts - 1, config=config, tap=tap)
        return whole, left, first, rest

    whole, left, first, rest = read(tap)
    near(left[0], whole[0])
    near(left[1, 3:], whole[1, :4])
    near(first, whole[[0, 1], [3, 1]])
    near(rest[0], whole[0, 4:])
    near(rest[1, :1], whole[1, 2:3])


def test_rows_that_are_repeated_keep_their_values(tiny, ids, everything, rng):
    config, params = tiny
    per_row = rng.normal(size=(2, 1, 24))
    edits = {
        "h.0.resid_post": add(per_row, at=[[2, 6], [3, 5]]),
        "h.1.attn.z": rng.normal(size=(2, 1, 3, 8)),
        "h.1.mlp.out": replace(0.0, np.arange(7)[:, None] < 2),
    }
    tap = make_tap(edits, config=config)
    run = jax.jit(partial(gpt2_jax.apply, config=config))
    twice = run(params, np.repeat(ids, 2, axis=0), tap=repeated(tap, 2))
    near(twice, np.repeat(run(params, ids, tap=tap), 2, axis=0))
    assert np.abs(twice[0] - everything[0][0]).max() > 1e-3


def test_positions_that_no_text_has_are_named(tiny, ids):
    config, params = tiny
    for at, message in (
        ([-1], "must be positions, from 0 on, got -1"),
        ([3, 3], r"each position once, got \[3, 3\]"),
        ([0.5], r"integers of shape \[N\] or \[B, N\], got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            add(0.0, at=at)
    for edit, message in (
        (add(0.0, at=[24]), r"`at` must be less than 24 \(`n_positions`\), got 24"),
        (add(0.0, at=[[1], [2], [3]]), "1 row, or 2 as the batch, got 3"),
        (add(np.zeros((7, 24)), at=[1, 2]), r"each of the 2 positions in `at`; got 7 of \[7, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(params, ids, config=config, edits={"h.0.resid_post": edit})
    with pytest.raises(ValueError, match="must be told those of the tokens"):
        add(0.0, at=[1])(jnp.zeros((2, 7, 24)))


# Activations, once they are there.


def test_layers_are_stacked_by_number():
    acts = {f"h.{i}.attn.z": np.full(1, i) for i in (10, 2, 0, 9, 1)}
    acts |= {"h.3.z": np.full(1, 7), "ln_f.out": np.zeros(1)}
    np.testing.assert_array_equal(by_layer(acts, "attn.z")[:, 0], [0, 1, 2, 9, 10])


def test_the_last_token_is_the_last_column_or_that_before_the_padding(everything):
    x = jnp.asarray(everything[1]["h.0.attn.z"])
    np.testing.assert_array_equal(at_last_token(x), x[:, 6])
    np.testing.assert_array_equal(at_last_token(x, np.array([7, 3])), [x[0, 6], x[1, 2]])


# Steering while sampling.


def test_generate_and_stream_apply_a_tap_to_prompt_and_new_tokens(tiny, ids, everything, rng):
    config, params = tiny
    lengths = np.array([7, 4])
    # At tokens of the prompts, at some that are made, and at all.
    edits = {
        "h.0.resid_post": add(rng.normal(0, 9, (2, 24)), at=[[2, 9], [3, 5]]),
        "logits": add(50.0 * np.eye(61)[17], at=[7]),
        "h.1.attn.out": lambda x: -x,
    }
    tap = make_tap(edits, config=config)
    options = {"config": config, "max_new_tokens": 5, "stop_ids": ()}
    out = gpt2_jax.generate(params, ids, lengths, tap=tap, **options)
    texts, _ = gpt2_jax.inputs.pad_rows([ids[0], ids[1, :4]], 12)
    step = jax.jit(lambda ids: gpt2_jax.apply(params, ids, config=config, tap=tap))
    for made in range(5):  # without a cache: every token reads the whole text, edited
        logits = np.asarray(step(texts))
        texts[[0, 1], lengths + made] = logits[[0, 1], lengths + made - 1].argmax(-1)
    np.testing.assert_array_equal(out.ids[0], texts[0, 7:])
    np.testing.assert_array_equal(out.ids[1], texts[1, 4:9])
    assert out.ids[0, 1] == out.ids[1, 4] == 17  # after the token at position 7
    assert out.ids[0, 0] != everything[0][0, -1].argmax(-1)
    pieces = [
        piece.ids for piece in gpt2_jax.stream(params, ids, lengths, chunk=4, tap=tap, **options)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), out.ids)


def test_other_vectors_compile_nothing(tiny, ids, rng):
    config, params = tiny
    before, texts = advance._cache_size(), set()
    for strength in (0.0, 1.0, -20.0):
        tap = make_tap(
            {"h.0.resid_post": add(rng.normal(size=(1, 1, 24)), strength)}, config=config
        )
        out = gpt2_jax.generate(params, ids, config=config, max_new_tokens=3, stop_ids=(), tap=tap)
        texts.add(np.asarray(out.ids).tobytes())
    assert advance._cache_size() == before + 1
    assert len(texts) > 1


# Transformations.


@pytest.fixture(scope="module")
def steer(tiny, ids):
    """A number of the output as a function of an offset to the stream, for derivatives."""
    config, params = tiny

    def value(offset, params=params, ids=ids):
        return patch(params, ids, config=config, edits={"h.0.resid_post": add(offset)})[
            :, -1, 5
        ].sum()

    return value


def test_derivatives_with_respect_to_an_edit_equal_finite_differences(steer, rng):
    """Forward mode, reverse mode, and forward over reverse: Hessian-vector products."""
    x, direction = rng.normal(size=(2, ROWS, LENGTH, 24))
    forward = jax.jit(lambda x, d: jax.jvp(steer, (x,), (d,)))
    reverse = jax.jit(jax.grad(steer))
    second = jax.jit(lambda x, d: jax.jvp(jax.grad(steer), (x,), (d,))[1])
    step = 1e-5
    ahead, behind = x + step * direction, x - step * direction
    slope = forward(x, direction)[1]
    difference = forward(ahead, direction)[0] - forward(behind, direction)[0]
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=1e-6)
    np.testing.assert_allclose((reverse(x) * direction).sum(), slope, rtol=1e-10)
    expected = (reverse(ahead) - reverse(behind)) / (2 * step)
    np.testing.assert_allclose(
        second(x, direction), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
    )


def test_the_jacobian_of_the_residual_stream_is_causal_and_equals_pytorchs(tiny, model, ids):
    config, params = tiny

    def after(x):  # [T, D] -> [T, D], from before layer 1 to after it
        site = "h.1.resid_post"
        return capture(
            params, ids[:1], config=config, sites=site, edits={"h.1.resid_pre": x[None]}
        )[1][site][0]

    x = capture(params, ids[:1], config=config, sites="h.1.resid_pre")[1]["h.1.resid_pre"][0]
    jacobian = np.asarray(jax.jit(jax.jacrev(after))(x))  # [T, D, T, D]
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float64).min, dtype=torch.float64).triu(
        1
    )[None, None]
    expected = torch.autograd.functional.jacobian(
        lambda x: model.transformer.h[1](x[None], attention_mask=mask)[0],
        torch.tensor(np.asarray(x)),
    )
    near(jacobian, expected.numpy())
    assert not jacobian.transpose(0, 2, 1, 3)[np.triu_indices(LENGTH, 1)].any()


def test_per_example_gradients_equal_pytorchs_of_each_example(tiny, model, ids):
    config, params = tiny

    def loss(params, row):
        return gpt2_jax.next_token_loss(params, row[None], config=config)[0]

    together = jax.device_get(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, ids))
    for row in range(ROWS):
        model.zero_grad()
        logits = model(torch.tensor(ids[row : row + 1])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[row, 1:])).backward()
        ours = to_hf(jax.tree.map(lambda leaf, row=row: leaf[row], together))
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(
                ours[name], parameter.grad.numpy(), rtol=0, atol=1e-10, err_msg=name
            )


def test_vmap_over_stacked_params_is_an_ensemble(tiny, ids):
    config, params = tiny
    members = [params, jax.tree.map(lambda leaf: 0.9 * leaf, params)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    edits = {"h.0.attn.out": lambda x: 2 * x}
    run = jax.jit(
        lambda params: capture(params, ids, config=config, sites="h.1.attn.pattern", edits=edits)
    )
    logits, acts = jax.jit(jax.vmap(run))(stacked)
    for i, member in enumerate(members):
        one, seen = run(member)
        near(logits[i], one)
        np.testing.assert_allclose(
            acts["h.1.attn.pattern"][i], seen["h.1.attn.pattern"], rtol=0, atol=1e-12
        )


def test_vmap_over_edits_equals_a_loop(tiny, ids, rng):
    config, params = tiny
    vectors = rng.normal(size=(3, 1, 1, 24))
    run = jax.jit(lambda v: patch(params, ids, config=config, edits={"h.0.mlp.out": replace(v)}))
    for one, vector in zip(jax.jit(jax.vmap(run))(vectors), vectors, strict=True):
        near(one, run(vector))


def test_a_mask_over_the_params_freezes_the_rest(tiny, ids):
    config, params = tiny
    label = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            "train"
            if path[:2] == (jax.tree_util.DictKey("h"), jax.tree_util.DictKey("1"))
            else "freeze"
        ),
        params,
    )
    tx = optax.multi_transform({"train": optax.sgd(1e-2), "freeze": optax.set_to_zero()}, label)
    state, _ = gpt2_jax.train_step(gpt2_jax.init_state(params, tx), ids, config=config, tx=tx)
    for name, before, after in zip(
        *map(jax.tree.leaves, (label, params, state.params)), strict=True
    ):
        assert (np.asarray(before) != np.asarray(after)).any() == (name == "train")


def test_masks_select_one_index_each(tiny, everything):
    config, _ = tiny
    masks = np.asarray(axis_masks("h.0.attn.z", "TH", LENGTH, config=config))
    assert masks.shape == (LENGTH * 3, LENGTH, 3, 1)
    assert [tuple(np.argwhere(mask)[0]) for mask in masks] == [
        (t, h, 0) for t in range(LENGTH) for h in range(3)
    ]
    assert masks.sum() == len(masks)
    x = by_layer(everything[1], "attn.z")[0]
    changed = np.argwhere(np.asarray(replace(7.0, masks[4])(x)) != x)
    assert {tuple(place[1:3]) for place in changed} == {(1, 1)}
