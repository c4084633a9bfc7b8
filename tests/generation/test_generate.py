import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax import (
    Categorical,
    Chain,
    GPT2Config,
    Greedy,
    Temperature,
    TopK,
    TopP,
    generate,
    stream,
)
from gpt2_jax.cache import bucket, cache_slots
from gpt2_jax.generation.decode import Start, advance, begin
from gpt2_jax.generation.generate import compile_first_token
from gpt2_jax.generation.request import make_request, read_endings, read_prompts

TINY = GPT2Config(
    vocab_size=61,
    n_positions=64,
    n_embd=24,
    n_layer=2,
    n_head=3,
    eos_token_id=None,
    bos_token_id=None,
)
apply = jax.jit(gpt2_jax.apply)
SAMPLER = Categorical(Chain((Temperature(1.5), TopK(30), TopP(0.95))))


@pytest.fixture(scope="module")
def params():
    # Larger weights than GPT-2's, so that the texts of different prompts differ.
    return jax.tree.map(lambda x: 5 * x, gpt2_jax.init(jax.random.key(0), TINY))


@pytest.fixture
def prompts(rng):
    return rng.integers(0, 61, (4, 9)), np.array([9, 3, 1, 6])


def keys(count):
    return jax.random.split(jax.random.key(7), count)


def test_a_rows_text_is_the_same_alone_and_in_a_batch(params, prompts):
    ids, lengths = prompts
    together = generate(
        params, ids, lengths, keys(4), config=TINY, max_new_tokens=12, sampler=SAMPLER
    )
    for i in range(4):
        alone = generate(
            params,
            ids[i : i + 1],
            lengths[i : i + 1],
            keys(4)[i : i + 1],
            config=TINY,
            max_new_tokens=12,
            sampler=SAMPLER,
        )
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-5)


def test_the_padding_side_and_its_content_change_nothing(params, prompts):
    ids, lengths = prompts
    right = generate(params, ids, lengths, keys(4), config=TINY, max_new_tokens=12, sampler=SAMPLER)
    left = np.stack(
        [np.roll(row, 9 - length) for row, length in zip((ids + 1) % 61, lengths, strict=True)]
    )
    place = np.arange(9)[None] >= 9 - lengths[:, None]
    left = np.where(place, (left - 1) % 61, left)
    chex.assert_trees_all_equal(
        generate(
            params,
            left,
            lengths,
            keys(4),
            config=TINY,
            max_new_tokens=12,
            sampler=SAMPLER,
            padding_side="left",
        ),
        right,
    )


def test_a_longer_run_begins_with_the_shorter_ones_tokens(params, prompts):
    short = generate(
        params, *prompts, jax.random.key(1), config=TINY, max_new_tokens=5, sampler=SAMPLER
    )
    long = generate(
        params, *prompts, jax.random.key(1), config=TINY, max_new_tokens=12, sampler=SAMPLER
    )
    np.testing.assert_array_equal(long.ids[:, :5], short.ids)


def test_stream_yields_what_generate_returns(params, prompts):
    options = {"config": TINY, "sampler": SAMPLER, "stop_ids": (5, 9, 30, 31, 32, 33)}
    whole = generate(params, *prompts, jax.random.key(2), max_new_tokens=23, **options)
    for chunk in (1, 4):
        pieces = list(
            stream(params, *prompts, jax.random.key(2), max_new_tokens=23, chunk=chunk, **options)
        )
        ids = np.concatenate([piece.ids for piece in pieces], axis=1)
        np.testing.assert_array_equal(ids, whole.ids[:, : ids.shape[1]])
        np.testing.assert_array_equal(
            sum(np.asarray(piece.lengths) for piece in pieces), whole.lengths
        )
        np.testing.assert_allclose(
            np.concatenate([piece.logprobs for piece in pieces], axis=1),
            whole.logprobs[:, : ids.shape[1]],
            atol=1e-5,
        )


