"""Beam search against HF's `generate`, token for token; beam sampling against its definition."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

import gpt2_jax
from gpt2_jax import Categorical, Chain, GPT2Config, Temperature, generate, sampler_from_options

V, N = 30, 9
TINY = {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 3}

token_logprobs = jax.jit(gpt2_jax.token_logprobs)


def beam_search(*args, **options):
    """The beams as numpy arrays."""
    return jax.device_get(gpt2_jax.beam_search(*args, **options))


@pytest.fixture(scope="module")
def models():
    """A float64 model of HF's, its weights large enough for varied texts, and the same here."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        HFConfig(**TINY, bos_token_id=None, eos_token_id=None, attn_implementation="eager")
    )
    model = model.eval().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    config = GPT2Config(**TINY, bos_token_id=None, eos_token_id=None, dtype="float64")
    return model, config, gpt2_jax.from_hf(model.state_dict(), config)


def search_hf(model, ids, lengths, *, stops, pad, **options):
    """HF's beams of left-padded prompts: texts `[B * R, up to N]` and scores `[B * R]`.

    The texts are without the prompts.
    """
    width = ids.shape[1]
    left = np.stack(
        [np.roll(row, width - length) for row, length in zip(ids, lengths, strict=True)]
    )
    mask = np.arange(width)[None] >= width - lengths[:, None]
    out = model.generate(
        torch.tensor(np.where(mask, left, pad)),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=N,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return out.sequences[:, width:].numpy(), out.sequences_scores.numpy()


PENALTIES = (-0.7, 0.0, 1.0, 2.5)
GRID = [
    (beams, early, penalty, (4, 9), 9)
    for i, (beams, early) in enumerate(itertools.product((2, 5), (False, True, "never")))
    for penalty in (PENALTIES[i % 4], PENALTIES[(i + 2) % 4])
]
GRID += [
    (3, False, 1.0, (), 3),
    (4, True, 1.0, (7,), 1),
    (4, "never", 1.0, (2, 7, 11, 12), 2),
    (3, False, 0.5, (5,), 0),
]


@pytest.mark.parametrize("beams, early, penalty, stops, pad", GRID)
def test_texts_and_scores_equal_hfs(beams, early, penalty, stops, pad, models, rng):
    model, config, params = models
    ids, lengths = rng.integers(0, V, (6, 5)), np.array([5, 2, 5, 1, 4, 3])
    found = beam_search(
        params,
        ids,
        lengths,
        config=config,
        max_new_tokens=N,
        num_beams=beams,
        early_stopping=early,
        length_penalty=penalty,
        num_return_sequences=2,
        stop_ids=stops,
        pad_id=pad,
    )
    expected, scores = search_hf(
        model,
        ids,
        lengths,
        stops=stops,
        pad=pad,
        num_beams=beams,
        early_stopping=early,
        length_penalty=penalty,
        num_return_sequences=2,
    )
    texts, width = np.asarray(found.ids).reshape(12, N), expected.shape[1]
    ends = np.asarray(found.lengths).ravel()
    for text, length, theirs in zip(texts, ends, expected, strict=True):
        np.testing.assert_array_equal(text[:length], theirs[:length])
        # Behind the end HF writes `pad_id`, or a stop id in the place of a `pad_id` of 0
        # (transformers#47286).
        assert (text[length:] == pad).all() and (theirs[length:] == (pad or stops[0])).all()
    assert ends.max() == width
    np.testing.assert_allclose(np.ravel(found.scores), scores, rtol=1e-5)


OPTIONS = {
    "repetition": {"repetition_penalty": 1.6},
    "2-gram": {"no_repeat_ngram_size": 2},
    "rules": {
        "bad_words_ids": [[3], [7, 8]],
        "min_new_tokens": 4,
        "sequence_bias": {(4,): 1.5, (4, 4): -9.0},
    },
    "forced": {"forced_eos_token_id": 9, "suppress_tokens": [1, 2]},
    "renormalized": {"repetition_penalty": 1.6, "renormalize_logits": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_transformed_texts_and_scores_equal_hfs(name, models, rng):
    model, config, params = models
    ids, stops = rng.integers(0, V, (5, 4)), (4, 9)
    sampler = sampler_from_options(OPTIONS[name], stop_ids=stops, max_new_tokens=N, vocab_size=V)
    found = beam_search(
        params,
        ids,
        config=config,
        max_new_tokens=N,
        num_beams=3,
        sampler=sampler,
        stop_ids=stops,
        pad_id=1,
    )
    expected, scores = search_hf(
        model, ids, np.full(5, 4), stops=stops, pad=1, num_beams=3, **OPTIONS[name]
    )
    np.testing.assert_array_equal(found.ids[:, 0, : expected.shape[1]], expected)
    np.testing.assert_allclose(np.ravel(found.scores), scores, rtol=1e-5)


def test_cuts_keep_as_many_tokens_as_hfs_do_for_beams():
    options = {
        "top_k": 1,
        "top_p": 0.0,
        "min_p": 1.0,
        "typical_p": 0.01,
        "epsilon_cutoff": 0.9,
        "eta_cutoff": 0.9,
    }
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.07, 0.03]]))
    for name, value in options.items():
        for stops, kept in (((), 2), ((1,), 2), ((1, 2), 3)):
            sampler = sampler_from_options(
                {name: value}, do_sample=True, stop_ids=stops, num_beams=2
            )
            assert np.isfinite(sampler.transform(logits, None)).sum() == kept, name
        alone = sampler_from_options({name: value}, do_sample=True, stop_ids=(1, 2))
        assert np.isfinite(alone.transform(logits, None)).sum() == 1, name


