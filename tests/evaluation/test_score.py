"""Scores against PyTorch: HF's logits, and HF's guide to perplexity written out."""

import math

import jax
import numpy as np
import pytest
import torch

import gpt2_jax
from gpt2_jax.evaluation import score as scoring
from gpt2_jax.evaluation.score import (
    Likelihood,
    ScoreRequest,
    after,
    perplexity,
    rolling_windows,
    score,
    score_choices,
    score_groups,
    sliding_windows,
    token_logprobs,
)
from tests.interpretability.hooks import hooked
from tests.reference import TINY, hf_model, ours

PREFIX = 0  # an id that stands for `<|endoftext|>`


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
    monkeypatch.setattr(scoring, "TOKENS_PER_CHUNK", 7)  # several chunks, the last not full
    ids = rng.integers(0, 61, (3, 25))  # one more than n_positions: 24 to read
    expected = [reference(model, row[:-1])[np.arange(24), row[1:]] for row in ids]
    compiled = jax.jit(lambda ids: token_logprobs(params, ids, config=config))
    logprobs = compiled(ids)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-12)


def test_token_logprobs_can_be_compiled_and_differentiated(models, rng):
    _, config, params = models
    ids = rng.integers(0, 61, (2, 9))

    def loss_by_scores(params, ids, *, config):
        return -token_logprobs(params, ids, config=config).mean()

    def loss(params, ids, *, config):
        return gpt2_jax.next_token_loss(params, ids, config=config)[0]

    by_scores = jax.jit(jax.grad(loss_by_scores))(params, ids, config=config)
    by_loss = jax.jit(jax.grad(loss))(params, ids, config=config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-14), by_scores, by_loss
    )


def test_a_tap_changes_what_is_scored_and_learnt_as_pytorchs_hooks_do(models, rng):
    model, config, params = models
    ids = rng.integers(0, 61, (2, 9))
    run = jax.jit(lambda tap: token_logprobs(params, ids, config=config, tap=tap))
    loss = jax.jit(lambda tap: gpt2_jax.next_token_loss(params, ids, config=config, tap=tap)[0])
    requests = [(row, 5) for row in ids]
    programs = scoring.score_batch._cache_size()
    for scale in (0.0, 2.0):
        offset = scale * rng.normal(size=24)
        of_all = np.zeros((2, 8, 24))
        of_all[:, 3] = offset
        logits = hooked(model, ids[:, :-1], {"h.0": lambda x, o=of_all: x + torch.tensor(o)})
        every = torch.log_softmax(torch.tensor(logits), -1).numpy()
        expected = np.take_along_axis(every, ids[:, 1:, None], -1)[..., 0]
        tap = gpt2_jax.make_tap({"h.0.resid_post": gpt2_jax.add(offset, at=[3])}, config=config)
        np.testing.assert_allclose(run(tap), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(loss(tap), -expected.mean(), rtol=0, atol=1e-12)
        scored = score(params, requests, config=config, batch_size=2, tap=tap)
        found = np.stack([one.logprobs for one in scored])
        np.testing.assert_allclose(found, expected[:, -5:], rtol=0, atol=1e-12)
        likelihood = perplexity(params, ids[0], config=config, batch_size=2, tap=tap)
        np.testing.assert_allclose(likelihood.nll, -expected[0].sum(), rtol=1e-12)
        choices = score_choices(
            params, ids[0, :7], [ids[0, 7:], ids[1, 7:]], config=config, tap=tap
        )
        np.testing.assert_allclose(choices[0].total, expected[0, -2:].sum(), rtol=1e-12)
    # Other values compile nothing.
    assert scoring.score_batch._cache_size() == programs + 1


def test_a_function_that_sees_logits_is_scored_and_compiled_once(models, rng):
    model, config, params = models
    ids = rng.integers(0, 61, (2, 9))

    def tap(site, x):
        return x.at[..., 7].add(3.0) if site == "logits" else x

    logits = torch.tensor(hooked(model, ids[:, :-1], {}))
    logits[..., 7] += 3.0
    every = torch.log_softmax(logits, -1).numpy()
    expected = np.take_along_axis(every, ids[:, 1:, None], -1)[..., 0]
    run = jax.jit(lambda ids: token_logprobs(params, ids, config=config, tap=tap))
    np.testing.assert_allclose(run(ids), expected, rtol=0, atol=1e-12)
    programs = scoring.score_batch._cache_size()
    for _ in range(2):
        scored = score(params, [(row, 8) for row in ids], config=config, batch_size=2, tap=tap)
        found = np.stack([one.logprobs for one in scored])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert scoring.score_batch._cache_size() == programs + 1


def test_a_single_column_leaves_nothing_to_score(models):
    _, config, params = models
    with pytest.raises(ValueError, match="at least 2 columns.*got 1"):
        token_logprobs(params, np.array([[3]]), config=config)


def test_requests_of_any_length_come_back_in_order(models, rng, monkeypatch):
    model, config, params = models
    monkeypatch.setattr(scoring, "TOKENS_PER_CHUNK", 16)
    texts = [rng.integers(0, 61, length) for length in (2, 25, 9, 40, 3, 17, 25)]
    counts = [1, 24, 3, 5, 2, 16, 1]
    scored = score(params, list(zip(texts, counts, strict=True)), config=config, batch_size=3)
    for text, count, found in zip(texts, counts, scored, strict=True):
        text = text[-25:]  # a longer one is cut from the left
        logp = reference(model, text[:-1])[-count:]
        expected = logp[np.arange(count), text[-count:]]
        np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.greedy, logp.argmax(-1) == text[-count:])


