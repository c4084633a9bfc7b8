"""Speculation is lossless: greedy texts are `generate`'s, drawn ones have its distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import (
    Categorical,
    Chain,
    GPT2Config,
    History,
    Temperature,
    generate,
    sampler_from_options,
)

TINY = GPT2Config(
    vocab_size=61,
    n_positions=64,
    n_embd=24,
    n_layer=2,
    n_head=3,
    eos_token_id=None,
    bos_token_id=None,
)
SMALL = TINY.replace(n_layer=1)
STOPS = (5, 9, 30, 31, 32, 33)


def speculate(*args, **options):
    """The result as numpy arrays."""
    return jax.device_get(gpt2_jax.speculate(*args, **options))


@pytest.fixture(scope="module")
def params():
    # Larger weights than GPT-2's, so that texts vary.
    return jax.tree.map(lambda x: 5 * x, gpt2_jax.init(jax.random.key(0), TINY))


@pytest.fixture(scope="module")
def draft(params):
    """The model without its upper layer: sometimes right."""
    return {"draft_params": params | {"h": {"0": params["h"]["0"]}}, "draft_config": SMALL}


@pytest.fixture
def prompts(rng):
    return rng.integers(0, 61, (5, 9)), np.array([9, 3, 1, 6, 9])


@pytest.mark.parametrize(
    "kind, stops",
    [
        ("lookup", ()),
        ("lookup", STOPS),
        ("lookup of 1", STOPS),
        ("draft", ()),
        ("draft", STOPS),
        ("itself", ()),
    ],
)
def test_greedy_texts_are_those_of_generate(kind, stops, params, draft, prompts):
    options = {
        "lookup": {},
        "lookup of 1": {"max_matching_ngram_size": 1, "num_draft_tokens": 3},
        "draft": draft,
        "itself": {"draft_params": params, "draft_config": TINY, "num_draft_tokens": 4},
    }[kind]
    run = {"config": TINY, "max_new_tokens": 30, "stop_ids": stops, "pad_id": 2}
    found, plain = speculate(params, *prompts, **run, **options), generate(params, *prompts, **run)
    np.testing.assert_array_equal(found.ids, plain.ids)
    np.testing.assert_array_equal(found.lengths, plain.lengths)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=2e-5)
    assert (found.accepted <= found.drafted).all() and 0 < found.accepted.sum()
    # Each round but the first, the prompt's, makes what it accepts and one token more; the end may
    # cut that one off.
    missing = found.rounds + found.accepted - found.lengths
    assert ((missing == 0) | (missing == 1)).all()
    if kind == "itself":
        assert (found.rounds <= 1 + -(-(found.lengths - 1) // 5)).all()
        np.testing.assert_array_equal(found.rounds[found.lengths == 30], 7)


def test_rules_that_look_back_see_the_guesses(params, draft, prompts):
    options = {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 7,
        "forced_eos_token_id": 4,
    }
    sampler = sampler_from_options(options, stop_ids=(5, 9, 30), max_new_tokens=20)
    run = {
        "config": TINY,
        "max_new_tokens": 20,
        "sampler": sampler,
        "stop_ids": (5, 9, 30),
        "pad_id": 0,
    }
    plain = generate(params, *prompts, **run)
    for options in ({}, draft):
        np.testing.assert_array_equal(speculate(params, *prompts, **run, **options).ids, plain.ids)


def test_the_whole_context_can_be_used(params, draft, prompts):
    ids = np.tile(prompts[0][:, :5], (1, 10))
    run = {"config": TINY, "max_new_tokens": 14, "stop_ids": ()}
    plain = generate(params, ids, **run)
    for options in ({}, draft):
        np.testing.assert_array_equal(
            speculate(params, ids, **run, **options, num_draft_tokens=9).ids, plain.ids
        )
    one = run | {"max_new_tokens": 1}
    np.testing.assert_array_equal(speculate(params, ids, **one).ids, plain.ids[:, :1])


def test_lookup_guesses_what_followed_the_longest_match_nearest_the_start():
    """A model that writes `2 3 4 2 3 4 ...` whatever it reads, by its position embeddings alone."""
    config = GPT2Config(
        vocab_size=8, n_positions=40, n_embd=8, n_layer=1, n_head=1, eos_token_id=None
    )
    params = jax.tree.map(jnp.zeros_like, gpt2_jax.init(jax.random.key(0), config))
    places = np.arange(40)
    params["wpe"]["embedding"] = jnp.eye(8)[2 + (places + 1) % 3]
    params["wte"]["embedding"] = jnp.eye(8)
    params["ln_f"]["scale"] = jnp.ones(8)
    # What it reads is as strong as where it is: a token of id 0 or 1 adds nothing to the three that
    # it chooses from.
    params["wte"]["embedding"] *= 0.25
    found = speculate(
        params, [[0, 1]], config=config, max_new_tokens=12, num_draft_tokens=3, stop_ids=()
    )
    text = 2 + (np.arange(2, 14)) % 3
    np.testing.assert_array_equal(found.ids[0], text)
    # Rounds: the prompt gives one token; the next three find nothing; with the first repetition
    # guesses of up to three tokens begin, all of them right: 4, then 4 tokens to a round.
    assert found.accepted == found.drafted and found.rounds[0] + found.accepted[0] == 12
    assert found.rounds[0] == 4 + 2


V, NEW, DRAWS = 3, 4, 30_000
DICE = GPT2Config(
    vocab_size=V,
    n_positions=16,
    n_embd=8,
    n_layer=1,
    n_head=2,
    eos_token_id=None,
    bos_token_id=None,
)


def texts_and_probabilities(params, prompt, transform, stop):
    """Every text of NEW tokens, with 0 after its stop, and its probability by the definition."""
    texts = np.array(list(itertools.product(range(V), repeat=NEW)))
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = gpt2_jax.apply(params, whole, config=DICE)
    logp, live = np.zeros(len(texts)), np.ones(len(texts), bool)
    for i in range(NEW):
        valid = jnp.broadcast_to(jnp.arange(whole.shape[1]) < len(prompt) + i, whole.shape)
        scores = transform(
            logits[:, len(prompt) + i - 1], History(jnp.asarray(whole), valid, jnp.int32(i))
        )
        step = np.asarray(jax.nn.log_softmax(scores))[np.arange(len(texts)), texts[:, i]]
        logp += np.where(live, step, np.where(texts[:, i] == 0, 0.0, -np.inf))
        live &= texts[:, i] != stop
    return texts, np.exp(logp)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_drawn_texts_have_the_models_distribution(kind):
    params, other = (
        jax.tree.map(lambda x: 9 * x, gpt2_jax.init(jax.random.key(seed), DICE)) for seed in (3, 4)
    )
    prompt = np.array([0, 1, 2, 0, 1])
    rules = sampler_from_options(
        {"repetition_penalty": 1.3, "presence_penalty": 0.4}
    ).transform.transforms
    sampler = Categorical(Chain((*rules, Temperature(1.2))))
    texts, expected = texts_and_probabilities(params, prompt, sampler.transform, stop=2)
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-6)
    options = {"draft_params": other, "draft_config": DICE} if kind == "draft" else {}
    found = speculate(
        params,
        np.tile(prompt, (DRAWS, 1)),
        None,
        jax.random.key(5),
        config=DICE,
        max_new_tokens=NEW,
        sampler=sampler,
        stop_ids=(2,),
        pad_id=0,
        num_draft_tokens=2,
        **options,
    )
    place = found.ids @ V ** np.arange(NEW)[::-1]  # of a text in `texts`
    seen = np.bincount(place, minlength=len(texts))
    possible = expected > 0
    assert not seen[~possible].any()
    count = DRAWS * expected[possible]
    chi2, freedom = ((seen[possible] - count) ** 2 / count).sum(), possible.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    share = found.accepted.sum() / found.drafted.sum()
    assert 0.04 < share < 0.96  # guesses were taken and refused
    # Had refused guesses been replaced by plain draws, the test would have seen it.
    if kind == "draft":
        _, others = texts_and_probabilities(other, prompt, sampler.transform, stop=2)
        assert (
            DRAWS * ((others - expected)[possible] ** 2 / expected[possible]).sum() > 10 * freedom
        )


def test_a_rows_text_is_the_same_alone_and_in_a_batch(params, draft, prompts):
    ids, lengths = prompts
    keys, sampler = jax.random.split(jax.random.key(7), 5), Categorical(Chain((Temperature(1.5),)))
    run = {
        "config": TINY,
        "max_new_tokens": 12,
        "sampler": sampler,
        "stop_ids": (5, 9, 30),
        "pad_id": 0,
    } | draft
    together = speculate(params, ids, lengths, keys, **run)
    for i in (1, 3):
        alone = speculate(params, ids[i : i + 1], lengths[i : i + 1], keys[i : i + 1], **run)
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        assert alone.accepted == together.accepted[i] and alone.rounds == together.rounds[i]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draft_config": SMALL}, "belong together: one of them is missing"),
        (
            {"draft_params": {}, "draft_config": SMALL.replace(vocab_size=7)},
            "model's 61 tokens, it has 7",
        ),
        (
            {"draft_params": {}, "draft_config": SMALL.replace(n_positions=8)},
            "model's 64 positions, it has 8",
        ),
        ({"num_draft_tokens": 10**6}, r"`num_draft_tokens` must be at most \d+ \(`n_positions`\)"),
        ({"num_draft_tokens": 0}, "`num_draft_tokens` must be a positive integer, got 0"),
        (
            {"max_matching_ngram_size": 0},
            "`max_matching_ngram_size` must be a positive integer, got 0",
        ),
        ({"sampler": Categorical()}, "`key` must be given for a sampler that draws"),
        ({"max_new_tokens": 64}, "together 65, but the model has 64 positions"),
    ],
)
def test_bad_arguments_are_named(options, message, params):
    with pytest.raises(ValueError, match=message):
        speculate(params, [[1]], **({"config": TINY, "max_new_tokens": 3} | options))
