"""Recipes: they check themselves, come back from JSON, and are the published ones."""

import dataclasses
import json

import pytest

from gpt2_jax import GPT2Config
from gpt2_jax.training.recipes import RECIPES, SHAPE, Recipe, changeable_fields

SMALL = dataclasses.replace(
    RECIPES["shakespeare_char"],
    batch_size=4,
    micro_batches=2,
    steps=12,
    warmup_steps=2,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 5}, "`batch_size` must be a multiple of `micro_batches`, got 5 and 2"),
        ({"warmup_steps": 12}, r"`warmup_steps` must be in \[0, 12\)"),
        ({"min_learning_rate": 1.0}, "got 0.01 and 1.0"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"dropout": 1.0}, r"pdrop` must be in \[0, 1\), got 1.0"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"batch_size": 2.5}, "`batch_size` must be of type int, got 2.5"),
        ({"b2": 1.0}, r"`b2` must be in \[0, 1\)"),
        ({"max_grad_norm": 0}, "`max_grad_norm` must be positive"),
        ({"seed": -1}, "`seed` must not be negative"),
    ],
)
def test_a_recipe_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_named_recipes_are_the_published_ones():
    published = RECIPES["shakespeare_char"]
    config = published.config(vocab_size=65, eot_id=None)
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 4, 128, 64)
    assert (published.batch_size, published.steps, published.dropout) == (12, 2000, 0)
    # nanoGPT's tokens of an update.
    assert RECIPES["gpt2"].batch_size * RECIPES["gpt2"].n_positions == 491_520


def test_a_recipe_comes_back_from_json():
    written = json.dumps(dataclasses.asdict(SMALL))
    assert Recipe.from_dict(json.loads(written)) == SMALL
    with pytest.raises(ValueError, match=r"Expected the fields of a recipe.*got \['colour'\]"):
        Recipe.from_dict({"colour": 1})


def test_a_whole_number_may_stand_where_a_fraction_could():
    recipe = dataclasses.replace(SMALL, min_learning_rate=0)
    assert recipe.min_learning_rate == 0
    assert isinstance(recipe.min_learning_rate, float)
    with pytest.raises(ValueError, match="`steps` must be of type int, got True"):
        dataclasses.replace(SMALL, steps=True)


def test_a_window_is_as_long_as_the_positions_unless_told():
    config = GPT2Config(n_positions=64)
    assert SMALL.window_length(config) == 64
    assert dataclasses.replace(SMALL, length=10).window_length(config) == 10
    with pytest.raises(ValueError, match=r"at most 64 \(`n_positions`\), got 65"):
        dataclasses.replace(SMALL, length=65).window_length(config)


def test_what_a_resumed_run_may_change_is_no_part_of_shape_or_arithmetic():
    assert changeable_fields() == {"eval_every", "save_every", "keep", "log_every", "sample_tokens"}
    assert not changeable_fields() & set(SHAPE)


def test_dropout_and_dtype_are_the_recipes_and_the_rest_the_models():
    config = GPT2Config(n_layer=3, resid_pdrop=0.3)
    recipe = dataclasses.replace(SMALL, dropout=0.2, dtype="bfloat16")
    expected = config.replace(dtype="bfloat16", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    assert recipe.adapt(config) == expected