def test_no_requests_give_no_scores(models):
    _, config, params = models
    assert score(params, [], config=config) == []


def test_totals_are_summed_in_float64():
    third = np.float32(1 / 3)
    scored = scoring.Scored(np.full(1000, third), np.array([True] * 999 + [False]))
    assert scored.total == pytest.approx(1000 * float(third), rel=1e-15)
    assert not scored.all_greedy
    assert scored._replace(greedy=scored.greedy[:-1]).all_greedy


def test_progress_counts_the_requests_of_each_batch(models, rng):
    _, config, params = models
    requests = [(rng.integers(0, 61, 5), 1) for _ in range(7)]
    counts = []
    score(params, requests, config=config, batch_size=3, progress=counts.append)
    assert counts == [3, 3, 1]


def test_texts_that_differ_in_their_last_token_share_a_pass(models, rng):
    _, config, params = models
    read = rng.integers(0, 61, 5).tolist()
    # More letters than a row may hold, and others that share nothing with them.
    letters = [([*read, letter], 1) for letter in range(30)]
    others = [([*read, 1], 2), (rng.integers(0, 61, 5), 1), ([*read, 3], 5)]
    requests = [*others, *letters]
    counts = []
    shared = score(params, requests, config=config, batch_size=2, progress=counts.append)
    assert max(counts) > 2
    apart = score(params, requests, config=config, batch_size=2, share=False)
    for one, other in zip(shared, apart, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-12)
        np.testing.assert_array_equal(one.greedy, other.greedy)
    assert len({one.total for one in shared[3:]}) == 30


def test_groups_keep_their_requests_together(models, rng):
    _, config, params = models
    requests = [after(rng.integers(0, 61, 4), rng.integers(0, 61, n)) for n in (1, 2, 3, 4)]
    apart = score(params, requests, config=config)
    groups = [requests[:1], [], requests[1:]]
    together = score_groups(params, groups, config=config)
    assert [len(group) for group in together] == [1, 0, 3]
    assert [one.total for group in together for one in group] == [one.total for one in apart]


def test_greedy_says_what_greedy_generation_would_choose(models, rng):
    _, config, params = models
    prompt = rng.integers(1, 61, (1, 5))
    generated = gpt2_jax.generate(params, prompt, config=config, max_new_tokens=6, stop_ids=())
    text = np.concatenate([prompt[0], generated.ids[0]])
    other = text.copy()
    other[-1] = (other[-1] + 1) % 61
    same, changed = score(params, [(text, 6), (other, 6)], config=config)
    assert same.greedy.all()
    assert changed.greedy.tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(same.logprobs, generated.logprobs[0], rtol=1e-6)


@pytest.mark.parametrize(
    "count, window, stride", [(90, 24, 24), (90, 24, 12), (91, 20, 7), (24, 24, 5), (7, 24, 12)]
)
def test_perplexity_follows_hfs_guide(models, rng, count, window, stride):
    model, config, params = models
    ids = rng.integers(0, 61, count)
    total = 0.0
    n_scored = 0
    previous_end = 0
    # The loop of the guide, its last windows weighted by what they score.
    for start in range(0, count, stride):
        end = min(start + window, count)
        labels = torch.tensor(ids[start:end])[None].clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            logits = model(torch.tensor(ids[start:end])[None]).logits
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100
        )
        total += losses.item()
        n_scored += (labels[0, 1:] != -100).sum().item()
        previous_end = end
        if end == count:
            break
    likelihood = perplexity(params, ids, config=config, window=window, stride=stride)
    assert likelihood.tokens == n_scored
    np.testing.assert_allclose(likelihood.perplexity, math.exp(total / n_scored), rtol=1e-12)
    np.testing.assert_allclose(likelihood.nll, total, rtol=1e-12)


def test_a_list_and_an_array_of_ids_are_the_same_text(models, rng):
    _, config, params = models
    ids = rng.integers(0, 61, 30)
    from_array = perplexity(params, ids, config=config, words=7, bytes=50)
    assert perplexity(params, ids.tolist(), config=config, words=7, bytes=50) == from_array


