import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import PRESETS, GPT2Config, products
from gpt2_jax.interpretability.sites import site_names
from gpt2_jax.modules import dropout
from gpt2_jax.products import FEW_ROWS

TINY = GPT2Config(
    vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3, eos_token_id=0, bos_token_id=0
)


apply = jax.jit(gpt2_jax.apply, static_argnames="padding_side")
decode_step = jax.jit(gpt2_jax.decode_step)


def apply_and_record(params, ids, config, key=None):
    """Logits and every activation by its site, in one compiled call."""

    def recorded(params, ids):
        seen = {}
        logits = gpt2_jax.apply(
            params,
            ids,
            config=config,
            dropout_key=key,
            tap=lambda site, x: seen.setdefault(site, x),
        )
        return logits, seen

    return jax.jit(recorded)(params, ids)


@pytest.fixture(scope="module")
def params():
    return gpt2_jax.init(jax.random.key(0), TINY)


def test_a_token_changes_no_logit_before_it(params, rng):
    ids = rng.integers(0, 61, (2, 12))
    changed = ids.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = (np.asarray(apply(params, x, config=TINY)) for x in (ids, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_is_irrelevant(params, rng, side):
    ids, lengths = rng.integers(0, 61, (3, 12)), np.array([12, 5, 1])
    place = np.arange(12)[None] if side == "right" else 11 - np.arange(12)[None]
    real = place < lengths[:, None]
    other = np.where(real, ids, (ids + 1) % 61)
    one, two = (apply(params, x, lengths, config=TINY, padding_side=side) for x in (ids, other))
    np.testing.assert_array_equal(np.asarray(one)[real], np.asarray(two)[real])


@pytest.mark.parametrize("side, length", [("right", 65), ("left", 300)])
def test_attention_in_parts_changes_only_rounding(rng, side, length):
    config = TINY.replace(n_positions=300, n_layer=1, dtype="float64")
    params, ids = gpt2_jax.init(jax.random.key(0), config), rng.integers(0, 61, (2, length))
    lengths, place = np.array([length, length - 7]), np.arange(length)[None]
    real = (place if side == "right" else length - 1 - place) < lengths[:, None]

    def gradient(**options):  # a tap, even one that does nothing, sees the whole pattern at once
        def loss(params):
            logits = gpt2_jax.apply(
                params, ids, lengths, config=config, padding_side=side, **options
            )
            return jnp.square(logits * real[..., None]).mean()

        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(), gradient(tap=lambda site, x: x), rtol=0, atol=1e-13)


def test_prefill_decode_step_and_apply_agree(params, rng):
    ids = rng.integers(0, 61, (2, 10))
    expected = apply(params, ids, config=TINY)
    logits, cache = gpt2_jax.prefill(params, ids[:, :4], config=TINY)
    for t in range(4, 10):
        chex.assert_trees_all_close(logits, expected[:, t - 1], atol=1e-6)
        logits, cache = decode_step(params, ids[:, t], cache, config=TINY)
    chex.assert_trees_all_close(logits, expected[:, -1], atol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 2, FEW_ROWS + 1])
