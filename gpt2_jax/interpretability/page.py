"""One text as a page to point at: each token's probability, and what the heads attend to.

The page is one HTML file that fetches nothing: its script and data stand in it. What is shown is
computed in `views.py`; here it becomes words and HTML.
"""

import base64
import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import replacing
from gpt2_jax.interpretability.edits import Edit
from gpt2_jax.interpretability.sites import find_sites
from gpt2_jax.interpretability.views import TextView, view_text
from gpt2_jax.modules import Params
from gpt2_jax.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parent.parent / "assets" / "page" / "page.html"
# Of all patterns, a byte each: a page of some 11 MB, which browsers still open at once.
MAX_ATTENTION = 2**23


@dataclasses.dataclass(frozen=True)
class Page:
    """An HTML page that needs nothing else. A notebook shows it; `save` writes it.

    Examples:
      >>> page = gpt2_jax.inspect_page(params, tokenizer, "Once upon a time", config=config)
      >>> page.save(folder / "page.html")
      >>> (folder / "page.html").read_text("utf-8") == page.html
      True
    """

    html: str = dataclasses.field(repr=False)
    title: str

    def save(self, path: str | Path) -> None:
        """Writes the page to a file, which is replaced if it is there."""
        with replacing(Path(path), overwrite=True) as file:
            file.write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        # In a frame: the page's style and names are not the notebook's.
        source = html.escape(self.html)
        style = "width: 100%; height: 48rem; border: 1px solid #ccc"
        title = html.escape(self.title)
        return (
            f'<iframe srcdoc="{source}" title="{title}" sandbox="allow-scripts" style="{style}">'
            "</iframe>"
        )


def inspect_page(
    params: Params,
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    *,
    config: GPT2Config,
    sites: str | Sequence[str] = "h.*.attn.pattern",
    edits: Mapping[str, Edit] | None = None,
    title: str = "",
) -> Page:
    """Returns a page of one text: point at a token, or at a head. Compiles itself.

    Tokens are coloured by their probability after those before them, with the five likeliest on
    hover. Beside them stand the attention patterns, in steps of 1/255.

    Args:
      params: the parameters.
      tokenizer: spells the tokens, and encodes `text` if it is one.
      text: a text, or its token ids.
      config: the model's configuration.
      sites: of the patterns, all layers' by default; `()` leaves them out.
      edits: the model is shown edited, as in `capture`.
      title: stands above, and in the browser's tab.

    Raises:
      ValueError: the text is empty or longer than the context; as `view_text`; or the patterns are
        more numbers than a page holds.

    Examples:
      >>> gpt2_jax.inspect_page(params, tokenizer, "Once", config=config, title="A word")
      Page(title='A word')
    """
    ids = tokenizer.encode(text) if isinstance(text, str) else [int(token) for token in text]
    if not ids:
        raise ValueError("`text` must have at least one token, got none.")
    names = find_sites(sites, config)
    check_size(len(names), config.n_head, len(ids))
    view = view_text(params, np.array([ids], np.int32), config=config, sites=names, edits=edits)
    return text_page(view, spelled(tokenizer, ids), spelled_rows(tokenizer, view.best), title=title)


def check_size(n_layers: int, n_heads: int, n_tokens: int) -> None:
    """Raises `ValueError` unless a page holds the patterns of so many heads and tokens."""
    count = n_layers * n_heads * n_tokens**2
    if count > MAX_ATTENTION:
        got = f"{n_layers} layers x {n_heads} heads x {n_tokens}^2 tokens = {count}"
        advice = "shorten the text or name fewer `sites`"
        raise ValueError(f"A page holds at most {MAX_ATTENTION} attentions, got {got}: {advice}.")


def text_page(
    view: TextView, tokens: Sequence[str], best: Sequence[Sequence[str]], *, title: str = ""
) -> Page:
    """Returns the page of a view, whose ids have become words.

    Raises:
      ValueError: a probability is not a number, as of params that hold NaN.
    """
    if not np.isfinite(view.best_probabilities).all():
        raise ValueError("The probabilities must be numbers, got NaN: `params` may hold it.")
    expected = []
    for words, probabilities in zip(best, view.best_probabilities.tolist(), strict=True):
        expected.append(list(zip(words, probabilities, strict=True)))
    packed = []
    for pattern in view.patterns:
        # An edited pattern may hold anything; what is drawn is between 0 and 1.
        shades = np.rint(255 * np.clip(pattern, 0, 1)).astype(np.uint8)
        packed.append(base64.b64encode(shades.tobytes()).decode())
    data = {
        "tokens": list(tokens),
        "probabilities": view.probabilities.tolist(),
        "best": expected,
        "sites": list(view.sites),
        "n_heads": view.patterns.shape[1],
        "patterns": packed,
    }
    title = title or "What GPT-2 makes of a text"
    # In JSON "<" stands in strings alone; so written, no token closes the script it stands in.
    written = json.dumps(data).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    page = template.replace("<!--TITLE-->", html.escape(title))
    return Page(page.replace("<!--DATA-->", written), title)


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns each token's text, each by itself: part of a character becomes U+FFFD."""
    return [tokenizer.decode([token]) for token in ids]


def spelled_rows(tokenizer: Tokenizer, ids: np.ndarray) -> list[list[str]]:
    """Returns the text of each token of several rows."""
    return [spelled(tokenizer, row) for row in ids.tolist()]