@pytest.mark.parametrize("window, stride", [(10, 3), (10, 9), (5, 1), (2, 1)])
@pytest.mark.parametrize("count", [2, 5, 10, 11, 12, 57])
def test_each_token_is_scored_once_with_enough_before_it(count, window, stride):
    scored_tokens = []
    for start, end, n_scored in sliding_windows(count, window=window, stride=stride):
        assert 1 <= end - start <= window
        assert n_scored < end - start
        assert start == 0 or end - start - n_scored >= min(window - stride, 1)
        scored_tokens += range(end - n_scored, end)
    assert scored_tokens == list(range(1, count))


def test_without_overlap_the_first_of_each_window_is_not_scored():
    windows = list(sliding_windows(11, window=4, stride=4))
    assert windows == [(0, 4, 3), (4, 8, 3), (8, 11, 2)]
    # The ninth alone has nothing before it.
    assert list(sliding_windows(9, window=4, stride=4))[-1] == (4, 8, 3)


def test_rolling_windows_by_hand():
    windows = rolling_windows([1, 2, 3, 4, 5, 6, 7], prefix_id=PREFIX, window=3)
    assert windows == [
        ScoreRequest([PREFIX, 1, 2, 3], 3),
        ScoreRequest([3, 4, 5, 6], 3),
        ScoreRequest([4, 5, 6, 7], 1),  # as long as the others, though one token is left
    ]
    assert rolling_windows([], prefix_id=PREFIX, window=3) == []


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_rolling_windows_score_each_token_once_after_one_more(count):
    ids = list(range(1, count + 1))
    windows = rolling_windows(ids, prefix_id=PREFIX, window=256)
    scored = [window[-n_scored:] for window, n_scored in windows]
    assert sum(scored, []) == ids
    assert all(len(window) <= 257 for window, _ in windows)
    assert all(n_scored < len(window) for window, n_scored in windows)


def test_quotients_by_hand():
    likelihood = Likelihood(nll=6.0, tokens=4, variance=0.64, words=3, bytes=12)
    assert likelihood.loss == 1.5
    assert likelihood.stderr == 0.4
    np.testing.assert_allclose(likelihood.perplexity, math.exp(1.5))
    np.testing.assert_allclose(likelihood.word_perplexity, math.exp(2))
    np.testing.assert_allclose(likelihood.byte_perplexity, math.exp(0.5))
    np.testing.assert_allclose(likelihood.bits_per_byte, 0.5 / math.log(2))
    assert likelihood._replace(words=None).word_perplexity is None
    assert likelihood._replace(bytes=None).bits_per_byte is None


def test_choices_are_summed_and_averaged(models, rng):
    model, config, params = models
    context = rng.integers(0, 61, 6)
    choices = [rng.integers(0, 61, length) for length in (1, 4, 3)]
    scored = score_choices(params, context, choices, config=config, bytes=[3, 8, 5])
    for choice, size, found in zip(choices, (3, 8, 5), scored, strict=True):
        logp = reference(model, np.concatenate([context, choice]))
        total = sum(logp[5 + i, token] for i, token in enumerate(choice))
        np.testing.assert_allclose(found, [total, total / len(choice), total / size], rtol=1e-12)
    without_bytes = score_choices(params, context, choices, config=config)
    assert math.isnan(without_bytes[0].per_byte)


def test_choices_need_as_many_bytes(models):
    _, config, params = models
    with pytest.raises(ValueError, match="one number for each of 2 choices, got 3"):
        score_choices(params, [1, 2], [[3], [4]], config=config, bytes=[1, 1, 1])


def test_lengths_share_what_they_compile(models, rng):
    _, config, params = models
    scoring.score_batch.clear_cache()
    for length in (3, 9, 20, 24):
        score(params, [(rng.integers(0, 61, length), length - 1)] * 2, config=config, batch_size=4)
    assert scoring.score_batch._cache_size() == 1


@pytest.mark.parametrize(
    "bad_request, message",
    [
        (([5], 1), "Request 1 must have at least 2 tokens.*got 1"),
        (([5, 6], 2), "Request 1 must score 1 to 1 of its 2 tokens.*got 2"),
        (([5, 6], 0), "got 0"),
        (([5] * 40, 25), r"1 to 24 of its 40 tokens \(`n_positions` is 24\), got 25"),
        (([5, 61], 1), r"Request 1: `ids` must be in \[0, 61\).*got 61"),
    ],
)
def test_a_bad_request_is_named(models, bad_request, message):
    _, config, params = models
    with pytest.raises(ValueError, match=message):
        score(params, [([1, 2], 1), bad_request], config=config)


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
    options = {"ids": [1, 2, 3]} | options
    with pytest.raises(ValueError, match=message):
        perplexity(params, config=config, **options)
