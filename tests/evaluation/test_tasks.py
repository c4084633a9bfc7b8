"""The tasks' protocols, on small sets made by hand; `test_harness.py` has the harness's."""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers

import gpt2_jax
from gpt2_jax.evaluation import readers, tasks
from gpt2_jax.evaluation.tasks import Model, TaskError
from tests.reference import DATA, ROOT

HELD_OUT = DATA / "held-out.txt"
PAGE = " ".join(HELD_OUT.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def model():
    """The shipped model."""
    config, params = gpt2_jax.load("demo", dtype="float32")
    return Model(params, config, gpt2_jax.Tokenizer.load(gpt2_jax.resolve("demo")))


@pytest.fixture(scope="module")
def logprobs():
    """A function from ids to HF's log-probability of each but the first, and if it is greedy."""
    hf = transformers.GPT2LMHeadModel.from_pretrained(
        gpt2_jax.resolve("demo"), attn_implementation="eager"
    ).float()

    @torch.no_grad()
    def logprobs_of(ids):
        ids = torch.tensor(ids)
        logp = torch.log_softmax(hf(ids[None, :-1]).logits[0], -1)
        chosen = logp[torch.arange(len(ids) - 1), ids[1:]]
        greedy = logp.argmax(-1) == ids[1:]
        return chosen.double().numpy(), greedy.numpy()

    return logprobs_of


def write(file, rows):
    """A file with a JSON object on each line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_perplexity_of_a_file(model, logprobs, tmp_path):
    text = PAGE[:600]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    ids = model.tokenizer.encode(text)
    assert len(ids) < 256  # one window: its sum is PyTorch's
    nll = -logprobs(ids)[0].sum()
    figures = tasks.perplexity_of_file(model, tmp_path / "a.txt")
    found = {figure.metric: figure for figure in figures}
    expected = {
        "perplexity": (math.exp(nll / (len(ids) - 1)), len(ids) - 1),
        "word perplexity": (math.exp(nll / len(text.split())), len(text.split())),
        "bits per byte": (nll / len(text.encode()) / math.log(2), len(text.encode())),
    }
    for metric, (value, count) in expected.items():
        np.testing.assert_allclose(found[metric].value, value, rtol=1e-5)
        assert found[metric].count == count
        assert found[metric].paper is None


def test_lambada_looks_at_the_last_word_or_at_its_last_token(model, logprobs, tmp_path):
    texts = [" ".join(PAGE.split()[i * 20 : i * 20 + 17 + i]) for i in range(6)]
    found = tasks.lambada(model, write(tmp_path / "l", [{"text": text} for text in texts]))
    totals = []
    whole = []
    last = []
    for text in texts:
        ids = model.tokenizer.encode(text)
        context = model.tokenizer.encode(text.rpartition(" ")[0])
        logp, greedy = logprobs(ids)
        totals.append(logp[len(context) - 1 :].sum())
        whole.append(greedy[len(context) - 1 :].all())
        last.append(greedy[-1])
    values = [figure.value for figure in found]
    expected = [math.exp(-np.mean(totals)), np.mean(whole), np.mean(last)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    limited = tasks.lambada(model._replace(limit=2), tmp_path / "l")
    np.testing.assert_allclose(limited[0].value, math.exp(-np.mean(totals[:2])), rtol=1e-5)


def test_hellaswag_as_llm_c_has_it(model, logprobs, tmp_path):
    words = PAGE.split()
    parts = [" ".join(words[i : i + 6 + i % 5]) for i in range(0, 240, 8)]
    rows = [
        {"ctx": parts[i], "endings": parts[i + 1 : i + 5], "label": i % 4} for i in range(0, 30, 5)
    ]
    found = tasks.hellaswag(model, write(tmp_path / "h", rows))
    plain = []
    normed = []
    for row in rows:
        context = model.tokenizer.encode(row["ctx"])
        ends = [model.tokenizer.encode(" " + ending) for ending in row["endings"]]
        scores = [logprobs(context + end)[0][len(context) - 1 :] for end in ends]
        plain.append(np.argmax([score.sum() for score in scores]) == row["label"])
        normed.append(np.argmax([score.mean() for score in scores]) == row["label"])
    assert [figure.value for figure in found] == [np.mean(plain), np.mean(normed)]
    np.testing.assert_allclose(found[0].stderr, math.sqrt(np.var(plain) / 5))


def test_cbt_puts_each_word_in_its_place(model, logprobs, tmp_path):
    # Fewer lines than the published twenty: all that PyTorch reads must fit into its context.
    context = [f"{i} Line {i} of a tale ." for i in range(1, 16)]
    words = ["king", "queen", "wolf", "apple"]
    lines = [*context, "21 Then the XXXXX went home .\tking\t\t" + "|".join(words), "", *context]
    lines.append("21 At the end the XXXXX ate it .\twolf\t\t" + "|".join(words))
    (tmp_path / "cbtest_CN_test.txt").write_text("\n".join(lines))
    (found,) = tasks.cbt(model, tmp_path / "cbtest_CN_test.txt")
    hits = []
    story = " ".join(line.partition(" ")[2] for line in context)
    for start, end, answer in (
        ("Then the", "went home .", "king"),
        ("At the end the", "ate it .", "wolf"),
    ):
        before = model.tokenizer.encode(f"{story} {start}")
        scores = [
            logprobs(before + model.tokenizer.encode(f" {word} {end}"))[0][len(before) - 1 :]
            for word in words
        ]
        hits.append(words[np.argmax([score.sum() for score in scores])] == answer)
    assert (found.value, found.count) == (np.mean(hits), 2)


def test_enwik8_is_its_last_part(model, logprobs, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TEST_BYTES", 400)
    (tmp_path / "enwik8").write_bytes(PAGE.encode()[:2000])
    (found,) = tasks.enwik8(model, tmp_path / "enwik8")
    text = PAGE.encode()[1600:2000].decode("utf-8", "replace")
    nll = -logprobs(model.tokenizer.encode(text))[0].sum()
    np.testing.assert_allclose(found.value, nll / len(text.encode()) / math.log(2), rtol=1e-5)


def test_the_papers_figure_stands_beside_a_model_of_that_size(model, tmp_path, monkeypatch):
    shape = (model.config.n_layer, model.config.n_embd)
    monkeypatch.setitem(tasks.PAPER_COLUMNS, shape, 2)  # as if it were gpt2-large
    file = write(tmp_path / "l", [{"text": "Once upon a time"}])
    assert [figure.paper for figure in tasks.lambada(model, file)] == [10.87, None, 0.6012]
    (tmp_path / "w").write_text(" = Title = \n\n Once upon a time . \n")
    papers = {figure.metric: figure.paper for figure in tasks.wikitext(model, tmp_path / "w")}
    assert papers.pop("word perplexity") == 19.93
    assert set(papers.values()) == {None}
    (tmp_path / "e").write_text("once upon a time")
    assert tasks.text8(model, tmp_path / "e")[0].paper == 1.02


@pytest.mark.parametrize(
    "name, paper", [("cbtest_CN_test_2500ex.txt", 0.9345), ("cbtest_NE_x", 0.880), ("other", None)]
)
def test_the_papers_figure_for_cbt_goes_by_the_files_name(
    model, tmp_path, monkeypatch, name, paper
):
    shape = (model.config.n_layer, model.config.n_embd)
    monkeypatch.setitem(tasks.PAPER_COLUMNS, shape, 2)
    (tmp_path / name).write_text("1 Once .\n2 The XXXXX ran .\tfox\t\tcat|fox")
    (figure,) = tasks.cbt(model, tmp_path / name)
    assert figure.paper == paper
    assert math.isnan(figure.stderr)  # of a single question


@pytest.mark.parametrize("task", ["perplexity", "lambada", "hellaswag", "wikitext", "cbt"])
def test_every_task_names_a_file_of_another_format(model, tmp_path, task):
    file = tmp_path / "data"
    file.write_text(" \n")
    with pytest.raises(TaskError, match="data: expected a text, got an empty one"):
        tasks.TASKS[task](model, file)


@pytest.mark.parametrize("task", ["perplexity", "enwik8", "text8"])
def test_a_text_of_one_token_cannot_be_scored(model, tmp_path, task):
    (tmp_path / "data").write_text("a")
    with pytest.raises(ValueError, match="at least 2 tokens to be scored, got 1"):
        tasks.TASKS[task](model, tmp_path / "data")


def test_progress_reaches_its_total(model, tmp_path):
    totals = {}
    counts = {}

    def progress(title, total):
        totals[title] = total
        counts[title] = 0

        def update(n_more):
            counts[title] += n_more

        return update

    lines = [" = Title = ", PAGE, " = Another = ", PAGE[:300]]
    (tmp_path / "w").write_text("\n".join(lines), encoding="utf-8")
    tasks.wikitext(model._replace(progress=progress), tmp_path / "w")
    assert counts == totals
    assert min(totals.values()) > 1
    assert totals.keys() == {"wikitext", "wikitext, pages"}


def test_a_tokenizer_without_end_of_text_is_named(model, tmp_path):
    without = types.SimpleNamespace(encode=model.tokenizer.encode, bot_id=None)
    (tmp_path / "w").write_text(" = Title = \n\n Once upon a time . \n")
    with pytest.raises(ValueError, match="a tokenizer that names its `bos_token` or"):
        tasks.wikitext(model._replace(tokenizer=without), tmp_path / "w")


def test_data_is_fetched_through_the_tasks():
    assert tasks.fetch is readers.fetch


def test_the_script_prints_figures_and_explains_mistakes(model, tmp_path):
    def run(*args):
        command = [
            sys.executable,
            ROOT / "scripts" / "evaluate.py",
            "--from_pretrained",
            "demo",
            "--quiet",
            *args,
        ]
        environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    done = run("--task", "perplexity", "--data", HELD_OUT, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["metric"] for row in rows] == ["perplexity", "word perplexity", "bits per byte"], (
        done.stderr
    )
    values = [figure.value for figure in tasks.perplexity_of_file(model, HELD_OUT)]
    np.testing.assert_allclose([row["value"] for row in rows], values, rtol=1e-6)
    wrong = run("--task", "perplexity", "--data", tmp_path / "none")
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("none: there is no such file.\n")
    assert run("--task", "lambada", "cbt", "--data", HELD_OUT).stderr.count("\n") == 1
