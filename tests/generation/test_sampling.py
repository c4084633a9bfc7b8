from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from gpt2_jax import Categorical, Chain, Greedy, MinP, Temperature, TopK, TopP
from gpt2_jax.generation.ranges import FINITE, POSITIVE, Range
from gpt2_jax.generation.rules import (
    ExponentialDecayLength,
    Force,
    FrequencyPenalty,
    NoRepeatNGram,
    PresencePenalty,
    RepetitionPenalty,
    SequenceBias,
    Suppress,
)
from gpt2_jax.generation.sampling import as_sampler
from gpt2_jax.generation.transforms import Stateful
from gpt2_jax.kernels import FEW, argmax, smallest_holding

CASES = {
    "temperature": (Temperature(0.7), hf.TemperatureLogitsWarper(0.7)),
    "top_k_1": (TopK(1), hf.TopKLogitsWarper(1)),
    "top_k_7": (TopK(7), hf.TopKLogitsWarper(7)),
    "top_k_beyond": (TopK(1000), hf.TopKLogitsWarper(1000)),
    "top_p_0": (TopP(0.0), hf.TopPLogitsWarper(0.0)),
    "top_p_half": (TopP(0.5), hf.TopPLogitsWarper(0.5)),
    "top_p_most": (TopP(0.95), hf.TopPLogitsWarper(0.95)),
    "min_p": (MinP(0.2), hf.MinPLogitsWarper(0.2)),
    "min_p_0": (MinP(0.0), hf.MinPLogitsWarper(0.0)),
    "min_p_1": (MinP(1.0), hf.MinPLogitsWarper(1.0)),
    "chain": (
        Chain((Temperature(1.3), TopK(20), TopP(0.9), MinP(0.05))),
        LogitsProcessorList(
            [
                hf.TemperatureLogitsWarper(1.3),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.05),
            ]
        ),
    ),
}


def logits_with_ties(rng):
    """Random rows, rows of few distinct values, a constant row and a row with -inf, in float32."""
    rows = [
        *rng.normal(size=(4, 50)) * 3,
        *rng.integers(0, 4, (4, 50)),
        np.zeros(50),
        rng.normal(size=50),
    ]
    rows[-1][::2] = -np.inf
    return np.array(rows, np.float32)


@pytest.mark.parametrize("name", CASES)
def test_transform_equals_hf_ties_included(name, rng, monkeypatch):
    # HF's top-p leaves the order of ties to an unstable sort, so its own answer is arbitrary there:
    # a stable sort fixes it.
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    ours, theirs = CASES[name]
    logits = logits_with_ties(rng)
    expected = theirs(None, torch.tensor(logits)).numpy()
    np.testing.assert_allclose(jax.jit(ours)(logits), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 20, FEW, FEW + 1])
@pytest.mark.parametrize("p", [0.0, 0.6, 0.97, 1.0])
def test_top_p_of_what_top_k_leaves_of_a_large_vocabulary(k, p, rng, monkeypatch):
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    logits = rng.normal(size=(6, 700)).astype(np.float32) * 2
    logits[3:] = np.round(logits[3:])  # more than k tie
    of_top_k = hf.TopKLogitsWarper(k)(None, torch.tensor(logits))
    theirs = hf.TopPLogitsWarper(p)(None, of_top_k).numpy()
    for rows in (slice(0, 3), slice(None)):
        ours = jax.jit(Chain((TopK(k), TopP(p))))(logits[rows])
        np.testing.assert_array_equal(ours, theirs[rows])


def test_top_k_keeps_ties_with_the_last():
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = np.isfinite(TopK(2)(logits))
    np.testing.assert_array_equal(kept, [[True, False, True, True, False]])


def test_top_p_of_one_is_the_identity(rng):
    logits = jnp.asarray(logits_with_ties(rng))
    np.testing.assert_array_equal(TopP(1.0)(logits), logits)


def test_numbers_may_differ_from_row_to_row(rng):
    logits = jnp.asarray(rng.normal(size=(2, 30)))
    for kind, values in ((Temperature, (0.5, 2.0)), (TopP, (0.3, 0.9)), (MinP, (0.5, 0.1))):
        both = kind(jnp.array(values))(logits)
        for row, value in enumerate(values):
            np.testing.assert_allclose(both[row], kind(value)(logits[row : row + 1])[0])


