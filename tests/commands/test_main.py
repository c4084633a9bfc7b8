"""How commands are found, what they are called and how they end."""

import ast
import dataclasses
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

import gpt2_jax_cli
from gpt2_jax.commands.common import COMMANDS, CommandFailed
from gpt2_jax.commands.main import run
from tests.reference import ROOT

DOORS = {
    "scripts/generate.py": ("generate",),
    "scripts/train.py": ("train", "train.py"),
    "scripts/prepare_data.py": ("prepare", "prepare_data.py"),
    "scripts/evaluate.py": ("evaluate", "evaluate.py"),
    "scripts/inspect_model.py": ("inspect", "inspect_model.py"),
    "weights_convert.py": ("convert", "weights_convert"),
    "gpt2_jax/__main__.py": (),
}


@pytest.fixture
def fake(monkeypatch):
    """Makes the command "fake" end as told: by an exception, or with an exit code."""

    def parser(program):
        return types.SimpleNamespace(parse_args=lambda arguments: (program, *arguments))

    def make(ending):
        def run(args):
            print(*args)
            if isinstance(ending, BaseException):
                raise ending
            return ending

        module = types.SimpleNamespace(parser=parser, run=run)
        monkeypatch.setitem(sys.modules, "gpt2_jax.commands.fake", module)
        monkeypatch.setitem(COMMANDS, "fake", "for tests")

    return make


@pytest.mark.parametrize("door", DOORS)
def test_every_door_opens_its_command(door, monkeypatch):
    opened = []
    monkeypatch.setattr(gpt2_jax_cli, "main", lambda *names: opened.append(names))
    runpy.run_path(str(ROOT / door), run_name="__main__")
    assert opened == [DOORS[door]]


def test_the_first_lines_import_nothing_slow():
    tree = ast.parse((ROOT / "gpt2_jax_cli.py").read_text(encoding="utf-8"))
    imported = [
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    ]
    assert imported == ["os", "signal", "sys"]
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom)]


def test_the_first_argument_may_name_the_command(fake, capsys):
    fake(0)
    assert run(["fake", "a", "b"]) == 0
    assert capsys.readouterr().out == "gpt2-jax fake a b\n"


def test_a_command_that_is_given_is_not_looked_for_in_the_arguments(fake, capsys):
    fake(0)
    assert run(["fake", "a"], "fake", "fake.py") == 0
    assert capsys.readouterr().out == "fake.py fake a\n"


@pytest.mark.parametrize(
    "ending, code, message",
    [
        (0, 0, ""),
        (130, 130, ""),
        (ValueError("No."), 2, "gpt2-jax fake: No.\n"),
        (FileNotFoundError("No file."), 2, "gpt2-jax fake: No file.\n"),
        (ImportError("No module."), 2, "gpt2-jax fake: No module.\n"),
        (CommandFailed("Not finite."), 1, "gpt2-jax fake: Not finite.\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_every_ending_has_its_exit_code(fake, capsys, ending, code, message):
    fake(ending)
    assert run(["fake"]) == code
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback(fake):
    fake(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        run(["fake"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_under_its_name(command, capsys):
    assert run([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: gpt2-jax {command} ")


def test_without_a_command_the_help_is_that_of_generate_and_names_the_others(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: gpt2-jax [-h]")
    for command in COMMANDS:
        assert f"gpt2-jax {command} " in out


def test_mistakes_in_arguments_end_with_2(capsys):
    assert run(["inspect"]) == 2
    assert "the following arguments are required: prompt" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_with_1(monkeypatch, tmp_path, capsys):
    from gpt2_jax.training import run as training

    def fit(*args, **options):
        raise training.TrainingError("Step 3, batch 2: the loss is nan.")

    monkeypatch.setattr(training, "fit", fit)
    assert run(["train", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "gpt2-jax train: Step 3, batch 2: the loss is nan.\n"


def test_a_pretrained_models_shape_is_not_to_be_changed(tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), "--from_pretrained", "demo", "--n_layer", "3"]
    assert run(["train", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == "gpt2-jax train: --n_layer: demo brings its own.\n"


def test_a_run_that_is_resumed_keeps_its_recipe(tmp_path):
    from gpt2_jax.commands import train
    from gpt2_jax.training.recipes import RECIPES

    recipe = {"n_layer": 3, "steps": 77, "warmup_steps": 5}
    saved = {"recipe": recipe, "from_pretrained": "some/model"}
    (tmp_path / "run.json").write_text(json.dumps(saved))
    arguments = ["data", "--out", str(tmp_path), "--steps", "99", "--warmup_steps", "5"]
    begun = train.choose_start(train.parser("train").parse_args(arguments))
    assert begun.recipe == dataclasses.replace(RECIPES["gpt2"], steps=99, warmup_steps=5)
    resumed = train.choose_start(train.parser("train").parse_args([*arguments, "--resume"]))
    assert (resumed.recipe.n_layer, resumed.recipe.steps) == (3, 99)
    assert resumed.from_pretrained == "some/model"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "perplexity", "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
        (["--task", "perplexity", "--stride", "-1"], "--stride must be at least 1, got -1."),
        (
            ["--task", "perplexity", "lambada", "--data", "x"],
            "--data must name a file for each of perplexity, lambada, got 1.",
        ),
        (["--task", "perplexity", "--data", "none.txt"], "none.txt: there is no such file."),
    ],
)
def test_what_cannot_be_measured_is_named(arguments, message, capsys):
    assert run(["evaluate", *arguments]) == 2
    assert capsys.readouterr().err == f"gpt2-jax evaluate: {message}\n"


def test_a_reader_that_has_seen_enough_is_no_mistake(tmp_path):
    code = "import gpt2_jax_cli; gpt2_jax_cli.main()"
    options = ["The king", "--from_pretrained", "demo", "--max_tokens", "2", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)},
    )
    process.stdout.close()
    with process:
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_disk_that_is_full_is_named():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    code = "import gpt2_jax_cli; gpt2_jax_cli.main()"
    options = ["inspect", "The king", "--from_pretrained", "demo", "--json"]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code, *options],
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr == b"gpt2-jax inspect: [Errno 28] No space left on device\n"


def test_json_has_no_nan():
    from gpt2_jax.commands.evaluate import as_record
    from gpt2_jax.evaluation.tasks import Figure

    one = Figure("cbt", "accuracy", 1.0, float("nan"), 1, "questions", "ours")
    assert as_record(one)["stderr"] is None
    assert as_record(one._replace(stderr=0.5)) == one._replace(stderr=0.5)._asdict()
