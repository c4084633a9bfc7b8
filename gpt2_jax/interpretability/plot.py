"""Pictures of what a model does, as matplotlib figures (`pip install ".[plot]"`). Knows arrays and labels, no models.

Figures are drawn without a display: `figure.savefig("picture.png")`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

INCH = 0.32  # the side of a cell


def plot_patterns(patterns: Any, tokens: Sequence[str], title: str = "") -> Any:
    """Returns a figure of attention patterns, `[H, T, S]`: a square for each head, rows attending to columns."""
    heads = len(patterns)
    columns = min(4, heads)
    rows = math.ceil(heads / columns)
    side = max(2.4, INCH * len(tokens))
    figure = _figure(columns * (side + 0.6), rows * (side + 1.2), title)
    for head, pattern in enumerate(np.asarray(patterns, np.float32)):
        axes = figure.add_subplot(rows, columns, head + 1, title=f"head {head}")
        axes.imshow(pattern, cmap="Blues", vmin=0, vmax=1)
        _label(axes, tokens, tokens)
    return figure


def plot_lens(
    best: Any, probabilities: Any, tokens: Sequence[str], names: Sequence[str], title: str = ""
) -> Any:
    """Returns a figure of a logit lens: by each stream, the likeliest token after each, shaded by its probability.

    Args:
      best: the likeliest tokens as text, `[N, T]`.
      probabilities: theirs, `[N, T]`.
      tokens: the `T` tokens of the text.
      names: of the `N` streams; the first is drawn at the bottom.
    """
    figure = _figure(2 + 0.8 * len(tokens), 1.5 + INCH * len(names), title)
    axes = figure.add_subplot()
    shades = np.asarray(probabilities, np.float32)
    image = axes.imshow(shades, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    for row, column in np.ndindex(np.shape(best)):
        color = "white" if shades[row, column] > 0.5 else "black"
        place = {"ha": "center", "va": "center", "fontsize": 7, "parse_math": False}
        axes.text(column, row, visible(best[row][column]), color=color, **place)
    _label(axes, tokens, names)
    figure.colorbar(image, label="probability")
    return figure


def plot_sweep(values: Any, labels: Sequence[str], title: str = "", quantity: str = "") -> Any:
    """Returns a heat map of changes, `[L, N]`: layers upwards, what was patched to the right; blue is more."""
    values = np.asarray(values, np.float32)
    figure = _figure(2.5 + INCH * len(labels), 1.8 + INCH * len(values), title)
    axes = figure.add_subplot(ylabel="layer")
    largest = np.abs(values).max(initial=1e-9)
    image = axes.imshow(
        values, cmap="RdBu", vmin=-largest, vmax=largest, origin="lower", aspect="auto"
    )
    _label(axes, labels, [str(i) for i in range(len(values))])
    figure.colorbar(image, label=quantity)
    return figure


def visible(token: str) -> str:
    """Returns a token with its line breaks and leading space in view."""
    token = token.replace("\n", "\\n").replace("\t", "\\t")
    return "·" + token[1:] if token.startswith(" ") else token


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def _label(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    style = {"fontsize": 7, "parse_math": False}
    axes.set_xticks(
        range(len(columns)), [visible(label) for label in columns], rotation=90, **style
    )
    axes.set_yticks(range(len(rows)), [visible(label) for label in rows], **style)