def test_one_key_is_folded_with_the_rows_number(params, prompts):
    key = jax.random.key(3)
    row_keys = jnp.stack([jax.random.fold_in(key, i) for i in range(4)])
    one = generate(params, *prompts, key, config=TINY, max_new_tokens=5, sampler=SAMPLER)
    many = generate(params, *prompts, row_keys, config=TINY, max_new_tokens=5, sampler=SAMPLER)
    raw = generate(
        params, *prompts, jax.random.PRNGKey(3), config=TINY, max_new_tokens=5, sampler=SAMPLER
    )
    chex.assert_trees_all_equal(one, many, raw)


def test_a_stop_id_ends_its_row_and_padding_follows(params, prompts):
    free = generate(params, *prompts, config=TINY, max_new_tokens=20)
    stops = (int(free.ids[0, 3]), int(free.ids[1, 7]))
    out = generate(params, *prompts, config=TINY, max_new_tokens=20, stop_ids=stops, pad_id=60)
    for i in range(4):
        hits = np.flatnonzero(np.isin(free.ids[i], stops))
        length = hits[0] + 1 if hits.size else 20
        assert out.lengths[i] == length
        np.testing.assert_array_equal(out.ids[i, :length], free.ids[i, :length])
        assert (np.asarray(out.ids[i, length:]) == 60).all() and not np.asarray(
            out.logprobs[i, length:]
        ).any()
    assert out.lengths[0] <= 4


def test_logprobs_are_the_models_own(params, prompts):
    ids, lengths = prompts
    out = jax.device_get(
        generate(
            params, ids, lengths, jax.random.key(4), config=TINY, max_new_tokens=6, sampler=SAMPLER
        )
    )
    for i, length in enumerate(lengths):
        whole = np.zeros((1, 15), int)
        whole[0, : length + 6] = [*ids[i, :length], *out.ids[i]]
        logp = jax.nn.log_softmax(apply(params, whole, config=TINY))[0, length - 1 :][:6]
        np.testing.assert_allclose(
            out.logprobs[i], logp[np.arange(6), np.asarray(out.ids[i])], atol=1e-5
        )


def test_the_whole_context_can_be_used(params, rng):
    ids = rng.integers(0, 61, (1, 50))
    out = generate(params, ids, config=TINY, max_new_tokens=14)
    whole = np.concatenate([ids, out.ids], axis=1)
    greedy = apply(params, whole, config=TINY).argmax(-1)
    np.testing.assert_array_equal(greedy[0, 49:-1], out.ids[0])


def test_new_numbers_prompts_and_seeds_compile_nothing_new(params, rng):
    programs = (begin, advance)
    for program in programs:
        program.clear_cache()
    for i in range(20):
        width = 1 + (7 * i) % 28  # one bucket, and one cache
        sampler = Categorical(Chain((Temperature(0.5 + 0.1 * i), TopK(30), TopP(0.9 - 0.01 * i))))
        generate(
            params,
            rng.integers(0, 61, (2, width)),
            None,
            jax.random.key(i),
            config=TINY,
            max_new_tokens=2 + i % 3,
            sampler=sampler,
            stop_ids=(i,),
            pad_id=i,
        )
    assert [program._cache_size() for program in programs] == [1, 1]
    generate(params, rng.integers(0, 61, (2, 33)), config=TINY, max_new_tokens=4)
    assert [program._cache_size() for program in programs] == [2, 2]


def test_cache_sizes_are_enough_and_few():
    assert [cache_slots(32, most) for most in (32, 33, 159, 160, 161, 256, 2000)] == [
        32,
        64,
        160,
        160,
        192,
        256,
        256,
    ]
    assert [cache_slots(used, 2000) for used in (256, 300, 512, 900, 1024)] == [
        512,
        640,
        1024,
        2048,
        2048,
    ]
    sizes = {
        (used, most): cache_slots(used, most)
        for most in range(1, 1025)
        for used in range(1, most + 1)
    }
    assert all(size >= min(most, 2 * used) for (used, most), size in sizes.items())
    assert len(set(sizes.values())) == 16


