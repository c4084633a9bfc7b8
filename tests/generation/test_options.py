"""Every option against HF's own processors, and whole texts against HF's `generate`."""

import json
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2LMHeadModel
from transformers import GPT2Config as HFConfig
from transformers.generation import logits_process as hf

import gpt2_jax
from gpt2_jax import GPT2Config, History, load_generation_config, sampler_from_options
from gpt2_jax.generation.cuts import Temperature, TopH, Typical
from gpt2_jax.generation.options import OPTIONS, options_table
from gpt2_jax.generation.rules import (
    Force,
    FrequencyPenalty,
    NoRepeatNGram,
    PresencePenalty,
    RepetitionPenalty,
    SequenceBias,
    Suppress,
)
from tests.reference import ROOT

V, PROMPT, STOPS = 40, 3, (5, 9)
WORDS = [[7], [5], [1, 2], [0, 1, 2], [3, 3, 3, 3, 3, 3, 3, 3]]
BIAS = {(1,): 2.5, (2, 1): -3.0, (0, 2, 1): 1.5, (4, 1): -1.0}

# Options of ours -> what HF makes of them, for prompts of PROMPT tokens and 6 new ones.
CASES = {
    "repetition": ({"repetition_penalty": 1.7}, lambda: [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
    "repetition below 1": (
        {"repetition_penalty": 0.6},
        lambda: [hf.RepetitionPenaltyLogitsProcessor(0.6)],
    ),
    "1-gram": ({"no_repeat_ngram_size": 1}, lambda: [hf.NoRepeatNGramLogitsProcessor(1)]),
    "2-gram": ({"no_repeat_ngram_size": 2}, lambda: [hf.NoRepeatNGramLogitsProcessor(2)]),
    "3-gram": ({"no_repeat_ngram_size": 3}, lambda: [hf.NoRepeatNGramLogitsProcessor(3)]),
    "8-gram": ({"no_repeat_ngram_size": 8}, lambda: [hf.NoRepeatNGramLogitsProcessor(8)]),
    "bad words": (
        {"bad_words_ids": WORDS},
        lambda: [hf.NoBadWordsLogitsProcessor(WORDS, list(STOPS))],
    ),
    "sequence bias": ({"sequence_bias": BIAS}, lambda: [hf.SequenceBiasLogitsProcessor(BIAS)]),
    "min length": ({"min_length": 6}, lambda: [hf.MinLengthLogitsProcessor(6, list(STOPS))]),
    "min new": (
        {"min_new_tokens": 2},
        lambda: [hf.MinNewTokensLengthLogitsProcessor(PROMPT, 2, list(STOPS))],
    ),
    "forced first": ({"forced_bos_token_id": 4}, lambda: [hf.ForcedBOSTokenLogitsProcessor(4)]),
    "forced last": (
        {"forced_eos_token_id": [4, 6]},
        lambda: [hf.ForcedEOSTokenLogitsProcessor(PROMPT + 6, [4, 6])],
    ),
    "decay": (
        {"exponential_decay_length_penalty": (2, 1.4)},
        lambda: [hf.ExponentialDecayLengthPenalty((2, 1.4), list(STOPS), PROMPT)],
    ),
    "suppress": ({"suppress_tokens": [1, 8]}, lambda: [hf.SuppressTokensLogitsProcessor([1, 8])]),
    "begin suppress": (
        {"begin_suppress_tokens": [1, 8]},
        lambda: [hf.SuppressTokensAtBeginLogitsProcessor([1, 8], PROMPT)],
    ),
    "typical": ({"typical_p": 0.4}, lambda: [hf.TypicalLogitsWarper(0.4)]),
    "typical, most": ({"typical_p": 0.97}, lambda: [hf.TypicalLogitsWarper(0.97)]),
    "epsilon": ({"epsilon_cutoff": 0.05}, lambda: [hf.EpsilonLogitsWarper(0.05)]),
    "epsilon, all": ({"epsilon_cutoff": 0.9}, lambda: [hf.EpsilonLogitsWarper(0.9)]),
    "eta": ({"eta_cutoff": 0.1}, lambda: [hf.EtaLogitsWarper(0.1)]),
    "order": (
        {
            "top_p": 0.9,
            "top_k": 12,
            "temperature": 0.6,
            "no_repeat_ngram_size": 2,
            "repetition_penalty": 1.4,
        },
        lambda: [
            hf.RepetitionPenaltyLogitsProcessor(1.4),
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.TemperatureLogitsWarper(0.6),
            hf.TopKLogitsWarper(12),
            hf.TopPLogitsWarper(0.9),
        ],
    ),
}


def logits_of(rng):
    """Random rows, rows of few distinct values, a constant row, and rows with -inf, float32."""
    rows = np.array(
        [
            *rng.normal(size=(5, V)) * 3,
            *rng.integers(-2, 3, (4, V)),
            np.zeros(V),
            *rng.normal(size=(2, V)),
        ]
    )
    rows[-2, ::2], rows[-1, 1:] = -np.inf, -np.inf
    return rows.astype(np.float32)


def scattered(ids, rng, step):
    """A history with gaps of random ids between the given ones."""
    rows, count = ids.shape
    valid = np.zeros((rows, count + 6), bool)
    for row in valid:
        row[np.sort(rng.permutation(count + 6)[:count])] = True
    spread = rng.integers(0, V, valid.shape)
    spread[valid] = ids.ravel()
    return History(jnp.asarray(spread, jnp.int32), jnp.asarray(valid), jnp.int32(step))


@jax.jit
def transformed(transform, logits, history):
    """What a transform makes of logits."""
    return transform(logits, history)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_hfs(name, rng, monkeypatch):
    # HF leaves the order of ties open.
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    options, theirs = CASES[name]
    sample = any(OPTIONS[name].needs == "do_sample" for name in options)
    sampler = sampler_from_options(
        options, do_sample=sample, stop_ids=STOPS, max_new_tokens=6, vocab_size=V
    )
    prompt = 1 if name == "forced first" else PROMPT
    changed = False
    for step in range(6):
        logits = logits_of(rng)
        # Few distinct ids, so that runs repeat.
        ids = rng.integers(0, 5, (len(logits), prompt + step))
        expected = torch.tensor(logits)
        for processor in theirs():
            expected = processor(torch.tensor(ids), expected)
        found = transformed(sampler.transform, logits, scattered(ids, rng, step))
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=1e-6)
        changed |= not np.array_equal(found, logits)
    assert changed == (name != "8-gram")  # which are longer than the texts


ids = st.integers(0, V - 1)
# Values of HF's options, and for each whether it may stand beside the others. Shares are fractions
# of 97: on a border such as 0.5 the two sums could round to different sides.
shares = st.integers(1, 96).map(lambda n: n / 97)
ANY_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "sequence_bias": st.dictionaries(
            st.lists(ids, min_size=1, max_size=3).map(tuple),
            st.floats(-4, 4, width=16),
            min_size=1,
            max_size=3,
        ),
        "repetition_penalty": st.floats(0.25, 4, width=16),
        "no_repeat_ngram_size": st.integers(0, 4),
        "bad_words_ids": st.lists(
            st.lists(ids, min_size=1, max_size=2), min_size=1, max_size=3, unique_by=tuple
        ),
        "min_length": st.integers(0, 9),
        "min_new_tokens": st.integers(0, 6),
        "forced_eos_token_id": ids,
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1, 2, width=16)),
        "suppress_tokens": st.lists(ids, max_size=3),
        "begin_suppress_tokens": st.lists(ids, max_size=3),
        "temperature": st.floats(0.25, 4, width=16),
        "top_k": st.integers(0, V),
        "top_p": shares,
        "min_p": shares,
        "typical_p": shares,
        "epsilon_cutoff": shares,
        "eta_cutoff": shares,
        "renormalize_logits": st.booleans(),
    },
)


