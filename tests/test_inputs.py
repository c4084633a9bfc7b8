"""Positions, masks, segments and embeddings: each is HF's, or equals each text by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt2_jax
from tests.reference import TINY, assert_near, hf_model, ours

N_ROWS = 3
LENGTH = 12
HOLES = np.array([[1] * 12, [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1], [1, 0] * 6])
# Two texts and three; a number comes again for another text.
SEGMENTS = np.array([[1] * 5 + [2] * 7, [3] * 4 + [1] * 4 + [3] * 4, [7] * 12])

apply = jax.jit(gpt2_jax.apply)
prefill = jax.jit(gpt2_jax.prefill, static_argnames="cache_len")
decode_step = jax.jit(gpt2_jax.decode_step)
loss_of = jax.jit(gpt2_jax.next_token_loss)
token_logprobs = jax.jit(gpt2_jax.token_logprobs)


@pytest.fixture(scope="module")
def model():
    return hf_model(**TINY)


@pytest.fixture(scope="module")
def tiny(model):
    return ours(model)


@pytest.fixture
def ids(rng):
    return rng.integers(0, 61, (N_ROWS, LENGTH))


def hf_logits(model, **inputs):
    with torch.no_grad():
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
        return model(**(inputs | tensors)).logits.numpy()


def texts_of(row, segments):
    """A row's texts: slices of runs of equal numbers."""
    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1), len(row)]
    return [slice(*pair) for pair in zip(borders, borders[1:], strict=False)]


def test_a_mask_with_holes_is_hfs(model, tiny, ids):
    config, params = tiny
    logits = apply(params, ids, config=config, mask=HOLES)
    seen = HOLES.astype(bool)  # what a hole says nobody reads
    expected = hf_logits(model, input_ids=ids, attention_mask=HOLES)
    assert_near(np.asarray(logits)[seen], expected[seen], 1e-10)
    unmasked = np.asarray(apply(params, ids, config=config))
    assert np.abs(unmasked - logits)[seen].max() > 0.1


def test_positions_are_hfs(model, tiny, ids):
    config, params = tiny
    # Not from 0 on, and with gaps; rising, as HF takes a fall for the start of another text.
    positions = np.arange(LENGTH)[None] * np.array([[1], [2], [1]]) + np.array([[5], [0], [12]])
    logits = apply(params, ids, config=config, positions=positions)
    assert_near(logits, hf_logits(model, input_ids=ids, position_ids=positions), 1e-10)
    one = apply(params, ids, config=config, positions=positions[:1])
    assert_near(one[0], np.asarray(logits)[0], 1e-12)


@pytest.mark.parametrize("n_heads", [1, 3])
def test_a_whole_mask_takes_the_causal_rules_place(model, tiny, ids, rng, n_heads):
    config, params = tiny
    mask = rng.random((N_ROWS, n_heads, LENGTH, LENGTH)) < 0.5
    mask |= np.eye(LENGTH, dtype=bool)[None, None]  # each sees itself
    added = np.where(mask, 0.0, np.finfo(np.float64).min)  # HF's own kind
    logits = apply(params, ids, config=config, mask=mask)
    assert_near(logits, hf_logits(model, input_ids=ids, attention_mask=added), 1e-10)


def test_embeddings_take_the_place_of_ids(model, tiny, ids, rng):
    config, params = tiny
    embeds = rng.normal(size=(N_ROWS, LENGTH, 24))
    logits = apply(params, None, config=config, inputs_embeds=embeds)
    assert_near(logits, hf_logits(model, inputs_embeds=embeds), 1e-10)
    own = params["wte"]["embedding"][ids]
    same = apply(params, None, config=config, inputs_embeds=own)
    assert_near(same, np.asarray(apply(params, ids, config=config)), 1e-12)


def test_each_segment_is_a_text_by_itself(tiny, ids):
    config, params = tiny
    logits = apply(params, ids, config=config, segment_ids=SEGMENTS)
    logprobs = token_logprobs(params, ids, config=config, segment_ids=SEGMENTS)
    for row, segments in enumerate(SEGMENTS):
        for place in texts_of(ids[row], segments):
            alone = ids[row, place][None]
            assert_near(logits[row, place], apply(params, alone, config=config)[0], 1e-12)
            expected = token_logprobs(params, alone, config=config)[0]
            assert_near(logprobs[row, place.start : place.stop - 1], expected, 1e-12)


