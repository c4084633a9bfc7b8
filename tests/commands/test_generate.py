import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.commands import generate as cli
from gpt2_jax.pretrained import hub
from gpt2_jax.tokenizer import Tokenizer

BLOCK = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
RUN = BLOCK + "from gpt2_jax.commands.generate import main; main()"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of compiled programs that the runs share."""
    return os.environ | {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture
def run(environment):
    """Runs the command without torch and transformers, with the packaged model unless told otherwise."""

    def run(*arguments, **options):
        demo = [] if "--from_pretrained" in arguments else ["--from_pretrained", "demo"]
        command = [sys.executable, "-c", RUN, *arguments, *demo]
        options = {
            "capture_output": True,
            "env": environment,
            "stdin": subprocess.DEVNULL,
            "timeout": 120,
        } | options
        return subprocess.run(command, **options)

    return run


def mistake(capsys, *arguments):
    """Standard error of a command line that fails before it loads anything."""
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_greedy_text_is_what_the_library_generates(run):
    prompt = "Once upon a time there was a"
    done = run(prompt, "--max_tokens", "20")
    assert done.returncode == 0, done.stderr
    config, params = gpt2_jax.load("demo", dtype="float32")
    tokenizer = Tokenizer.load(hub.DEMO)
    out = gpt2_jax.generate(
        params, np.array([tokenizer.encode(prompt)]), config=config, max_new_tokens=20
    )
    assert done.stdout.decode() == prompt + tokenizer.decode(out.ids[0]) + "\n"
    assert b"4,2" in done.stderr and b"tokens/s" in done.stderr


def test_samples_are_repeated_by_their_seed_and_written_as_json(run):
    options = (
        "The king",
        "The queen",
        "--do_sample",
        "--top_k",
        "40",
        "--top_p",
        "0.9",
        "--min_p",
        "0.01",
    )
    options += (
        "--temperature",
        "0.9",
        "--num_samples",
        "2",
        "--max_tokens",
        "9",
        "--json",
        "--quiet",
    )
    one, two, other = (run(*options, "--seed", seed) for seed in ("5", "5", "6"))
    assert one.returncode == 0 and one.stderr == b"", one.stderr
    assert one.stdout == two.stdout != other.stdout
    records = [json.loads(line) for line in one.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["The king"] * 2 + ["The queen"] * 2
    assert records[0]["text"] != records[1]["text"]
    tokenizer = Tokenizer.load(hub.DEMO)
    for record in records:
        assert record["finish_reason"] == "length" and record["text"] == tokenizer.decode(
            record["ids"]
        )
        assert len(record["ids"]) == len(record["logprobs"]) == 9 and max(record["logprobs"]) < 0


def test_a_prompt_is_read_from_standard_input_and_a_text_stops_before_its_stop(run):
    prompt = b"There was once a poor man"
    free = run("--max_tokens", "30", input=prompt, stdin=None)
    text = free.stdout.decode().removesuffix("\n").removeprefix(prompt.decode())
    stop = text[len(text) // 2 :][:4]
    cut = run("--max_tokens", "30", "--stop", stop, "--json", input=prompt + b"\n", stdin=None)
    record = json.loads(cut.stdout)
    assert record["text"] == text[: text.index(stop)] and record["finish_reason"] == "stop"


def test_rules_change_what_is_written(run):
    prompt = ["The king", "--max_tokens", "40", "--json", "--quiet"]
    free, once, without = (
        json.loads(run(*prompt, *more).stdout)
        for more in (
            [],
            ["--no_repeat_ngram_size", "1"],
            ["--suppress_tokens", "12", "--repetition_penalty", "1.3"],
        )
    )
    assert len(set(free["ids"])) < 40 == len(set(once["ids"]))
    assert free["ids"] != without["ids"] and 12 not in without["ids"]


def test_beams_are_those_of_the_library(run):
    options = (
        "--num_beams",
        "3",
        "--num_samples",
        "2",
        "--length_penalty",
        "0.5",
        "--early_stopping",
        "true",
    )
    done = run("The king", *options, "--max_tokens", "9", "--json", "--quiet")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    config, params = gpt2_jax.load("demo", dtype="float32")
    tokenizer = Tokenizer.load(hub.DEMO)
    out = gpt2_jax.beam_search(
        params, np.array([tokenizer.encode("The king")]), config=config, max_new_tokens=9, num_beams=3,
        num_return_sequences=2, length_penalty=0.5, early_stopping=True,
    )  # fmt: skip
    for record, ids, length, score in zip(
        records, out.ids[0], out.lengths[0], out.scores[0], strict=True
    ):
        assert record["ids"] == ids[:length].tolist() and record["text"] == tokenizer.decode(
            record["ids"]
        )
        np.testing.assert_allclose(record["score"], score, rtol=1e-4)


@pytest.mark.parametrize(
    "guess",
    [
        ("--prompt_lookup_num_tokens", "3"),
        ("--assistant_model", "demo", "--num_assistant_tokens", "4"),
    ],
)
def test_speculation_writes_the_same_text(run, guess):
    prompt = ("Once upon a time there was a king", "--max_tokens", "40")
    plain, guessed = run(*prompt), run(*prompt, *guess)
    assert guessed.stdout == plain.stdout and plain.returncode == 0
    right, drafted = re.search(
        r"(\d+) of (\d+) guesses were right", guessed.stderr.decode()
    ).groups()
    assert 0 < int(drafted) and (
        guess[0] != "--assistant_model" or right == drafted
    )  # a model agrees with itself


def test_past_the_context_a_text_stops_or_slides_on(run):
    prompt = ("Once upon a time there was a king", "--max_tokens", "270", "--json", "--quiet")
    stopped, slid = (
        json.loads(run(*prompt, "--overflow", kind).stdout) for kind in ("stop", "slide")
    )
    size = len(Tokenizer.load(hub.DEMO).encode(prompt[0]))
    assert len(stopped["ids"]) == 256 - size and stopped["finish_reason"] == "length"
    assert len(slid["ids"]) == 270 and slid["ids"][: 256 - size] == stopped["ids"]


def test_a_conversation_goes_on_until_it_is_begun_anew(run):
    turns = b"The king was old\nThe queen was young\n/new\nThe queen was young\n"
    done = run("--interactive", "--max_tokens", "12", "--quiet", input=turns, stdin=None)
    config, params = gpt2_jax.load("demo", dtype="float32")
    tokenizer = Tokenizer.load(hub.DEMO)
    talk, expected = gpt2_jax.Conversation(params, tokenizer, config=config), ""
    for text in ("The king was old", "\nThe queen was young", None, "The queen was young"):
        if text is None:
            talk.reset()
            continue
        *_, row = talk.reply(text, max_new_tokens=12)
        expected += row.text + "\n"
    assert done.stdout.decode() == expected and done.returncode == 0


def test_probabilities_are_shown_as_colours(run):
    prompt = ("Once upon a time there was a", "--max_tokens", "20")
    coloured, record = (
        run(*prompt, "--show_probs").stdout.decode(),
        json.loads(run(*prompt, "--json").stdout),
    )
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == prompt[0] + record["text"] + "\n"
    sure = ["38;5;34" if logprob >= np.log(0.5) else "" for logprob in record["logprobs"]]
    assert 0 < sure.count("38;5;34") == coloured.count("38;5;34m") < 20


def test_ctrl_c_keeps_the_text_and_exits_with_130(environment):
    command = [
        sys.executable,
        "-c",
        RUN,
        "Once upon a time",
        "--from_pretrained",
        "demo",
        "--max_tokens",
        "240",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    seen = process.stdout.read(len("Once upon a time"))
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert seen == b"Once upon a time"
    assert process.returncode == 130 and b"interrupted" in errors and b"Traceback" not in errors


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(run, environment, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(
        "A", "--max_tokens", "2", env=environment | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    )
    assert (
        done.returncode == 0
        and b"cannot be written" in done.stderr
        and b"Traceback" not in done.stderr
    )


def test_text_that_is_not_utf8_is_named(run):
    done = run(input=b"caf\xe9 noir", stdin=None)
    assert done.returncode == 2 and done.stderr.startswith(
        b"gpt2-jax: Standard input must be UTF-8, but "
    )
    assert b"at byte 3" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["A", "--from_pretrained", "nowhere/at/all"], "There is no folder nowhere/at/all"),
        (["A", "--from_pretrained", "gpt2"], '"demo", which comes with the package'),
        ([""], "The prompt '' is empty"),
        (["word " * 5000], "but the model has 256 positions"),
        (["A", "--max_tokens", "300"], "`max_new_tokens` is 300"),
        (["A", "--repetition_penalty", "0"], "`penalty` must be greater than 0, got 0.0"),
        (
            ["A", "--suppress_tokens", "4096"],
            "`suppress_tokens` must hold ids in [0, 4096) (`vocab_size`), got 4096",
        ),
        (["A", "--device", "tpu"], "--device tpu: JAX finds no such device here"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(run, environment, arguments, message):
    environment = {name: value for name, value in environment.items() if name != "JAX_PLATFORMS"}
    done = run(*arguments, env=environment)
    assert done.returncode == 2 and done.stdout == b""
    assert message in done.stderr.decode() and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "0.5"], "--temperature acts on random draws: add --do_sample"),
        (["--eta_cutoff", "0.1"], "--eta_cutoff acts on random draws: add --do_sample"),
        (["--do_sample", "--temperature", "0"], "--temperature must be greater than 0, got 0.0"),
        (["--do_sample", "--top_p", "1.5"], "--top_p must be in [0, 1], got 1.5"),
        (["--do_sample", "--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--do_sample", "--min_p", "nan"], "--min_p must be in [0, 1], got nan"),
        (["--num_samples", "2"], "--num_samples would repeat"),
        (["--max_tokens", "0"], "--max_tokens must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be in [0, 4294967296), got -1"),
        (["--stop", ""], "--stop must not be empty"),
        (["--lines"], "--lines reads standard input"),
        (["--length_penalty", "0"], "--length_penalty acts on beams: add --num_beams"),
        (["--early_stopping", "true"], "--early_stopping acts on beams: add --num_beams"),
        (["--num_beams", "2", "--stop", "x"], "--stop does not act on beams"),
        (
            ["--num_beams", "2", "--assistant_model", "demo"],
            "--num_beams and --assistant_model cannot be had together",
        ),
        (["--num_beams", "0"], "--num_beams must be at least 1, got 0"),
        (["--num_assistant_tokens", "3"], "--num_assistant_tokens needs --assistant_model"),
        (
            ["--prompt_lookup_num_tokens", "0"],
            "--prompt_lookup_num_tokens must be at least 1, got 0",
        ),
        (["--interactive", "--json"], "--interactive and --json cannot be had together"),
        (
            ["--interactive", "--overflow", "stop"],
            "--interactive and --overflow cannot be had together",
        ),
        (["--show_probs", "--json"], "--json has the probabilities already"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_options_out_of_range_are_named(capsys, arguments, message):
    assert message in mistake(capsys, "A", *arguments)


def test_no_stop_text_is_ever_shown_in_part():
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("one two END three")
    row = gpt2_jax.Continuation("", tokenizer, ["two END"])
    shown = [row.push([token], [0.0]) for token in ids]
    assert "".join(shown) + row.finish() == "one "
    row = gpt2_jax.Continuation("", tokenizer, ["two ENDING"])
    shown = [row.push([token], [0.0]) for token in ids]
    assert "".join(shown) + row.finish() == "one two END three"
