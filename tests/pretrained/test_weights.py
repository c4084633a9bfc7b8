"""Checkpoints: round trips are bit-identical, HF reads what is written, every mistake is named."""

import json
import math
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors.numpy import load_file, save_file

import weights_convert
from gpt2_jax.config import PRESETS, GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import conversion, layout, params_file, weights
from gpt2_jax.tokenizer import Tokenizer
from tests import reference
from tests.pretrained import damage
from tests.reference import ROOT

transformers.utils.logging.disable_progress_bar()

SHAPE = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
CONFIG = GPT2Config(**SHAPE)


def hf_model(**changes):
    """A small model in float32, the same at every call."""
    options = SHAPE | {"bos_token_id": 0, "eos_token_id": 0} | changes
    return reference.hf_model(**options).float()


def hf_folder(folder, max_shard_size="5GB", dtype=torch.float32, **changes):
    """Saves it as HF does today, and returns the folder."""
    hf_model(**changes).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def bin_folder(folder, **changes):
    """Saves it as HF did before safetensors, and returns the folder."""
    model = hf_model(**changes)
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def random_state(config=CONFIG, dtype=np.float32, prefix="transformer."):
    rng = np.random.default_rng(0)
    return {
        (name if name.startswith("lm_head") else prefix + name): rng.normal(size=shape).astype(
            dtype
        )
        for name, shape in layout.param_shapes(config).items()
    }


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_equals_hf(params, model):
    ours, theirs = weights.to_hf(params), model.state_dict()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].numpy())
    assert set(theirs) - set(ours) <= {"lm_head.weight"}


