import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from gpt2_jax import PRESETS, GPT2Config
from gpt2_jax.config import ACTIVATIONS, ALIASES, as_count
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
    both = {"n_ctx": 256, "n_positions": 512}
    with pytest.warns(UserWarning, match="`n_ctx` is 256 and `n_positions` 512: `n_positions`"):
        config = GPT2Config.from_dict(both)
    assert config.n_positions == transformers.GPT2Config.from_dict(both).n_positions == 512


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 4},
        {"hidden_size": 96},
        {"num_hidden_layers": 3},
        {"max_position_embeddings": 33},
        {"hidden_size": 96, "n_embd": 96, "num_attention_heads": 3, "n_layer": 1},
    ],
)
def test_hfs_other_names_are_read_as_hf_reads_them(values):
    theirs = transformers.GPT2Config.from_dict(values)
    ours = GPT2Config.from_dict(values)
    for name in ("n_embd", "n_head", "n_layer", "n_positions"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_every_other_name_of_hfs_is_known():
    assert ALIASES == transformers.GPT2Config.attribute_map


def test_one_field_with_two_values_is_refused():
    with pytest.raises(ValueError, match="names of one field, got num_attention_heads=4 and n_"):
        GPT2Config.from_dict({"n_head": 6, "num_attention_heads": 4})


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
        ({"architectures": ["BertModel"]}, r"must name GPT-2's, got \['BertModel'\]"),
        ({"n_layer": 1.5}, "`n_layer` must be a positive integer, got 1.5"),
        ({"resid_pdrop": False}, r"`resid_pdrop` must be in \[0, 1\), got False"),
        ({"layer_norm_epsilon": True}, "`layer_norm_epsilon` must be positive, got True"),
        ({"layer_norm_epsilon": float("inf")}, "`layer_norm_epsilon` must be positive, got inf"),
        ({"scale_attn_weights": "false"}, "`scale_attn_weights` must be true or false, got 'false"),
        ({"tie_word_embeddings": 0}, "`tie_word_embeddings` must be true or false, got 0"),
        ({"reorder_and_upcast_attn": None}, "`reorder_and_upcast_attn` must be true or false"),
        ({"bos_token_id": [1]}, r"`bos_token_id` must be an integer or None, got \[1\]"),
        ({"pad_token_id": 1.0}, "`pad_token_id` must be an integer or None, got 1.0"),
        ({"eos_token_id": "3"}, "`eos_token_id` must be an integer or None, got '3'"),
        ({"eos_token_id": [1, "2"]}, r"a list of integers, or None, got \[1, '2'\]"),
        ({"eos_token_id": [None]}, r"a list of integers, or None, got \[None\]"),
        ({"eos_token_id": True}, "`eos_token_id` must be an integer or None, got True"),
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
    values = {"model_type": "gpt2", "activation_function": ["gelu"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: `activation_function` must be one of"):
        GPT2Config.from_json_file(tmp_path / "config.json")


def test_a_file_that_says_nothing_of_gpt2_is_refused(tmp_path):
    of_bert = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(of_bert))
    with pytest.raises(ValueError, match="config.json: expected .* n_embd, n_head, n_layer; n_emb"):
        GPT2Config.from_json_file(tmp_path / "config.json")
    # The earliest files have no `model_type`, and the same names as HF's newest.
    of_2019 = {"n_embd": 96, "n_head": 3, "n_layer": 1, "n_ctx": 64, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(of_2019))
    config = GPT2Config.from_json_file(tmp_path / "config.json")
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (96, 3, 1, 64)


def test_numbers_of_numpy_become_pythons():
    given = {
        "n_layer": np.int64(3),
        "n_inner": np.uint8(16),
        "eos_token_id": [np.int32(1), 2],
        "pad_token_id": np.int64(5),
        "resid_pdrop": 0,
        "attn_pdrop": np.float32(0.5),
        "tie_word_embeddings": np.bool_(False),
    }
    config = GPT2Config(**given)
    plain = GPT2Config(
        n_layer=3,
        n_inner=16,
        eos_token_id=(1, 2),
        pad_token_id=5,
        resid_pdrop=0.0,
        attn_pdrop=0.5,
        tie_word_embeddings=False,
    )
    assert config == plain and hash(config) == hash(plain)
    assert type(config.n_layer) is type(config.pad_token_id) is int
    assert type(config.resid_pdrop) is type(config.attn_pdrop) is float
    assert GPT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_token_id_may_lie_beyond_the_vocabulary():
    config = GPT2Config.from_dict({"vocab_size": 300, "pad_token_id": -1})
    assert (config.eos_token_id, config.pad_token_id) == (50256, -1)
    assert config.eos_token_ids == ()
    assert config.replace(eos_token_id=(7, 300, -1, 299)).eos_token_ids == (7, 299)


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