def test_greedy_takes_the_first_of_ties():
    assert Greedy()(None, jnp.array([[0.0, 5.0, 5.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


def test_argmax_equals_numpys(rng):
    rows = np.concatenate([logits_with_ties(rng), np.full((1, 50), -np.inf, np.float32)])
    found = argmax(jnp.asarray(rows))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, rows.argmax(-1))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_value_up_to_which_a_mass_is_held_is_that_of_a_sort(dtype, rng):
    x = np.concatenate([logits_with_ties(rng), rng.normal(size=(2, 50)) * 1e30]).astype(dtype)
    x[0, :4] = [0.0, -0.0, np.inf, -np.inf]
    weights = rng.random(x.shape).astype(dtype)
    weights[:, ::3] = 0.0
    order = np.argsort(x, axis=-1, kind="stable")
    held = np.take_along_axis(weights, order, axis=-1).cumsum(axis=-1)
    for mass in (0.0, 1e-3, 0.4 * held[:, -1:], 0.99 * held[:, -1:], 2 * held[:, -1:]):
        reaches = held >= mass
        place = np.where(reaches.any(axis=-1), reaches.argmax(axis=-1), 49)
        expected = np.take_along_axis(x, order, axis=-1)[np.arange(len(x)), place]
        found = smallest_holding(jnp.asarray(x), jnp.asarray(weights), jnp.asarray(mass))
        np.testing.assert_array_equal(found[:, 0], expected)


def test_top_k_does_not_sort_the_vocabulary():
    text = jax.jit(TopK(40)).lower(jnp.zeros((2, 5000), jnp.float32)).compile().as_text()
    assert "topk" in text.lower() and " sort(" not in text


@pytest.mark.parametrize("size", [1, 2, 10, 23])
def test_draws_follow_the_softmax_at_every_place_of_the_vocabulary(size, rng):
    n_draws = 40_000
    logits = (rng.normal(size=size) * 1.5).astype(np.float32)
    logits[1::5] = -np.inf
    keys = jax.random.split(jax.random.key(size), n_draws)
    draws = np.asarray(jax.jit(Categorical())(keys, jnp.broadcast_to(logits, (n_draws, size))))
    expected = n_draws * np.asarray(jax.nn.softmax(logits))
    seen = np.bincount(draws, minlength=size)
    possible = expected > 0
    assert not seen[~possible].any()
    chi2 = ((seen[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    # The mean and four standard deviations of chi-squared.
    freedom = possible.sum() - 1
    assert chi2 <= freedom + 4 * np.sqrt(2 * freedom)


def test_draws_from_what_is_no_distribution():
    none = np.full(10, -np.inf)
    infinite, lost = none.copy(), np.zeros(10)
    infinite[[4, 8]] = np.inf
    lost[6] = np.nan
    far = np.full(10, -1e30)
    far[7] = 1e30
    keys = jax.random.split(jax.random.key(0), 4)
    logits = jnp.asarray(np.stack([none, infinite, lost, far]), jnp.float32)
    assert Categorical()(keys, logits).tolist() == [0, 4, 0, 7]


def test_top_1_sampling_is_greedy(rng):
    logits = jnp.asarray(rng.normal(size=(8, 40)))
    keys = jax.random.split(jax.random.key(0), 8)
    np.testing.assert_array_equal(Categorical(TopK(1))(keys, logits), Greedy()(None, logits))


def test_draws_follow_the_softmax_of_the_transformed_logits():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    keys = jax.random.split(jax.random.key(3), 20_000)
    draws = Categorical(Chain((TopK(3),)))(keys, jnp.broadcast_to(logits, (20_000, 4)))
    frequencies = np.bincount(draws, minlength=4) / 20_000
    # Five standard deviations of a frequency near 4/9 over 20,000 draws are 0.018.
    np.testing.assert_allclose(frequencies, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.018)


def test_a_row_draws_the_same_alone(rng):
    logits = jnp.asarray(rng.normal(size=(5, 40)))
    keys = jax.random.split(jax.random.key(1), 5)
    together = Categorical()(keys, logits)
    alone = [int(Categorical()(keys[i : i + 1], logits[i : i + 1])[0]) for i in range(5)]
    assert together.tolist() == alone


def test_the_count_of_a_cut_may_be_numpys():
    logits = jnp.array([[3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(TopK(np.int64(2))(logits), TopK(2)(logits))


def largest_of_reversed(keys, logits, history):
    """A plain function in a sampler's place."""
    del keys, history
    return logits[:, ::-1].argmax(-1)


@struct.dataclass
class OwnSampler:
    """A user's sampler, complete."""

    transform: Any
    draws: ClassVar[bool] = False

    def __call__(self, keys, logits, history=None):
        return argmax(self.transform(logits, history))


@struct.dataclass
class HalfSampler:
    """A user's sampler that says nothing of itself."""

    bias: Any

    def __call__(self, keys, logits, history=None):
        return argmax(logits + self.bias)


class Unhashable:
    """What can be called, but be no static argument of a compiled program."""

    __hash__ = None

    def __call__(self, keys, logits, history=None):
        return argmax(logits)


def test_no_sampler_is_greedy():
    assert as_sampler(None) == Greedy()
    assert not as_sampler(None).draws


@pytest.mark.parametrize("sampler", [Greedy(TopK(3)), Categorical(), OwnSampler(TopK(2))])
def test_a_sampler_stays_what_it_is(sampler):
    assert as_sampler(sampler) is sampler


def test_samplers_say_whether_they_draw():
    assert Categorical.draws
    assert not Greedy.draws


def test_a_function_becomes_a_sampler_that_may_draw():
    sampler = as_sampler(largest_of_reversed)
    ids = sampler(None, jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
    assert ids.tolist() == [0, 2]
    assert ids.dtype == jnp.int32
    assert sampler.draws
    assert sampler.transform is None


def test_equal_functions_compile_once():
    structure = jax.tree.structure(as_sampler(largest_of_reversed))
    assert structure == jax.tree.structure(as_sampler(largest_of_reversed))
    assert structure != jax.tree.structure(as_sampler(lambda *_: 0))


def test_an_incomplete_sampler_counts_as_a_function_whose_numbers_are_leaves():
    sampler = as_sampler(HalfSampler(jnp.array([[0.0, 5.0]])))
    assert sampler.draws
    assert len(jax.tree.leaves(sampler)) == 1
    assert jax.jit(lambda s, x: s(None, x))(sampler, jnp.array([[1.0, 0.0]])).tolist() == [1]


@pytest.mark.parametrize(
    "result, got",
    [
        (lambda keys, logits, history: logits, r"float\d+ of shape \[2, 3\]"),
        (lambda keys, logits, history: 1, r"int\d+ of shape \[\]"),
    ],
)
def test_a_function_must_return_an_id_for_each_row(result, got):
    with pytest.raises(ValueError, match=rf"must return integers of shape \[2\], got {got}"):
        as_sampler(result)(None, jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    "given, message",
    [
        (TopK(3), r"TopK is a transform, not a sampler: use `Categorical\(TopK\(...\)\)`"),
        (Chain(), r"Chain is a transform, not a sampler: use `Categorical\(Chain\(...\)\)`"),
        (Greedy, r"must be an object, got the class Greedy: use `Greedy\(...\)`"),
        ("greedy", "must be a sampler or a function .* got 'greedy'"),
        (Unhashable(), "must be hashable or a pytree, Unhashable is neither"),
    ],
)
def test_what_cannot_be_a_sampler_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        as_sampler(given)


def halved(logits, history):
    return logits / 2


def test_a_function_stands_in_a_transforms_place():
    logits = jnp.array([[0.0, 4.0, 2.0]])
    chained = jax.jit(lambda chain, x: chain(x))(Chain((halved, TopK(2))), logits)
    assert chained.tolist() == [[-np.inf, 2.0, 1.0]]
    for sampler in (Greedy, Categorical):
        assert sampler(halved).transform(logits, None).tolist() == [[0.0, 2.0, 1.0]]
        # It compiles once.
        assert jax.tree.structure(sampler(halved)) == jax.tree.structure(sampler(halved))


class Counting(Stateful):
    """A transform with a state, of a class that JAX does not know."""


@pytest.mark.parametrize(
    "given, message",
    [
        (TopK, "`transform` must be a transform or a function .* got <class"),
        (3, "`transform` must be a transform or a function .* got 3"),
        (Unhashable(), "`transform` must be hashable or a pytree, Unhashable is neither"),
        (Counting(), "Counting is no pytree: make it one, by `flax.struct.dataclass`"),
    ],
)
@pytest.mark.parametrize("put", [Greedy, Categorical, lambda given: Chain((TopK(2), given))])
def test_what_cannot_be_a_transform_is_named(put, given, message):
    with pytest.raises(ValueError, match=message):
        put(given)


@pytest.mark.parametrize(
    "rule",
    [
        RepetitionPenalty(1.5),
        FrequencyPenalty(0.5),
        PresencePenalty(0.5),
        NoRepeatNGram(2),
        SequenceBias.ban([[1]]),
        Suppress((1,), steps=3),
        Suppress((1,), length=3),
        Force((1,), step=2),
        ExponentialDecayLength((1,), 2, 1.5),
    ],
)
def test_a_rule_that_looks_back_names_the_missing_history(rule):
    name = type(rule).__name__
    with pytest.raises(ValueError, match=f"{name} looks back: `history` must be a `History`"):
        rule(jnp.zeros((1, 4)))


def test_a_draw_names_the_missing_keys():
    with pytest.raises(ValueError, match="Categorical draws: `keys` must hold a key for each row"):
        Categorical()(None, jnp.zeros((1, 4)))


def test_ranges_read_as_sentences():
    below_one = Range(low=0, high=1, high_open=True)
    at_least_1 = Range(low=1)
    assert [str(range) for range in (below_one, POSITIVE, at_least_1, FINITE)] == [
        "in [0, 1)",
        "greater than 0",
        "at least 1",
        "finite",
    ]


def test_ranges_hold_their_closed_bounds_alone():
    values = np.array([-0.1, 0.0, 0.5, 1.0, np.nan, np.inf])
    assert Range(0, 1).contains(values).tolist() == [False, True, True, True, False, False]
    inside = Range(0, 1, low_open=True, high_open=True).contains(values)
    assert inside.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Temperature(0.0), "`temperature` must be greater than 0, got 0.0"),
        (lambda: Temperature(float("nan")), "`temperature` must be greater than 0, got nan"),
        (lambda: TopK(0), "`k` of TopK must be a positive integer, got 0"),
        (lambda: TopK(2.5), "`k` of TopK must be a positive integer, got 2.5"),
        (lambda: TopP(1.5), r"`p` must be in \[0, 1\], got 1.5"),
        (lambda: MinP(jnp.array([0.1, -0.1])), r"`min_p` must be in \[0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