def rewrite(folder, change):
    """Applies `change` to the tensors of a folder's safetensors file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# The tree.


def test_names_of_the_tree():
    config = CONFIG.replace(n_layer=1, tie_word_embeddings=False)
    params = weights.from_hf(random_state(config), config)
    names = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    assert names == {
        "wte/embedding": (40, 8),
        "wpe/embedding": (16, 8),
        "h/0/ln_1/scale": (8,),
        "h/0/ln_1/bias": (8,),
        "h/0/attn/c_attn/kernel": (8, 24),
        "h/0/attn/c_attn/bias": (24,),
        "h/0/attn/c_proj/kernel": (8, 8),
        "h/0/attn/c_proj/bias": (8,),
        "h/0/ln_2/scale": (8,),
        "h/0/ln_2/bias": (8,),
        "h/0/mlp/c_fc/kernel": (8, 32),
        "h/0/mlp/c_fc/bias": (32,),
        "h/0/mlp/c_proj/kernel": (32, 8),
        "h/0/mlp/c_proj/bias": (8,),
        "ln_f/scale": (8,),
        "ln_f/bias": (8,),
        "lm_head/embedding": (40, 8),
    }


@pytest.mark.parametrize(
    "name, count",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_sizes(name, count):
    assert sum(np.prod(shape) for shape in layout.param_shapes(PRESETS[name]).values()) == count


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_that_hf_writes(tmp_path, tied):
    hf_folder(tmp_path, tie_word_embeddings=tied)
    _, params = weights.load(tmp_path)
    assert weights.to_hf(params).keys() == load_file(tmp_path / "model.safetensors").keys()


def test_params_are_a_copy_of_the_state():
    state = random_state()
    params = weights.from_hf(state, CONFIG)
    before = jax.tree.map(lambda x: np.array(x), params)
    for array in state.values():
        array[:] = 7
    assert_same_bits(params, before)


def test_hf_names_and_back_is_the_identity():
    state = random_state()
    assert_same_bits(weights.to_hf(weights.from_hf(state, CONFIG)), state)


# Reading.


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"n_inner": 12}])
def test_loads_what_hf_saves(tmp_path, changes):
    config, params = weights.load(hf_folder(tmp_path, **changes))
    assert_equals_hf(params, hf_model(**changes))
    assert (config.n_layer, config.dtype) == (2, "float32")
    assert ("lm_head" in params) == ("tie_word_embeddings" in changes)


def test_prefix_and_buffers_do_not_matter():
    bare = random_state(prefix="")
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
    bare["h.1.attn.masked_bias"] = np.float32(-1e4)
    assert_same_bits(weights.from_hf(bare, CONFIG), weights.from_hf(random_state(), CONFIG))


def test_state_dict_of_a_model_in_memory():
    model = hf_model()
    assert_equals_hf(weights.from_hf(model.state_dict(), CONFIG), model)


def test_state_dict_in_bfloat16_keeps_its_bits():
    state = hf_model().to(torch.bfloat16).state_dict()
    params = weights.from_hf(state, CONFIG)
    ours = np.asarray(params["wte"]["embedding"]).view(np.int16)
    np.testing.assert_array_equal(ours, state["transformer.wte.weight"].view(torch.int16).numpy())


@pytest.mark.parametrize("kind", ["shards", "bin", "old bin", "bin shards"])
def test_other_layouts_give_the_same_params(tmp_path, kind):
    folder = tmp_path / "model"
    if kind == "shards":
        hf_folder(folder, max_shard_size="3KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        bin_folder(folder)
    file = folder / "pytorch_model.bin"
    if kind == "old bin":
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    if kind == "bin shards":
        state = torch.load(file)
        file.unlink()
        parts = {"a.bin": list(state)[:5], "b.bin": list(state)[5:]}
        for part, names in parts.items():
            torch.save({name: state[name] for name in names}, folder / part)
        weight_map = {name: part for part, names in parts.items() for name in names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, params = weights.load(folder)
    assert_equals_hf(params, hf_model())


def test_safetensors_come_first(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    weights.load(tmp_path)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtype_of_the_file_is_kept(tmp_path, name):
    config, params = weights.load(hf_folder(tmp_path, dtype=getattr(torch, name)))
    assert config.dtype == name
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {name}


def test_dtype_casts(tmp_path):
    hf_folder(tmp_path)
    config, params = weights.load(tmp_path, dtype=jnp.bfloat16)
    expected = hf_model().transformer.wte.weight.detach().numpy().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["wte"]["embedding"]), expected)
    assert config.dtype == "bfloat16"


def test_float64_needs_x64():
    state = random_state(dtype=np.float64)
    message = "would be float64: set `jax_enable_x64`, or ask for another `dtype`"
    with jax.enable_x64(False), pytest.raises(CheckpointError, match=message):
        weights.from_hf(state, CONFIG)
    assert weights.from_hf(state, CONFIG, "float32")["wte"]["embedding"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert_same_bits(weights.to_hf(weights.from_hf(state, CONFIG)), state)


def test_demo_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from gpt2_jax.pretrained import weights\n"
        "config, params = weights.load('demo')\n"
        "print(config.n_embd, params['wte']['embedding'].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "256 (4096, 256)\n"


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="measures memory by Linux's /proc"
)
@pytest.mark.parametrize("name", ["model", "ckpt.pt"])
def test_loading_takes_little_more_memory_than_the_params(tmp_path, name):
    config = GPT2Config(vocab_size=20000, n_embd=768, n_layer=6, activation_function="gelu")
    params = weights.from_hf(random_state(config), config)
    conversion.write(tmp_path / name, params, config, source=tmp_path)
    code = (
        "import sys, jax\n"
        "from gpt2_jax.pretrained import weights\n"
        "def kilobytes(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(key))\n"
        "weights.load('demo')\n"
        "import torch  # counts for nothing\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # forgets the peak so far\n"
        "before = kilobytes('VmRSS')\n"
        "params = jax.block_until_ready(weights.load(sys.argv[1])[1])\n"
        "size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))\n"
        "print((kilobytes('VmHWM') - before) * 1024 / size)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment
    )
    assert float(done.stdout) < 1.3


# Writing.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", [None, 3000])
def test_save_and_load_is_bit_identical(tmp_path, dtype, tied, max_shard_size):
    config = CONFIG.replace(tie_word_embeddings=tied, dtype=np.dtype(dtype).name)
    params = weights.from_hf(random_state(config, dtype), config)
    weights.save(tmp_path / "out", params, config, max_shard_size=max_shard_size)
    loaded_config, loaded = weights.load(tmp_path / "out")
    assert loaded_config == config
    assert_same_bits(loaded, params)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", [None, 3000])
def test_hf_loads_what_is_saved(tmp_path, tied, max_shard_size):
    config = CONFIG.replace(tie_word_embeddings=tied)
    params = weights.from_hf(random_state(config), config)
    weights.save(tmp_path / "out", params, config, max_shard_size=max_shard_size)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert_equals_hf(params, model)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_logits_survive_a_round_trip_through_hf(tmp_path):
    original = hf_model()
    config, params = weights.load(hf_folder(tmp_path / "in"))
    weights.save(tmp_path / "out", params, config)
    copy = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(original(ids).logits, copy(ids).logits)


def test_shards_stay_below_the_limit(tmp_path):
    weights.save(
        tmp_path / "out", weights.from_hf(random_state(), CONFIG), CONFIG, max_shard_size=3000
    )
    files = [load_file(file) for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert max(sum(array.nbytes for array in file.values()) for file in files) <= 3000
    assert sum(len(file) for file in files) == len(layout.param_shapes(CONFIG))


def test_saving_over_the_folder_that_was_loaded(tmp_path):
    folder = hf_folder(tmp_path / "model", max_shard_size="3KB")
    (folder / "vocab.json").write_text("{}")
    config, params = weights.load(folder)
    changed = jax.tree.map(lambda x: x + 1, params)
    weights.save(folder, changed, config, overwrite=True)
    assert_same_bits(weights.load(folder)[1], changed)
    assert_equals_hf(params, hf_model())
    names = {"config.json", "generation_config.json", "model.safetensors", "vocab.json"}
    assert {file.name for file in folder.iterdir()} == names
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_save_refuses_a_folder_in_use(tmp_path):
    params = weights.from_hf(random_state(), CONFIG)
    (tmp_path / "empty").mkdir()
    weights.save(tmp_path / "empty", params, CONFIG)
    with pytest.raises(
        CheckpointError, match="exists already: expected a new or empty place, or `overwrite`"
    ):
        weights.save(tmp_path / "empty", params, CONFIG)


def test_save_refuses_params_of_another_config(tmp_path):
    params = weights.from_hf(random_state(), CONFIG)
    with pytest.raises(CheckpointError, match="12 missing, 0 unexpected, 1 of another shape"):
        weights.save(tmp_path / "out", params, CONFIG.replace(n_layer=3, vocab_size=41))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_is_written_with_the_weights_or_nothing_is(tmp_path, monkeypatch):
    folder = hf_folder(tmp_path / "model")
    (folder / "tokenizer.json").write_text("of the model before")
    (folder / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    config, params = weights.load(folder)
    tokenizer = Tokenizer({"a": 0}, [])

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "save", full)
        with pytest.raises(OSError, match=f"No space left on device: '{folder}'"):
            weights.save(folder, params, config, tokenizer=tokenizer, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    weights.save(folder, params, config, tokenizer=tokenizer, overwrite=True)
    assert Tokenizer.load(folder).vocab == {"a": 0}
    assert not (folder / "tokenizer.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = hf_folder(tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    config, params = weights.load(folder)

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(folder, params, config, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_weights_are_as_readable_as_the_config(tmp_path):
    weights.save(tmp_path / "out", weights.from_hf(random_state(), CONFIG), CONFIG)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_params_file_is_bit_exact(tmp_path):
    params = weights.from_hf(random_state(dtype=np.float16), CONFIG)
    params["wpe"]["embedding"] = params["wpe"]["embedding"].at[0, 0].set(jnp.nan)
    tree = {"params": params, "step": jnp.int32(3), "mask": jnp.array([True, False])}
    params_file.save_params(tmp_path / "state.safetensors", tree)
    assert_same_bits(params_file.load_params(tmp_path / "state.safetensors"), tree)
    assert params_file.load_config(tmp_path / "state.safetensors") is None


def test_params_file_holds_its_config(tmp_path):
    config = CONFIG.replace(dtype="bfloat16", eos_token_id=(1, 2))
    params_file.save_params(
        tmp_path / "p.safetensors", weights.from_hf(random_state(), CONFIG), config
    )
    assert params_file.load_config(tmp_path / "p.safetensors") == config
    assert "wte.embedding" in load_file(tmp_path / "p.safetensors")


# Mistakes.


def test_missing_unexpected_and_misshapen_are_reported_together():
    state = random_state()
    del state["transformer.ln_f.bias"], state["transformer.h.1.mlp.c_fc.weight"]
    state["transformer.score.weight"] = np.ones((2, 8), np.float32)
    state["transformer.wpe.weight"] = np.ones((17, 8), np.float32)
    with pytest.raises(CheckpointError) as caught:
        weights.from_hf(state, CONFIG)
    assert str(caught.value) == (
        "The weights do not fit the config: 2 missing, 1 unexpected, 1 of another shape.\n"
        "  missing: h.1.mlp.c_fc.weight [8, 32]\n"
        "  missing: ln_f.bias [8]\n"
        "  unexpected: score.weight [2, 8]\n"
        "  wpe.weight: expected [16, 8], got [17, 8]"
    )


def test_a_long_report_is_cut():
    with pytest.raises(
        CheckpointError, match=r"(?s)148 missing, 0 unexpected.*\n  and 98 more$"
    ) as caught:
        weights.from_hf({}, GPT2Config())
    assert str(caught.value).count("\n") == 51


def test_config_of_another_size(tmp_path):
    hf_folder(tmp_path)
    set_config(tmp_path, n_embd=16)
    with pytest.raises(
        CheckpointError, match=r"wte.weight: expected \[40, 16\], got \[40, 8\]"
    ) as caught:
        weights.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_name_given_twice():
    state = random_state()
    state["wte.weight"] = state["transformer.wte.weight"]
    with pytest.raises(CheckpointError, match="got with and without `transformer.`: wte.weight"):
        weights.from_hf(state, CONFIG)


def test_a_tied_head_is_dropped_when_equal_and_refused_when_not():
    state = random_state()
    state["lm_head.weight"] = state["transformer.wte.weight"].copy()
    assert "lm_head" not in weights.from_hf(state, CONFIG)
    state["lm_head.weight"][3, :2] += 1
    with pytest.raises(
        CheckpointError, match="differs from `wte.weight` in 2 of 320 values: set `tie_word"
    ):
        weights.from_hf(state, CONFIG)


def test_an_untied_head_must_be_there():
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \[40, 8\]"):
        weights.from_hf(random_state(), CONFIG.replace(tie_word_embeddings=False))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_must_be_finite(value, dtype):
    state = random_state(dtype=dtype)
    state["transformer.h.1.ln_2.bias"][:3] = value
    with pytest.raises(
        CheckpointError, match="h.1.ln_2.bias: expected finite weights, got 3 NaN or infinite of 8"
    ):
        weights.from_hf(state, CONFIG)


def test_weights_must_be_finite_after_a_cast():
    state = random_state()
    state["transformer.wpe.weight"][0, 0] = 1e6
    with pytest.raises(
        CheckpointError, match="wpe.weight cast to float16: .* got 1 NaN or infinite of 128"
    ):
        weights.from_hf(state, CONFIG, jnp.float16)


def test_integer_weights_are_refused():
    state = random_state()
    state["transformer.wte.weight"] = np.ones((40, 8), np.int8)
    with pytest.raises(CheckpointError, match="wte.weight: expected one of float32, .*, got int8"):
        weights.from_hf(state, CONFIG)


def test_float8_weights_are_refused(tmp_path):
    hf_folder(tmp_path)
    state = {
        name: tensor.detach().clone()
        for name, tensor in hf_model().transformer.state_dict().items()
    }
    state["wpe.weight"] = state["wpe.weight"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="wpe.weight: expected one of float32, .*, got F8_E4M3"
    ):
        weights.load(tmp_path)


@pytest.mark.parametrize("dtype", ["banana", "int32", jnp.int16])
def test_dtype_must_be_a_float_or_int8(dtype):
    with pytest.raises(
        CheckpointError,
        match="`dtype` must be one of float32, bfloat16, float16, float64, int8; got",
    ):
        weights.from_hf(random_state(), CONFIG, dtype)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_file(tmp_path, cut):
    file = hf_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        CheckpointError, match="model.safetensors: expected a whole safetensors file, got "
    ):
        weights.load(tmp_path)


def test_garbage_instead_of_a_file(tmp_path):
    file = hf_folder(tmp_path) / "model.safetensors"
    file.write_bytes(b"404 not found" * 9)
    with pytest.raises(
        CheckpointError, match="model.safetensors: expected a whole safetensors file"
    ):
        weights.load(tmp_path)
    with pytest.raises(
        CheckpointError, match="model.safetensors: expected a whole safetensors file"
    ):
        params_file.load_params(file)


def test_missing_shard(tmp_path):
    hf_folder(tmp_path, max_shard_size="3KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(
        CheckpointError, match=r"index.json: expected \d+ weight files, .*model-00002-of-\d+.safet"
    ):
        weights.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(tmp_path, text):
    hf_folder(tmp_path, max_shard_size="3KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    message = "index.json: expected (a `weight_map` from names to files|JSON|an object), got"
    with pytest.raises(CheckpointError, match=message):
        weights.load(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    folder = hf_folder(tmp_path / "model", max_shard_size="3KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_folder(tmp_path)
    with pytest.raises(CheckpointError, match="weight files, model.safetensors not found"):
        weights.load(folder)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("legacy", [False, True, "plain pickle"])
def test_a_pickle_is_never_executed(tmp_path, legacy):
    folder, trap = bin_folder(tmp_path / "model"), tmp_path / "trap"
    file = folder / "pytorch_model.bin"
    if legacy == "plain pickle":
        file.write_bytes(pickle.dumps({"wte.weight": Malicious(trap)}))
    else:
        torch.save({"wte.weight": Malicious(trap)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin: expected a file of tensors alone, got"
    ):
        weights.load(folder)
    assert not trap.exists()
    if legacy == "plain pickle":
        pickle.loads(file.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"404"])
def test_damaged_bin(tmp_path, content):
    (bin_folder(tmp_path / "model") / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        CheckpointError, match="pytorch_model.bin: expected a file of tensors alone, got"
    ):
        weights.load(tmp_path / "model")


def test_bin_of_something_else(tmp_path):
    torch.save({"epoch": 3}, bin_folder(tmp_path / "model") / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: expected names and tensors"):
        weights.load(tmp_path / "model")


def test_bin_without_torch(tmp_path, monkeypatch):
    bin_folder(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        CheckpointError, match="reading it needs PyTorch, which is not installed. Install `torch`"
    ):
        weights.load(tmp_path / "model")


@pytest.mark.parametrize("layout", damage.LAYOUTS)
def test_a_damaged_file_is_read_or_named(layout):
    # 1,200 of each when this was written: none was refused without its name.
    n_refused, wrongs = damage.try_damages(layout, 60)
    assert wrongs == []
    assert 30 < n_refused < 60


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_says_what_to_run(tmp_path, name):
    folder = bin_folder(tmp_path / "model")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548118077\n"
    (folder / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name}: .*Git LFS pointer.*run `git lfs pull`"):
        weights.load(folder)


@pytest.mark.parametrize(
    "content, kind", [(b"<!DOCTYPE html>", "an HTML page"), (b"PK\x03\x04", "a zip archive")]
)
def test_what_came_in_place_of_weights_is_named(tmp_path, content, kind):
    (hf_folder(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors: got {kind}"):
        weights.load(tmp_path)


def test_a_device_in_place_of_weights_is_not_read(tmp_path):
    (hf_folder(tmp_path) / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="p.safetensors: expected a file, got a FIFO"):
        params_file.load_params(tmp_path / "p.safetensors")


@pytest.mark.parametrize("n_layer", [10**7, 2**31 - 1])
def test_layers_are_counted_before_they_are_named(tmp_path, n_layer):
    hf_folder(tmp_path)
    set_config(tmp_path, n_layer=n_layer)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"expected {n_layer} layers .*, got 28 names"):
        weights.load(tmp_path)
    config = CONFIG.replace(n_layer=n_layer)
    with pytest.raises(CheckpointError, match=f"expected {n_layer} layers"):
        weights.save(tmp_path / "out", weights.from_hf(random_state(), CONFIG), config)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensor: tensor.to_sparse(), "expected a dense tensor of floats, got torch.sparse"),
        (lambda tensor: tensor.to("meta"), "got one on the meta device"),
        (lambda tensor: tensor.to(torch.float8_e5m2), "expected one of float32.*float8_e5m2"),
        (lambda tensor: tensor.to(torch.complex64), "expected one of float32, .*, got complex64"),
        (
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "got a quantised one",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of what it will do away with
def test_tensors_that_are_no_floats_in_memory_are_named(tmp_path, change, message):
    folder = bin_folder(tmp_path / "model")
    file = folder / "pytorch_model.bin"
    state = torch.load(file)
    state["transformer.wpe.weight"] = change(state["transformer.wpe.weight"])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=f"(?i)model.bin: wpe.weight: .*{message}"):
        weights.load(folder)
    with pytest.raises(CheckpointError, match=f"(?i)^wpe.weight: .*{message}"):
        weights.from_hf(state, CONFIG)


@pytest.mark.parametrize(
    "state, got",
    [
        ({0: np.ones(1, np.float32)}, "the name 0"),
        ({"a": 3}, "int as 'a'"),
        ({"model": {"a": 3}}, "dict as 'model'"),
    ],
)
def test_a_state_is_names_and_arrays(tmp_path, state, got):
    with pytest.raises(CheckpointError, match=f"The state: expected names and tensors, got {got}"):
        weights.from_hf(state, CONFIG)


def test_names_cannot_move_the_cursor_nor_fill_the_screen():
    state = random_state() | {"\x1b[2J\r" + "x" * 10_000: np.ones(1, np.float32)}
    with pytest.raises(CheckpointError) as caught:
        weights.from_hf(state, CONFIG)
    assert len(str(caught.value).encode()) <= 4000
    assert r"unexpected: \x1b[2J\r" in str(caught.value)


def sparse_file(file, shapes):
    """Writes a file of safetensors, all zeros, that takes no room on the disk."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        start = end
        end += 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def test_a_tensor_larger_than_the_memory_is_named(tmp_path):
    config = CONFIG.replace(vocab_size=2**31 - 1, n_embd=512)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    try:
        sparse_file(tmp_path / "model.safetensors", layout.param_shapes(config))
    except OSError:
        pytest.skip("this file system has no sparse files of 4 TB")
    message = "model.safetensors: wte.weight: Expected room for it in memory"
    with pytest.raises(CheckpointError, match=message):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "names", [["a", "a.b"], ["a.b", "a.b.c.d"], [".".join("x" * 200)], ["wte"], [""]]
)
def test_paths_that_make_no_tree_are_refused_and_the_file_named(tmp_path, names):
    file = tmp_path / "p.safetensors"
    save_file({name: np.ones(1, np.float32) for name in names}, file)
    with pytest.raises(CheckpointError, match="p.safetensors: "):
        conversion.read(file, config_file=conversion.hub.DEMO)