@cache
def any_model():
    """A model of HF's, for its way of making processors."""
    return GPT2LMHeadModel(HFConfig(vocab_size=V, n_positions=8, n_embd=4, n_layer=1, n_head=1))


def chain_hf(options):
    """HF's processors of options, in its own order, for prompts of PROMPT tokens and 6 new ones."""
    config = GenerationConfig(
        **{"top_k": 0} | options, do_sample=True, eos_token_id=list(STOPS), max_length=PROMPT + 6
    )
    any_model()._prepare_special_tokens(config, device="cpu")
    return any_model()._get_logits_processor(config, PROMPT, device="cpu")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(options=ANY_OPTIONS, step=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_any_options_together_are_hfs_chain(options, step, seed):
    assume(options.get("forced_eos_token_id") not in options.get("suppress_tokens", ()))
    rng = np.random.default_rng(seed)
    # Without the rows of which a few options together would leave no token.
    logits = logits_of(rng)[:-2]
    ids = rng.integers(0, 5, (len(logits), PROMPT + step))
    sampler = sampler_from_options(
        options, do_sample=True, stop_ids=STOPS, max_new_tokens=6, vocab_size=V
    )
    found = sampler.transform(jnp.asarray(logits), scattered(ids, rng, step))
    with pytest.MonkeyPatch.context() as patch:
        # HF leaves the order of ties open.
        patch.setattr(torch, "sort", partial(torch.sort, stable=True))
        expected = chain_hf(options)(torch.tensor(ids), torch.tensor(logits))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_h", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [V, 300])
def test_top_h_equals_hfs(top_h, size, rng):
    logits = (rng.normal(size=(8, size)) * 2).astype(np.float32)
    expected = hf.TopHLogitsWarper(top_h)(None, torch.tensor(logits)).numpy()
    found = jax.jit(TopH(top_h))(logits)
    # The sum of all parts equals the whole up to its last digit, so at 1 the least likely token of
    # each row may go either way.
    differing = np.isfinite(found) != np.isfinite(expected)
    assert differing.sum() <= (8 if top_h == 1.0 else 0)
    assert np.isfinite(found).any()
    assert top_h == 1.0 or not np.isfinite(found).all()


def test_penalties_count_what_was_generated_as_openai_defines_them():
    history = History(
        jnp.array([[3, 1, 9, 2, 2, 1]]), jnp.array([[1, 1, 0, 1, 1, 1]], bool), jnp.int32(3)
    )
    logits = jnp.zeros((1, 10))
    expected = np.zeros(10)
    expected[[1, 2]] = -0.5, -1.0  # 1 also stands in the prompt, which does not count
    np.testing.assert_allclose(FrequencyPenalty(0.5)(logits, history)[0], expected)
    expected[[1, 2]] = -0.5
    np.testing.assert_allclose(PresencePenalty(0.5)(logits, history)[0], expected)


TINY = {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
GREEDY = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.8},
    "2-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [11], [7, 8]]},
    "bias": {"sequence_bias": {(4,): 3.0, (4, 4): -9.0}},
    "min new": {"min_new_tokens": 6},
    "forced last": {"forced_eos_token_id": 9},
    "decay": {"exponential_decay_length_penalty": (2, 1.6)},
    "suppress": {"suppress_tokens": [1, 2, 4], "begin_suppress_tokens": [8]},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "suppress_tokens": [2],
    },
}