def test_the_head_is_a_product_with_the_table_whatever_the_number_of_rows(rng, n_rows):
    config = TINY.replace(dtype="float64")
    hidden = rng.normal(size=(n_rows, 24))
    table = rng.normal(size=(61, 24))
    slopes = rng.normal(size=(n_rows, 61))

    @jax.jit
    def unembed(hidden, table):
        return gpt2_jax.unembed({"wte": {"embedding": table}}, hidden, config=config)

    logits, pull = jax.vjp(unembed, hidden, table)
    hidden_grad, table_grad = pull(slopes)
    np.testing.assert_allclose(logits, hidden @ table.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(hidden_grad, slopes @ table, rtol=0, atol=1e-12)
    np.testing.assert_allclose(table_grad, slopes.T @ hidden, rtol=0, atol=1e-12)


def test_initialisation_follows_gpt2():
    config = TINY.replace(vocab_size=4000, n_embd=96, n_positions=500, tie_word_embeddings=False)
    params = gpt2_jax.init(jax.random.key(1), config)
    scaled = 0.02 / np.sqrt(2 * config.n_layer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            expected = scaled if "c_proj" in name else 0.02
            # Four standard errors of a sample deviation, the leaves having 9,216 entries and more.
            np.testing.assert_allclose(
                leaf.std(), expected, rtol=4 / np.sqrt(2 * leaf.size), err_msg=name
            )
            np.testing.assert_allclose(
                leaf.mean(), 0, atol=4 * expected / np.sqrt(leaf.size), err_msg=name
            )


def test_initial_loss_is_near_that_of_a_guess(params, rng):
    logp = jax.nn.log_softmax(apply(params, rng.integers(0, 61, (4, 24)), config=TINY))
    assert abs(-logp.mean() - np.log(61)) < 0.05


def test_presets_have_the_published_size_without_allocating_it():
    shapes = jax.eval_shape(lambda: gpt2_jax.init(jax.random.key(0), PRESETS["gpt2-xl"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_557_611_200


def test_an_identity_tap_sees_every_site_and_changes_nothing(params, rng):
    ids, sites = rng.integers(0, 61, (2, 6)), []

    def tap(site, x):
        sites.append((site, x.shape))
        return x

    plain = gpt2_jax.apply(params, ids, config=TINY)
    np.testing.assert_array_equal(gpt2_jax.apply(params, ids, config=TINY, tap=tap), plain)
    block = [
        ("resid_pre", (2, 6, 24)),
        *((f"attn.{site}", (2, 6, 3, 24)) for site in ("in", "q_in", "k_in", "v_in")),
        ("ln_1.scale", (2, 6, 1)),
        ("ln_1.out", (2, 6, 24)),
        ("attn.q", (2, 6, 3, 8)),
        ("attn.k", (2, 6, 3, 8)),
        ("attn.v", (2, 6, 3, 8)),
        ("attn.scores", (2, 3, 6, 6)),
        ("attn.pattern", (2, 3, 6, 6)),
        ("attn.z", (2, 6, 3, 8)),
        ("attn.result", (2, 6, 3, 24)),
        ("attn.out", (2, 6, 24)),
        ("resid_mid", (2, 6, 24)),
        ("mlp.in", (2, 6, 24)),
        ("ln_2.scale", (2, 6, 1)),
        ("ln_2.out", (2, 6, 24)),
        ("mlp.pre", (2, 6, 96)),
        ("mlp.post", (2, 6, 96)),
        ("mlp.out", (2, 6, 24)),
        ("resid_post", (2, 6, 24)),
    ]
    layers = [(f"h.{i}.{site}", shape) for i in range(2) for site, shape in block]
    first = [(site, (2, 6, 24)) for site in ("wte.out", "wpe.out", "embed")]
    assert sites == [
        *first,
        *layers,
        ("ln_f.scale", (2, 6, 1)),
        ("ln_f.out", (2, 6, 24)),
        ("logits", (2, 6, 61)),
    ]
    assert tuple(site for site, _ in sites) == site_names(TINY)


def test_a_tap_can_replace_an_activation(params, rng):
    ids, donor = rng.integers(0, 61, (2, 1, 6))
    expected, seen = apply_and_record(params, donor, TINY)

    @jax.jit
    def patched(params, ids):
        return gpt2_jax.apply(
            params,
            ids,
            config=TINY,
            tap=lambda site, x: seen[site] if site == "h.1.resid_post" else x,
        )

    chex.assert_trees_all_close(patched(params, ids), expected, atol=1e-6)
    assert np.abs(expected - apply(params, ids, config=TINY)).max() > 1e-2


def test_dropout_zeroes_each_element_independently_and_keeps_the_mean():
    x = jnp.ones((64, 4, 128), jnp.float32)
    out = np.asarray(dropout(jax.random.key(0), x, 0.25))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    # 32,768 elements: five standard errors of the share of zeros are 0.012.
    assert abs((out == 0).mean() - 0.25) < 0.012
    assert len({row.tobytes() for row in (out == 0).reshape(256, 128)}) == 256  # no mask is shared


def test_each_dropout_rate_acts_at_its_site_alone(params, rng):
    ids, key = rng.integers(0, 61, (2, 8)), jax.random.key(5)
    off = TINY.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    sites = {"embd_pdrop": "embed", "attn_pdrop": "h.1.attn.pattern", "resid_pdrop": "h.1.mlp.out"}
    causal = np.tril(np.ones((8, 8), bool))
    for rate, dropped in sites.items():
        _, seen = apply_and_record(params, ids, off.replace(**{rate: 0.5}), key)
        seen["h.1.attn.pattern"] = np.asarray(seen["h.1.attn.pattern"])[..., causal]
        assert [site for site in sites.values() if (np.asarray(seen[site]) == 0).any()] == [dropped]


def test_without_a_key_or_a_rate_nothing_is_dropped(params, rng):
    ids = rng.integers(0, 61, (2, 8))
    off = TINY.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    plain = apply(params, ids, config=TINY)
    np.testing.assert_array_equal(
        apply(params, ids, config=off, dropout_key=jax.random.key(5)), plain
    )
    assert (
        np.abs(apply(params, ids, config=TINY, dropout_key=jax.random.key(5)) - plain).max() > 1e-3
    )


@pytest.mark.parametrize(
    "dtype, wide", [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_each_dtype_is_used_where_it_should_be(params, rng, dtype, wide):
    _, seen = apply_and_record(params, rng.integers(0, 61, (2, 5)), TINY.replace(dtype=dtype))
    for site in (
        "embed",
        "h.0.attn.q",
        "h.0.attn.out",
        "h.1.mlp.post",
        "h.1.resid_post",
        "ln_f.out",
    ):
        assert seen[site].dtype == dtype, site
    for site in ("h.0.attn.scores", "h.0.attn.pattern", "logits"):
        assert seen[site].dtype == wide, site


def test_every_product_carries_the_precision_asked_for(params):
    ids = jnp.zeros((1, 4), jnp.int32)
    for precision in ("default", "highest"):
        config = TINY.replace(precision=precision)
        text = jax.jit(gpt2_jax.apply).lower(params, ids, config=config).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) == 2 * 6 + 1
        wanted = [
            f"precision = [{precision.upper()}, {precision.upper()}]" in line for line in products
        ]
        assert all(wanted), products


@pytest.mark.parametrize(
    "flags, n_turned",
    [("fma avx2 bmi2", 2 * 4), ("avx2 avx512f", 0), (None, 0)],  # None: no Linux, no file
)
def test_a_few_rows_go_as_columns_where_that_is_faster_and_give_the_same(
    params, rng, monkeypatch, tmp_path, flags, n_turned
):
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor : 0\nflags : {flags}\nbugs :\n")
    monkeypatch.setattr(products, "Path", lambda path: cpuinfo)
    products._has_avx2_alone.cache_clear()
    config = TINY.replace(dtype="float64")
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    ids = rng.integers(0, 61, (2, 5))

    def loss(params):
        return jnp.tanh(gpt2_jax.apply(params, ids, config=config)).sum()

    text = jax.jit(loss).lower(params).as_text()
    assert text.count("optimization_barrier") == n_turned + 1  # and the head's
    found = jax.jit(jax.value_and_grad(loss))(params)
    # Of a batch too large for it.
    monkeypatch.setattr(products, "FEW_ROWS", 1)
    expected = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    products._has_avx2_alone.cache_clear()
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1, 61]], r"`ids` must be in \[0, 61\) \(`vocab_size`\), got 61"),
        ([[1, -1]], r"`ids` must be in \[0, 61\) \(`vocab_size`\), got -1"),
        ([1, 2], r"shape \[B, T\], got int64 of shape \[2\]"),
        ([[1.0, 2.0]], "got float64"),
        ([[0] * 25], r"1 to 24 \(`n_positions`\) columns, got 25"),
        ([[]], "must be an integer array"),
    ],
)
def test_bad_ids_are_named(params, ids, message):
    with pytest.raises(ValueError, match=message):
        gpt2_jax.apply(params, ids, config=TINY)
    with pytest.raises(ValueError, match=message):
        gpt2_jax.prefill(params, ids, config=TINY)


def test_other_bad_arguments_are_named(params):
    with pytest.raises(
        ValueError, match="`cache_len` must be at least the 3 columns of `ids`, got 2"
    ):
        gpt2_jax.prefill(params, [[1, 2, 3]], config=TINY, cache_len=2)
    with pytest.raises(ValueError, match="`padding_side` must be"):
        gpt2_jax.apply(params, [[1]], config=TINY, padding_side="middle")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_apply_and_the_decode_loop_lower_for_cpu_cuda_and_tpu(dtype):
    config = TINY.replace(dtype=dtype)
    shapes = jax.eval_shape(lambda: gpt2_jax.init(jax.random.key(0), config))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def apply(params, ids):
        return gpt2_jax.apply(params, ids, config=config)

    def decode(params, ids):
        logits, cache = gpt2_jax.prefill(params, ids, config=config, cache_len=24)

        def step(carry, _):
            token, cache = carry
            logits, cache = gpt2_jax.decode_step(params, token, cache, config=config)
            return (jnp.argmax(logits, -1).astype(jnp.int32), cache), token

        return jax.lax.scan(step, (jnp.argmax(logits, -1).astype(jnp.int32), cache), length=5)[1]

    for function in (apply, decode):
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(
            shapes, ids
        )
        assert exported.platforms == ("cpu", "cuda", "tpu")
