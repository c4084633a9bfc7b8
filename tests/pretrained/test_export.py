"""Checkpoints for other tools: bit for bit there and back, and as those tools read them."""

import warnings

import flax.serialization
import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

import gpt2_jax
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import hub, params_file
from gpt2_jax.pretrained.conversion import convert
from gpt2_jax.pretrained.foreign import export
from tests.reference import DATA, assert_near, hf_model

SHAPE = {"vocab_size": 4096, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
END = {"bos_token_id": 0, "eos_token_id": 0}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def small(bias=True, **changes):
    """A small model of HF's whose vocabulary has the demo's size, with our config and params."""
    model = hf_model(**SHAPE, **END, **changes).float()
    config = GPT2Config(**SHAPE, **END, **changes, bias=bias)
    if not bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    return model, config, gpt2_jax.from_hf(model.state_dict(), config)


def demo_tokenizer():
    return gpt2_jax.load_tokenizer("demo")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits


@pytest.mark.parametrize(
    "name", ["folder", "p.safetensors", "m.gguf", "flax/flax_model.msgpack", "ckpt.pt"]
)
def test_the_demo_goes_there_and_back_bit_for_bit(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nanoGPT computes the exact GELU")
        convert("demo", tmp_path / name)
    convert(tmp_path / name, tmp_path / "back")
    there = gpt2_jax.load(tmp_path / name)
    back = gpt2_jax.load(tmp_path / "back")
    config, params = gpt2_jax.load("demo", dtype="float16")  # the file's own
    assert there[0] == back[0] == config
    assert_same_bits(there[1], params)
    assert_same_bits(back[1], params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["m.gguf", "ckpt.pt", "m.msgpack"])
def test_every_dtype_is_kept(tmp_path, name, dtype):
    _, config, params = small(activation_function="gelu_new")
    config = config.replace(dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nanoGPT computes the exact GELU")
        export.write(tmp_path / name, params, config, demo_tokenizer)
    given = config if name == "m.msgpack" else None
    loaded_config, loaded = gpt2_jax.load(tmp_path / name, config=given)
    assert loaded_config == config
    assert_same_bits(loaded, params)


# As others read them.


def test_transformers_reads_our_gguf(tmp_path):
    model, config, params = small()
    export.write(tmp_path / "m.gguf", params, config, demo_tokenizer)
    hf_config = transformers.GPT2Config(**SHAPE, **END)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=hf_config
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    ids = np.arange(12)[None]
    assert_near(gpt2_jax.apply(params, ids, config=config), logits_of(theirs.eval(), ids), 1e-6)


def test_our_gguf_has_what_llama_cpp_asks_for(tmp_path):
    _, config, params = small()
    half = jax.tree.map(lambda leaf: leaf.astype("float16"), params)
    wide = config.replace(vocab_size=4100)  # padded
    half["wte"]["embedding"] = np.pad(half["wte"]["embedding"], ((0, 4), (0, 0)))
    export.write(tmp_path / "m.gguf", half, wide, demo_tokenizer)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["gpt2.attention.head_count"] == 2
    assert fields["gpt2.feed_forward_length"] == 32
    assert fields["tokenizer.ggml.model"] == "gpt2"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 4100 and tokens[-1] == "[PAD4099]"
    assert demo_tokenizer().vocab.items() >= {
        (token, id) for id, token in enumerate(tokens[1:9], 1)
    }
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.attn_output.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.1.attn_output.bias"] == kinds["position_embd.weight"] == "F32"
    assert "output.weight" not in kinds  # tied: llama.cpp takes the table


def test_the_tokenizer_goes_along_in_gguf(tmp_path):
    convert("demo", tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    text = "Once upon a time, there was a little café.<|endoftext|>"
    expected = demo_tokenizer()
    for place in ("m.gguf", "back"):
        tokenizer = gpt2_jax.load_tokenizer(tmp_path / place)
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.eot_id == expected.eot_id


def test_flax_has_the_tree_that_hf_writes(tmp_path):
    source = DATA / "formats" / "flax"
    config, params = gpt2_jax.load(source)
    export.write(tmp_path / "m.msgpack", params, config, demo_tokenizer)
    ours = flax.serialization.msgpack_restore((tmp_path / "m.msgpack").read_bytes())
    theirs = flax.serialization.msgpack_restore((source / "flax_model.msgpack").read_bytes())
    ours = flatten_dict(ours, sep=".")
    theirs = flatten_dict(theirs, sep=".")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_gets_its_own_names(tmp_path, bias):
    model, config, params = small(bias, activation_function="gelu")
    export.write(tmp_path / "ckpt.pt", params, config, demo_tokenizer)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content["model_args"] == {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 16,
        "bias": bias,
        "vocab_size": 4096,
        "dropout": 0.1,
    }
    state = content["model"]
    theirs = model.state_dict()
    expected = {name for name in theirs if bias or not name.endswith("bias")}
    assert state.keys() == expected
    for name in ("c_attn", "c_proj"):
        linear = state[f"transformer.h.1.attn.{name}.weight"]
        assert torch.equal(linear, theirs[f"transformer.h.1.attn.{name}.weight"].T)
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


# What a format cannot hold.


def test_another_gelu_is_said(tmp_path):
    _, config, params = small()
    with pytest.warns(UserWarning, match="nanoGPT computes the exact GELU, .* with gelu_new"):
        export.write(tmp_path / "ckpt.pt", params, config, demo_tokenizer)
    _, config, params = small(activation_function="gelu")
    with pytest.warns(UserWarning, match="llama.cpp computes gelu_new, .* trained with gelu:"):
        export.write(tmp_path / "m.gguf", params, config, demo_tokenizer)


@pytest.mark.parametrize(
    "changes, name, message",
    [
        ({"tie_word_embeddings": False}, "m.pt", "nanoGPT has tie_word_embeddings=True only"),
        ({"n_inner": 12}, "m.pt", "nanoGPT has mlp_width=32 only, got 12"),
        ({"scale_attn_weights": False}, "m.gguf", "GPT-2 has scale_attn_weights=True only"),
    ],
)
def test_a_model_that_the_tool_has_not_is_refused(tmp_path, changes, name, message):
    _, config, params = small(**changes)
    with pytest.raises(CheckpointError, match=message):
        export.write(tmp_path / name, params, config, demo_tokenizer)


def test_gguf_needs_a_tokenizer(tmp_path):
    _, config, params = small()
    params_file.save_params(tmp_path / "p.safetensors", params, config)
    with pytest.raises(CheckpointError, match="expected a tokenizer beside the weights"):
        convert(tmp_path / "p.safetensors", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", ["m.gguf", "m.msgpack", "ckpt.pt"])
def test_what_was_written_is_verified(tmp_path, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nanoGPT computes the exact GELU")
        written = convert("demo", tmp_path / name, dtype="float32", verified=True)
    assert written.difference.error < 1e-5 * written.difference.scale


# Models without biases.


@pytest.mark.parametrize("name", ["folder", "m.gguf", "m.msgpack"])
def test_without_biases_zeros_are_written_and_taken_off_again(tmp_path, name):
    model, config, params = small(bias=False)
    with pytest.warns(UserWarning, match="has no biases .*: they are written as zeros"):
        if name == "folder":
            gpt2_jax.save(tmp_path / name, params, config)
        else:
            export.write(tmp_path / name, params, config, demo_tokenizer)
    given = config if name == "m.msgpack" else None
    loaded_config, loaded = gpt2_jax.load(tmp_path / name, config=given)
    assert loaded_config == config
    assert_same_bits(loaded, params)
    if name == "folder":
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        ids = np.arange(12)[None]
        assert_near(gpt2_jax.apply(params, ids, config=config), logits_of(theirs, ids), 1e-6)


def test_the_tokenizers_of_a_file_beside_it(tmp_path):
    convert("demo", tmp_path / "hf")
    convert(tmp_path / "hf" / "model.safetensors", tmp_path / "copy")
    for name in hub.TOKENIZER_FILES:
        source = hub.DEMO / name
        if source.is_file():
            assert (tmp_path / "copy" / name).read_bytes() == source.read_bytes()