def test_positions_that_begin_anew_are_segments_to_hf(model, tiny, ids):
    config, params = tiny
    positions = np.tile(np.r_[0:5, 0:7], (N_ROWS, 1))
    segments = np.tile(SEGMENTS[0], (N_ROWS, 1))
    # As long as it keeps no cache.
    expected = hf_logits(model, input_ids=ids, position_ids=positions, use_cache=False)
    assert_near(apply(params, ids, config=config, segment_ids=segments), expected, 1e-10)


def test_the_loss_of_packed_texts_is_that_of_the_texts(tiny, ids):
    config, params = tiny

    loss_and_grads = jax.jit(jax.value_and_grad(gpt2_jax.next_token_loss, has_aux=True))
    (_, metrics), grads = loss_and_grads(params, ids, config=config, segment_ids=SEGMENTS)
    texts = [
        row[place] for row, of in zip(ids, SEGMENTS, strict=True) for place in texts_of(row, of)
    ]
    weight = sum(len(text) - 1 for text in texts)
    total = 0.0
    summed = jax.tree.map(jnp.zeros_like, params)
    for text in texts:
        (_, text_metrics), text_grads = loss_and_grads(params, text[None], config=config)
        share = (len(text) - 1) / weight
        total += share * text_metrics["loss"]
        summed = jax.tree.map(lambda a, b, share=share: a + share * b, summed, text_grads)
    assert metrics["weight"] == weight
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, summed)
    # A step of training takes the same gradient, in parts as well.
    tx = gpt2_jax.make_optimizer(1e-3)
    ids = np.concatenate([ids, ids[:1]])
    segments = np.concatenate([SEGMENTS, SEGMENTS[:1]])
    steps = [
        gpt2_jax.train_step(
            gpt2_jax.init_state(params, tx),
            ids,
            config=config,
            tx=tx,
            segment_ids=segments,
            micro_batches=n_parts,
        )[1]
        for n_parts in (1, 2)
    ]
    expected, _ = loss_of(params, ids, config=config, segment_ids=segments)
    for metrics in steps:
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(steps[0]["grad_norm"], steps[1]["grad_norm"], rtol=1e-10)


def test_the_loss_takes_masks_positions_and_embeddings(model, tiny, ids):
    config, params = tiny
    positions = np.arange(LENGTH)[None] + np.array([[5], [0], [12]])
    embeds = np.asarray(params["wte"]["embedding"])[ids]
    logits = hf_logits(model, input_ids=ids, attention_mask=HOLES, position_ids=positions)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    # Where a hole reads, its garbage counts: they have weight in neither.
    weights = np.pad(HOLES[:, :-1], ((0, 0), (1, 0)))
    loss, _ = loss_of(
        params,
        ids,
        config=config,
        mask=HOLES,
        positions=positions,
        inputs_embeds=embeds,
        weights=weights,
    )
    chosen = np.take_along_axis(np.asarray(logprobs), ids[:, 1:, None], axis=2)[..., 0]
    expected = -(chosen * weights[:, 1:]).sum() / weights[:, 1:].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["mask", "segment_ids"])
def test_what_follows_a_prefill_sees_what_the_last_token_sees(model, tiny, ids, kind):
    config, params = tiny
    # The last two columns are read one by one, as more of the last text.
    extra = {"mask": HOLES, "segment_ids": SEGMENTS}[kind]
    whole = apply(params, ids, config=config, **{kind: extra})
    n_read = LENGTH - 2
    first = {kind: extra[:, :n_read]}
    logits, cache = prefill(params, ids[:, :n_read], config=config, cache_len=LENGTH, **first)
    is_read = extra[:, n_read - 1] != 0
    assert_near(np.asarray(logits)[is_read], np.asarray(whole)[is_read, n_read - 1], 1e-10)
    for place in range(n_read, LENGTH):
        logits, cache = decode_step(params, ids[:, place], cache, config=config)
        # The mask's new columns are all seen: `HOLES` ends so in the rows that are compared.
        rows = np.array([0, 1])
        assert_near(np.asarray(logits)[rows], np.asarray(whole)[rows, place], 1e-10)


