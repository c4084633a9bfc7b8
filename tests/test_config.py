import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import PRESETS, GPT2Config
from gpt2_jax.config import ACTIVATIONS, as_count
from gpt2_jax.modules import ACTIVATIONS as FUNCTIONS


def parameter_count(config):
    """Counted by hand from the GPT-2 paper's architecture."""
    d, f = config.n_embd, config.mlp_width
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    return (config.vocab_size + config.n_positions) * d + config.n_layer * block + 2 * d


def test_presets_have_the_published_number_of_parameters():
    counts = {name: parameter_count(config) for name, config in PRESETS.items()}
    assert counts == {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "distilgpt2": 81_912_576,
    }


def test_dict_round_trip_is_the_identity():
    config = GPT2Config(
        n_inner=100, activation_function="gelu", eos_token_id=(1, 2), tie_word_embeddings=False
    )
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_hf_reads_what_we_write_and_we_read_what_hf_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = GPT2Config(
        n_embd=96, n_head=3, n_inner=50, layer_norm_epsilon=1e-3, resid_pdrop=0.0, attn_pdrop=0.25
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert GPT2Config.from_json_file(tmp_path / "again" / "config.json") == config


def test_old_files_with_n_ctx_are_read():
    assert GPT2Config.from_dict({"n_ctx": 512}).n_positions == 512
    assert GPT2Config.from_dict({"n_ctx": 512, "n_positions": 512}).n_positions == 512
    with pytest.raises(ValueError, match="n_ctx=256 and n_positions=512"):
        GPT2Config.from_dict({"n_ctx": 256, "n_positions": 512})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 and n_head=3"),
        ({"n_layer": 0}, "`n_layer` must be a positive integer, got 0"),
        ({"n_inner": -4}, "`n_inner` must be a positive integer, got -4"),
        ({"vocab_size": "50257"}, "`vocab_size` must be a positive integer, got '50257'"),
        ({"attn_pdrop": 1.0}, r"`attn_pdrop` must be in \[0, 1\), got 1.0"),
        ({"n_head": True}, "`n_head` must be a positive integer, got True"),
        ({"n_layer": 2.0}, "`n_layer` must be a positive integer, got 2.0"),
        ({"attn_pdrop": "0.1"}, r"`attn_pdrop` must be in \[0, 1\), got '0.1'"),
        ({"embd_pdrop": float("nan")}, r"`embd_pdrop` must be in \[0, 1\), got nan"),
        ({"initializer_range": None}, "`initializer_range` must be positive, got None"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be positive"),
        (
            {"activation_function": "gelu_knew"},
            "`activation_function` must be one of .*'gelu_knew'",
        ),
        ({"add_cross_attention": True}, "`add_cross_attention=True` is not supported"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config=.*` is not supported"),
        ({"model_type": "llama"}, '`model_type` must be "gpt2", got "llama"'),
    ],
)
def test_what_is_wrong_or_unsupported_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict(values)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"n_layer": ')
    with pytest.raises(ValueError, match=r"config\.json: expected JSON, got Expecting value"):
        GPT2Config.from_json_file(tmp_path / "config.json")


def test_the_file_of_a_wrong_value_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"activation_function": ["gelu"]}')
    with pytest.raises(ValueError, match=r"config\.json: `activation_function` must be one of"):
        GPT2Config.from_json_file(tmp_path / "config.json")


def test_numbers_of_numpy_become_pythons():
    given = {
        "n_layer": np.int64(3),
        "n_inner": np.uint8(16),
        "eos_token_id": [np.int32(1), 2],
        "pad_token_id": np.int64(5),
        "resid_pdrop": 0,
        "attn_pdrop": np.float32(0.5),
    }
    config = GPT2Config(**given)
    plain = GPT2Config(
        n_layer=3, n_inner=16, eos_token_id=(1, 2), pad_token_id=5, resid_pdrop=0.0, attn_pdrop=0.5
    )
    assert config == plain and hash(config) == hash(plain)
    assert type(config.n_layer) is type(config.pad_token_id) is int
    assert type(config.resid_pdrop) is type(config.attn_pdrop) is float
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_token_id_may_lie_beyond_the_vocabulary():
    config = GPT2Config.from_dict({"vocab_size": 300, "pad_token_id": -1})
    assert (config.eos_token_id, config.pad_token_id) == (50256, -1)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), jnp.int32(3)])
def test_a_count_is_any_integer(value):
    assert type(as_count("n", value)) is int
    assert as_count("n", value) == 3
    assert as_count("n", value, least=3) == 3


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 2.0, np.float32(2), "2", None, [2], np.array([2])]
)
def test_a_count_is_nothing_else(value):
    with pytest.raises(ValueError, match="`steps` must be a positive integer, got"):
        as_count("steps", value)


def test_a_count_has_a_least_value():
    assert as_count("skipped", 0, least=0) == 0
    with pytest.raises(ValueError, match="`steps` must be a positive integer, got 0"):
        as_count("steps", 0)
    with pytest.raises(ValueError, match="`beams` must be an integer of at least 2, got 1"):
        as_count("beams", 1, least=2)


def test_a_traced_count_is_refused():
    with pytest.raises(ValueError, match="`steps` must be a positive integer, got"):
        jax.jit(lambda steps: as_count("steps", steps))(3)


def test_config_is_hashable_frozen_and_checked_on_replacement():
    config = PRESETS["gpt2"]
    assert hash(config) == hash(GPT2Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
    with pytest.raises(ValueError, match="n_head=7"):
        config.replace(n_head=7)


def test_every_activation_has_a_function():
    assert set(ACTIVATIONS) == set(FUNCTIONS)
