"""The pictures and numbers of `scripts/inspect_model.py`, on the model in the package."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

import gpt2_jax

spec = importlib.util.spec_from_file_location(
    "inspect_model", Path(__file__).parents[2] / "scripts" / "inspect_model.py"
)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
GIRL, BOY = "The little girl took", "The little boy took"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(
            sys, "argv", ["inspect_model.py", *args, "--from_pretrained", "demo", "--quiet"]
        )
        status = script.main()
        return status, capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def demo():
    """The demo model, its tokenizer, and a text's ids."""
    config, params = gpt2_jax.load("demo", dtype="float32")
    tokenizer = gpt2_jax.Tokenizer.load(gpt2_jax.resolve("demo"))
    return config, params, tokenizer, np.array([tokenizer.encode(GIRL)])


def test_the_lens_shows_the_models_own_prediction_last(run, demo, tmp_path):
    config, params, tokenizer, ids = demo
    status, printed = run(GIRL, "--json", "--out", str(tmp_path / "lens.png"))
    found = json.loads(printed.out)
    probabilities = jax.nn.softmax(
        jax.jit(gpt2_jax.apply, static_argnames="config")(params, ids, config=config)[0]
    )
    assert status == 0 and found["sites"] == [f"h.{i}.resid_post" for i in range(4)]
    assert found["best"][-1] == [
        tokenizer.decode([i]) for i in np.asarray(probabilities.argmax(-1))
    ]
    np.testing.assert_allclose(found["probabilities"][-1], probabilities.max(-1), rtol=1e-4)
    assert imread(tmp_path / "lens.png").std() > 0.05  # something is drawn
    assert [file.name for file in tmp_path.iterdir()] == ["lens.png"]


def test_patterns_are_printed_by_head(run, tmp_path):
    status, printed = run(
        GIRL, "--site", "h.1.attn.pattern", "--json", "--out", str(tmp_path / "heads.svg")
    )
    pattern = np.array(json.loads(printed.out)["patterns"]["h.1.attn.pattern"])
    assert status == 0 and pattern.shape == (4, 4, 4)
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-6)
    assert not pattern[:, *np.triu_indices(4, 1)].any()
    assert "<svg" in (tmp_path / "heads.svg").read_text()


def test_the_heat_map_ends_in_the_donors_value(run, tmp_path):
    options = ["--donor", BOY, "--answers", " her", " his", "--batch_size", "3"]
    status, printed = run(GIRL, *options, "--json", "--out", str(tmp_path / "patching.png"))
    found = json.loads(printed.out)
    values = np.array(found["values"])
    assert (
        status == 0
        and found["labels"] == ["The", " little", " girl", " took"]
        and values.shape == (4, 4)
    )
    np.testing.assert_allclose(
        values[:, :2], found["unpatched"], rtol=1e-5
    )  # where the texts are the same
    np.testing.assert_allclose(
        values[0, 2], found["donor"], rtol=1e-5
    )  # where all that differs is patched
    assert (
        found["unpatched"] > 0 > found["donor"]
        and (tmp_path / "patching.png").stat().st_size > 1000
    )


@pytest.mark.parametrize(
    "args, message",
    [
        ([GIRL], "Expected --out FILE, --json, or both."),
        (
            [GIRL, "--json", "--donor", "The boy"],
            "--donor must have the 4 tokens of the prompt, got 2.",
        ),
        ([GIRL, "--json", "--donor", BOY], "Both texts go on with ' the': give two --answers"),
        (
            [GIRL, "--json", "--site", "h.9.resid_post"],
            "There is no site 'h.9.resid_post' in 4 layers.",
        ),
        (
            [GIRL, "--json", "--site", "h.1.attn.z"],
            "--site must be streams of width D or attention patterns",
        ),
        (["", "--json"], "The texts must not be empty."),
        ([GIRL, "--json", "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
    ],
)
def test_mistakes_are_named(run, args, message):
    status, printed = run(*args)
    assert status == 2 and message in printed.err and not printed.out