def test_a_prefill_goes_on_from_its_positions(model, tiny, ids):
    config, params = tiny
    positions = np.arange(10)[None] + np.array([[5], [0], [12]])
    lengths = np.array([10, 4, 7])
    _, cache = prefill(
        params, ids[:, :10], lengths, config=config, cache_len=16, positions=positions
    )
    assert cache.lengths.tolist() == [15, 4, 19]
    logits, _ = decode_step(params, ids[:, 10], cache, config=config)
    for row, length in enumerate(lengths):
        text = np.r_[ids[row, :length], ids[row, 10]][None]
        places = np.arange(length + 1)[None] + positions[row, 0]
        expected = hf_logits(model, input_ids=text, position_ids=places)[0, -1]
        assert_near(logits[row], expected, 1e-10)


def test_activations_are_read_and_edited_under_any_layout(tiny, ids):
    config, params = tiny
    edits = {"h.1.attn.z": lambda z: 0 * z}
    logits, acts = gpt2_jax.capture(
        params, ids, config=config, sites="h.1.attn.pattern", segment_ids=SEGMENTS
    )
    assert_near(logits, apply(params, ids, config=config, segment_ids=SEGMENTS), 1e-12)
    pattern = np.asarray(acts["h.1.attn.pattern"])
    same = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    assert (pattern[0][:, ~same] == 0).all()
    patched = gpt2_jax.patch(params, ids, config=config, edits=edits, segment_ids=SEGMENTS)
    alone = gpt2_jax.patch(params, ids[:1, 5:], config=config, edits=edits)
    assert_near(patched[0, 5:], np.asarray(alone)[0], 1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask": np.ones((3, 11))}, r"`mask` must be booleans, or 0 and 1, of shape \[3, 12\] or"),
        ({"mask": np.zeros((3, 12))}, "got float64 of shape"),
        ({"mask": np.ones((3, 2, 12, 12), bool)}, r"got bool of shape \[3, 2, 12, 12\]"),
        (
            {"positions": np.arange(11)[None]},
            r"integers of shape \[3, 12\] or \[1, 12\], got int64",
        ),
        ({"positions": np.full((1, 12), 24)}, r"in \[0, 24\) \(`n_positions`\), got 24"),
        ({"positions": np.full((1, 12), 0.5)}, "must be integers of shape"),
        ({"segment_ids": np.zeros(12, int)}, r"`segment_ids` must be integers of shape \[3, 12\]"),
        (
            {"segment_ids": SEGMENTS, "mask": np.ones((1, 1, 12, 12), bool)},
            "says all: leave out `segment_ids`",
        ),
        ({"inputs_embeds": np.zeros((3, 12, 24))}, "`ids`, which must be None"),
        (
            {"padding_side": "left", "lengths": np.array([3, 4, 5]), "mask": HOLES},
            "leave out `positions`, `mask` and `segment_ids`",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(tiny, ids, arguments, message):
    config, params = tiny
    with pytest.raises(ValueError, match=message):
        gpt2_jax.apply(params, ids, config=config, **arguments)


@pytest.mark.parametrize(
    "embeds, message",
    [
        (None, "`ids` or `inputs_embeds` must be given, got neither"),
        (np.zeros((2, 5, 23)), r"floats of shape \[B, T, 24\], got float64 of shape \[2, 5, 23\]"),
        (np.zeros((2, 5, 24), int), "got int64"),
        (np.zeros((2, 25, 24)), r"1 to 24 \(`n_positions`\) columns, got 25"),
    ],
)
def test_embeddings_that_are_none_are_refused(tiny, embeds, message):
    config, params = tiny
    with pytest.raises(ValueError, match=message):
        gpt2_jax.apply(params, None, config=config, inputs_embeds=embeds)
