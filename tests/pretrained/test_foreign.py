"""Checkpoints of other tools are read: what each tool's own writer wrote, and what HF computes."""

import json
import shutil
import struct
import sys

import gguf
import h5py
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import gpt2_jax
from gpt2_jax.config import GPT2Config
from gpt2_jax.files import CheckpointError
from gpt2_jax.pretrained import params_file, weights
from gpt2_jax.pretrained.foreign import find
from tests.reference import DATA, assert_near, hf_model

FORMATS = DATA / "formats"
SHAPE = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
END = {"bos_token_id": None, "eos_token_id": None}
CONFIG = GPT2Config(**SHAPE, **END)
IDS = np.random.default_rng(0).integers(0, 40, (2, 9))
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def reference(bias=True, **changes):
    """A small model of HF's in float32, with or without biases."""
    model = hf_model(**SHAPE, **END, **changes).float()
    if not bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    return model


def linear_state(model, bias=True):
    """Its weights as `nn.Linear` keeps them, as nanoGPT and minGPT do."""
    state = {}
    for name, tensor in model.state_dict().items():
        if bias or not name.endswith("bias"):
            state[name] = tensor.T.contiguous() if name.endswith(LINEAR) else tensor
    return state


def nanogpt(file, bias=True, **model_args):
    """Writes nanoGPT's `ckpt.pt`, and returns the model that is in it."""
    model = reference(bias, activation_function="gelu")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 40}
    content = {
        "model": linear_state(model, bias),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "model_args": sizes | {"bias": bias, "dropout": 0.25} | model_args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(content, file)
    return model


def assert_same_model(path, model, **options):
    """Asserts that what is loaded has a model's weights, bit for bit, and its logits."""
    config, params = gpt2_jax.load(path, **options)
    theirs = model.state_dict()
    for name, array in weights.to_hf(params).items():
        np.testing.assert_array_equal(array, theirs[name].numpy(), err_msg=name)
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS)).logits
    # Without what no forward pass looks at, so that most tests share a program.
    same = config.replace(
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, n_inner=config.mlp_width, **END
    )
    assert_near(gpt2_jax.apply(params, IDS, config=same), logits, 1e-6)
    return config, params


# Flax, TensorFlow and OpenAI: files of their own writers.


@pytest.mark.parametrize(
    "path",
    [
        "flax",
        "flax/flax_model.msgpack",
        "tf",
        "tf/tf_model.h5",
        "openai",
        "openai/model.ckpt.index",
    ],
)
def test_files_of_the_formats_own_writers(path):
    config, params = gpt2_jax.load(FORMATS / path)
    expected = np.load(FORMATS / "expected.npz")
    for name, array in weights.to_hf(params).items():
        np.testing.assert_array_equal(array, expected[name.removeprefix("transformer.")])
    logits = gpt2_jax.apply(params, expected["ids"], config=config)
    assert_near(logits, expected["logits"], 1e-6)
    assert (config.n_head, config.dtype, config.activation_function) == (2, "float32", "gelu_new")


def test_an_untied_head_of_flax_is_a_dense_layer(tmp_path):
    from flax.serialization import msgpack_restore, msgpack_serialize

    content = (FORMATS / "flax" / "flax_model.msgpack").read_bytes()
    tree = msgpack_restore(content)
    head = np.random.default_rng(0).normal(size=(8, 37)).astype(np.float32)
    (tmp_path / "m").write_bytes(msgpack_serialize(tree | {"lm_head": {"kernel": head}}))
    config = find.config_in(FORMATS / "flax").replace(tie_word_embeddings=False)
    _, params = gpt2_jax.load(tmp_path / "m", config=config)
    np.testing.assert_array_equal(params["lm_head"]["embedding"], head.T)


def test_the_latest_of_numbered_checkpoints_of_tensorflow_is_read(tmp_path):
    for file in (FORMATS / "openai").glob("model.ckpt*"):
        for step in (9, 10):
            shutil.copy(file, tmp_path / file.name.replace("ckpt", f"ckpt-{step}"))
    (tmp_path / "model.ckpt-9.data-00000-of-00001").unlink()
    shutil.copy(FORMATS / "openai" / "hparams.json", tmp_path)
    assert gpt2_jax.load(tmp_path)[0].n_embd == 8


