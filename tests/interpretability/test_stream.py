"""Activations over a corpus are those of its windows; what is learnt from them stands in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpt2_jax
from gpt2_jax.interpretability import stream
from gpt2_jax.interpretability.stream import capture_stream
from gpt2_jax.interpretability.taps import capture
from tests.interpretability.hooks import near
from tests.reference import DATA


def test_windows_of_a_token_file_have_the_activations_of_their_texts(tiny, rng, tmp_path):
    config, params = tiny
    ids = rng.integers(0, 61, 5 * 6 + 2)
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    corpus = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
    edits = {"h.0.mlp.out": 0.0}
    options = {"config": config, "sites": ("h.1.attn.z", "h.2.resid_post"), "length": 6}
    programs = stream._capture._cache_size()
    batches = list(capture_stream(params, corpus, batch_size=2, edits=edits, **options))
    assert [len(batch.ids) for batch in batches] == [2, 2, 1]  # the last two ids are no window
    read = np.concatenate([batch.ids for batch in batches])
    np.testing.assert_array_equal(read, ids[:30].reshape(5, 6))
    run = jax.jit(capture, static_argnames="sites")
    _, expected = run(params, read, config=config, sites=options["sites"], edits=edits)
    for site, x in expected.items():
        near(np.concatenate([batch.acts[site] for batch in batches]), x)
    # Another text, and another value.
    again = capture_stream(params, ids, batch_size=2, edits={"h.0.mlp.out": 1.0}, **options)
    assert np.abs(next(again).acts["h.2.resid_post"] - expected["h.2.resid_post"][:2]).max() > 1e-3
    assert stream._capture._cache_size() == programs + 1


def test_bad_corpora_are_named(tiny):
    config, params = tiny
    ids = np.zeros(30, np.uint16)
    for corpus, options, message in (
        (ids.reshape(5, 6), {}, r"integers of shape \[N\], got uint16 of shape \[5, 6\]"),
        (ids[:5], {"length": 6}, "must hold a window of 6 ids, got 5"),
        (ids, {"length": 25}, r"1 to 24 \(`n_positions`\), got 25"),
        (ids, {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            capture_stream(params, corpus, config=config, sites="embed", **options)
    batches = capture_stream(params, ids + 61, config=config, sites="embed")
    with pytest.raises(ValueError, match=r"in \[0, 61\) \(`vocab_size`\), got 61"):
        next(batches)


def test_a_sparse_autoencoder_learnt_from_a_stream_stands_in_for_the_activations():
    """On stories that it was not trained on."""
    config, params = gpt2_jax.load("demo")
    site = "h.1.mlp.out"
    page = (DATA / "demo-stories.txt").read_text(encoding="utf-8")
    ids = np.array(gpt2_jax.load_tokenizer("demo").encode(page))
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    held_out, corpus = windows[-6:], windows[:-6].ravel()

    def encode(sae, x):
        return jax.nn.relu((x - sae["mean"]) @ sae["encoder"] + sae["bias"])

    def decode(sae, features):
        return features @ sae["encoder"].T + sae["mean"]

    def loss(sae, x):
        features = encode(sae, x)
        error = jnp.square(decode(sae, features) - x).sum(-1).mean()
        return error + 0.1 * jnp.abs(features).sum(-1).mean()

    @jax.jit
    def step(sae, state, x):
        updates, state = tx.update(jax.grad(loss)(sae, x), state)
        return optax.apply_updates(sae, updates), state

    encoder = 0.06 * jax.random.normal(jax.random.key(0), (256, 256), jnp.float32)
    zeros = jnp.zeros((1, 256), jnp.float32)
    sae = {"encoder": encoder, "bias": zeros, "mean": zeros}
    tx = optax.adam(3e-3)
    state = tx.init(sae)
    stream = capture_stream(params, corpus, config=config, sites=site, length=64)
    batches = [batch.acts[site].reshape(-1, 256) for batch in stream]
    for _ in range(20):
        for x in batches:
            sae, state = step(sae, state, x)

    @jax.jit
    def held_out_loss(own, learnt, sae):
        def edit(x):
            features = encode(sae, x.reshape(-1, 256))
            return own * x + learnt * decode(sae, features).reshape(x.shape)

        tap = gpt2_jax.make_tap({site: edit}, config=config)
        return gpt2_jax.next_token_loss(params, held_out, config=config, tap=tap)[0]

    plain = held_out_loss(1.0, 0.0, sae)
    ablated = held_out_loss(0.0, 0.0, sae)
    recovered = (ablated - held_out_loss(0.0, 1.0, sae)) / (ablated - plain)
    assert 0.85 < recovered < 1  # 0.93 of what the site does to the loss
