"""Going on from a cache: `extend`, `share`, and `generate(cache=)` equal reading all anew."""

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import GPT2Config, generate
from gpt2_jax.generation.rules import NoRepeatNGram
from gpt2_jax.generation.sampling import Greedy
from gpt2_jax.generation.transforms import Chain
from tests.reference import TINY, assert_near

CONFIG = GPT2Config(**TINY).replace(dtype="float64", n_positions=48)
NEW = 7

apply = jax.jit(gpt2_jax.apply)
prefill = jax.jit(gpt2_jax.prefill, static_argnames="cache_len")
extend = jax.jit(gpt2_jax.extend)


@pytest.fixture(scope="module")
def params():
    params = gpt2_jax.init(jax.random.key(0), CONFIG)
    # Wider than at the start of a training, so that texts differ.
    return jax.tree.map(lambda x: 8 * x, params)


@pytest.fixture
def texts(rng):
    """Prompts of several lengths, padded."""
    return rng.integers(1, 61, (3, 20)), np.array([20, 9, 14])


def assert_same(made, expected):
    np.testing.assert_array_equal(made.ids, expected.ids)
    np.testing.assert_array_equal(made.lengths, expected.lengths)
    np.testing.assert_allclose(made.logprobs, expected.logprobs, atol=1e-6)


def test_ragged_additions_are_read_as_the_whole_texts_would_be(params, texts):
    ids, _ = texts
    n_first, n_second, n_third = np.array([8, 3, 5]), np.array([4, 1, 3]), np.array([1, 5, 2])
    _, cache = prefill(params, ids[:, :8], n_first, config=CONFIG, cache_len=24)
    rows = [[*ids[b, :n]] for b, n in enumerate(n_first)]
    for count, start in ((n_second, 8), (n_third, 12)):
        logits, cache = extend(params, ids[:, start : start + 5], cache, count, config=CONFIG)
        for b, n in enumerate(count):
            n_before = len(rows[b])
            rows[b] += [*ids[b, start : start + n]]
            whole = apply(params, np.array([rows[b]]), config=CONFIG)[0]
            assert_near(logits[b, :n], whole[n_before:], 1e-10)
    assert cache.lengths.tolist() == [13, 9, 10]
    assert cache.valid.sum(axis=1).tolist() == [13, 9, 10]


def test_an_extension_is_tapped(params, texts):
    ids, _ = texts
    _, cache = prefill(params, ids[:, :12], config=CONFIG, cache_len=24)
    tap = gpt2_jax.make_tap({"h.1.attn.out": lambda x: 0 * x}, config=CONFIG)
    logits, _ = gpt2_jax.extend(params, ids[:, 12:], cache, config=CONFIG, tap=tap)
    # Of the last layer alone, so that what was cached before is the same.
    edited = gpt2_jax.apply(params, ids, config=CONFIG, tap=tap)
    assert_near(logits, edited[:, 12:], 1e-10)


def test_what_has_no_room_is_refused(params, texts):
    ids, _ = texts
    _, cache = prefill(params, ids, config=CONFIG, cache_len=24)
    with pytest.raises(ValueError, match="must have 5 free slots, got 4 of 24: see `lengthen`"):
        gpt2_jax.extend(params, ids[:, :5], cache, config=CONFIG)
    longer = gpt2_jax.lengthen(cache, 80)
    with pytest.raises(ValueError, match="would have 50 tokens, but the model has 48 positions"):
        gpt2_jax.extend(params, np.ones((3, 30), int), longer, config=CONFIG)
    with pytest.raises(ValueError, match="must be at least the cache's 24, got 20"):
        gpt2_jax.lengthen(cache, 20)


