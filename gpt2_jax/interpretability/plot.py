"""Pictures of what a model does, as matplotlib figures. Knows arrays and labels, no models.

Needs `pip install "gpt2_jax[plot]"`; matplotlib is imported when the first figure is made. Figures
are drawn without a display: `figure.savefig("picture.png")`. A notebook shows them.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

CELL = 0.32  # inches, the side of a cell: a label of FONT_SIZE beside each just fits
FONT_SIZE = 7  # points
MOST_COLUMNS = 4  # of squares in a row


def plot_patterns(
    patterns: Float[ArrayLike, "H T T"], tokens: Sequence[str], title: str = ""
) -> "matplotlib.figure.Figure":
    """Returns a figure of attention patterns: a square for each head, queries down, keys across."""
    # matplotlib draws no bfloat16.
    patterns = np.asarray(patterns, np.float32)
    n_heads = len(patterns)
    # XL has 25 heads: in rows of four they stay legible.
    n_columns = min(MOST_COLUMNS, n_heads)
    n_rows = math.ceil(n_heads / n_columns)
    side = max(2.4, CELL * len(tokens))  # inches; a short text is not a stamp
    # Beside a square stand its tokens; below it too, and its title above.
    width = n_columns * (side + 0.8) + 1  # the scale
    height = n_rows * (side + 1.4)
    figure = _figure(width, height, title)
    squares = []
    for head in range(n_heads):
        axes = figure.add_subplot(n_rows, n_columns, head + 1)
        axes.set_title(f"head {head}")
        # The same shades in all: one scale serves them.
        image = axes.imshow(patterns[head], cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("key (attended to)")
        axes.set_ylabel("query (attending)")
        _label(axes, tokens, tokens)
        squares.append(axes)
    figure.colorbar(image, ax=squares, label="attention", shrink=1 / n_rows)
    return figure


def plot_lens(
    best: Sequence[Sequence[str]],
    probabilities: Float[ArrayLike, "N T"],
    tokens: Sequence[str],
    names: Sequence[str],
    title: str = "",
) -> "matplotlib.figure.Figure":
    """Returns a figure of a logit lens: by each stream, the likeliest token after each.

    Args:
      best: the likeliest tokens as text, `[N, T]`.
      probabilities: theirs, by which the cells are shaded.
      tokens: the `T` tokens of the text.
      names: of the `N` streams; the first is drawn at the bottom.
    """
    shades = np.asarray(probabilities, np.float32)
    # A cell holds a word: it is wider than high.
    width = 2 + 0.8 * len(tokens)
    height = 1.5 + CELL * len(names)
    figure = _figure(width, height, title)
    axes = figure.add_subplot()
    image = axes.imshow(
        shades,
        cmap="Blues",
        vmin=0,  # not the least one: shades of two pictures mean the same
        vmax=1,
        origin="lower",  # the stream flows upwards, as it is drawn in papers
        aspect="auto",
    )
    for row, words in enumerate(best):
        for column, word in enumerate(words):
            is_dark = shades[row, column] > 0.5
            axes.text(
                column,
                row,
                visible(word),
                color="white" if is_dark else "black",
                ha="center",
                va="center",
                fontsize=FONT_SIZE,
                parse_math=False,  # a token may be "$"
            )
    axes.set_xlabel("token read last")
    axes.set_ylabel("stream")
    _label(axes, tokens, names)
    figure.colorbar(image, label="probability of the likeliest next token")
    return figure


def plot_sweep(
    values: Float[ArrayLike, "L N"],
    labels: Sequence[str],
    title: str = "",
    quantity: str = "",
    patched: str = "patched at",
) -> "matplotlib.figure.Figure":
    """Returns a heat map of changes: layers upwards, what was patched to the right; blue is more.

    Args:
      values: the changes. White is 0, and the largest, up or down, is the darkest.
      labels: of the `N` columns.
      title: stands above.
      quantity: what the values are, beside the scale.
      patched: what the columns are, below them.
    """
    values = np.asarray(values, np.float32)
    n_layers = len(values)
    width = 2.5 + CELL * len(labels)
    height = 1.8 + CELL * n_layers
    figure = _figure(width, height, title)
    axes = figure.add_subplot()
    axes.set_xlabel(patched)
    axes.set_ylabel("layer")
    # Never 0: where nothing changes the map is white, not an error.
    largest = np.abs(values).max(initial=1e-9)
    image = axes.imshow(
        values,
        cmap="RdBu",
        vmin=-largest,
        vmax=largest,
        origin="lower",
        aspect="auto",
    )
    layers = [str(layer) for layer in range(n_layers)]
    _label(axes, labels, layers)
    figure.colorbar(image, label=quantity)
    return figure


def visible(token: str) -> str:
    """Returns a token with its line breaks, tabs and leading space in view."""
    token = token.replace("\n", "\\n")
    token = token.replace("\t", "\\t")
    if token.startswith(" "):
        return "·" + token[1:]
    return token


def _figure(width: float, height: float, title: str) -> "matplotlib.figure.Figure":
    """Returns an empty figure, sizes in inches."""
    # Not `pyplot`, which would look for a display and keep every figure alive.
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows, with or without its inline backend."""

        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def _label(axes: "matplotlib.axes.Axes", columns: Sequence[str], rows: Sequence[str]) -> None:
    """Writes a label below each column and beside each row."""
    axes.set_xticks(
        range(len(columns)),
        [visible(label) for label in columns],
        rotation=90,
        fontsize=FONT_SIZE,
        parse_math=False,
    )
    axes.set_yticks(
        range(len(rows)),
        [visible(label) for label in rows],
        fontsize=FONT_SIZE,
        parse_math=False,
    )
