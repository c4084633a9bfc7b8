"""Weights of 8 bits: against numpy's arithmetic, and against the floats that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import quantised
from gpt2_jax.files import CheckpointError
from gpt2_jax.quantised import FEW, Quantised
from gpt2_jax.sharding import make_mesh
from tests.reference import DATA, TINY, assert_near, hf_model, ours

CONFIG = gpt2_jax.GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
# How far a product of 16 bits may be from one of floats, relative to the largest.
ROUNDED = 1e-3

apply = jax.jit(gpt2_jax.apply)


@pytest.fixture(scope="module")
def model():
    """A model's config and its params: in 8 bits, and the floats that these stand for."""
    config, params = ours(hf_model(**TINY), dtype="float32")
    quantised_params = gpt2_jax.quantize(params, config=config)
    return config, quantised_params, gpt2_jax.dequantize(quantised_params)


def test_a_matrix_by_hand():
    # The largest of a row is 127 steps of its scale; halves go to the even neighbour.
    kernel = np.array([[127.0, 0, 0.5], [-63.5, 0, 1.0]], np.float32)  # [I, O]
    matrix = quantised.of_kernel(kernel)
    np.testing.assert_array_equal(matrix.values, [[127, -64], [0, 0], [64, 127]])
    np.testing.assert_allclose(matrix.scale, [1, 0, 1 / 127], rtol=1e-6)
    back = quantised.kernel_of(matrix)
    np.testing.assert_allclose(back, [[127, 0, 64 / 127], [-64, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize("n_tokens", [1, 3, FEW + 1])
def test_a_product_is_that_of_the_floats_though_one_number_is_far_larger(n_tokens, rng):
    x = rng.standard_normal((n_tokens, 32))
    x[:, 5] *= 100  # as a few of the numbers of a GPT-2 are: with 8 bits, most others were 0
    matrix = quantised.of_rows(jnp.array(rng.standard_normal((16, 32))))
    expected = x @ np.asarray(quantised.rows_of(matrix, "float64")).T
    assert_near(quantised.product(jnp.array(x), matrix), expected, relative=1e-4)


def test_the_model_computes_what_its_floats_compute(model):
    config, params, floats = model
    assert isinstance(params["h"]["0"]["attn"]["c_attn"]["kernel"], Quantised)
    expected = apply(floats, IDS, config=config)
    assert_near(apply(params, IDS, config=config), expected, relative=ROUNDED)
    tied = config.replace(tie_word_embeddings=False)
    head = {"lm_head": {"embedding": 2 * floats["wte"]["embedding"]}}
    untied = gpt2_jax.quantize(floats | head, config=tied)
    assert_near(apply(untied, IDS, config=tied), 2 * expected, relative=ROUNDED)


def test_decoding_says_what_reading_says(model):
    config, params, _ = model
    out = gpt2_jax.generate(params, IDS[:1], config=config, max_new_tokens=6, stop_ids=())
    whole = np.concatenate([IDS[:1], out.ids], axis=1)
    logits = apply(params, whole[:, :-1], config=config)
    np.testing.assert_array_equal(out.ids, logits[:, IDS.shape[1] - 1 :].argmax(axis=-1))


def test_an_id_beyond_the_table_reads_nan_inside_jit(model):
    config, params, _ = model
    outside = apply(params, jnp.array([[61]]), config=config)
    assert np.isnan(outside).all()


def test_derivatives_are_those_of_the_floats(model):
    config, params, floats = model
    embeds = jnp.array(np.random.default_rng(0).standard_normal((1, 5, 24)), jnp.float32)

    def total(embeds, params):
        logits = apply(params, None, config=config, inputs_embeds=embeds)
        return jax.nn.log_softmax(logits)[..., 7].sum()

    gradient = jax.jit(jax.grad(total))
    assert_near(gradient(embeds, params), gradient(embeds, floats), ROUNDED)
    with pytest.raises(TypeError, match="int8"):
        jax.grad(total, argnums=1)(embeds, params)


def test_weights_are_read_as_they_are_quantised_in_memory(tmp_path):
    config, params = ours(hf_model(**TINY), dtype="float32")
    gpt2_jax.save(tmp_path / "gpt2", params, config)
    found, read = gpt2_jax.load(tmp_path / "gpt2", dtype="int8")
    assert found.dtype == "float32"
    expected = gpt2_jax.quantize(params, config=config)
    for path, leaf in jax.tree.leaves_with_path(expected):
        np.testing.assert_array_equal(leaf, at(read, path), err_msg=jax.tree_util.keystr(path))
    jitted = jax.jit(gpt2_jax.quantize)(params, config=config)
    np.testing.assert_array_equal(
        jitted["wte"]["embedding"].values, read["wte"]["embedding"].values
    )


def at(tree, path):
    """Returns the leaf at a path of JAX's."""
    for key in path:
        tree = getattr(tree, key.name) if hasattr(key, "name") else tree[key.key]
    return tree


def test_weights_on_a_mesh_compute_the_same(tmp_path, model):
    config, params, _ = model
    gpt2_jax.save(tmp_path / "gpt2", ours(hf_model(**TINY), dtype="float32")[1], config)
    mesh = make_mesh("fsdp=2,tensor=3")
    _, spread = gpt2_jax.load(tmp_path / "gpt2", dtype="int8", mesh=mesh)
    kernel = spread["h"]["1"]["mlp"]["c_fc"]["kernel"]
    assert kernel.values.sharding.spec == jax.P("tensor", "fsdp")  # [F, D]
    expected = apply(params, IDS, config=config)
    assert_near(apply(spread, IDS, config=config), expected, relative=ROUNDED)


def test_perplexity_stays_within_one_percent():
    config, params, tokenizer = gpt2_jax.load_pretrained("demo")
    ids = np.array(tokenizer.encode((DATA / "held-out.txt").read_text(encoding="utf-8")))
    small = gpt2_jax.quantize(params, config=config)
    exact = gpt2_jax.perplexity(params, ids, config=config).nll / (len(ids) - 1)
    rounded = gpt2_jax.perplexity(small, ids, config=config).nll / (len(ids) - 1)
    assert 0 < abs(np.exp(rounded - exact) - 1) < 0.01


def test_what_reads_kernels_has_the_floats(model):
    config, params, floats = model
    for method in (gpt2_jax.fold_layer_norm, gpt2_jax.center_writing_weights):
        equal_config, equal = method(params, config=config)
        again = apply(equal, IDS, config=equal_config)
        expected = apply(floats, IDS, config=config)
        assert_near(again, expected, relative=ROUNDED)
    found = gpt2_jax.ov_circuit(params, 1, 2, config=config)
    expected = gpt2_jax.ov_circuit(floats, 1, 2, config=config)
    for actual, desired in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_a_stack_of_layers_computes_the_same(model):
    config, params, _ = model
    stacked = gpt2_jax.stack_layers(params)
    expected = apply(params, IDS, config=config)
    assert_near(apply(stacked, IDS, config=config), expected, relative=1e-5)


def test_what_needs_floats_says_so(model, tmp_path):
    config, params, _ = model
    key = jax.random.key(0)
    tx = gpt2_jax.make_optimizer(1e-3)
    calls = {
        "quantize": lambda: gpt2_jax.quantize(params, config=config),
        "save": lambda: gpt2_jax.save(tmp_path / "new", params, config),
        "HF": lambda: gpt2_jax.to_hf(params),
        "adapters": lambda: gpt2_jax.lora(key, params, rank=2),
        "number of tokens": lambda: gpt2_jax.resize_vocab(params, config, 70),
        "trained": lambda: gpt2_jax.init_state(params, tx),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"{what}.* must be of floats.*dequantize"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="`dtype` must be one of float32.*, int8; got"):
        gpt2_jax.load("demo", dtype="int4")


def test_what_stays_frozen_may_be_quantised(model):
    config, params, _ = model
    tx = gpt2_jax.make_optimizer(1e-3)
    state = gpt2_jax.init_state(params, tx, trainable="ln_f.*")
    np.testing.assert_array_equal(
        state.params["wte"]["embedding"].values, params["wte"]["embedding"].values
    )
    after, metrics = gpt2_jax.train_step(state, IDS, config=config, tx=tx, trainable="ln_f.*")
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(after.params["ln_f"]["bias"], params["ln_f"]["bias"])


def test_the_floats_of_one_layer_at_a_time_are_in_memory(rng):
    width = 128
    matrix = quantised.of_rows(rng.normal(size=(width, width)).astype(np.float32))
    matrices = jax.tree.map(jnp.asarray, [matrix] * 12)
    x = jnp.asarray(rng.normal(size=(FEW + 1, width)), jnp.float32)

    def layers(x, matrices):
        for matrix in matrices:
            x = jnp.tanh(quantised.product(x, matrix))
        return x

    def bytes_besides(function, x):
        return jax.jit(function).lower(x, matrices).compile().memory_analysis().temp_size_in_bytes

    floats = 4 * width**2
    assert bytes_besides(layers, x) < 2 * floats + 2 * x.nbytes
    # A batch multiplies the tokens, not the matrices.
    batch = jnp.stack([x] * 4)
    assert bytes_besides(jax.vmap(layers, in_axes=(0, None)), batch) < 2 * floats + 2 * batch.nbytes
