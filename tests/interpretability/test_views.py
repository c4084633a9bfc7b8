"""What is shown of a text equals the activations it is said to be, and the library's own sweep."""

import jax
import numpy as np
import pytest

from gpt2_jax.interpretability import views
from gpt2_jax.interpretability.edits import replace
from gpt2_jax.interpretability.patching import patching_sweep
from gpt2_jax.interpretability.taps import capture
from gpt2_jax.interpretability.views import Contrast, SweepPlan
from tests.interpretability.hooks import near

LENGTH, LAYERS, HEADS = 5, 3, 3
ANSWERS = (3, 8)


@pytest.fixture(scope="module")
def text(texts):
    """The first row of the first batch, `[1, T]`."""
    return texts[0][:1]


@pytest.fixture(scope="module")
def donor(texts):
    """The first row of the second batch."""
    return texts[1][:1]


def test_the_last_line_of_a_lens_is_the_models_own_prediction(tiny, text, acts):
    config, params = tiny
    # The last stream is another text's.
    edits = {"h.2.resid_post": acts[1]["h.2.resid_post"][:1]}
    view = views.view_lens(params, text, config=config, sites="h.*.resid_post", edits=edits)
    probabilities = jax.nn.softmax(acts[1]["logits"][0])
    assert view.sites == tuple(f"h.{i}.resid_post" for i in range(LAYERS))
    np.testing.assert_array_equal(view.best[-1], probabilities.argmax(-1))
    near(view.probabilities[-1], probabilities.max(-1))
    assert view.best.shape == view.probabilities.shape == (LAYERS, LENGTH)


def test_patterns_are_those_of_the_pass_in_its_order(tiny, text, acts):
    config, params = tiny
    sites = ("h.2.attn.pattern", "h.0.attn.pattern")
    edits = {"h.2.attn.pattern": acts[1]["h.0.attn.pattern"][:1]}
    view = views.view_patterns(params, text, config=config, sites=sites, edits=edits)
    assert view.sites == ("h.0.attn.pattern", "h.2.attn.pattern")
    near(view.patterns[0], acts[0]["h.0.attn.pattern"][0])
    near(view.patterns[1], acts[1]["h.0.attn.pattern"][0])


def test_a_text_has_its_own_probabilities_and_those_likeliest(tiny, text, acts):
    config, params = tiny
    # Its last token is read off another text's last stream.
    edits = {"h.2.resid_post": replace(acts[1]["h.2.resid_post"][:1, 3:4], at=[3])}
    view = views.view_text(params, text, config=config, sites="h.1.*.pattern", edits=edits)
    own, other = (jax.nn.softmax(seen["logits"][0]) for seen in acts)
    expected = np.array([own[i, text[0, i + 1]] for i in range(3)] + [other[3, text[0, 4]]])
    near(view.probabilities, expected)
    order = np.argsort(-own[4])[:5]
    np.testing.assert_array_equal(view.best[4], order)
    near(view.best_probabilities[4], own[4][order])
    assert view.sites == ("h.1.attn.pattern",)
    np.testing.assert_allclose(view.patterns[0], acts[0]["h.1.attn.pattern"][0], rtol=1e-6)


def test_a_site_of_other_axes_is_refused(tiny, text):
    config, params = tiny
    with pytest.raises(ValueError, match="must have the axes B T D, got B T H K at h.1.attn.z"):
        views.view_lens(params, text, config=config, sites=("h.0.resid_pre", "h.1.attn.z"))
    with pytest.raises(ValueError, match="must have the axes B H T S, got B T D at ln_f.out"):
        views.view_patterns(params, text, config=config, sites="ln_f.out")
    with pytest.raises(ValueError, match="must have the axes B H T S, got B T D at ln_f.out"):
        views.view_text(params, text, config=config, sites="ln_f.out")
    with pytest.raises(ValueError, match="`count` must be a positive integer, got 0"):
        views.view_text(params, text, config=config, count=0)


def test_a_contrast_is_a_difference_of_logits_after_each_text(tiny, text, donor, acts):
    config, params = tiny
    of_text, of_donor = (seen["logits"][0, -1] for seen in acts)
    edits = {"logits": lambda x: 2 * x}
    found = views.contrast(params, text, donor, ANSWERS, config=config, edits=edits)
    near(found.unpatched, 2 * (of_text[3] - of_text[8]))
    near(found.donor, 2 * (of_donor[3] - of_donor[8]))
    assert found.answers == ANSWERS


def test_without_answers_a_contrast_is_between_the_predictions(tiny, text, donor, acts):
    config, params = tiny
    predicted = [int(seen["logits"][0, -1].argmax()) for seen in acts]
    found = views.contrast(params, text, donor, config=config)
    assert found.answers == (predicted[1], predicted[0])


@pytest.mark.parametrize("over, batches", [("T", [2, 2, 1]), ("H", [2, 1]), ("", [1])])
def test_patching_is_the_sweep_in_batches_that_show_progress(
    tiny, text, donor, acts, over, batches
):
    config, params = tiny
    edits = {"h.1.mlp.out": 0.0, "h.2.attn.z": replace(0.0, at=[1])}
    seen = []

    def progress(items):
        for item in items:
            seen.append(len(item))
            yield item

    view = views.view_patching(
        params,
        text,
        donor,
        Contrast(ANSWERS, unpatched=0.25, donor=0.0),
        config=config,
        plan=SweepPlan(site="attn.z", over=over, batch_size=2),
        progress=progress,
        edits=edits,
    )
    sites = "h.*.attn.z"
    _, donors = jax.jit(lambda ids: capture(params, ids, config=config, sites=sites, edits=edits))(
        donor
    )

    def difference(logits):
        return logits[0, 3] - logits[0, 8]

    options = {"config": config, "site": "attn.z", "over": over, "edits": edits}
    sweep = jax.jit(lambda: patching_sweep(params, text, donors, difference, **options))
    near(view.values, np.reshape(sweep(), (LAYERS, -1)))
    near(view.changes, view.values - 0.25)
    assert seen == batches


def test_bad_plans_and_donors_of_another_length_are_named(tiny, text, donor):
    config, params = tiny
    contrasted = Contrast(ANSWERS, 0.0, 0.0)
    with pytest.raises(ValueError, match="`donor_ids` must have the 5 tokens of `ids`, got 4"):
        views.view_patching(params, text, donor[:, :4], contrasted, config=config, plan=SweepPlan())
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        views.view_patching(
            params, text, donor, contrasted, config=config, plan=SweepPlan(batch_size=0)
        )


@pytest.mark.parametrize(
    "over, count, expected",
    [
        ("T", 2, ["a", " b"]),
        ("H", 2, ["head 0", "head 1"]),
        ("TH", 4, ["a head 0", "a head 1", " b head 0", " b head 1"]),
        ("", 1, ["all"]),
        ("K", 3, ["0", "1", "2"]),
    ],
)
def test_what_is_patched_has_names(over, count, expected):
    assert views.sweep_labels(over, ["a", " b"], n_heads=2, count=count) == expected