def test_log_probabilities_are_the_models_own_and_add_up_to_the_score(models, rng):
    _, config, params = models
    ids, lengths = rng.integers(0, V, (3, 4)), np.array([4, 2, 3])
    found = beam_search(
        params,
        ids,
        lengths,
        config=config,
        max_new_tokens=N,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.5,
        stop_ids=(4, 9),
    )
    np.testing.assert_allclose(found.scores, found.logprobs.sum(-1) / found.lengths**0.5, rtol=1e-5)
    assert (np.diff(found.scores) <= 0).all()
    own = np.zeros((3, 3, 4 + N), int)
    for row, place in itertools.product(range(3), range(3)):
        own[row, place, : lengths[row] + N] = [*ids[row, : lengths[row]], *found.ids[row, place]]
    own = np.asarray(token_logprobs(params, own.reshape(9, -1), config=config)).reshape(3, 3, -1)
    for row, place in itertools.product(range(3), range(3)):
        # A prediction stands before its token.
        size, start = found.lengths[row, place], lengths[row] - 1
        np.testing.assert_allclose(
            found.logprobs[row, place, :size], own[row, place, start:][:size], atol=1e-5
        )
        assert not found.logprobs[row, place, size:].any()


def test_as_many_beams_as_texts_find_the_likeliest(models):
    _, config, params = models
    small = np.arange(3)
    keep = sampler_from_options({"suppress_tokens": list(range(3, V))})
    found = beam_search(
        params,
        [[5, 6]],
        config=config,
        max_new_tokens=3,
        num_beams=9,
        num_return_sequences=9,
        sampler=keep,
        stop_ids=(),
    )
    texts = np.array(list(itertools.product(small, repeat=3)))
    whole = np.concatenate([np.tile([5, 6], (27, 1)), texts], axis=1)
    own = np.asarray(token_logprobs(params, whole, config=config))[:, -3:].sum(axis=1)
    order = np.argsort(-own)[:9]
    np.testing.assert_array_equal(found.ids[0], texts[order])


