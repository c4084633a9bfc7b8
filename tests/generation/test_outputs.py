"""What generation returns besides tokens, against HF's `generate`, and texts joined again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax import Categorical, Chain, Temperature, TopK, generate, join, sampler_from_options
from gpt2_jax.generation.sampling import Greedy
from tests.reference import TINY, assert_near, hf_model, ours

NEW = 5
capture = jax.jit(partial(gpt2_jax.capture, sites="h.0.attn.z"))


@pytest.fixture(scope="module")
def models():
    model = hf_model(**(TINY | {"n_layer": 1}))
    return model, *ours(model)


@pytest.fixture
def prompts(rng):
    return rng.integers(1, 61, (2, 6)), np.array([6, 4])


def test_outputs_are_hfs(models):
    model, config, params = models
    ids = np.random.default_rng(2).integers(1, 61, (2, 6))
    theirs = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=1.7,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    out = generate(
        params,
        ids,
        config=config,
        max_new_tokens=NEW,
        stop_ids=(),
        sampler=sampler_from_options({"repetition_penalty": 1.7}),
        outputs=("logits", "scores", "*.resid_pre", "ln_f.out"),
    )
    assert set(out.outputs) == {"logits", "scores", "h.0.resid_pre", "ln_f.out"}
    np.testing.assert_array_equal(out.ids, theirs.sequences[:, 6:])
    # HF rounds logits to float32 before it looks at them.
    assert_near(out.outputs["logits"], torch.stack(theirs.logits, dim=1), 1e-6)
    assert_near(out.outputs["scores"], torch.stack(theirs.scores, dim=1), 1e-6)
    for layer, site in enumerate(["h.0.resid_pre", "ln_f.out"]):
        # Of each step, all layers; of the first, all tokens of the prompt.
        hidden = [of_layers[layer][:, -1] for of_layers in theirs.hidden_states]
        assert_near(out.outputs[site], torch.stack(hidden, dim=1), 1e-12)


def test_outputs_follow_their_rows_and_end_with_them(models, prompts):
    _, config, params = models
    sampler = Categorical(Chain((Temperature(1.5), TopK(20))))
    options = {"config": config, "max_new_tokens": NEW, "num_return_sequences": 2}
    options |= {"sampler": sampler, "stop_ids": tuple(range(20)), "pad_id": 0}
    key = jax.random.key(0)
    plain = generate(params, *prompts, key, **options)
    assert plain.outputs == {}
    out = generate(params, *prompts, key, **options, outputs=("scores", "logits", "h.0.attn.z"))
    np.testing.assert_array_equal(out.ids, plain.ids)
    np.testing.assert_array_equal(out.policy_logprobs, plain.policy_logprobs)
    made = np.arange(NEW)[None] < np.asarray(out.lengths)[:, None]
    assert 0 < made.sum() < made.size
    # Both log-probabilities are those of what was kept.
    for name, logprobs in (("logits", out.logprobs), ("scores", out.policy_logprobs)):
        of_all = jax.nn.log_softmax(out.outputs[name], axis=-1)
        of_tokens = jnp.take_along_axis(of_all, out.ids[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(logprobs, np.where(made, of_tokens, 0.0), atol=1e-6)
    # What the model sees when it reads the whole texts.
    whole, lengths = join(*prompts, out)
    _, acts = capture(params, whole, config=config)
    for row, length in enumerate(np.repeat(prompts[1], 2)):
        n_made = int(out.lengths[row])
        assert lengths[row] == length + n_made
        read = acts["h.0.attn.z"][row, length - 1 : length - 1 + n_made]
        assert_near(out.outputs["h.0.attn.z"][row, :n_made], read, 1e-12)
        assert not out.outputs["h.0.attn.z"][row, n_made:].any()


def test_a_greedy_choice_is_certain_and_a_functions_unknown(models, prompts):
    _, config, params = models
    options = {"config": config, "max_new_tokens": 1, "stop_ids": ()}
    out = generate(params, *prompts, **options)
    assert not out.policy_logprobs.any() and (out.logprobs < 0).all()
    own = generate(params, *prompts, jax.random.key(0), sampler=smallest, **options)
    assert np.isnan(own.policy_logprobs).all() and not np.isnan(own.logprobs).any()


def smallest(keys, logits, history):
    """A plain function in a sampler's place."""
    del keys, history
    return logits.argmin(-1)


@pytest.mark.parametrize(
    "outputs, sampler, message",
    [
        ("score", None, "`outputs` must be .* got 'score'. Near ones: scores"),
        (["h.7.mlp.out"], None, "got 'h.7.mlp.out'. Near ones: h.0.mlp.out"),
        ("h.*.attn.pattern", None, "cannot keep h.0.attn.pattern, which has a column for each"),
        ("scores", smallest, 'cannot keep "scores" of a function'),
    ],
)
def test_outputs_that_there_are_not_are_named(models, outputs, sampler, message):
    _, config, params = models
    options = {"config": config, "max_new_tokens": 2, "sampler": sampler, "outputs": outputs}
    with pytest.raises(ValueError, match=message):
        generate(params, [[1, 2]], None, jax.random.key(0), **options)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_joined_texts_are_prompts_and_what_followed(padding_side):
    given = {"left": [[9, 1, 2], [3, 4, 5]], "right": [[1, 2, 9], [3, 4, 5]]}[padding_side]
    new = np.array([[6, 0, 0], [6, 7, 8], [8, 8, 0], [7, 0, 0]])
    out = gpt2_jax.Beams(new.reshape(2, 2, 3), np.array([[1, 3], [2, 1]]), None, None)
    ids, lengths = join(given, [2, 3], out, padding_side=padding_side)
    expected = [[1, 2, 6, 0, 0, 0], [1, 2, 6, 7, 8, 0], [3, 4, 5, 8, 8, 0], [3, 4, 5, 7, 0, 0]]
    assert ids.tolist() == expected
    assert lengths.tolist() == [3, 5, 5, 4]
    with pytest.raises(ValueError, match="as many texts of each of 3 prompts, got 4 texts"):
        join([[1], [2], [3]], None, out)


def test_numbers_per_row_fit_rows_alone(rng):
    logits = jnp.asarray(rng.normal(size=(2, 2, 5)))
    message = r"one number, or `\[B\]` for logits \[B, V\]; got numbers \[2\] and logits"
    with pytest.raises(ValueError, match=rf"{message} \[2, 2, 5\]"):
        Temperature(np.array([0.5, 2.0]))(logits)
    with pytest.raises(ValueError, match=rf"{message} \[3, 5\]"):
        Greedy(Temperature(np.array([0.5, 2.0])))(None, jnp.zeros((3, 5)))
