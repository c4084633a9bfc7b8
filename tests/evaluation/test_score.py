"""Scores against PyTorch: HF's logits, and HF's guide to perplexity written out."""

import math

import jax
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax.evaluation import score as evaluate
from gpt2_jax.evaluation.score import (
    Likelihood,
    perplexity,
    score,
    score_choices,
    sliding_windows,
    token_logprobs,
)
from tests.reference import TINY, hf_model, ours


@pytest.fixture(scope="module")
def models():
    """HF's model, our config and params, in float64."""
    model = hf_model(**TINY)
    return (model, *ours(model))


def reference(model, ids):
    """Log-probabilities of all tokens after each prefix, by PyTorch."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(ids)[None]).logits[0], -1).numpy()


def test_token_logprobs_equal_pytorch(models, rng, monkeypatch):
    model, config, params = models
    monkeypatch.setattr(evaluate, "CHUNK", 7)  # several chunks, the last not full
    ids = rng.integers(0, 61, (3, 25))  # one more than n_positions: 24 to read
    expected = [reference(model, row[:-1])[np.arange(24), row[1:]] for row in ids]
    np.testing.assert_allclose(
        token_logprobs(params, ids, config=config), expected, rtol=0, atol=1e-12
    )


def test_token_logprobs_can_be_differentiated(models, rng):
    _, config, params = models
    ids = rng.integers(0, 61, (2, 9))
    by_scores = jax.grad(lambda params: -token_logprobs(params, ids, config=config).mean())(params)
    by_loss = jax.grad(lambda params: gpt2_jax.next_token_loss(params, ids, config=config)[0])(
        params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-14), by_scores, by_loss
    )


def test_requests_of_any_length_come_back_in_order(models, rng, monkeypatch):
    model, config, params = models
    monkeypatch.setattr(evaluate, "CHUNK", 16)
    texts = [rng.integers(0, 61, length) for length in (2, 25, 9, 40, 3, 17, 25)]
    counts = [1, 24, 3, 5, 2, 16, 1]
    found = score(params, list(zip(texts, counts, strict=True)), config=config, batch_size=3)
    for text, count, one in zip(texts, counts, found, strict=True):
        text = text[-25:]  # a longer one is cut from the left
        logp = reference(model, text[:-1])[-count:]
        np.testing.assert_allclose(
            one.logprobs, logp[np.arange(count), text[-count:]], rtol=0, atol=1e-12
        )
        np.testing.assert_array_equal(one.greedy, logp.argmax(-1) == text[-count:])


def test_greedy_says_what_greedy_generation_would_choose(models, rng):
    _, config, params = models
    prompt = rng.integers(1, 61, (1, 5))
    made = gpt2_jax.generate(params, prompt, config=config, max_new_tokens=6, stop_ids=())
    text = np.concatenate([prompt[0], made.ids[0]])
    other = text.copy()
    other[-1] = (other[-1] + 1) % 61
    same, changed = score(params, [(text, 6), (other, 6)], config=config)
    assert same.greedy.all() and changed.greedy.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(same.logprobs, made.logprobs[0], rtol=1e-6)


@pytest.mark.parametrize(
    "count, window, stride", [(90, 24, 24), (90, 24, 12), (91, 20, 7), (24, 24, 5), (7, 24, 12)]
)
def test_perplexity_follows_hfs_guide(models, rng, count, window, stride):
    model, config, params = models
    ids = rng.integers(0, 61, count)
    total, scored, before = 0.0, 0, 0
    for start in range(
        0, count, stride
    ):  # the loop of the guide, its last windows weighted by what they score
        end = min(start + window, count)
        labels = torch.tensor(ids[start:end])[None].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            logits = model(torch.tensor(ids[start:end])[None]).logits
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100
        )
        total, scored = total + losses.item(), scored + (labels[0, 1:] != -100).sum().item()
        before = end
        if end == count:
            break
    found = perplexity(params, ids, config=config, window=window, stride=stride)
    assert found.tokens == scored
    np.testing.assert_allclose(found.perplexity, math.exp(total / scored), rtol=1e-12)
    np.testing.assert_allclose(found.nll, total, rtol=1e-12)


@pytest.mark.parametrize("window, stride", [(10, 3), (10, 9), (5, 1), (2, 1)])
@pytest.mark.parametrize("count", [2, 5, 10, 11, 12, 57])
def test_each_token_is_scored_once_with_enough_before_it(count, window, stride):
    places = []
    for start, end, scored in sliding_windows(count, window=window, stride=stride):
        assert 1 <= end - start <= window and scored < end - start
        assert start == 0 or end - start - scored >= min(window - stride, 1)
        places += range(end - scored, end)
    assert places == list(range(1, count))


def test_without_overlap_the_first_of_each_window_is_not_scored():
    windows = list(sliding_windows(11, window=4, stride=4))
    assert windows == [(0, 4, 3), (4, 8, 3), (8, 11, 2)]
    assert list(sliding_windows(9, window=4, stride=4))[-1] == (
        4,
        8,
        3,
    )  # the ninth alone has nothing before it


def test_quotients_by_hand():
    found = Likelihood(nll=6.0, tokens=4, variance=0.64, words=3, bytes=12)
    assert found.loss == 1.5 and found.stderr == 0.4
    np.testing.assert_allclose(found.perplexity, math.exp(1.5))
    np.testing.assert_allclose(
        [found.word_perplexity, found.byte_perplexity], [math.exp(2), math.exp(0.5)]
    )
    np.testing.assert_allclose(found.bits_per_byte, 0.5 / math.log(2))
    assert found._replace(words=None, bytes=None).word_perplexity is None


def test_choices_are_summed_and_averaged(models, rng):
    model, config, params = models
    context, choices = rng.integers(0, 61, 6), [rng.integers(0, 61, length) for length in (1, 4, 3)]
    found = score_choices(params, context, choices, config=config, bytes=[3, 8, 5])
    for choice, size, one in zip(choices, (3, 8, 5), found, strict=True):
        logp = reference(model, np.concatenate([context, choice]))
        total = sum(logp[5 + i, id] for i, id in enumerate(choice))
        np.testing.assert_allclose(one, [total, total / len(choice), total / size], rtol=1e-12)
    assert math.isnan(score_choices(params, context, choices, config=config)[0].per_byte)


def test_lengths_share_what_they_compile(models, rng):
    _, config, params = models
    evaluate._score.clear_cache()
    for length in (3, 9, 20, 24):
        score(params, [(rng.integers(0, 61, length), length - 1)] * 2, config=config, batch_size=4)
    assert evaluate._score._cache_size() == 1


@pytest.mark.parametrize(
    "request_, message",
    [
        (([5], 1), "Request 1 must score from 1 to 0 of its 1 tokens"),
        (([5, 6], 2), "from 1 to 1 of its 2 tokens.*got 2"),
        (([5, 6], 0), "got 0"),
        (([5] * 40, 25), r"from 1 to 24 of its 40 tokens \(`n_positions` is 24\), got 25"),
        (([5, 61], 1), r"Request 1: `ids` must be in \[0, 61\).*got 61"),
    ],
)
def test_a_bad_request_is_named(models, request_, message):
    _, config, params = models
    with pytest.raises(ValueError, match=message):
        score(params, [([1, 2], 1), request_], config=config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ids": [3]}, "at least 2 tokens to be scored, got 1"),
        ({"window": 25}, r"`window` must be at most 24 \(`n_positions`\), got 25"),
        ({"window": 8, "stride": 9}, r"`stride` in \[1, `window`\], got 8 and 9"),
        ({"stride": 0}, "got 24 and 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_windows_are_named(models, options, message):
    _, config, params = models
    with pytest.raises(ValueError, match=message):
        perplexity(params, options.pop("ids", [1, 2, 3]), config=config, **options)