@pytest.mark.parametrize("cache_len", [12, 48])
def test_generation_goes_on_from_a_cache_as_if_it_read_all(params, texts, cache_len):
    ids, lengths = texts
    known = np.array([12, 8, 1])
    _, cache = prefill(params, ids[:, :12], known, config=CONFIG, cache_len=cache_len)
    options = {"config": CONFIG, "max_new_tokens": NEW, "stop_ids": ()}
    expected = generate(params, ids, lengths, **options)
    assert_same(generate(params, ids, lengths, cache=cache, **options), expected)
    # It stays as it is.
    assert_same(generate(params, ids, lengths, cache=cache, **options), expected)


def test_rules_look_back_on_what_is_in_the_cache(params, texts):
    ids, lengths = texts
    ids = ids % 4 + 1  # so that runs come again
    _, cache = prefill(params, ids[:, :8], config=CONFIG, cache_len=16)
    sampler = Greedy(Chain((NoRepeatNGram(2),)))
    options = {"config": CONFIG, "max_new_tokens": NEW, "stop_ids": (), "sampler": sampler}
    expected = generate(params, ids, lengths, **options)
    assert_same(generate(params, ids, lengths, cache=cache, **options), expected)
    free = generate(params, ids, lengths, **(options | {"sampler": None}))
    assert (free.ids != expected.ids).any()


def test_a_prefix_is_read_once_for_many_continuations(params, texts):
    ids, _ = texts
    prefix = ids[:1, :12]
    questions = [np.r_[prefix[0], ids[row, 12 : 13 + row]] for row in range(3)]
    whole, lengths = _padded(questions)
    _, cache = prefill(params, prefix, config=CONFIG, cache_len=12)
    key = jax.random.key(1)
    options = {"config": CONFIG, "max_new_tokens": NEW, "sampler": gpt2_jax.Categorical()}
    options |= {"num_return_sequences": 2, "stop_ids": ()}
    made = generate(params, whole, lengths, key, cache=gpt2_jax.share(cache, 3), **options)
    assert_same(made, generate(params, whole, lengths, key, **options))


def _padded(rows):
    ids = np.zeros((len(rows), max(map(len, rows))), int)
    for row, text in enumerate(rows):
        ids[row, : len(text)] = text
    return ids, np.array([len(row) for row in rows])


def test_shared_rows_keep_their_order(params, texts):
    ids, lengths = texts
    _, cache = prefill(params, ids, lengths, config=CONFIG, cache_len=24)
    shared = gpt2_jax.share(cache, 2)
    assert shared.lengths.tolist() == [20, 20, 9, 9, 14, 14]
    logits, _ = gpt2_jax.decode_step(params, np.arange(6), shared, config=CONFIG)
    for row in range(6):
        text = np.r_[ids[row // 2, : lengths[row // 2]], row][None]
        assert_near(logits[row], apply(params, text, config=CONFIG)[0, -1], 1e-10)
    with pytest.raises(ValueError, match="`n` must be"):
        gpt2_jax.share(cache, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 2}, "must have 2 layers and 2 rows, got 2 and 3"),
        ({"width": 12}, "row 0 has 12 tokens, the cache holds 12"),
        ({"overflow": "slide", "max_new_tokens": 40}, "reads texts anew: leave out `cache`"),
    ],
)
def test_a_cache_of_other_texts_is_refused(params, texts, change, message):
    ids, _ = texts
    _, cache = prefill(params, ids[:, :12], config=CONFIG, cache_len=12)
    prompts = ids[: change.pop("rows", 3), : change.pop("width", 20)]
    options = {"config": CONFIG, "max_new_tokens": NEW} | change
    with pytest.raises(ValueError, match=message):
        generate(params, prompts, cache=cache, **options)


def test_a_cache_with_holes_is_refused(params, texts):
    ids, _ = texts
    mask = np.ones((3, 12), bool)
    mask[1, 3] = False
    _, cache = prefill(params, ids[:, :12], config=CONFIG, cache_len=12, mask=mask)
    with pytest.raises(ValueError, match="made with a mask, segments or positions"):
        generate(params, ids, config=CONFIG, max_new_tokens=NEW, cache=cache)