def test_a_cache_that_grows_changes_nothing_and_is_compiled_for_ahead(rng, caplog):
    config = TINY.replace(n_positions=1024, n_layer=1)
    params = jax.tree.map(lambda x: 5 * x, gpt2_jax.init(jax.random.key(0), config))
    ids, lengths = rng.integers(0, 61, (2, 30)), np.array([30, 11])
    advance.clear_cache()
    with jax.log_compiles():  # in this thread
        # 256 slots, then 512, then 640.
        out = generate(params, ids, lengths, config=config, max_new_tokens=600)
    compiled = [
        record.message
        for record in caplog.records
        if record.message.startswith("Compiling jit(advance)")
    ]
    assert len(compiled) == 1 and advance._cache_size() == 3
    for row, length in enumerate(lengths):
        whole = np.zeros((1, 640), int)
        whole[0, : length + 600] = [*ids[row, :length], *np.asarray(out.ids[row])]
        logits = apply(params, whole, config=config)[0, length - 1 : length + 599]
        np.testing.assert_array_equal(logits.argmax(-1), out.ids[row])
        logp = jax.nn.log_softmax(logits).max(-1)
        np.testing.assert_allclose(out.logprobs[row], logp, atol=1e-5)
    for chunk in (100, 500):
        pieces = list(stream(params, ids, lengths, config=config, max_new_tokens=600, chunk=chunk))
        np.testing.assert_array_equal(
            np.concatenate([piece.ids for piece in pieces], axis=1), out.ids
        )


@pytest.mark.parametrize("sampler", [Greedy(), SAMPLER])
def test_a_program_is_compiled_for_shapes_and_then_found(sampler, params, prompts, caplog):
    ids, lengths = prompts
    key = jax.random.key(1)
    options = {"config": TINY, "max_new_tokens": 1, "sampler": sampler}
    shapes = jax.eval_shape(lambda: params)
    begin.clear_cache()
    with jax.log_compiles():
        compile_first_token(shapes, ids, lengths, key, **options)
        ahead = [record.message for record in caplog.records if "jit(begin)" in record.message]
        caplog.clear()
        generate(params, ids, lengths, key, **options)
    assert any(message.startswith("Compiling jit(begin)") for message in ahead)
    assert "begin" not in caplog.text


def test_a_cache_grows_under_settings_of_one_thread_too(rng):
    config = TINY.replace(n_positions=512, n_layer=1)
    with jax.enable_x64(False):  # where the compiling thread has it on
        params = gpt2_jax.init(jax.random.key(0), config)
        inside = generate(params, rng.integers(0, 61, (1, 9)), config=config, max_new_tokens=300)
    assert inside.lengths.tolist() == [300]
    assert inside.ids.dtype == jnp.int32 and inside.logprobs.dtype == jnp.float32


def test_work_ends_when_every_row_has(params, prompts):
    free = generate(params, *prompts, config=TINY, max_new_tokens=20)
    stops = tuple(np.unique(free.ids[:, 3]).tolist())
    request = make_request(
        read_prompts(*prompts, "right", config=TINY),
        read_endings(stops, 0, config=TINY),
        key=None,
        sampler=None,
    )
    state, _ = begin(params, request, Start(), config=TINY, cache_len=32, num_return_sequences=1)
    state, out = advance(params, state, request.rules, 15, config=TINY, chunk=20)
    assert state.step <= 4
    np.testing.assert_array_equal(out.ids[:, 3:], 0)


