"""A model on a mesh of devices: what one device computes, and how it is spread."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import gpt2_jax
from gpt2_jax import sharding
from gpt2_jax.generation import decode
from gpt2_jax.interpretability.reading import logit_lens
from gpt2_jax.pretrained.formats import SafetensorsFile
from gpt2_jax.training import step
from gpt2_jax.training.losses import make_batch
from tests.reference import ROOT, assert_near

# Large weights: of small ones, all texts are alike.
CONFIG = gpt2_jax.GPT2Config(
    vocab_size=48,
    n_positions=32,
    n_embd=32,
    n_layer=1,
    n_head=4,
    dtype="float64",
    eos_token_id=0,
    initializer_range=0.5,
)
ALL_AXES = "data=2,fsdp=2,tensor=2"
KERNEL = "h.0.attn.c_attn.kernel"


@pytest.fixture(scope="module")
def params():
    """Params on one device."""
    return gpt2_jax.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def ids():
    """Eight rows: as many as devices."""
    return np.random.default_rng(0).integers(1, CONFIG.vocab_size, (8, 12))


def explicit(mesh):
    """The mesh as `jax.make_mesh` makes it by default."""
    return jax.make_mesh(tuple(mesh.shape.values()), mesh.axis_names, devices=mesh.devices.ravel())


def mesh_of(sizes, kind):
    """A mesh of automatic or explicit axes, and what the caller has set."""
    mesh = sharding.make_mesh(sizes)
    if kind == "automatic":
        return mesh, contextlib.nullcontext()
    mesh = explicit(mesh)
    return mesh, jax.set_mesh(mesh) if kind == "set" else contextlib.nullcontext()


def specs_of(tree):
    """The specs of a tree's leaves by their names."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding.spec
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


# Rules.


def test_the_rules_are_megatrons(params):
    specs = specs_of(sharding.shard(params, sharding.make_mesh(ALL_AXES)))
    assert specs == {
        "h.0.attn.c_attn.bias": P(),
        KERNEL: P(("tensor", "fsdp")),
        "h.0.attn.c_proj.bias": P(),
        "h.0.attn.c_proj.kernel": P("tensor", "fsdp"),
        "h.0.ln_1.bias": P(),
        "h.0.ln_1.scale": P(),
        "h.0.ln_2.bias": P(),
        "h.0.ln_2.scale": P(),
        "h.0.mlp.c_fc.bias": P("tensor"),
        "h.0.mlp.c_fc.kernel": P("fsdp", "tensor"),
        "h.0.mlp.c_proj.bias": P(),
        "h.0.mlp.c_proj.kernel": P("tensor", "fsdp"),
        "ln_f.bias": P(),
        "ln_f.scale": P(),
        "wpe.embedding": P(None, "fsdp"),
        "wte.embedding": P("tensor", "fsdp"),
    }


def test_a_vocabulary_that_does_not_divide_is_cut_by_width():
    mesh = sharding.make_mesh(ALL_AXES)
    spec = sharding.leaf_sharding("wte.embedding", (50257, 768), mesh).spec
    assert spec == P(None, ("tensor", "fsdp"))


def test_a_stack_of_layers_is_cut_as_each_of_them_is():
    mesh = sharding.make_mesh(ALL_AXES)
    spec = sharding.leaf_sharding("0.trace.h.mlp.c_fc.kernel", (12, 768, 3072), mesh).spec
    assert spec == P(None, "fsdp", "tensor")


