"""Generation inside another's program, by `jit`, `vmap` or `export`: it makes the same tokens."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import gpt2_jax
from gpt2_jax import Categorical, Chain, GPT2Config, Temperature, TopK, generate
from gpt2_jax.cache import empty

TINY = GPT2Config(
    vocab_size=61,
    n_positions=48,
    n_embd=24,
    n_layer=1,
    n_head=3,
    eos_token_id=None,
    bos_token_id=None,
)
OPTIONS = {
    "config": TINY,
    "max_new_tokens": 7,
    "sampler": Categorical(Chain((Temperature(1.5), TopK(30)))),
    "stop_ids": (5, 9, 30, 31, 32, 33),
    "pad_id": 2,
}
WIDTH = 16
# What a file of a program needs: JAX, and none of this library.
ELSEWHERE = """
import sys
import jax
import numpy as np

sys.modules["gpt2_jax"] = None
program, inputs, outputs = sys.argv[1:]
call = jax.export.deserialize(bytearray(open(program, "rb").read())).call
given = np.load(inputs)
leaves = [given[f"arr_{number}"] for number in range(len(given.files))]
np.savez(outputs, *call(*leaves))
"""


@pytest.fixture(scope="module")
def params():
    # Larger weights than GPT-2's, so that texts vary.
    return jax.tree.map(lambda x: 5 * x, gpt2_jax.init(jax.random.key(0), TINY))


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(0).integers(0, 61, (3, WIDTH))
    return ids, np.array([WIDTH, 5, 11])


def assert_same(made, expected):
    """The same tokens bit for bit; numbers up to the rounding of another program."""
    np.testing.assert_array_equal(made.ids, expected.ids)
    np.testing.assert_array_equal(made.lengths, expected.lengths)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def outside(params, prompts):
    """The texts of three keys, made from the host."""
    keys = jax.random.split(jax.random.key(4), 3)
    return keys, [generate(params, *prompts, key, **OPTIONS) for key in keys]


def test_a_program_that_generates_makes_the_same_tokens(params, prompts, outside):
    keys, texts = outside
    inside = jax.jit(lambda *arguments: generate(*arguments, **OPTIONS))
    for key, expected in zip(keys, texts, strict=True):
        assert_same(inside(params, *prompts, key), expected)
    assert inside._cache_size() == 1
    # Rows end before the last token, or this would show nothing of what follows.
    assert any((text.lengths < 7).any() for text in texts)


def test_many_keys_and_many_models_at_once(params, prompts, outside):
    keys, texts = outside
    other = jax.tree.map(lambda x: 0.7 * x, params)
    models = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), params, other)

    def run(params, key):
        return generate(params, *prompts, key, **OPTIONS)

    made = jax.jit(jax.vmap(run))(models, keys)
    expected = [texts[0], generate(other, *prompts, keys[1], **OPTIONS), texts[2]]
    for row, text in enumerate(expected):
        assert_same(jax.tree.map(lambda x, row=row: x[row], made), text)


def test_a_sampler_is_exported_and_runs_without_this_library(params, prompts, outside, tmp_path):
    keys, texts = outside
    leaves, structure = jax.tree.flatten(params)

    def sample(ids, lengths, key_data, *leaves):
        params = jax.tree.unflatten(structure, leaves)
        key = jax.random.wrap_key_data(key_data)
        # Of two texts a prompt, so that copies of rows are exported as well.
        out = generate(params, ids, lengths, key, num_return_sequences=2, **OPTIONS)
        return out.ids, out.lengths, out.logprobs

    (rows,) = export.symbolic_shape("b")
    exported = export.export(jax.jit(sample))(
        jax.ShapeDtypeStruct((rows, WIDTH), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
    )
    program, inputs, outputs = (tmp_path / name for name in ("program", "in.npz", "out.npz"))
    program.write_bytes(exported.serialize())
    ids, lengths = prompts
    key_data = jax.random.key_data(keys[0])
    arrays = [ids.astype(np.int32), lengths.astype(np.int32), key_data, *leaves]
    np.savez(inputs, *map(np.asarray, arrays))
    arguments = [sys.executable, "-c", ELSEWHERE, str(program), str(inputs), str(outputs)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(outputs) as file:
        made = dict(file)
    expected = generate(params, *prompts, keys[0], num_return_sequences=2, **OPTIONS)
    np.testing.assert_array_equal(made["arr_0"], expected.ids)
    np.testing.assert_array_equal(made["arr_1"], expected.lengths)
    np.testing.assert_allclose(made["arr_2"], expected.logprobs, atol=1e-5)


def test_left_padded_rows_that_fill_the_context_end_there_inside_too(params, prompts):
    ids, lengths = prompts
    rows = zip(ids, lengths, strict=True)
    ids = np.stack([np.roll(row, WIDTH - length) for row, length in rows])
    options = {"config": TINY, "max_new_tokens": 40, "overflow": "stop"}
    options |= {"padding_side": "left", "stop_ids": ()}
    expected = generate(params, ids, lengths, **options)
    assert expected.lengths.tolist() == [32, 40, 37]
    made = jax.jit(lambda ids, lengths: generate(params, ids, lengths, **options))(ids, lengths)
    assert_same(made, expected)


def test_searches_are_parts_of_a_program_as_well(params, prompts):
    options = {"config": TINY, "max_new_tokens": 5, "stop_ids": (5, 9)}
    for search, more in ((gpt2_jax.beam_search, {"num_beams": 2}), (gpt2_jax.speculate, {})):
        program = jax.make_jaxpr(lambda *given, f=search, o=options | more: f(*given, **o))
        # Of one compiled function, and nothing else that computes.
        (loop,) = [step for step in program(params, *prompts).eqns if "while" in str(step)]
        assert loop.params["name"] == "_in_one"


@pytest.mark.parametrize(
    "function, changes, message",
    [
        (gpt2_jax.stream, {}, "`stream` hands out its pieces on the host"),
        (generate, {"overflow": "slide", "max_new_tokens": 40}, '`overflow="slide"` is read on'),
        (generate, {"max_new_tokens": 40}, "prompt has 16 tokens .* is 40, together 56"),
        (generate, {"sampler": Categorical()}, "`key` must be given for a sampler that draws"),
    ],
)
def test_what_needs_the_host_is_refused_by_name(params, prompts, function, changes, message):
    options = {"config": TINY, "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda ids: function(params, ids, **options))(prompts[0])


def test_a_cache_is_refused_by_name(params, prompts):
    cache = empty(TINY, 3, 9)
    with pytest.raises(ValueError, match="`cache` is read on the host, so not inside `jax.jit`"):
        jax.jit(lambda ids: generate(params, ids, config=TINY, max_new_tokens=2, cache=cache))(
            prompts[0]
        )