def test_buckets_are_powers_of_two_up_to_the_largest():
    assert [bucket(n, 1000) for n in (1, 32, 33, 64, 65, 513, 1000)] == [
        32,
        32,
        64,
        64,
        128,
        1000,
        1000,
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": [[1, 61]]}, r"`ids` must be in \[0, 61\).*got 61"),
        ({"lengths": [0]}, "`lengths` must be in 1 to 3, the columns of `ids`; got 0"),
        ({"lengths": [4]}, "`lengths` must be in 1 to 3, the columns of `ids`; got 4"),
        (
            {"lengths": [1, 2]},
            r"`lengths` must be integers of shape \[1\], got int64 of shape \[2\]",
        ),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer, got 0"),
        (
            {"max_new_tokens": 62},
            "prompt has 3 tokens and `max_new_tokens` is 62, together 65, .* 64 positions",
        ),
        ({"sampler": SAMPLER}, "`key` must be given .* Categorical"),
        ({"key": keys(3), "sampler": SAMPLER}, r"one key or 1 keys, one per row; got shape \[3\]"),
        ({"padding_side": "up"}, "`padding_side` must be"),
        (
            {"num_return_sequences": 10**9, "sampler": SAMPLER, "key": keys(1)[0]},
            r"`num_return_sequences` is 1000000000: 1,000,000,000 rows need at least [\d,]+ GB",
        ),
        ({"max_new_tokens": 2**31}, "`max_new_tokens` must be at most 2147483647, got 2147483648"),
        ({"stop_ids": (61,)}, r"`stop_ids` must be in \[0, 61\) \(`vocab_size`\), got 61"),
        ({"stop_ids": [1, 2.5]}, r"`stop_ids` must be in \[0, 61\) \(`vocab_size`\), got 2.5"),
        ({"stop_ids": ["3"]}, r"`stop_ids` must be in \[0, 61\) \(`vocab_size`\), got '3'"),
        ({"stop_ids": 3}, "`stop_ids` must be a sequence of ids, got 3"),
        ({"stop_ids": "3"}, "`stop_ids` must be a sequence of ids, got '3'"),
        ({"pad_id": True}, r"`pad_id` must be in \[0, 61\) \(`vocab_size`\), got True"),
        ({"pad_id": -1}, r"`pad_id` must be in \[0, 61\) \(`vocab_size`\), got -1"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(params, changes, message):
    arguments = {
        "ids": [[1, 2, 3]],
        "lengths": None,
        "key": None,
        "config": TINY,
        "max_new_tokens": 4,
    } | changes
    with pytest.raises(ValueError, match=message):
        generate(params, **arguments)
    with pytest.raises(ValueError, match=message):
        stream(params, **arguments)


def test_ids_of_the_config_that_the_vocabulary_lacks_are_left_out(params, prompts):
    beyond = TINY.replace(eos_token_id=50256, pad_token_id=-1)
    assert read_endings(None, None, config=beyond) == ((), 0)
    some = TINY.replace(eos_token_id=(50256, 7), pad_token_id=60)
    assert read_endings(None, None, config=some) == ((7,), 60)
    chex.assert_trees_all_equal(
        generate(params, *prompts, config=beyond, max_new_tokens=4),
        generate(params, *prompts, config=TINY, max_new_tokens=4),
    )


def test_greedy_is_the_default(params, prompts):
    chex.assert_trees_all_equal(
        generate(params, *prompts, config=TINY, max_new_tokens=4),
        generate(params, *prompts, config=TINY, max_new_tokens=4, sampler=Greedy()),
    )


@pytest.mark.parametrize("keep, sampler", [(64, None), (None, None), (10, None), (None, SAMPLER)])
def test_past_the_context_a_row_slides_on_from_its_last_tokens(params, rng, keep, sampler):
    ids, lengths, new = rng.integers(0, 61, (3, 70)), np.array([70, 40, 61]), 35
    options = {
        "config": TINY,
        "max_new_tokens": new,
        "sampler": sampler,
        "stop_ids": (),
        "overflow": "slide",
    }
    out = jax.device_get(generate(params, ids, lengths, keys(3), keep=keep, **options))
    assert (out.lengths == new).all()
    for row in range(3):
        text = ids[row, : lengths[row]].tolist()
        start = 0
        for i in range(new):
            if len(text) - start >= 64:
                start = len(text) - (keep or 32)
            seen = np.zeros((1, 64), int)
            seen[0, : len(text) - start] = text[start:]
            logits = apply(params, seen, config=TINY)[:, len(text) - start - 1]
            if sampler:
                token = int(sampler(jax.random.fold_in(keys(3)[row], i)[None], logits)[0])
            else:
                token = int(logits.argmax())
            assert out.ids[row, i] == token
            logp = jax.nn.log_softmax(logits)[0, token]
            np.testing.assert_allclose(out.logprobs[row, i], logp, atol=2e-5)
            text.append(token)
    pieces = list(stream(params, ids, lengths, keys(3), keep=keep, chunk=5, **options))
    np.testing.assert_array_equal(np.concatenate([piece.ids for piece in pieces], axis=1), out.ids)


def test_sliding_rows_end_at_their_stop_ids_and_number_their_steps(params, rng):
    ids, lengths = rng.integers(0, 61, (2, 60)), np.array([60, 20])
    options = {"config": TINY, "max_new_tokens": 50, "pad_id": 3, "overflow": "slide"}
    free = np.asarray(generate(params, ids, lengths, stop_ids=(), **options).ids)
    stop = next(int(id) for id in free[0, 10:] if id not in free[0, :10])
    out = generate(params, ids, lengths, stop_ids=(stop,), **options)
    for row in range(2):
        ends = np.flatnonzero(free[row] == stop)
        end = ends[0] + 1 if len(ends) else 50
        assert out.lengths[row] == end
        np.testing.assert_array_equal(out.ids[row], [*free[row, :end], *[3] * (50 - end)])
    late = gpt2_jax.sampler_from_options({"min_new_tokens": 45}, stop_ids=(stop,))
    assert (
        generate(params, ids, lengths, stop_ids=(stop,), sampler=late, **options).lengths >= 45
    ).all()


def test_past_the_context_a_row_stops(params, rng):
    ids, lengths = rng.integers(0, 61, (3, 60)), np.array([60, 20, 55])
    options = {"config": TINY, "stop_ids": (), "pad_id": 3}
    out = generate(params, ids, lengths, max_new_tokens=50, overflow="stop", **options)
    np.testing.assert_array_equal(out.lengths, [4, 44, 9])
    assert out.ids.shape == (3, 50)
    for row, length in enumerate([4, 44, 9]):
        alone = generate(
            params, ids[row : row + 1, : lengths[row]], max_new_tokens=length, **options
        )
        np.testing.assert_array_equal(out.ids[row], [*alone.ids[0], *[3] * (50 - length)])
        assert not out.logprobs[row, length:].any()
    pieces = list(stream(params, ids, lengths, max_new_tokens=50, overflow="stop", **options))
    np.testing.assert_array_equal(sum(np.asarray(piece.lengths) for piece in pieces), [4, 44, 9])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 5}, "is 5, together 65, but the model has 64 positions"),
        ({"overflow": "clamp"}, '`overflow` must be "error", "stop" or "slide", got \'clamp\''),
        (
            {"overflow": "stop", "keep": 3},
            '`keep` must be in 1 to 64, with `overflow="slide"`; got 3',
        ),
        ({"overflow": "slide", "keep": 65}, "`keep` must be in 1 to 64, .* got 65"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a positive integer, got 0"),
    ],
)
def test_bad_ways_past_the_context_are_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        generate(params, np.zeros((1, 60), int), config=TINY, **({"max_new_tokens": 3} | options))
    if options.get("overflow") == "stop":
        with pytest.raises(ValueError, match="has 64 tokens"):
            generate(params, np.zeros((1, 64), int), config=TINY, max_new_tokens=3, overflow="stop")