def test_early_names_in_h5(tmp_path):
    shutil.copy(FORMATS / "tf" / "tf_model.h5", tmp_path)
    shutil.copy(FORMATS / "tf" / "config.json", tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        group = file["transformer/tfgpt2lm_head_model/transformer/wte"]
        group.move("embeddings:0", "weight:0")
    expected = np.load(FORMATS / "expected.npz")["wte.weight"]
    np.testing.assert_array_equal(gpt2_jax.load(tmp_path)[1]["wte"]["embedding"], expected)


# PyTorch: nanoGPT, minGPT, and what wraps them.


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path, bias):
    model = nanogpt(tmp_path / "ckpt.pt", bias)
    config, params = assert_same_model(tmp_path / "ckpt.pt", model)
    has_bias = any(
        "bias" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)
    )
    assert (config.bias, has_bias) == (bias, bias)
    assert (config.activation_function, config.attn_pdrop) == ("gelu", 0.25)
    assert (config.n_positions, config.eos_token_id) == (16, None)
    assert_same_model(tmp_path, model)  # the folder, in which it is alone


def test_nanogpt_compiled_and_under_other_names(tmp_path):
    model = nanogpt(tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt")
    state = {}
    for name, tensor in content["model"].items():
        name = name.replace("ln_1.weight", "ln_1.gamma").replace("ln_1.bias", "ln_1.beta")
        state[f"_orig_mod.{name}"] = tensor
    content["model"] = state
    content["model_args"] = {
        "seq_length": 16,
        "vocab_size": 40,
        "num_layers": 2,
        "num_heads": 2,
        "dim_embedding": 32,
        "use_bias": True,
    }
    torch.save(content, tmp_path / "ckpt.pt")
    assert_same_model(tmp_path / "ckpt.pt", model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "base_model.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict"])
def test_prefixes_and_containers(tmp_path, prefix, container):
    model = reference()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "model.pt")
    assert_same_model(tmp_path / "model.pt", model, config=CONFIG)


def test_mingpt_has_an_untied_head_and_masks(tmp_path):
    model = reference(tie_word_embeddings=False)
    state = linear_state(model) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    torch.save(state, tmp_path / "model.pth")
    untied = CONFIG.replace(tie_word_embeddings=False)
    assert_same_model(tmp_path / "model.pth", model, config=untied)
    with pytest.raises(
        CheckpointError, match="`tie_word_embeddings` is true, but `lm_head.weight`"
    ):
        gpt2_jax.load(tmp_path / "model.pth", config=CONFIG)


def test_a_state_dict_of_linear_layers_in_memory():
    model = reference()
    params = gpt2_jax.from_hf(linear_state(model), CONFIG)
    for name, array in weights.to_hf(params).items():
        np.testing.assert_array_equal(array, model.state_dict()[name].numpy())


def test_lightning_is_named_where_it_does_not_fit(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in reference().state_dict().items()}
    content = {"pytorch-lightning_version": "2.1", "state_dict": state, "epoch": 1}
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError) as caught:
        gpt2_jax.load(tmp_path / "last.ckpt", config=CONFIG.replace(n_layer=3))
    where = (
        "a Lightning checkpoint, whose weights stand under `state_dict`, with `model.transformer.`"
    )
    assert where in str(caught.value) and "12 missing" in str(caught.value)