def test_sampling_draws_beams_without_replacement_in_proportion(models):
    """Two beams, one step: the best of two different tokens, drawn one after the other."""
    _, config, params = models
    prompt, draws = np.array([[5, 6, 7]]), 4000
    sampler = Categorical(Chain((Temperature(1.7),)))
    p = np.exp(
        token_logprobs(params, np.array([[5, 6, 7, id] for id in range(V)]), config=config)[:, -1]
    ) ** (1 / 1.7)
    p = np.asarray(p / p.sum())
    first, second = np.meshgrid(range(V), range(V), indexing="ij")
    # In order of drawing.
    pairs = np.where(first == second, 0.0, p[first] * p[second] / (1 - p[first]))
    best = np.where(p[first] >= p[second], first, second)
    expected = np.bincount(best.ravel(), pairs.ravel(), V)
    found = beam_search(
        params,
        np.tile(prompt, (draws, 1)),
        None,
        jax.random.key(3),
        config=config,
        max_new_tokens=1,
        num_beams=2,
        sampler=sampler,
        stop_ids=(),
    )
    seen = np.bincount(np.ravel(found.ids), minlength=V) / draws
    assert np.abs(seen - expected).max() < 4 * np.sqrt(0.25 / draws)
    # So that plain draws would have failed.
    assert np.abs(expected - p).max() > 8 * np.sqrt(0.25 / draws)


def test_a_row_is_the_same_alone_and_in_a_batch(models, rng):
    _, config, params = models
    ids, lengths, keys = (
        rng.integers(0, V, (3, 6)),
        np.array([6, 1, 4]),
        jax.random.split(jax.random.key(0), 3),
    )
    for sampler in (None, Categorical(Chain((Temperature(1.5),)))):
        run = partial(
            beam_search,
            config=config,
            max_new_tokens=N,
            num_beams=4,
            sampler=sampler,
            stop_ids=(4, 9),
            pad_id=0,
        )
        together = run(params, ids, lengths, keys)
        for row in range(3):
            alone = run(params, ids[row : row + 1, : lengths[row]], None, keys[row : row + 1])
            np.testing.assert_array_equal(alone.ids[0], together.ids[row])


def test_new_numbers_do_not_recompile(models, rng):
    _, config, params = models
    ids = rng.integers(0, V, (2, 4))
    run = partial(beam_search, params, config=config, max_new_tokens=4, num_beams=2)
    run(ids, stop_ids=(3,), sampler=sampler_from_options({"repetition_penalty": 1.2}))
    size = gpt2_jax.generation.beam._steps._cache_size()
    for value in (1.3, 1.9):
        sampler = sampler_from_options({"repetition_penalty": value})
        run(ids[:, : int(4 - value)], stop_ids=(7,), length_penalty=value, sampler=sampler)
    assert gpt2_jax.generation.beam._steps._cache_size() == size


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 1}, "`num_beams` must be at least 2 .`generate` searches with one., got 1"),
        (
            {"num_return_sequences": 3},
            r"`num_return_sequences` must be in 1 to 2 \(`num_beams`\), got 3",
        ),
        (
            {"early_stopping": "always"},
            "`early_stopping` must be True, False or \"never\", got 'always'",
        ),
        ({"length_penalty": float("inf")}, "`length_penalty` must be finite, got inf"),
        ({"sampler": Categorical()}, "`key` must be given for a sampler that draws"),
        ({"stop_ids": tuple(range(V))}, "The vocabulary has 30 tokens, too few beside 30 stop ids"),
        ({"num_beams": 10**9}, r"`num_beams` is 1000000000: 1,000,000,000 rows need at least"),
        ({"max_new_tokens": 32}, "together 33, but the model has 32 positions"),
    ],
)
def test_bad_arguments_are_named(options, message, models):
    _, config, params = models
    with pytest.raises(ValueError, match=message):
        beam_search(
            params, [[1]], **({"config": config, "max_new_tokens": 3, "num_beams": 2} | options)
        )


def test_num_return_sequences_of_generate_draws_for_each_row(models, rng):
    _, config, params = models
    ids, lengths = rng.integers(0, V, (2, 5)), np.array([5, 3])
    run = partial(generate, params, config=config, max_new_tokens=5, sampler=Categorical())
    many = run(ids, lengths, jax.random.key(2), num_return_sequences=3)
    repeated = run(np.repeat(ids, 3, axis=0), np.repeat(lengths, 3), jax.random.key(2))
    np.testing.assert_array_equal(many.ids, repeated.ids)
    assert len({tuple(row) for row in np.asarray(many.ids)}) == 6
    with pytest.raises(ValueError, match="the same text 2 times"):
        run(ids, lengths, num_return_sequences=2, sampler=None)
