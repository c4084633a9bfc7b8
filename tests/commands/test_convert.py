"""The command `convert`: what it prints, and that it leaves nothing where it fails."""

import pytest

import gpt2_jax
import weights_convert
from gpt2_jax.commands.main import run
from gpt2_jax.pretrained import conversion
from gpt2_jax.tokenizer_template import Template


def test_what_was_written_is_printed(tmp_path, capsys):
    target = tmp_path / "demo.safetensors"
    assert run(["convert", "demo", str(target), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{target}: 3,483,904 parameters, bfloat16\n"


def test_the_difference_from_pytorchs_logits_is_printed_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "compare", lambda *_: conversion.Difference(0.0123, 150.0))
    assert run(["convert", "demo", str(tmp_path / "demo"), "--verify"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "largest difference from PyTorch's logits: 0.0123 (largest logit: 150)"
    assert second.startswith(f"{tmp_path / 'demo'}: ")


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_logits_that_differ_leave_nothing_behind(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "compare", lambda *_: conversion.Difference(error, 1.0))
    assert run(["convert", "demo", str(tmp_path / "demo"), "--verify"]) == 2
    err = capsys.readouterr().err
    assert f"Expected logits within 0.01 of PyTorch's, got {error:.3g}: nothing was written" in err
    assert not list(tmp_path.iterdir())


def test_another_kinds_tokenizer_goes_with_its_model(tmp_path):
    config, params = gpt2_jax.load("demo")
    source = tmp_path / "source"
    gpt2_jax.save(source, params, config)
    (source / "vocab.txt").write_text("[UNK]\nthe\n")
    assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[UNK]\nthe\n"
    # Without it the model would pass for one of GPT-2's.
    with pytest.raises(ValueError, match="got the class unknown and vocab.txt"):
        gpt2_jax.load_tokenizer(tmp_path / "out")


def test_of_two_tokenizers_in_a_target_the_models_stays(tmp_path):
    target = tmp_path / "target"
    gpt2_jax.Tokenizer({"a": 0}, [], template=Template((0,), (0,))).save(target)
    assert (target / "tokenizer.json").is_file()
    (target / "notes.txt").touch()
    assert run(["convert", "demo", str(target), "--overwrite"]) == 0
    assert gpt2_jax.load_tokenizer(target).vocab == gpt2_jax.load_tokenizer("demo").vocab
    assert (target / "notes.txt").is_file()


def test_the_old_door_is_the_same_command(tmp_path, capsys):
    target = tmp_path / "demo.safetensors"
    assert weights_convert.main(["demo", str(target)]) == 0
    assert weights_convert.main(["demo", str(target)]) == 2
    assert capsys.readouterr().err.startswith(f"weights_convert: {target} exists already")