@pytest.mark.parametrize("config", ["", "[]", '{"n_layer": 0}', '{"a":' + "[" * 100_000])
def test_a_damaged_config_in_a_file_of_params_is_refused_and_the_file_named(tmp_path, config):
    file = tmp_path / "p.safetensors"
    save_file({"a": np.ones(1, np.float32)}, file, {"config": config})
    with pytest.raises(CheckpointError, match="p.safetensors: expected a config in its metadata"):
        params_file.load_config(file)


def test_folder_without_a_config(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        CheckpointError, match="expected `config.json` in this folder, got notes.txt"
    ):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"eos_token_id": ' + "[" * 950 + "]" * 950 + "}",
        '{"n_head": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"resid_pdrop": 1' + "0" * 400 + "}",
        '{"n_layer": 1' + "0" * 400 + "}",
        '{"model_type": "' + "x" * 10_000 + '"}',
        '{"n_embd": {"\\u001b": 1}}',
    ],
)
def test_a_hostile_config_is_one_short_line(tmp_path, text):
    (hf_folder(tmp_path) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/config.json: ") as caught:
        weights.load(tmp_path)
    assert len(str(caught.value).encode()) <= 4000
    assert str(caught.value).isprintable()


def test_an_index_of_names_that_are_too_long_is_named(tmp_path):
    index = hf_folder(tmp_path, max_shard_size="3KB") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(CheckpointError, match="index.json: expected 1 weight files, x.* not found"):
        weights.load(tmp_path)


def test_folder_without_weights(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    message = (
        "expected model.safetensors or pytorch_model.bin, whole or in shards, got config.json, gen"
    )
    with pytest.raises(CheckpointError, match=message):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "gpt_neo"}, 'must be "gpt2", got "gpt_neo"'),
        ({"quantization_config": {"bits": 4}}, "`quantization_config=.*not supported"),
        ({"add_cross_attention": True}, "`add_cross_attention=True` is not supported"),
        ({"n_head": 3}, "`n_embd` must be a multiple of `n_head`"),
    ],
)
def test_unsupported_config(tmp_path, values, message):
    hf_folder(tmp_path)
    set_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        weights.load(tmp_path)
    assert "config.json" in str(caught.value)


