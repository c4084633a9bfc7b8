"""A page shows what it was given to whoever points at it, fetches nothing, and runs no token."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from gpt2_jax import Tokenizer, inspect_page
from gpt2_jax.interpretability import page
from gpt2_jax.interpretability.views import TextView

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

TOKENS = ["A", " </script><b>b</b>", "\n&", " é"]
BEST = [["x", "y"], [" é", "$"], ["<i>", "\t"], ["z", "w"]]
# What a reader does: points at a token, at a head, at a token under it, and reads what is shown.
POINTING = """
<script>
const seen = [];
const point = element => element.dispatchEvent(new PointerEvent("pointerenter"));
const read = id => seen.push(document.getElementById(id).innerText.replace(/\\s+/g, " "));
const textOf = id => document.getElementById(id).textContent;
read("expected");
point(document.querySelectorAll("#tokens > span")[2]);
read("expected");
point(document.querySelectorAll("#tokens > span")[0]);
read("expected");
point(document.querySelectorAll("canvas.head")[3]);
point(document.querySelectorAll("#attended > span")[2]);
read("attending");
seen.push([...document.querySelectorAll("#attended > span")].map(x => x.style.backgroundColor)
  .join(" "));
seen.push(textOf("tokens"));
const shown = document.createElement("pre");
shown.id = "seen";
shown.textContent = seen.map(x => JSON.stringify(x)).join("\\n");
document.body.append(shown);
</script>
"""


@pytest.fixture(scope="module")
def made():
    """A page of two layers of two heads; the second layer's second head is of one row's own."""
    patterns = np.zeros((2, 2, 4, 4))
    patterns[1, 1, 2] = [0.5, 0.2, 0.3, 0.0]
    view = TextView(
        probabilities=np.array([0.5, 0.031, 0.9]),
        best=np.zeros((4, 2), np.int32),
        best_probabilities=np.array([[0.5, 0.25], [0.6, 0.2], [0.7, 0.1], [0.8, 0.05]]),
        sites=("h.0.attn.pattern", "h.1.attn.pattern"),
        patterns=patterns,
    )
    return page.text_page(view, TOKENS, BEST, title="a <title> & more")


def test_a_page_fetches_nothing_and_closes_no_script(made):
    assert "<!--" not in made.html.replace("<!-- Nothing is fetched", "")
    assert "default-src 'none'" in made.html
    assert not re.search(r"(?:src|href)=|@import|url\(|https?://", made.html)
    assert made.html.count("</script>") == 2
    assert "<title>a &lt;title&gt; &amp; more</title>" in made.html


def test_a_notebook_shows_it_in_a_frame_and_a_file_is_the_same(made, tmp_path):
    (source,) = re.findall('srcdoc="([^"]*)"', made._repr_html_())
    assert html.unescape(source) == made.html
    for _ in range(2):  # what is there is replaced
        made.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == made.html
    assert len(repr(made)) < 100


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_what_is_pointed_at(made, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(made.html.replace("</html>", POINTING + "</html>"), encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run(
        [BROWSER, *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    shown = html.unescape(re.search('<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    after, third, first, attending, shades, text = map(json.loads, shown.split("\n"))
    assert after.startswith("After the text, the likeliest are:")
    assert "“z” 80.0 %" in after and "“w” 5.00 %" in after
    assert "had 3.10 %. The likeliest were" in third and "“ é” 60.0 %" in third
    assert first == "Nothing stands before “A”: it has no probability."
    assert attending.startswith("h.1.attn.pattern, head 1: from “\\n&” to “A” 50.2 %, “\\n&” 29.8")
    # From white to (8, 48, 107), by the bytes 128, 51, 76 and 0 of 255.
    expected = ["rgb(131, 151, 181)", "rgb(206, 214, 225)", "rgb(181, 193, 211)"]
    assert shades == " ".join([*expected, "rgb(255, 255, 255)"])
    assert text == "A </script><b>b</b>↵\n& éwhat comes next"


def test_a_page_of_a_text_is_that_of_its_ids(tiny, monkeypatch):
    config, params = tiny
    tokenizer = Tokenizer.gpt2()
    by_text = inspect_page(params, tokenizer, "!#&", config=config, sites=())
    by_ids = inspect_page(params, tokenizer, np.array([0, 2, 5]), config=config, sites=())
    assert by_text == by_ids and '"sites": []' in by_ids.html
    with pytest.raises(ValueError, match="must have at least one token, got none"):
        inspect_page(params, tokenizer, "", config=config)
    monkeypatch.setattr(page, "MAX_ATTENTION", 80)
    with pytest.raises(ValueError, match=r"got 3 layers x 3 heads x 3\^2 tokens = 81: shorten"):
        inspect_page(params, tokenizer, [0, 2, 5], config=config)


def test_what_is_no_number_is_refused(tiny):
    config, params = tiny
    broken = params | {"ln_f": {name: x * np.nan for name, x in params["ln_f"].items()}}
    with pytest.raises(ValueError, match="must be numbers, got NaN"):
        inspect_page(broken, Tokenizer.gpt2(), [0, 2, 5], config=config, sites=())