@pytest.fixture(scope="module")
def models():
    """A model of HF's, with weights large enough to write varied texts, and the same here."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        HFConfig(**TINY, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6)
    config = GPT2Config(**TINY, bos_token_id=None, eos_token_id=None)
    return model, config, gpt2_jax.from_hf(model.state_dict(), config)


# Stop ids and the padding: not among them, or one of them.
ENDS = [(STOPS, 0), (STOPS, 9), ((5,), 5), ((), 0)]


@pytest.mark.parametrize(
    "name, stops, pad", [(name, *ENDS[i % 4]) for i, name in enumerate(GREEDY)]
)
def test_greedy_texts_equal_hfs(name, stops, pad, models, rng):
    model, config, params = models
    options = dict(GREEDY[name])
    if not stops:
        options = {
            name: value for name, value in options.items() if OPTIONS[name].needs != "stop_ids"
        }
    ids, lengths = rng.integers(1, V, (6, 5)), np.full(6, 5)
    if "no_repeat_ngram_size" not in options:  # which HF lets see the padding
        lengths = np.array([5, 1, 3, 5, 2, 4])
    left = np.stack([np.roll(row, 5 - length) for row, length in zip(ids, lengths, strict=True)])
    mask = np.arange(5)[None] >= 5 - lengths[:, None]
    expected = model.generate(
        torch.tensor(np.where(mask, left, pad)),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        **options,
    )[:, 5:].numpy()
    sampler = sampler_from_options(options, stop_ids=stops, max_new_tokens=12, vocab_size=V)
    run = partial(
        gpt2_jax.generate, params, config=config, max_new_tokens=12, sampler=sampler, stop_ids=stops
    )
    out = run(ids, lengths, pad_id=pad)
    width = expected.shape[1]
    np.testing.assert_array_equal(out.ids[:, :width], expected)
    assert (np.asarray(out.ids)[:, width:] == pad).all()
    again = run(left, lengths, pad_id=pad, padding_side="left")
    np.testing.assert_array_equal(out.ids, again.ids)


def test_rules_that_look_back_see_a_row_alone_and_in_a_batch_alike(models, rng):
    _, config, params = models
    ids, lengths = rng.integers(0, V, (3, 7)), np.array([7, 2, 4])
    options = {
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[3, 4], [6]],
        "min_length": 8,
    }
    sampler = sampler_from_options(options, stop_ids=STOPS)
    run = partial(
        gpt2_jax.generate, config=config, max_new_tokens=10, sampler=sampler, stop_ids=STOPS
    )
    together = run(params, ids, lengths)
    for row in range(3):
        alone = run(params, ids[row : row + 1, : lengths[row]])
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])


def test_numbers_may_differ_from_row_to_row(rng):
    logits, ids = rng.normal(size=(2, V)), rng.integers(0, V, (2, 5))
    history = History(jnp.asarray(ids), jnp.ones((2, 5), bool), jnp.int32(2))
    logits = jnp.asarray(logits)
    for name, values in (
        ("repetition_penalty", (1.0, 3.0)),  # the neutral value is one of them
        ("typical_p", (0.2, 0.9)),
        ("eta_cutoff", (0.01, 0.2)),
        ("min_new_tokens", (1, 4)),
        ("presence_penalty", (0.5, -0.5)),
    ):
        sample = OPTIONS[name].needs == "do_sample"
        make = partial(sampler_from_options, do_sample=sample, stop_ids=STOPS)
        both = make({name: jnp.array(values)}).transform(logits, history)
        for row, value in enumerate(values):
            alone = make({name: value}).transform(logits, history)
            np.testing.assert_allclose(both[row], alone[row])


def test_an_options_number_may_be_traced():
    def scaled(temperature):
        sampler = sampler_from_options({"temperature": temperature}, do_sample=True)
        return sampler.transform(jnp.array([[1.0, 2.0]]), None)

    np.testing.assert_allclose(jax.jit(scaled)(0.5), [[2.0, 4.0]])


def test_a_checkpoints_generation_config_makes_hfs_processors(models, tmp_path):
    model, config, params = models
    settings = {
        "max_length": 14,
        "eos_token_id": [5, 9],
        "pad_token_id": 0,
        "repetition_penalty": 1.6,
    }
    GenerationConfig(**settings).save_pretrained(tmp_path)
    ids = np.arange(8).reshape(2, 4)
    arguments = load_generation_config(tmp_path, config=config, prompt_length=4)
    assert arguments["max_new_tokens"] == 10
    assert arguments["stop_ids"] == (5, 9)
    assert arguments["pad_id"] == 0
    expected = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape),
        generation_config=GenerationConfig(**settings),
    )[:, 4:].numpy()
    out = gpt2_jax.generate(params, ids, config=config, **arguments)
    np.testing.assert_array_equal(out.ids[:, : expected.shape[1]], expected)


def test_a_generation_config_with_beams_has_the_arguments_of_beam_search(models, tmp_path):
    model, config, params = models
    settings = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "early_stopping": True,
        "eos_token_id": 5,
        "pad_token_id": 1,
    }
    settings |= {"length_penalty": 2.0, "max_new_tokens": 8, "no_repeat_ngram_size": 2}
    GenerationConfig(**settings).save_pretrained(tmp_path)
    ids = np.arange(4)[None]
    expected = model.generate(
        torch.tensor(ids),
        attention_mask=torch.ones(ids.shape),
        generation_config=GenerationConfig(**settings),
    )[:, 4:].numpy()
    out = gpt2_jax.beam_search(
        params, ids, config=config, **load_generation_config(tmp_path, config=config)
    )
    np.testing.assert_array_equal(out.ids[0, :, : expected.shape[1]], expected)


@pytest.mark.parametrize("unsaid", [{}, {"top_k": None}])
def test_a_sampling_generation_config_has_hfs_top_k(tmp_path, unsaid):
    file, config = tmp_path / "generation_config.json", GPT2Config()
    keys = {"do_sample": True, "temperature": 0.7, "_from_model_config": True}
    file.write_text(json.dumps(keys | unsaid))
    arguments = load_generation_config(tmp_path, config=config)
    expected = sampler_from_options({"temperature": 0.7, "top_k": 50}, do_sample=True)
    assert arguments["sampler"] == expected
    assert arguments["stop_ids"] == (50256,)
    assert "max_new_tokens" not in arguments


def test_ids_of_a_generation_config_that_the_vocabulary_lacks_are_left_out(tmp_path):
    content = {"eos_token_id": [50256, 7], "pad_token_id": 50257}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    arguments = load_generation_config(tmp_path, config=GPT2Config(vocab_size=97))
    assert arguments["stop_ids"] == (7,)
    assert "pad_id" not in arguments


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"num_beam_groups": 4},
            "`num_beam_groups` must be 1, the one value that is supported; got 4",
        ),
        ({"length_penalty": 2.0}, "length_penalty acts on beams: set `num_beams`"),
        ({"watermarking_config": {}}, "These options are not supported: watermarking_config"),
        ({"prefix_allowed_tokens_fn": 1}, "_fn` is `PrefixAllowedTokens`"),
        ({"max_length": 30}, "`max_length` counts the prompt, so `prompt_length` must be given"),
        ({"temperature": 0.7}, "temperature acts on random draws: set `do_sample`"),
        (
            {"suppress_tokens": [60000]},
            r"`suppress_tokens` must hold ids in \[0, 50257\) \(`vocab_size`\), got 60000",
        ),
        ({"bad_words_ids": [[1, -2]]}, "`bad_words_ids` must hold ids in .* got -2"),
        ({"eos_token_id": "3"}, "`eos_token_id` must be an integer or None, got '3'"),
        ({"pad_token_id": [3]}, r"`pad_token_id` must be an integer or None, got \[3\]"),
        ([], "expected an object, got list"),
    ],
)
def test_what_a_generation_config_asks_for_in_vain_is_named(content, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_generation_config(tmp_path, config=GPT2Config())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: sampler_from_options({"temprature": 1}),
            "not supported: temprature. There are sequence_bias",
        ),
        (
            lambda: sampler_from_options({"min_length": 3}),
            "min_length acts on stop ids, and there are none",
        ),
        (
            lambda: sampler_from_options({"forced_eos_token_id": 3}),
            "needs to know `max_new_tokens`",
        ),
        (
            lambda: sampler_from_options({"forced_bos_token_id": 3, "suppress_tokens": [2, 3]}),
            r"`forced_bos_token_id` .3. is in `suppress_tokens`, so no token would be left",
        ),
        (
            lambda: sampler_from_options({"repetition_penalty": 0.0}),
            "`repetition_penalty` must be greater than 0, got 0.0",
        ),
        (
            lambda: sampler_from_options({"typical_p": 1.5}, do_sample=True),
            r"`typical_p` must be in \(0, 1\], got 1.5",
        ),
        (lambda: Typical(1.0), r"`mass` must be in \(0, 1\), got 1.0"),
        (lambda: RepetitionPenalty(0.0), "`penalty` must be greater than 0, got 0.0"),
        (
            lambda: sampler_from_options({"presence_penalty": float("nan")}),
            "`presence_penalty` must be finite, got nan",
        ),
        (
            lambda: sampler_from_options({"no_repeat_ngram_size": -1}),
            "`no_repeat_ngram_size` must be at least 0, got -1",
        ),
        (
            lambda: sampler_from_options({"min_length": 3}, stop_ids=(99,), vocab_size=V),
            r"`min_length` must hold ids in \[0, 40\) \(`vocab_size`\), got 99",
        ),
        (
            lambda: sampler_from_options({"num_beams": 3}),
            "not supported: num_beams. There are sequence_bias",
        ),
        (
            lambda: sampler_from_options({"top_h": 0.0}, do_sample=True),
            r"`top_h` must be in \(0, 1\], got 0.0",
        ),
        (lambda: NoRepeatNGram(-1), "`n` of NoRepeatNGram must be a positive integer, got -1"),
        (lambda: SequenceBias(((),), [1.0]), "none of them empty"),
        (lambda: Force((1,)), "either `step` or `length`"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_neutral_values_leave_nothing_to_do():
    neutral = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "top_k": 0,
        "top_p": 1.0,
        "min_length": None,
    }
    assert sampler_from_options(neutral).transform.transforms == ()
    assert Suppress((1,))(jnp.zeros((1, 3))).tolist() == [[0.0, -np.inf, 0.0]]


def test_cuts_for_beams_leave_a_token_more_than_there_are_stop_ids():
    sampler = sampler_from_options({"top_k": 1}, do_sample=True, stop_ids=STOPS, num_beams=2)
    assert sampler.transform.transforms[0].k == 3


def test_the_order_of_options_given_is_of_no_matter():
    options = {"top_p": 0.9, "temperature": 0.5, "repetition_penalty": 2.0}
    sampler = sampler_from_options(options, do_sample=True)
    kinds = [type(transform) for transform in sampler.transform.transforms]
    assert kinds == [RepetitionPenalty, Temperature, gpt2_jax.TopP]


def test_the_table_is_read_without_jax():
    # `gpt2_jax` itself imports JAX: a bare package in its place has the same modules.
    code = f"""
import sys, types
sys.modules["jax"] = sys.modules["flax"] = None
package = types.ModuleType("gpt2_jax")
package.__path__ = [{str(ROOT / "gpt2_jax")!r}]
sys.modules["gpt2_jax"] = package
from gpt2_jax.generation.options import OPTIONS, options_table
print(len(OPTIONS), len(options_table()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(OPTIONS)), str(len(options_table()))], done.stderr
