"""The pictures and numbers of the command `inspect`, on the packaged model."""

import base64
import json
import re

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import gpt2_jax

GIRL = "The little girl took"
BOY = "The little boy took"


@pytest.fixture
def look(command):
    """Runs the command, without a bar."""

    def run(*arguments):
        return command("inspect", *arguments, "--quiet")

    return run


def numbers_of(done):
    """What a run that went well has printed."""
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_lens_shows_the_models_own_prediction_last(look, demo, tmp_path):
    found = numbers_of(look(GIRL, "--json", "--out", str(tmp_path / "lens.png")))
    ids = np.array([demo.tokenizer.encode(GIRL)])
    logits = jax.jit(gpt2_jax.apply)(demo.params, ids, config=demo.config)[0]
    probabilities = jax.nn.softmax(logits)
    best = np.asarray(probabilities.argmax(-1))
    assert found["sites"] == [f"h.{i}.resid_post" for i in range(demo.config.n_layer)]
    assert found["best"][-1] == [demo.tokenizer.decode([i]) for i in best]
    np.testing.assert_allclose(found["probabilities"][-1], probabilities.max(-1), rtol=1e-4)
    assert imread(tmp_path / "lens.png").std() > 0.05  # something is drawn
    assert [file.name for file in tmp_path.iterdir()] == ["lens.png"]


def test_patterns_are_printed_by_head(look, tmp_path):
    picture = tmp_path / "heads.svg"
    found = numbers_of(look(GIRL, "--site", "h.1.attn.pattern", "--json", "--out", str(picture)))
    pattern = np.array(found["patterns"]["h.1.attn.pattern"])
    assert pattern.shape == (4, 4, 4)
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-6)
    assert not pattern[:, *np.triu_indices(4, 1)].any()
    assert "<svg" in picture.read_text()


def test_the_heat_map_ends_in_the_donors_value(look, tmp_path):
    picture = tmp_path / "patching.png"
    options = ["--donor", BOY, "--answers", " her", " his", "--batch_size", "3"]
    found = numbers_of(look(GIRL, *options, "--json", "--out", str(picture)))
    values = np.array(found["values"])
    assert found["labels"] == ["The", " little", " girl", " took"]
    assert values.shape == (3, 4)  # layers, tokens
    # Where the texts are the same, and where all that differs is patched.
    np.testing.assert_allclose(values[:, :2], found["unpatched"], rtol=1e-5)
    np.testing.assert_allclose(values[0, 2], found["donor"], rtol=1e-5)
    assert found["unpatched"] > 0 > found["donor"]
    assert picture.stat().st_size > 1000


def test_a_page_holds_the_numbers_that_are_printed(look, tmp_path):
    file = tmp_path / "page.html"
    found = numbers_of(look(GIRL, "--out", str(file), "--json"))
    written = file.read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', written)[1])
    assert data["tokens"] == found["tokens"] == ["The", " little", " girl", " took"]
    assert data["probabilities"] == found["probabilities"]
    assert data["best"][-1][0] == [found["best"][-1][0], found["best_probabilities"][-1][0]]
    packed = np.frombuffer(base64.b64decode(data["patterns"][1]), np.uint8).reshape(4, 4, 4)
    np.testing.assert_allclose(packed / 255, found["patterns"]["h.1.attn.pattern"], atol=0.002)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([GIRL], "Expected --out FILE, --json, or both."),
        (
            [GIRL, "--json", "--donor", "The boy"],
            "--donor must have the 4 tokens of the prompt, got 2.",
        ),
        ([GIRL, "--json", "--donor", BOY], "Both texts go on with ' a': give two --answers"),
        (
            [GIRL, "--json", "--donor", BOY, "--answers", "", " his"],
            "The --answers must not be empty.",
        ),
        (
            [GIRL, "--json", "--site", "h.9.resid_post"],
            "There is no site 'h.9.resid_post' in 3 layers.",
        ),
        (
            [GIRL, "--json", "--site", "h.1.attn.z"],
            "--site must be streams of width D or attention patterns",
        ),
        (
            [GIRL, "--out", "heads.png", "--site", "h.*.attn.pattern"],
            "--out draws the heads of one layer, got the sites h.0.attn.pattern, ",
        ),
        (
            [GIRL, "--out", "page.html", "--donor", BOY],
            "A page shows one text: --out page.html takes no --donor.",
        ),
        (
            [GIRL, "--out", "page.HTM", "--site", "h.1.attn.z"],
            "`sites` must have the axes B H T S, got B T H K at h.1.attn.z.",
        ),
        (["", "--json"], "The texts must not be empty."),
        ([GIRL, "--json", "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
    ],
)
def test_mistakes_are_named(look, arguments, message):
    done = look(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
