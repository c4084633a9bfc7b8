"""Figures hold what they were given: its numbers, its words, nothing read as mathematics."""

import numpy as np
import pytest

from gpt2_jax.interpretability import plot


def image_of(axes):
    """The numbers of the one image in some axes."""
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def test_each_head_has_a_square(rng):
    patterns = rng.random((5, 3, 3)).astype(np.float32)
    figure = plot.plot_patterns(patterns, ["a", " b", "$"], "layer 2")
    *squares, scale = figure.axes
    assert figure.get_suptitle() == "layer 2"
    assert [axes.get_title() for axes in squares] == [f"head {i}" for i in range(5)]
    assert scale.get_ylabel() == "attention" and scale.get_ylim() == (0, 1)
    for axes, pattern in zip(squares, patterns, strict=True):
        assert "query" in axes.get_ylabel() and "key" in axes.get_xlabel()
        np.testing.assert_array_equal(image_of(axes), pattern)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "·b", "$"]


def test_a_lens_shows_each_word_where_its_probability_is(tmp_path):
    best = [["a", " b", "$"], ["c", "\n", " d"]]
    probabilities = [[0.1, 0.9, 0.2], [0.3, 0.4, 0.6]]
    figure = plot.plot_lens(best, np.array(probabilities), ["x", "y", "z"], ["h.0", "h.1"])
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("token read last", "stream")
    words = {text.get_position(): text for text in axes.texts}
    assert words[(1, 0)].get_text() == "·b" and words[(1, 0)].get_color() == "white"
    assert words[(1, 1)].get_text() == "\\n" and words[(1, 1)].get_color() == "black"
    np.testing.assert_allclose(image_of(axes), probabilities, rtol=1e-6)
    figure.savefig(tmp_path / "lens.png")  # "$" is drawn, not parsed
    assert (tmp_path / "lens.png").stat().st_size > 1000


@pytest.mark.parametrize("values", [np.array([[1.0, -3.0]]), np.zeros((2, 2))])
def test_a_sweeps_colours_are_even_about_zero(values):
    figure = plot.plot_sweep(values, ["a", "b"], "title", "change")
    axes = figure.axes[0]
    (image,) = axes.get_images()
    lowest, highest = image.get_clim()
    assert lowest == -highest < 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("patched at", "layer")
    assert figure.axes[1].get_ylabel() == "change" and figure.get_suptitle() == "title"
    np.testing.assert_array_equal(image_of(axes), values)


def test_a_notebook_shows_a_picture():
    figure = plot.plot_sweep(np.array([[1.0, -3.0]]), ["a", "b"])
    assert figure._repr_png_().startswith(b"\x89PNG") and len(figure._repr_png_()) > 1000


def test_white_space_is_visible():
    assert plot.visible(" a\n\tb ") == "·a\\n\\tb "
