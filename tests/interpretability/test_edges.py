"""Edge attribution has the derivatives of real path patching; in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.interpretability.edges import EDGE_SITES, EdgeScores, edge_attribution
from gpt2_jax.interpretability.edits import add, replace
from gpt2_jax.interpretability.patching import path_patch
from gpt2_jax.interpretability.sites import find_sites
from tests.interpretability.hooks import near

LAYERS, HEADS = 2, 3
LENGTHS = np.array([5, 3])
UNCHANGED = {"embed": replace(0.0, False)}  # so that one program serves other edits, too


def metric(logits):
    """A difference of two logits, summed over the rows, `[B, V] -> []`."""
    return (logits[:, 3] - logits[:, 8]).sum()


@pytest.fixture(scope="module")
def small(tiny):
    """The first two layers: config and params."""
    config, params = tiny
    layers = {name: params["h"][name] for name in ("0", "1")}
    return config.replace(n_layer=LAYERS), params | {"h": layers}


@pytest.fixture(scope="module")
def donors(small, acts):
    """What the senders of the second batch write."""
    config, _ = small
    return {site: acts[1][site] for site in find_sites(EDGE_SITES, config)}


@pytest.fixture(scope="module")
def scores(small, texts, donors):
    config, params = small

    @partial(jax.jit, static_argnames="steps")
    def run(donors, edits, steps):
        return edge_attribution(
            params, texts[0], donors, metric, LENGTHS, config=config, steps=steps, edits=edits
        )

    return lambda edits, steps=1: run(donors, edits, steps)


def strengths_by_site(strengths, sites):
    """Splits a number for each sender or receiver by sites: a layer's heads share one."""
    by_site = {}
    for site in sites:
        count = HEADS if ".attn." in site else 1
        number, strengths = strengths[:count], strengths[count:]
        by_site[site] = number[None, None, :, None] if count > 1 else number[0]
    assert not len(strengths)
    return by_site


def test_scores_are_the_derivatives_of_path_patching(small, texts, acts, donors, scores, rng):
    """Of each receiver alone, where each sender writes so much of its change."""
    config, params = small
    senders = find_sites(EDGE_SITES, config)
    last = f"h.{LAYERS - 1}.resid_post"
    receivers = find_sites(("h.*.attn.[qkv]_in", "h.*.mlp.in", last), config)

    def effect(strengths, is_receiver):
        edits = {}
        for site, strength in strengths_by_site(strengths, senders).items():
            edits[site] = add(donors[site] - acts[0][site], strength)
        masks = strengths_by_site(is_receiver, receivers)
        logits = path_patch(params, texts[0], edits, config=config, receivers=masks)
        return metric(logits[jnp.arange(2), LENGTHS - 1])

    found = scores(UNCHANGED)
    n_senders, n_receivers = found.scores.shape
    parts = rng.normal(size=n_senders)

    @jax.jit
    @jax.vmap
    def derivative(is_receiver):
        at_nothing = jnp.zeros(n_senders)
        return jax.jvp(lambda x: effect(x, is_receiver), (at_nothing,), (parts,))[1]

    near(parts @ found.scores, derivative(jnp.eye(n_receivers, dtype=bool)))
    assert n_senders == 1 + LAYERS * (HEADS + 1)
    assert n_receivers == LAYERS * (3 * HEADS + 1) + 1

    edges = found.strongest(4)
    assert [abs(edge.score) for edge in edges] == sorted(np.abs(found.scores).ravel())[:-5:-1]
    for edge in edges:
        row = found.senders.index(edge.sender)
        assert found.scores[row, found.receivers.index(edge.receiver)] == edge.score
    assert found.senders[:5] == ("embed", "h.0.attn[0]", "h.0.attn[1]", "h.0.attn[2]", "h.0.mlp")
    assert found.receivers[3] == "h.0.attn[0].k"
    assert found.receivers[9:11] == ("h.0.mlp", "h.1.attn[0].q")
    assert found.receivers[-1] == "logits"


def test_integrated_gradients_are_the_mean_on_the_way_to_the_text(acts, donors, scores):
    """For the embeddings, of which half way half of the change is left."""
    half = (acts[0]["embed"] + donors["embed"]) / 2
    at_half = scores({"embed": replace(half, True)}).scores[0]
    expected = (scores(UNCHANGED).scores[0] + 2 * at_half) / 2
    near(scores(UNCHANGED, steps=2).scores[0], expected)


def test_bad_donors_and_steps_are_named(small, texts, donors):
    config, params = small
    run = partial(edge_attribution, params, texts[0], metric=metric, config=config)
    with pytest.raises(ValueError, match="must have every site, they lack embed, h.0.attn.z"):
        run({site: x for site, x in donors.items() if not site.startswith(("embed", "h.0"))})
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        run(donors, steps=0)


def test_scores_are_a_pytree_with_their_names():
    tree = EdgeScores(jnp.ones((1, 1)), ("embed",), ("logits",))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(tree)
    assert doubled.strongest(5) == [("embed", "logits", 2.0)]