def test_nanogpt_without_a_field(tmp_path):
    nanogpt(tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt")
    del content["model_args"]["n_head"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="expected n_head among `model_args`, got n_layer=2"):
        gpt2_jax.load(tmp_path / "ckpt.pt")


def test_adapters_are_no_model(tmp_path):
    torch.save({"base_model.model.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="got LoRA's adapters: load their model"):
        gpt2_jax.load(tmp_path / "a")


def test_biases_that_the_config_has_not_must_be_zero():
    state = reference(bias=False).state_dict()
    config = CONFIG.replace(bias=False)
    assert "bias" not in gpt2_jax.from_hf(state, config)["ln_f"]
    state["transformer.ln_f.bias"][:2] = 1
    with pytest.raises(CheckpointError, match="`bias` is false, but ln_f.bias differs from 0 in 2"):
        gpt2_jax.from_hf(state, config)


# Other heads.


@pytest.mark.parametrize(
    "head", ["score.weight", "classifier.weight", "qa_outputs.bias", "v_head.summary.weight"]
)
def test_other_heads_are_left_out_with_a_warning(tmp_path, head):
    model = reference()
    torch.save(model.state_dict() | {head: torch.ones(2, 32)}, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=f"other heads, which are left out: {head}"):
        assert_same_model(tmp_path / "m.pt", model, config=CONFIG)


def test_other_heads_are_loaded_where_asked_for_and_written_back(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**reference().config.to_diff_dict() | {"num_labels": 3})
    theirs = transformers.GPT2ForSequenceClassification(config)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = gpt2_jax.load(tmp_path / "theirs", heads=True)
    weight = params["heads"]["score"]["weight"]
    np.testing.assert_array_equal(weight, theirs.score.weight.detach().numpy())
    ids = np.arange(8)[None] % 40
    # HF's logits of the last token: its head on our hidden states.
    hidden = gpt2_jax.model.hidden_states(params, ids, config=config)
    theirs.config.pad_token_id = 39
    expected = theirs.eval()(torch.as_tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(hidden[:, -1] @ weight.T, expected, rtol=1e-4, atol=1e-6)
    gpt2_jax.save(tmp_path / "ours", params, config)
    again = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "ours", num_labels=3
    )
    assert torch.equal(again.score.weight, theirs.score.weight)


# llm.c.


def llmc_bytes(model, version=3, n_rows=128, **header):
    """A model's file: a header, and each kind of tensor for all layers in turn."""
    sizes = [16, 40, 2, 2, 32, n_rows]
    numbers = [20240326, version, *sizes] + [0] * (256 - 8)
    state = linear_state(model)
    table = torch.zeros(n_rows, 32)
    table[:40] = state["transformer.wte.weight"]
    tensors = [table, state["transformer.wpe.weight"]]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for leaf in ("weight", "bias"):
            tensors += [state[f"transformer.h.{layer}.{module}.{leaf}"] for layer in range(2)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    dtype = np.float32 if version == 3 else ml_dtypes.bfloat16
    data = b"".join(tensor.numpy().astype(dtype).tobytes() for tensor in tensors)
    return struct.pack("<256i", *numbers) + data


def test_llmc_in_float32(tmp_path):
    model = reference()
    (tmp_path / "gpt2.bin").write_bytes(llmc_bytes(model))
    config, params = assert_same_model(tmp_path / "gpt2.bin", model)
    assert (config.vocab_size, params["wte"]["embedding"].shape) == (40, (40, 32))


def test_llmc_in_bfloat16(tmp_path):
    model = reference().bfloat16().float()
    (tmp_path / "gpt2.bin").write_bytes(llmc_bytes(model, version=5))
    config, params = gpt2_jax.load(tmp_path / "gpt2.bin")
    assert config.dtype == params["ln_f"]["scale"].dtype.name == "bfloat16"
    for name, array in weights.to_hf(params).items():
        theirs = model.state_dict()[name].numpy()
        np.testing.assert_array_equal(array.astype(np.float32), theirs)


def test_other_files_of_llmc_are_named(tmp_path):
    file = tmp_path / "x.bin"
    content = llmc_bytes(reference())
    file.write_bytes(struct.pack("<i", 20240520) + content[4:])
    with pytest.raises(CheckpointError, match="expected a model of llm.c, got tokens of llm.c"):
        gpt2_jax.load(file)
    file.write_bytes(content[:4] + struct.pack("<i", 2) + content[8:])
    with pytest.raises(CheckpointError, match="version 3 .* or 5 .*, got version 2"):
        gpt2_jax.load(file)
    file.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ bytes, got"):
        gpt2_jax.load(file)


# .npz.


@pytest.mark.parametrize("names", ["hf", "openai", "linear"])
def test_npz(tmp_path, names):
    model = reference()
    state = linear_state(model) if names == "linear" else model.state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items() if "lm_head" not in name}
    if names == "openai":
        arrays = {openai_name(name): array for name, array in arrays.items()}
        hparams = {"n_vocab": 40, "n_ctx": 16, "n_embd": 32, "n_head": 2, "n_layer": 2}
        (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    np.savez(tmp_path / "gpt2.npz", **arrays)
    config = None if names == "openai" else CONFIG
    assert_same_model(tmp_path / "gpt2.npz", model, config=config)


def openai_name(name):
    """`transformer.h.0.attn.c_attn.weight` -> `model/h0/attn/c_attn/w`."""
    name = name.removeprefix("transformer.").replace("h.", "h", 1)
    *modules, leaf = name.split(".")
    if modules[-1] in ("wte", "wpe"):
        return f"model/{modules[-1]}"
    leaf = "b" if leaf == "bias" else "g" if "ln_" in modules[-1] else "w"
    return "/".join(["model", *modules, leaf])


# GGUF.

GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
GGUF_NAMES |= {"lm_head": "output"}
GGUF_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name):
    """`transformer.h.0.attn.c_attn.weight` -> `blk.0.attn_qkv.weight`."""
    module, leaf = name.removeprefix("transformer.").rsplit(".", 1)
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        return f"blk.{layer}.{GGUF_LAYER[module]}.{leaf}"
    return f"{GGUF_NAMES[module]}.{leaf}"


def write_gguf(file, model, kind="F32", arch="gpt2", head=False):
    """Writes a model with `gguf`'s own writer; returns its weights as the file has them."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    kind = gguf.GGMLQuantizationType[kind]
    stored = {}
    for name, tensor in linear_state(model).items():
        array = tensor.numpy()
        if name == "lm_head.weight" and not head:
            continue
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            data = gguf.quantize(array, kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
            array = gguf.dequantize(data, kind)
        stored[name] = array.T if name.endswith(LINEAR) else array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf(tmp_path, kind):
    model = reference()
    stored = write_gguf(tmp_path / "m.gguf", model, kind)
    config, params = gpt2_jax.load(tmp_path / "m.gguf")
    for name, array in weights.to_hf(params).items():
        np.testing.assert_array_equal(array.astype(np.float32), stored[name], err_msg=name)
    assert config.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    if kind == "F32":
        assert_same_model(tmp_path / "m.gguf", model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_gguf(tmp_path, tied):
    model = reference(tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model, head=True)
    config, params = assert_same_model(tmp_path / "m.gguf", model)
    assert (config.tie_word_embeddings, "lm_head" in params) == (tied, not tied)


def test_gguf_without_a_field(tmp_path):
    write_gguf(tmp_path / "m.gguf", reference())
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"gpt2.block_count", b"gpt2.block_cound"))
    with pytest.raises(CheckpointError, match="expected gpt2.block_count, which a GGUF file of"):
        gpt2_jax.load(tmp_path / "m.gguf")


def test_gguf_of_another_architecture(tmp_path):
    write_gguf(tmp_path / "m.gguf", reference(), arch="llama")
    with pytest.raises(CheckpointError, match='expected the architecture "gpt2", got "llama"'):
        gpt2_jax.load(tmp_path / "m.gguf")


# Files of HF's and ours.


def test_a_container_under_hfs_name(tmp_path):
    model = reference()
    model.config.save_pretrained(tmp_path)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    assert_same_model(tmp_path, model)


def test_files_instead_of_folders(tmp_path):
    model = reference()
    model.save_pretrained(tmp_path / "hf")
    config, params = assert_same_model(tmp_path / "hf" / "model.safetensors", model)
    params_file.save_params(tmp_path / "ours.safetensors", params, config)
    assert_same_model(tmp_path / "ours.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    assert_same_model(tmp_path / "hf" / "pytorch_model.bin", model)


def test_the_content_tells_not_the_name(tmp_path):
    shutil.copy(FORMATS / "flax" / "flax_model.msgpack", tmp_path / "model.safetensors.pt")
    shutil.copy(FORMATS / "flax" / "config.json", tmp_path)
    assert gpt2_jax.load(tmp_path)[0].n_embd == 8


def test_the_tokenizer_of_a_file(tmp_path):
    table = {"transformer.wte.weight": torch.zeros(50304, 2)}
    torch.save(table, tmp_path / "ckpt.pt")
    assert gpt2_jax.load_tokenizer(tmp_path / "ckpt.pt") is gpt2_jax.Tokenizer.gpt2()
    nanogpt(tmp_path / "ckpt.pt")  # of characters, or whatever else
    with pytest.raises(FileNotFoundError, match="Name the tokenizer that the model was trained"):
        gpt2_jax.load_tokenizer(tmp_path / "ckpt.pt")
    message = "ids below 40, the model.s `vocab_size`, got ids up to 4095"
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load_pretrained(tmp_path / "ckpt.pt", tokenizer_name="demo")


# Mistakes.


def test_a_missing_config_says_what_is_needed(tmp_path):
    torch.save(reference().state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        gpt2_jax.load(tmp_path / "m.pt")
    assert str(caught.value) == (
        f"{tmp_path}/m.pt holds no config: give one with `--config config.json` of `gpt2-jax "
        "convert`, with `load(path, config=GPT2Config(...))`, or as `config.json` beside it. As a "
        "PyTorch file, its weights say vocab_size=40, n_embd=32, n_positions=16, n_layer=2; "
        "`n_head`, and `activation_function` if it is not gelu_new, they do not."
    )


def test_a_lack_of_biases_is_told_by_the_names(tmp_path):
    torch.save(linear_state(reference(), bias=False), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="n_layer=2, bias=False; `n_head`"):
        gpt2_jax.load(tmp_path / "m.pt")


def test_a_folder_with_several(tmp_path):
    nanogpt(tmp_path / "a.pt")
    nanogpt(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="got a.pt, b.pt: give the path of one of them"):
        gpt2_jax.load(tmp_path)


def test_another_architecture(tmp_path):
    torch.save({"encoder.layer.0.weight": torch.ones(2)}, tmp_path / "bert.pt")
    message = "expected GPT-2's names, .* in a PyTorch file; got encoder.layer.0.weight"
    with pytest.raises(CheckpointError, match=message):
        gpt2_jax.load(tmp_path / "bert.pt")


@pytest.mark.parametrize("content", [b"", b"not found", b"\x00" * 300])
def test_a_file_of_no_format(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="x: expected a file of safetensors, PyTorch's, Flax"):
        gpt2_jax.load(tmp_path / "x")


def test_a_pointer_of_git_lfs(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "flax_model.msgpack").write_text(text)
    with pytest.raises(CheckpointError, match="msgpack: got a Git LFS pointer.*run `git lfs pull`"):
        gpt2_jax.load(tmp_path)


def test_missing_biases_alone_are_explained():
    with pytest.raises(CheckpointError, match="(?s)13 missing.*without biases.*`bias` to false"):
        gpt2_jax.from_hf(linear_state(reference(), bias=False), CONFIG)


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    """One sound file of each format, in a folder."""
    folder = tmp_path_factory.mktemp("sound")
    model = reference()
    nanogpt(folder / "nanogpt")
    write_gguf(folder / "gguf", model)
    (folder / "llmc").write_bytes(llmc_bytes(model))
    np.savez(folder / "npz", wte=np.ones((40, 32), np.float32))
    (folder / "npz.npz").rename(folder / "npz")
    shutil.copy(FORMATS / "flax" / "flax_model.msgpack", folder / "flax")
    shutil.copy(FORMATS / "tf" / "tf_model.h5", folder / "h5")
    return folder


@pytest.mark.parametrize("name", ["nanogpt", "gguf", "llmc", "npz", "flax", "h5"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_file(sound_files, tmp_path, name, part):
    content = (sound_files / name).read_bytes()
    file = tmp_path / name
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(CheckpointError, match=str(file)):
        gpt2_jax.load(file, config=CONFIG)


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_a_truncated_checkpoint_of_tensorflow(tmp_path, name):
    shutil.copytree(FORMATS / "openai", tmp_path / "m")
    file = tmp_path / "m" / name
    content = file.read_bytes()
    # The end of an index, by which it is known, stays.
    file.write_bytes(content[:100] + content[-200:])
    with pytest.raises(CheckpointError, match=str(file)):
        gpt2_jax.load(tmp_path / "m")


@pytest.mark.parametrize(
    "package, path, extra",
    [("h5py", FORMATS / "tf", "h5"), ("gguf", "m.gguf", "gguf")],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, package, path, extra):
    write_gguf(tmp_path / "m.gguf", reference())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=rf"not installed. Install `gpt2_jax\[{extra}\]`"):
        gpt2_jax.load(tmp_path / path)