def test_the_first_rule_counts_and_each_must_find_a_leaf(params):
    mesh = sharding.make_mesh("tensor=4")
    mine = [(r"c_fc", P(None, "tensor")), (r"c_fc\.kernel", P("tensor")), (r"", P())]
    # A bias has no second axis: it is on all devices.
    specs = specs_of(sharding.shard(params, mesh, mine))
    assert specs["h.0.mlp.c_fc.kernel"] == P(None, "tensor")
    assert {spec for name, spec in specs.items() if name != "h.0.mlp.c_fc.kernel"} == {P()}
    with pytest.raises(ValueError, match="'gate' finds none of 16: names are such as h.0.attn"):
        sharding.shardings(params, mesh, [("gate", P("tensor")), ("", P())])
    with pytest.raises(
        ValueError, match=r"axes data, fsdp, tensor cannot spread 'wte' by P.*tensr"
    ):
        sharding.shardings(params, mesh, [("wte", P("tensr"))])
    with pytest.raises(ValueError, match=r"each axis once, 'wte' has P.*'tensor', 'tensor'"):
        sharding.shardings(params, mesh, [("wte", P("tensor", "tensor"))])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("data=4,tensor=4", "data=4,fsdp=1,tensor=4 needs 16 devices, there are 8"),
        ("data=2,data=4", "each axis once, got 'data' twice"),
        ("model=4", "axes of data, fsdp, tensor, got 'model'"),
        ("data=0", "whole numbers from 1 on, got data=0"),
        ("data", "such as data=2,tensor=4, got 'data'"),
    ],
)
def test_a_mesh_that_cannot_be_is_told_with_the_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_a_param_that_does_not_divide_is_told_before_anything_is_read(tmp_path, params):
    gpt2_jax.save(tmp_path, params, CONFIG)
    mesh = sharding.make_mesh("tensor=3")
    message = r"h.0.attn.c_attn.kernel \[32, 96\]: axis 0, of 32, must divide by the 3 devices"
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load(tmp_path, mesh=mesh)
    with pytest.raises(ValueError, match="give `mesh`, too"):
        gpt2_jax.load(tmp_path, rules=sharding.RULES)
    with pytest.raises(ValueError, match="give `mesh`, too"):
        gpt2_jax.init(jax.random.key(0), CONFIG, rules=sharding.RULES)


# What is computed.


def figures(params, ids):
    """What the pure functions return, in one program."""
    seen = []

    def record(site, x):  # a caller's tap: no pytree, and it does things of its own
        if site == "h.0.attn.z":
            seen.append(2 * x)
        return x

    lengths = jnp.arange(5, 13)
    _, cache = gpt2_jax.prefill(params, ids, lengths, config=CONFIG, cache_len=16, tap=record)
    read, cache = gpt2_jax.extend(params, ids[:, :2], cache, config=CONFIG)
    edits = {"h.0.mlp.out": jnp.zeros_like}
    _, acts = gpt2_jax.capture(params, ids, config=CONFIG, sites=["*.z", "logits"], edits=edits)

    def loss(params):
        return gpt2_jax.next_token_loss(params, ids, config=CONFIG)[0]

    return read, seen, acts, logit_lens(params, ids, config=CONFIG), jax.grad(loss)(params)


@pytest.fixture(scope="module")
def on_one_device(params, ids):
    """The figures of one device."""
    return jax.jit(figures)(params, ids)


@pytest.mark.parametrize("kind", ["automatic", "set"])
def test_figures_are_those_of_one_device(params, ids, on_one_device, kind):
    mesh, setting = mesh_of(ALL_AXES, kind)
    with setting:
        spread = sharding.shard(params, mesh)
        got = jax.jit(figures)(spread, sharding.shard_batch(ids, mesh))
        # As arrays of the caller's kind of mesh, fit for whatever comes next.
        assert jax.tree.leaves(got)[0].sharding.mesh == mesh
        doubled = jax.tree.map(lambda x: x * 2, got)
    for actual, expected in zip(
        jax.tree.leaves(doubled), jax.tree.leaves(on_one_device), strict=True
    ):
        assert_near(actual, 2 * np.asarray(expected), 1e-10)


def test_greedy_texts_are_those_of_one_device_by_as_many_programs(params, ids):
    options = {"config": CONFIG, "max_new_tokens": 8, "stop_ids": ()}
    want = gpt2_jax.generate(params, ids, **options)
    spread = sharding.shard(params, explicit(sharding.make_mesh(ALL_AXES)))
    programs = (decode.begin, decode.advance)
    before = [program._cache_size() for program in programs]
    for _ in range(2):
        made = gpt2_jax.generate(spread, ids, **options)
    assert [program._cache_size() for program in programs] == [size + 1 for size in before]
    np.testing.assert_array_equal(made.ids, want.ids)
    assert_near(made.logprobs, want.logprobs, 1e-6)  # they are float32


TX = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope="module")
def trained(params, ids):
    """The state after three steps on one device, and the last metrics."""
    state = gpt2_jax.init_state(params, TX)
    for _ in range(3):
        state, metrics = gpt2_jax.train_step(state, ids, config=CONFIG, tx=TX)
    return state, metrics