def test_config_without_architectures(tmp_path):
    hf_folder(tmp_path)
    set_config(tmp_path, architectures=None)
    weights.load(tmp_path)


# The command line.


def convert(*arguments):
    return weights_convert.main([str(argument) for argument in arguments])


def test_convert_there_and_back(tmp_path, capsys):
    source = hf_folder(tmp_path / "in", tie_word_embeddings=False)
    (source / "vocab.json").write_text('{"a": 0}')
    assert convert(source, tmp_path / "p.safetensors") == 0
    assert convert(tmp_path / "p.safetensors", tmp_path / "out") == 0
    assert convert(source, tmp_path / "copy") == 0
    assert_same_bits(weights.load(tmp_path / "out")[1], weights.load(source)[1])
    assert (tmp_path / "copy" / "vocab.json").read_text() == '{"a": 0}'
    assert "parameters, float32" in capsys.readouterr().out


def test_convert_verifies_against_pytorch(tmp_path, capsys):
    source = hf_folder(tmp_path / "in")
    assert convert(source, tmp_path / "out", "--verify", "--dtype", "bfloat16") == 0
    assert convert(source, tmp_path / "p.safetensors", "--verify") == 0
    assert convert(tmp_path / "p.safetensors", tmp_path / "q.safetensors", "--verify") == 0
    differences = re.findall(r"logits: (\S+)", capsys.readouterr().out)
    assert len(differences) == 3 and float(differences[1]) < 1e-5


