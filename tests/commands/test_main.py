"""How commands are found, what they are called and how they end."""

import ast
import dataclasses
import io
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tqdm import tqdm

import gpt2_jax_cli
from gpt2_jax.commands.common import COMMANDS, CommandFailed, as_json
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
    assert imported == ["gc", "os", "signal", "sys"]
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
        (MemoryError(), 2, "gpt2-jax fake: There is not enough memory for this.\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9 TB"),
            2,
            "gpt2-jax fake: There is not enough memory for this: RESOURCE_EXHAUSTED: 9 TB\n",
        ),
        (ValueError("a\x1b[2Jb\rc"), 2, "gpt2-jax fake: a\\x1b[2Jb\\rc\n"),
        (OSError(2, "No such file", "\udcff\x07"), 2, "[Errno 2] No such file: '\\udcff\\x07'\n"),
    ],
)
def test_every_ending_has_its_exit_code(fake, capsys, ending, code, message):
    fake(ending)
    assert run(["fake"]) == code
    assert capsys.readouterr().err.endswith(message)


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


# The first lines of a process, before a command that stands in for all of them.
STAND_IN = """
import os, sys, types
def run(arguments, command, program):
    print("a note", file=sys.stderr, flush=True)
    with open(arguments[0], "w") as file:
        try:
            os.write(2, b"of a library")
        except OSError:
            pass
        print("text \u00e9 \u03c0", flush=True)
        file.write("content")
    return 7
sys.modules["gpt2_jax.commands.main"] = types.SimpleNamespace(run=run)
sys.modules["gpt2_jax"] = sys.modules["gpt2_jax.commands"] = types.ModuleType("stand-in")
import gpt2_jax_cli
gpt2_jax_cli.main()
"""


def run_stand_in(file, redirections, **environment):
    """Runs it in a shell that closes some of its streams; returns exit code, output, errors."""
    command = f'exec "$@" {redirections}'
    program = [sys.executable, "-c", STAND_IN, file]
    done = subprocess.run(
        ["sh", "-c", command, "sh", *program],
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirections", ["", "2>&-", "<&-", "2>&- <&-", "2>/dev/full"])
def test_notes_never_come_into_the_output_nor_into_a_file(tmp_path, redirections):
    code, out, err = run_stand_in(tmp_path / "file", redirections)
    assert (code, out) == (7, "text é π\n".encode())
    assert (tmp_path / "file").read_text() == "content"
    assert err == (b"" if "2>" in redirections else b"a note\nof a library")


def test_without_any_stream_a_command_does_its_work(tmp_path):
    code, out, err = run_stand_in(tmp_path / "file", ">&- 2>&- <&-")
    assert (code, out, err) == (7, b"", b"")
    assert (tmp_path / "file").read_text() == "content"


def test_what_the_outputs_encoding_lacks_is_replaced(tmp_path):
    code, out, _ = run_stand_in(tmp_path / "file", "", PYTHONIOENCODING="latin-1")
    assert (code, out) == (7, b"text \xe9 ?\n")


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "ascii", "latin-1"])
def test_json_loses_nothing_in_any_encoding(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    line = as_json({"text": "\u00e9\u03c0"})
    assert json.loads(line.encode(encoding).decode(encoding)) == {"text": "\u00e9\u03c0"}
    assert ("\u03c0" in line) == (encoding.lower() == "utf-8")


def test_notes_that_nobody_reads_end_nothing():
    class Broken(io.StringIO):
        def write(self, text=""):
            raise BrokenPipeError

        flush = write

    notes = gpt2_jax_cli.Notes(Broken())
    for _ in tqdm(range(3), file=notes):
        assert notes.write("a note\n") == 7
    notes.flush()
    assert notes.writable()


def test_quiet_commands_quiet_the_hub(fake, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    fake(0)
    module = sys.modules["gpt2_jax.commands.fake"]
    seen = []
    module.run = lambda args: seen.append(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")) or 0
    for quiet in (False, True):
        arguments = types.SimpleNamespace(
            parse_args=lambda _, q=quiet: types.SimpleNamespace(quiet=q)
        )
        module.parser = lambda program, made=arguments: made
        assert run(["fake"]) == 0
    assert seen == [None, "1"]


def test_a_run_json_of_another_program_is_named(tmp_path, capsys):
    for text in ("[]", "{}", '{"recipe": {"lr": 3}, "from_pretrained": null}', '{"recipe": 3}'):
        (tmp_path / "run.json").write_text(text)
        assert run(["train", "data", "--out", str(tmp_path), "--resume"]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}/run.json: expected " in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "option, message",
    [
        ("--n_layer=10000000000", "`n_layer` must be at most 2147483647, got 10000000000."),
        ("--steps=99999999999999999999", "`steps` must be at most 2147483647, got 9999999999"),
        ("--seed=1180591620717411303424", "`seed` must be at most 4294967295, got 118059162071741"),
        ("--n_embd=12000000000", "`n_embd` must be at most 2147483647"),
    ],
)
def test_numbers_beyond_all_reason_are_refused_before_anything_is_read(option, message, capsys):
    assert run(["train", "/no/such", "--out", "/no/such/run", option]) == 2
    assert message in capsys.readouterr().err


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