@pytest.fixture
def no_cache_of_programs():
    """Lets XLA compile, and warn, whatever was compiled before."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.parametrize(("sizes", "kind"), [("tensor=4", "automatic"), (ALL_AXES, "explicit")])
def test_steps_are_those_of_one_device_by_one_program(
    params, ids, trained, no_cache_of_programs, capfd, sizes, kind
):
    mesh, _ = mesh_of(sizes, kind)
    state = gpt2_jax.init_state(sharding.shard(params, mesh), TX)
    batch = sharding.shard_batch(ids, mesh)
    places = [leaf.sharding for leaf in jax.tree.leaves(state)]
    before = step._train_step._cache_size()
    for _ in range(3):
        state, metrics = gpt2_jax.train_step(state, batch, config=CONFIG, tx=TX)
    assert step._train_step._cache_size() == before + 1
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == places
    # XLA's "involuntary full rematerialization": an array that it replicates to cut it anew.
    assert "rematerialization" not in capfd.readouterr().err
    for actual, expected in zip(
        jax.tree.leaves((state, metrics)), jax.tree.leaves(trained), strict=True
    ):
        assert_near(actual, expected, 1e-10)


# How it is computed.


def between_devices(text):
    """What a program sends between devices: the operations and the shapes of what comes out."""
    operations = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    found = re.findall(rf"= (.*?) ({operations})(?:-start)?\(", text)
    return [(name, re.findall(r"\[([\d,]*)\]", shapes)) for shapes, name in found]


def test_a_decode_step_along_tensor_sums_activations_and_nothing_else(params, ids):
    mesh = sharding.make_mesh("tensor=4")
    spread = sharding.shard(params, mesh)
    prefill = jax.jit(lambda params: gpt2_jax.prefill(params, ids[:2], config=CONFIG, cache_len=16))
    decode_step = jax.jit(
        lambda params, tokens, cache: gpt2_jax.decode_step(params, tokens, cache, config=CONFIG)
    )
    _, cache = prefill(spread)
    keys = cache.layers[0].keys
    assert keys.sharding.spec == P("tensor")  # each device has the keys of one head
    text = decode_step.lower(spread, ids[:2, 0], cache).compile().as_text()
    # The embedding, the queries, keys and values, and what attention and the MLP write.
    assert between_devices(text) == [
        ("all-reduce", ["2,1,32"]),
        ("all-reduce", ["2,96"]),
        ("all-reduce", ["2,32"]),
        ("all-reduce", ["2,32"]),
    ]


def test_a_training_step_along_tensor_gathers_no_param(params, ids):
    state = gpt2_jax.init_state(sharding.shard(params, sharding.make_mesh("tensor=4")), TX)
    program = step._Program(TX, 1, "none", None, None, sharding.places(state))
    batch = make_batch(ids, None, step.Layout(), None, CONFIG)
    lowered = step._train_step.lower(state, batch, None, config=CONFIG, program=program)
    sent = between_devices(lowered.compile().as_text())
    gathered = [shape for name, shapes in sent if name == "all-gather" for shape in shapes]
    whole = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    assert "32,96" in whole and whole.isdisjoint(gathered)


def test_one_devices_program_says_nothing_of_places(params, ids):
    text = jax.jit(gpt2_jax.apply).lower(params, ids, config=CONFIG).as_text()
    assert "harding" not in text


# Checkpoints.


def test_the_block_of_the_page_prints_that_a_mesh_changes_nothing(capsys):
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    first, second = capsys.readouterr().out.splitlines()
    assert "('fsdp', 'tensor')" in first and second == "True"


def test_params_are_made_where_they_lie_of_the_same_bits(params):
    made = gpt2_jax.init(jax.random.key(0), CONFIG, mesh=sharding.make_mesh(ALL_AXES))
    assert specs_of(made)[KERNEL] == P(("tensor", "fsdp"))
    jax.tree.map(np.testing.assert_array_equal, made, params)


def test_of_a_checkpoint_the_parts_of_the_devices_are_read(tmp_path, params, monkeypatch):
    folder = tmp_path / "one"
    gpt2_jax.save(folder, params, CONFIG)
    monkeypatch.setattr(SafetensorsFile, "read", None)  # what would read a whole tensor
    _, loaded = gpt2_jax.load(folder, mesh=sharding.make_mesh(ALL_AXES))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    kernel = loaded["h"]["0"]["attn"]["c_attn"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(8, 96)] * 8
    gpt2_jax.save(tmp_path / "spread", loaded, CONFIG)
    files = [tmp_path / name / "model.safetensors" for name in ("one", "spread")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_part_that_is_not_finite_is_told(tmp_path, params):
    bad = jax.tree.map(jnp.array, params)
    bad["wpe"]["embedding"] = bad["wpe"]["embedding"].at[3, 30].set(jnp.nan)
    gpt2_jax.save(tmp_path, bad, CONFIG)
    with pytest.raises(ValueError, match=r"wpe.weight: expected finite weights, got 1 NaN"):
        gpt2_jax.load(tmp_path, mesh=sharding.make_mesh("fsdp=2"))
