"""The command `generate` on the packaged model: what it writes is what the library makes."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.commands import generate
from gpt2_jax.commands.generate import parser, shade_of
from gpt2_jax.commands.main import run
from gpt2_jax.files import lines_of
from gpt2_jax.generation.options import OPTIONS
from gpt2_jax.tokenizer import Tokenizer
from tests.reference import ROOT, TINY

# Users have neither of the two.
COMMAND = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from gpt2_jax_cli import main
main()
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A cache of compiled programs that the runs share."""
    cache = str(tmp_path_factory.mktemp("cache"))
    paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache, "JAX_PLATFORMS": "cpu"}
    return os.environ | paths


@pytest.fixture
def process(environment):
    """Runs the command in a process of its own, without torch and transformers."""

    def run(*arguments, **changes):
        options = {"env": environment, "stdin": subprocess.DEVNULL} | changes
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments, "--from_pretrained", "demo"],
            capture_output=True,
            timeout=120,
            **options,
        )

    return run


def records_of(done):
    """The JSON lines of a run that went well."""
    assert done.code == 0, done.err
    return [json.loads(line) for line in lines_of(done.out)[:-1]]


# In a process.


def test_greedy_text_is_what_the_library_generates(process, demo):
    prompt = "Once upon a time there was a"
    done = process(prompt, "--max_tokens", "20")
    assert done.returncode == 0, done.stderr
    ids = np.array([demo.tokenizer.encode(prompt)])
    out = gpt2_jax.generate(demo.params, ids, config=demo.config, max_new_tokens=20)
    assert done.stdout.decode() == prompt + demo.tokenizer.decode(out.ids[0]) + "\n"
    assert b"3,483,904 parameters" in done.stderr
    assert b"tokens/s" in done.stderr


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(process, environment, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = environment | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = process("A", "--max_tokens", "2", env=blocked)
    assert done.returncode == 0
    assert b"cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_text_that_is_not_utf8_is_named(process):
    done = process(input=b"caf\xe9 noir", stdin=None)
    assert done.returncode == 2
    assert done.stderr.startswith(b"gpt2-jax: Standard input: expected UTF-8, but ")
    assert b"at byte 3" in done.stderr


def test_a_device_that_is_not_there_is_named(process, environment):
    any_device = {name: value for name, value in environment.items() if name != "JAX_PLATFORMS"}
    done = process("A", "--device", "tpu", env=any_device)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"--device tpu: JAX finds no such device here" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_device_without_a_plugin_is_named(monkeypatch):
    def fail():
        raise AssertionError  # as JAX does

    updates = []
    monkeypatch.setattr(generate.jax.config, "update", lambda *change: updates.append(change))
    monkeypatch.setattr(generate.jax, "devices", fail)
    args = types.SimpleNamespace(dtype="float32", device="gpu")
    with pytest.raises(ValueError, match="--device gpu: JAX finds no such device here"):
        generate.set_up_jax(args, lambda line: None)
    assert ("jax_platforms", "cuda") in updates


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    assert not generate.is_writable(Path("~/.cache/gpt2_jax/xla"))


# What is written.


def test_samples_are_repeated_by_their_seed_and_written_as_json(command, demo):
    cuts = ["--top_k", "40", "--top_p", "0.9", "--min_p", "0.01", "--temperature", "0.9"]
    options = ["The king", "The queen", "--do_sample", *cuts, "--num_samples", "2"]
    options += ["--max_tokens", "9", "--json", "--quiet"]
    one = command(*options, "--seed", "5")
    two = command(*options, "--seed", "5")
    other = command(*options, "--seed", "6")
    assert one.err == ""
    assert one.out == two.out != other.out
    records = records_of(one)
    prompts = [record["prompt"] for record in records]
    assert prompts == ["The king", "The king", "The queen", "The queen"]
    assert records[0]["text"] != records[1]["text"]
    for record in records:
        assert record["finish_reason"] == "length"
        assert record["text"] == demo.tokenizer.decode(record["ids"])
        assert len(record["ids"]) == len(record["logprobs"]) == 9
        assert max(record["logprobs"]) < 0


def test_a_prompt_that_is_a_commands_name_goes_through_generate(command):
    done = command("generate", "train", "--max_tokens", "3", "--quiet")
    assert done.code == 0
    assert done.out.startswith("train")


def test_a_prompt_is_read_from_standard_input_and_a_text_stops_before_its_stop(command):
    prompt = "There was once a poor man"
    free = command("--max_tokens", "30", typed=prompt)
    text = free.out.removesuffix("\n").removeprefix(prompt)
    stop = text[len(text) // 2 :][:4]
    (record,) = records_of(
        command("--max_tokens", "30", "--stop", stop, "--json", typed=prompt + "\n")
    )
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


def test_each_line_may_be_a_prompt(command):
    records = records_of(
        command(
            "--lines", "--json", "--max_tokens", "2", typed="\ufeffThe king\r\n\nThe\u2028queen\n"
        )
    )
    assert [record["prompt"] for record in records] == ["The king", "The\u2028queen"]


def test_several_texts_are_parted_by_rules(command):
    done = command("The king", "The queen", "--max_tokens", "2", "--quiet")
    assert re.findall(r"^=== \d of 2 ===$", done.out, re.MULTILINE) == [
        "=== 1 of 2 ===",
        "=== 2 of 2 ===",
    ]


def test_rules_change_what_is_written(command):
    prompt = ["The king", "--max_tokens", "40", "--json", "--quiet"]
    endless = ["--suppress_tokens", "0"]  # the end of a story
    (free,) = records_of(command(*prompt, *endless))
    (once,) = records_of(command(*prompt, *endless, "--no_repeat_ngram_size", "1"))
    penalty = [*endless, "--suppress_tokens", "12", "--repetition_penalty", "1.3"]
    (without,) = records_of(command(*prompt, *penalty))
    assert len(set(free["ids"])) < 40 == len(set(once["ids"]))
    assert free["ids"] != without["ids"]
    assert 12 not in without["ids"]


def test_a_bias_is_given_before_the_run_that_it_completes(command):
    prompt = ["The king", "--max_tokens", "4", "--json", "--quiet"]
    (lifted,) = records_of(command(*prompt, "--sequence_bias", "1000", "12"))
    assert lifted["ids"] == [12, 12, 12, 12]


def test_texts_have_the_form_that_is_asked_for(command, tmp_path):
    pytest.importorskip("outlines_core")
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    drawn = ["--do_sample", "--top_k", "3", "--seed", "1", "--num_samples", "2", "--json"]
    for given in (json.dumps(schema), str(file)):
        records = records_of(command("The king", "--json_schema", given, *drawn))
        assert [record["finish_reason"] for record in records] == ["stop", "stop"]
        assert all(isinstance(json.loads(record["text"])["old"], bool) for record in records)
    # One form alone can follow, so that the prompt and the form are all that there is.
    done = command("The king", "--regex", " of [F]rance", "--quiet")
    assert done.out == "The king of France\n", done.err
    refused = command("The king", "--regex", "(")
    assert refused.code == 2 and "`pattern` must be a regular expression, got '('" in refused.err


def test_beams_are_those_of_the_library(command, demo):
    beams = ["--num_beams", "3", "--num_samples", "2", "--length_penalty", "0.5"]
    options = [*beams, "--early_stopping", "true", "--max_tokens", "9", "--json", "--quiet"]
    records = records_of(command("The king", *options))
    out = gpt2_jax.beam_search(
        demo.params,
        np.array([demo.tokenizer.encode("The king")]),
        config=demo.config,
        max_new_tokens=9,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.5,
        early_stopping=True,
    )
    found = zip(records, out.ids[0], out.lengths[0], out.scores[0], strict=True)
    for record, ids, length, score in found:
        assert record["ids"] == ids[:length].tolist()
        assert record["text"] == demo.tokenizer.decode(record["ids"])
        np.testing.assert_allclose(record["score"], score, rtol=1e-4)


@pytest.mark.parametrize(
    "guess",
    [
        ("--prompt_lookup_num_tokens", "3"),
        ("--assistant_model", "demo", "--num_assistant_tokens", "4"),
    ],
)
def test_speculation_writes_the_same_text(command, guess):
    prompt = ("Once upon a time there was a king", "--max_tokens", "40")
    plain = command(*prompt)
    guessed = command(*prompt, *guess)
    assert plain.code == 0
    assert guessed.out == plain.out
    accepted, drafted = re.search(r"(\d+) of (\d+) guesses were right", guessed.err).groups()
    assert int(drafted) > 0
    # A model agrees with itself.
    assert guess[0] != "--assistant_model" or accepted == drafted


def test_past_the_context_a_text_stops_or_slides_on(command, demo):
    text = "Once upon a time there was a king"
    endless = ("--suppress_tokens", "0")  # the end of a story
    prompt = (text, *endless, "--max_tokens", "270", "--json", "--quiet")
    (stopped,) = records_of(command(*prompt, "--overflow", "stop"))
    (slid,) = records_of(command(*prompt, "--overflow", "slide"))
    room = 256 - len(demo.tokenizer.encode(text))
    assert len(stopped["ids"]) == room
    assert stopped["finish_reason"] == "length"
    assert len(slid["ids"]) == 270
    assert slid["ids"][:room] == stopped["ids"]


def test_a_conversation_goes_on_until_it_is_begun_anew(command, demo):
    turns = "The king was old\nThe queen was young\n/new\nThe queen was young\n"
    done = command("--interactive", "--max_tokens", "12", "--quiet", typed="\ufeff" + turns)
    talk = gpt2_jax.Conversation(demo.params, demo.tokenizer, config=demo.config)
    expected = ""
    for text in ("The king was old", "\nThe queen was young", None, "The queen was young"):
        if text is None:
            talk.reset()
            continue
        *_, row = talk.reply(text, max_new_tokens=12)
        expected += row.text + "\n"
    assert done.code == 0
    assert done.out == expected


def test_enter_alone_goes_on_where_the_turn_was_cut(command):
    cut = command("--interactive", "--max_tokens", "9", "--quiet", typed="The king was old\n\n")
    whole = command("The king was old", "--max_tokens", "18", "--quiet")
    assert "The king was old" + cut.out.replace("\n", "", 1) == whole.out


def test_an_ended_story_is_announced(command):
    done = command("--interactive", "--max_tokens", "200", typed="They all lived happily\n")
    assert "; the text ends here: add a line, or /new" in done.err


@pytest.fixture
def without_network(monkeypatch):
    """No hub can be reached, and nothing is in its cache."""
    load = generate.load_pretrained

    def refuse(name, **options):
        if name != "demo":
            raise ConnectionError("the hub could not be reached")
        return load(name, **options)

    monkeypatch.setattr(generate, "load_pretrained", refuse)


def test_without_a_network_the_demo_takes_the_place_of_a_model_not_asked_for(
    command, without_network
):
    asked_for = command("The king", "--max_tokens", "5")
    fallen_back = command("The king", "--max_tokens", "5", model=())
    assert fallen_back.code == 0
    assert fallen_back.out == asked_for.out
    notice, description, _ = fallen_back.err.splitlines()
    assert notice.startswith("gpt2 is not here and the hub cannot be reached: this is demo")
    assert "--from_pretrained" in notice
    assert description.startswith("demo: 3,483,904 parameters")
    # Whose text it is must be known to all who read it.
    assert command("The king", "--quiet", model=()).err == notice + "\n"


@pytest.mark.parametrize(
    "asked_for", [("--from_pretrained", "gpt2"), ("--model_name", "gpt2"), ("--revision", "main")]
)
def test_what_was_asked_for_has_no_replacement(command, without_network, asked_for):
    done = command("The king", *asked_for, model=())
    assert done.code == 2
    assert done.out == ""
    assert done.err == "gpt2-jax: the hub could not be reached\n"


def test_probabilities_are_shown_as_colours(command):
    prompt = ("Once upon a time there was a", "--max_tokens", "20")
    coloured = command(*prompt, "--show_probs").out
    (record,) = records_of(command(*prompt, "--json"))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == prompt[0] + record["text"] + "\n"
    n_sure = sum(logprob >= np.log(0.5) for logprob in record["logprobs"])
    assert 0 < n_sure == coloured.count("38;5;34m") < 20


def test_the_likelier_a_token_the_greener_it_is():
    shades = [shade_of(np.log(probability)) for probability in (0.9, 0.3, 0.1, 0.03, 0.001)]
    assert shades == [34, 112, 178, 208, 196]
    assert shade_of(-np.inf) == 196


def test_a_model_of_another_kind_of_tokenizer_is_read_or_named(tmp_path, capsys):
    config = gpt2_jax.GPT2Config(**TINY)
    gpt2_jax.save(tmp_path, gpt2_jax.init(jax.random.key(0), config), config)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    arguments = ["the cats", "--from_pretrained", str(tmp_path), "--max_tokens", "3", "--json"]
    assert run(arguments) == 2
    assert "got the class unknown and vocab.txt" in capsys.readouterr().err

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    params = gpt2_jax.load(tmp_path)[1]
    for flags, ids in (([], [2, 5, 6, 7, 3]), (["--no_special_tokens"], [5, 6, 7])):
        assert run([*arguments, *flags]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        out = gpt2_jax.generate(params, np.array([ids]), config=config, max_new_tokens=3)
        assert json.loads(line)["ids"] == out.ids[0, : out.lengths[0]].tolist()


# Mistakes.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["A", "--from_pretrained", "nowhere/at/all"], "There is no folder nowhere/at/all"),
        (["A", "--from_pretrained", "gpt2"], '"demo", which comes with the package'),
        ([""], "The prompt '' is empty"),
        (["word " * 5000], "but the model has 256 positions"),
        (["A", "--max_tokens", "300"], "`max_new_tokens` is 300"),
        (
            ["A", "--suppress_tokens", "4096"],
            "`suppress_tokens` must hold ids in [0, 4096) (`vocab_size`), got 4096",
        ),
    ],
)
def test_mistakes_about_the_model_get_a_sentence(command, arguments, message):
    done = command(*arguments, "--quiet")
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("gpt2-jax: ")
    assert message in done.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "0.5"], "--temperature acts on random draws: add --do_sample"),
        (["--eta_cutoff", "0.1"], "--eta_cutoff acts on random draws: add --do_sample"),
        (
            ["--do_sample", "--temperature", "0"],
            "--temperature must be greater than 0, got 0.0; without --do_sample it is 0.",
        ),
        (["--do_sample", "--top_p", "1.5"], "--top_p must be in [0, 1], got 1.5"),
        (["--do_sample", "--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--do_sample", "--min_p", "nan"], "--min_p must be in [0, 1], got nan"),
        (["--do_sample", "--typical_p", "0"], "--typical_p must be in (0, 1], got 0.0"),
        (["--repetition_penalty", "0"], "--repetition_penalty must be greater than 0, got 0.0"),
        (["--num_samples", "2"], "--num_samples would repeat"),
        (["--max_tokens", "0"], "--max_tokens must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be in [0, 4294967296), got -1"),
        (["--stop", ""], "--stop must not be empty"),
        (["--lines"], "--lines reads standard input"),
        (["--length_penalty", "0"], "--length_penalty acts on beams: add --num_beams"),
        (["--early_stopping", "true"], "--early_stopping acts on beams: add --num_beams"),
        (["--renormalize_logits"], "--renormalize_logits acts on beams: add --num_beams"),
        (["--num_beams", "2", "--stop", "x"], "--stop does not act on beams"),
        (
            ["--num_beams", "2", "--assistant_model", "demo"],
            "--num_beams and --assistant_model cannot be combined",
        ),
        (["--num_beams", "0"], "--num_beams must be at least 1, got 0"),
        (["--num_assistant_tokens", "3"], "--num_assistant_tokens needs --assistant_model"),
        (
            ["--prompt_lookup_num_tokens", "0"],
            "--prompt_lookup_num_tokens must be at least 1, got 0",
        ),
        (["--max_tokens", "3000000000"], "--max_tokens must be at most 2147483647, got 3000000000"),
        (["--seed", "1180591620717411303424"], "--seed must be in [0, 4294967296), got 11805916"),
        (["--num_beams", "3000000000"], "--num_beams must be at most 2147483647"),
        (["--min_length", "3000000000"], "--min_length must be at most 2147483647"),
        (["--interactive", "--json"], "--interactive and --json cannot be combined"),
        (
            ["--regex", "a", "--json_schema", "{}", "--overflow", "slide"],
            "--regex and --json_schema and --overflow slide cannot be combined",
        ),
        (
            ["--interactive", "--overflow", "stop"],
            "--interactive and --overflow cannot be combined",
        ),
        (["--interactive", "--num_samples", "2", "--do_sample"], "--interactive writes one text"),
        (["--show_probs", "--json"], "--json has the probabilities already"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["b\udcff"], "spellable in UTF-8, got '\\udcff' at position 1"),
    ],
)
def test_options_out_of_range_are_named(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(generate, "load_pretrained", None)  # nothing is loaded for them
    assert run(["A", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_terminal_without_a_prompt_is_asked_for_one(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run([]) == 2
    assert "No prompt: give one" in capsys.readouterr().err


def test_every_option_of_the_table_is_one_of_the_command_line():
    args = parser("gpt2-jax").parse_args([])
    assert OPTIONS.keys() <= vars(args).keys()


def test_options_that_are_not_given_change_nothing():
    args = parser("gpt2-jax").parse_args([])
    generate.check_options(args)
    given = {name: getattr(args, name) for name in OPTIONS}
    left = {name: value for name, value in given.items() if value not in (None, False)}
    assert left == {"num_beams": 1}


def test_no_stop_text_is_ever_shown_in_part():
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("one two END three")
    row = gpt2_jax.Continuation("", tokenizer, ["two END"])
    shown = [row.push([token], [0.0]) for token in ids]
    assert "".join(shown) + row.finish() == "one "
    row = gpt2_jax.Continuation("", tokenizer, ["two ENDING"])
    shown = [row.push([token], [0.0]) for token in ids]
    assert "".join(shown) + row.finish() == "one two END three"
