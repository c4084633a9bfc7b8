"""What is shown of configs, params and results fits a screen, and is counted right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, summarize
from gpt2_jax.generation.decode import Generation


def shapes(config):
    """A model's params, as shapes alone."""
    return jax.eval_shape(partial(gpt2_jax.init, config=config), jax.random.key(0))


def test_a_model_of_any_size_is_counted_without_being_made():
    found = summarize(shapes(gpt2_jax.PRESETS["gpt2"]))
    assert found.numbers == 124_439_808  # as transformers' `num_parameters()` has it
    assert found.bytes == 4 * 124_439_808
    assert len(found.rows) == 16  # 12 leaves of a layer, two embeddings, and the last LayerNorm
    (row,) = [row for row in found.rows if row.name == "h.*.attn.c_attn.kernel"]
    assert row[1:] == (12, (768, 2304), "float32", 12 * 768 * 2304, 4 * 12 * 768 * 2304)


def test_layers_that_differ_have_rows_of_their_own():
    tree = {
        "h": {"0": {"a": np.zeros((2, 3))}, "1": {"a": np.zeros((2, 3))}, "2": {"a": jnp.zeros(4)}}
    }
    tree["oh"] = {"1": np.zeros(2, np.int8)}  # no layer
    rows = summarize(tree).rows
    assert [(row.name, row.times, row.shape) for row in rows] == [
        ("h.*.a", 2, (2, 3)),
        ("h.*.a", 1, (4,)),
        ("oh.1", 1, (2,)),
    ]
    assert rows[2].bytes == 2


def test_an_optimizers_state_is_a_tree_as_well():
    params = {"h": {"0": {"kernel": np.zeros((2, 2), np.float32)}}}
    found = summarize(optax.adam(1e-3).init(params))
    assert [row.name for row in found.rows] == ["0.count", "0.mu.h.*.kernel", "0.nu.h.*.kernel"]
    assert found.numbers == 1 + 2 * 4


def test_a_table_is_text_and_html():
    found = summarize({"<w>": np.zeros((1000, 2), np.float32), "b": np.zeros(3, np.float16)})
    assert repr(found).splitlines() == [
        "name  times  shape      dtype    numbers  bytes",
        "<w>       1  [1000, 2]  float32    2,000  8,000",
        "b         1  [3]        float16        3      6",
        "all       2                        2,003  8,006",
    ]
    page = found._repr_html_()
    assert "<td>&lt;w&gt;</td><td>1</td><td>[1000, 2]</td>" in page and "<th>dtype</th>" in page
    assert page.count("<tr>") == 4
    with pytest.raises(ValueError, match="must hold arrays, got str at 'h.1.a'"):
        summarize({"h": {"1": {"a": "x"}}})


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            GPT2Config(),
            "GPT2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)",
        ),
        (
            GPT2Config(n_layer=2, bias=False, eos_token_id=(1, 2), dtype="bfloat16"),
            "GPT2Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=2, n_head=12, "
            "eos_token_id=(1, 2), bias=False, dtype='bfloat16')",
        ),
    ],
)
def test_a_config_shows_its_shape_and_what_is_unusual(config, expected):
    assert repr(config) == expected
    assert eval(expected) == config


def test_results_and_models_show_shapes_and_no_arrays():
    out = Generation(
        jnp.zeros((2, 8), jnp.int32),
        np.zeros(2, np.int32),
        jnp.zeros((2, 8)),
        jnp.zeros((2, 8)),
        {},
    )
    out = out._replace(outputs={"scores": np.zeros((2, 8, 61), np.float32)})
    expected = "outputs={'scores': float32[2, 8, 61]})"
    assert repr(out).startswith("Generation(ids=int32[2, 8], lengths=int32[2], logprobs=float")
    assert repr(out).endswith(expected)
    seen = []
    jax.eval_shape(lambda ids: seen.append(repr(out._replace(ids=ids))), out.ids)
    assert seen == [repr(out)]  # of a tracer too

    params = {"w": np.zeros((3, 5), np.float32)}
    shown = repr(gpt2_jax.Pretrained(GPT2Config(), params, gpt2_jax.Tokenizer.gpt2()))
    assert "params=<15 numbers, 60 bytes>" in shown and "n_layer=12" in shown