def test_the_bucket_changes_nothing(params, rng):
    """A prompt of 5 tokens in a bucket of 32, and beside one of 40 tokens in a bucket of 64."""
    short, long = rng.integers(0, 61, (1, 5)), rng.integers(0, 61, (1, 40))
    both = np.concatenate([np.pad(short, ((0, 0), (0, 35))), long])
    options = {"config": TINY, "max_new_tokens": 12, "sampler": SAMPLER, "stop_ids": ()}
    alone = generate(params, short, None, keys(2)[:1], **options)
    together = generate(params, both, np.array([5, 40]), keys(2), **options)
    np.testing.assert_array_equal(alone.ids[0], together.ids[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda *args, **options: generate(*args, **options),
        lambda *args, **options: list(gpt2_jax.stream(*args, **options)),
        lambda *args, **options: gpt2_jax.beam_search(*args, num_beams=2, **options),
        lambda *args, **options: gpt2_jax.speculate(*args, **options),
    ],
)
def test_logits_that_are_no_numbers_are_an_error(make):
    params = gpt2_jax.init(jax.random.key(0), TINY)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[3].set(jnp.inf)
    config = TINY.replace(dtype="bfloat16")
    with pytest.raises(FloatingPointError, match="overflow in bfloat16: `load` them"):
        make(params, np.array([[1, 2]]), config=config, max_new_tokens=2)