@pytest.mark.parametrize("target", ["out", "p.safetensors"])
def test_convert_says_in_one_line_that_the_disk_is_full(tmp_path, capsys, target):
    source = hf_folder(tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As a full disk, but that the system calls it "File too large".
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        assert convert(source, tmp_path / target) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert error == f"weights_convert: [Errno 27] File too large: '{tmp_path / target}'\n"
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("target", ["out", "p.safetensors"])
def test_convert_leaves_nothing_when_verification_fails(tmp_path, capsys, monkeypatch, target):
    source = hf_folder(tmp_path / "in")
    monkeypatch.setattr(conversion, "compare", lambda *args: conversion.Difference(1.0, 1.0))
    assert convert(source, tmp_path / target, "--verify") == 2
    assert (
        "Expected logits within 0.0001 of PyTorch's, got 1: nothing was written"
        in capsys.readouterr().err
    )
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_convert_keeps_float64(tmp_path):
    source = hf_folder(tmp_path / "in", dtype=torch.float64)
    with jax.enable_x64(False):
        assert convert(source, tmp_path / "p.safetensors") == 0
        assert convert(tmp_path / "p.safetensors", tmp_path / "out", "--verify") == 0
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("in", "out")]
    assert files[0]["transformer.wte.weight"].dtype == np.float64
    assert_same_bits(*files)


def test_convert_takes_the_config_from_elsewhere(tmp_path, capsys):
    source = hf_folder(tmp_path / "in")
    params_file.save_params(tmp_path / "p.safetensors", weights.load(source)[1])
    assert convert(tmp_path / "p.safetensors", tmp_path / "out") == 2
    assert "holds no config: give one with `--config config.json`" in capsys.readouterr().err
    assert convert(tmp_path / "p.safetensors", tmp_path / "out", "--config", source) == 0
    assert_same_bits(weights.load(tmp_path / "out")[1], weights.load(source)[1])


def test_convert_refuses_to_overwrite_unless_told(tmp_path, capsys):
    source = hf_folder(tmp_path / "in")
    assert convert(source, source) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert(source, source, "--overwrite", "--dtype", "float16") == 0
    assert weights.load(source)[0].dtype == "float16"


@pytest.mark.parametrize(
    "arguments", [("/no/such", "out"), ("none.safetensors", "out"), ("demo", "out", "--dtype", "x")]
)
def test_convert_reports_a_mistake_in_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("weights_convert: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
