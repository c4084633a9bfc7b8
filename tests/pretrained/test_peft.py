"""Adapters on disk: PEFT's are read, ours are read by PEFT, and both compute the same."""

import json

import jax
import numpy as np
import peft
import pytest
import torch

import gpt2_jax
from gpt2_jax import CheckpointError, load_lora, lora, merge_lora, save_lora
from tests.reference import TINY, assert_near, hf_model, ours

# PEFT asks transformers for what this renames.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
apply = jax.jit(gpt2_jax.apply)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 61, (2, 9))


def written_by_peft(folder, **options):
    """A folder of PEFT's own writing, and the model that it belongs to, merged."""
    config, params = ours(hf_model(**TINY))
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "mlp.c_proj"]}
    settings |= {"fan_in_fan_out": True, "init_lora_weights": False}
    torch.manual_seed(1)
    model = peft.get_peft_model(hf_model(**TINY), peft.LoraConfig(**(settings | options)))
    model.save_pretrained(folder)
    return config, params, model.merge_and_unload()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.as_tensor(ids)).logits.numpy()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"layers_to_transform": [1]}, {"target_modules": ["c_fc"]}],
)
def test_pefts_adapters_merge_as_pefts(tmp_path, ids, options):
    config, params, merged = written_by_peft(tmp_path, **options)
    read = load_lora(tmp_path)
    ours_merged = merge_lora(params, read.adapters, alpha=read.alpha)
    expected = logits_of(merged, ids)
    assert_near(apply(ours_merged, ids, config=config), expected, 1e-6)
    assert np.abs(apply(params, ids, config=config) - expected).max() > 0.01


def test_peft_reads_what_is_written(tmp_path, ids):
    config, params = ours(hf_model(**TINY))
    targets = ("h.1.attn.c_attn", "*.mlp.c_fc")
    adapters = lora(jax.random.key(0), params, rank=2, targets=targets)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # as if trained
    save_lora(tmp_path / "adapter", adapters, alpha=6)
    theirs = peft.PeftModel.from_pretrained(hf_model(**TINY), tmp_path / "adapter")
    merged = merge_lora(params, adapters, alpha=6)
    assert_near(apply(merged, ids, config=config), logits_of(theirs, ids), 1e-6)
    again = load_lora(tmp_path / "adapter")
    assert again.alpha == 6
    jax.tree.map(np.testing.assert_array_equal, again.adapters, adapters)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "expected adapters of the kind LORA, got 'IA3'"),
        ({"use_dora": True}, "expected `use_dora` to be false, got true"),
        ({"modules_to_save": ["wte"]}, r"expected `modules_to_save` to be null, got \[\"wte\"\]"),
        ({"r": 0}, "expected a rank `r` of at least 1, got 0"),
    ],
)
def test_what_is_no_plain_lora_is_named(tmp_path, change, message):
    written_by_peft(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        load_lora(tmp_path)


def test_other_folders_and_trees_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="expected `adapter_config.json` in this folder"):
        load_lora(tmp_path)
    written_by_peft(tmp_path, target_modules=["wte"], fan_in_fan_out=False)
    with pytest.raises(CheckpointError, match="GPT-2's layers, .* got .*lora_embedding"):
        load_lora(tmp_path)
    half = {"h": {"0": {"attn": {"c_attn": {"lora_A": np.ones((24, 2))}}}}}
    message = r"of one rank for h.0.attn.c_attn, got \[24, 2\] and None"
    with pytest.raises(CheckpointError, match=message):
        save_lora(tmp_path / "half", half)
