"""Our figures against lm-evaluation-harness with its own `hf` model, for the shipped model."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.evaluation import readers
from gpt2_jax.evaluation.score import rolling_windows
from gpt2_jax.evaluation.tasks import Model, hellaswag, lambada, wikitext
from gpt2_jax.tokenizer_template import Template
from tests.reference import DATA, TINY

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = (DATA / "held-out.txt").read_text(encoding="utf-8")
SENTENCES = [
    sentence.strip() + "."
    for sentence in " ".join(PAGE.split()).split(".")
    if len(sentence.split()) > 8
]
ARTICLE = " \n = {} = \n \n {} \n \n = = Early life = = \n \n {} @-@ {} @,@ 1 's ( so ) \n"
MEAN = {"aggregation": "mean", "higher_is_better": True}


# Small sets in the published formats, from a page of the Grimms.


def lines_of(rows):
    """A JSON object on each line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def hellaswag_rows():
    """Questions whose contexts and endings are sentences of the page."""
    for number in range(12):
        first, *endings = (SENTENCES[(number * 3 + i) % len(SENTENCES)] for i in range(5))
        half = len(first) // 2
        endings[1] += " [title] And  then [step] so."
        yield {
            "activity_label": "Telling [tales]",
            "ctx": first,
            "ctx_a": first[:half],
            "ctx_b": first[half:],
            "endings": endings,
            "label": number % 4,
        }


def wikitext_articles():
    """Articles of different lengths, tokenised as WikiText is."""
    words = PAGE.split()
    for i in range(3):
        body = " ".join(words[i * 300 : i * 300 + 290 + i])
        yield ARTICLE.format(f"Title {i}", body, "well", "known")


def harness_pages(articles):
    """The articles as the harness's set has them: from a title to the line before the next."""
    lines = "".join(articles).split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(" = Title")]
    ends = [*starts[1:], len(lines)]
    return ["\n".join(lines[start:end]) for start, end in zip(starts, ends, strict=True)]


def test_texts_begin_and_end_as_with_the_harnesss_own_model(tmp_path):
    from lm_eval.models.huggingface import HFLM

    from gpt2_jax.evaluation.harness import GPT2JaxLM

    config = gpt2_jax.GPT2Config(**TINY | {"vocab_size": 70})
    gpt2_jax.save(tmp_path, gpt2_jax.init(jax.random.key(0), config), config)
    vocab = {chr(byte): byte - 33 for byte in range(33, 100)} | {
        "<s>": 67,
        "</s>": 68,
        "\u0120": 69,
    }
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    specials = {"<s>": 67, "</s>": 68}
    for template in ((), (67,)), ((67,), ()), ((67,), (68,)):
        gpt2_jax.Tokenizer(vocab, [], specials, roles=roles, template=Template(*template)).save(
            tmp_path
        )
        ours = GPT2JaxLM(pretrained=str(tmp_path))
        theirs = HFLM(pretrained=str(tmp_path), device="cpu")
        assert ours.prefix_token_id == theirs.prefix_token_id == 67
        assert ours.eot_token_id == theirs.eot_token_id == 68
        for text in ("AB A", "<s>AB", "A</s>B", ""):
            for add_special_tokens in (None, True, False):
                ids = ours.tok_encode(text, add_special_tokens)
                assert ids == theirs.tok_encode(text, add_special_tokens)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder that holds the sets."""
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": sentence.rstrip(".")} for sentence in SENTENCES[:16]]
    articles = list(wikitext_articles())
    pages = [{"page": page} for page in harness_pages(articles)]
    (folder / "lambada").write_text(lines_of(texts))
    (folder / "hellaswag").write_text(lines_of(hellaswag_rows()))
    (folder / "wikitext").write_text("".join(articles))
    (folder / "pages").write_text(lines_of(pages))
    return folder


# The harness on these sets: its own tasks but for where the data lies.


def harness_tasks(data):
    """LAMBADA, HellaSwag, WikiText and continuations, as the harness defines tasks."""
    from lm_eval.tasks.hellaswag.utils import process_docs
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    def local(name):
        files = {"data_files": {"test": str(data / name)}, "cache_dir": str(data / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    return [
        local("lambada")
        | {
            "task": "our_lambada",
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc"} | MEAN,
            ],
        },
        local("hellaswag")
        | {
            "task": "our_hellaswag",
            "output_type": "multiple_choice",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"} | MEAN, {"metric": "acc_norm"} | MEAN],
        },
        local("pages")
        | {
            "task": "our_wikitext",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": wikitext_detokenizer,
            "process_results": process_results,
            "metric_list": [
                {"metric": "word_perplexity"},
                {"metric": "byte_perplexity"},
                {"metric": "bits_per_byte"},
            ],
        },
        local("lambada")
        | {
            "task": "our_stories",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "",
            "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"} | MEAN],
        },
    ]


def evaluate(model, model_args, data):
    """The harness's figures and the model's answers, by task."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=harness_tasks(data),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    figures = {}
    for task, row in results["results"].items():
        figures[task] = {name: value for name, value in row.items() if isinstance(value, float)}
    answers = {}
    for task, samples in results["samples"].items():
        answers[task] = [sample["resps"] for sample in samples]
    return figures, answers


@pytest.fixture(scope="module")
def theirs(data):
    """The harness with HF's model."""
    return evaluate("hf", f"pretrained={gpt2_jax.resolve('demo')},dtype=float32", data)


@pytest.fixture(scope="module")
def adapter():
    """Our model for the harness."""
    from gpt2_jax.evaluation.harness import GPT2JaxLM

    return GPT2JaxLM("demo")


@pytest.fixture(scope="module")
def model():
    """Our model for our tasks."""
    config, params = gpt2_jax.load("demo", dtype="float32")
    return Model(params, config, gpt2_jax.Tokenizer.load(gpt2_jax.resolve("demo")))


# The adapter.


def test_the_adapter_gives_what_the_harness_gives_with_hf(data, theirs):
    import gpt2_jax.evaluation.harness  # noqa: F401  registers the model

    their_figures, their_answers = theirs
    figures, answers = evaluate("gpt2_jax", "pretrained=demo", data)
    assert figures.keys() == their_figures.keys()
    for task, row in their_figures.items():
        assert row
        assert row.keys() == figures[task].keys()
        for name, value in row.items():
            np.testing.assert_allclose(
                figures[task][name], value, rtol=1e-4, err_msg=f"{task} {name}"
            )
    assert answers["our_stories"] == their_answers["our_stories"]
    assert any(len(text[0][0]) > 5 for text in answers["our_stories"])


def instances(kind, *arguments):
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def test_texts_are_the_sum_of_what_follows_end_of_text(adapter):
    text = " ".join(PAGE.split()[:40])
    requests = instances("loglikelihood_rolling", (text,), ("",))
    whole, empty = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    (answer,) = adapter.loglikelihood(instances("loglikelihood", ("", text)), disable_tqdm=True)
    np.testing.assert_allclose(whole, answer[0], rtol=1e-5)
    assert empty == 0.0


def test_a_long_context_is_cut_from_the_left(adapter):
    context = adapter.tok_encode(PAGE)
    continuation = adapter.tok_encode(" wolf")
    assert len(context) > adapter.max_length
    long = (("all", " wolf"), context, continuation)
    # All that fits: the continuation's last token is not read.
    short = (("the end", " wolf"), context[-adapter.max_length :], continuation)
    long_answer, short_answer = adapter._loglikelihood_tokens([long, short], disable_tqdm=True)
    assert long_answer == short_answer


def test_continuations_end_before_the_first_stop_text(adapter):
    options = {"max_gen_toks": 12, "until": []}
    contexts = ["Once upon a time", "There was a king", "The wolf"]
    plain = adapter.generate_until(
        instances("generate_until", *[(context, options) for context in contexts]),
        disable_tqdm=True,
    )
    assert all(len(text) > 10 for text in plain)
    stop = plain[1][4:7]
    stopped = adapter.generate_until(
        instances(
            "generate_until",
            (contexts[0], options),
            (contexts[1], options | {"until": ["", stop]}),  # an empty one ends nothing
            (contexts[2], options | {"until": plain[2][6:8]}),  # not a list
        ),
        disable_tqdm=True,
    )
    assert stopped[0] == plain[0]
    assert stopped[1] == plain[1].split(stop)[0]
    assert stopped[2] == plain[2].split(plain[2][6:8])[0]


def test_sampling_is_repeatable_and_greedy_ignores_its_options(adapter):
    def one(**options):
        options |= {"max_gen_toks": 8}
        requests = instances("generate_until", ("Once upon a time", options))
        return adapter.generate_until(requests, disable_tqdm=True)[0]

    assert one(temperature=5.0) == one(temperature=5.0)
    assert one(temperature=5.0) != one()
    assert one(temperature=0, top_p=0.5) == one()
    assert one(do_sample=False, temperature=5.0) == one()
    assert one(do_sample=True, top_k=1) == one()


def test_a_repeated_question_gets_answers_that_no_batch_size_changes(adapter):
    drawn = {"max_gen_toks": 8, "temperature": 1.0}
    questions = [("Once upon a time", drawn)] * 3 + [("The wolf said", drawn)]
    requests = instances("generate_until", *questions)
    answers = adapter.generate_until(requests, disable_tqdm=True)
    assert len(set(answers)) == 4
    adapter.batch_size = 2
    try:
        assert adapter.generate_until(requests, disable_tqdm=True) == answers
        # Nor does what else is asked.
        assert adapter.generate_until(requests[3:] * 2, disable_tqdm=True)[0] == answers[3]
    finally:
        adapter.batch_size = 8


@pytest.mark.parametrize("first", ["gpt2_jax.evaluation.harness", "lm_eval"])
def test_the_harness_keeps_its_own_models(first):
    code = f"""
import {first}, gpt2_jax.evaluation.harness
from lm_eval.api.registry import MODEL_REGISTRY
from lm_eval.models import MODEL_MAPPING
print(sorted({{*MODEL_MAPPING, "gpt2_jax"}} - set(MODEL_REGISTRY.keys())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ARGUMENTS = ({}, {"add_bos_token": True}, {"prefix_token_id": 5}, {"logits_cache": False})


@pytest.mark.parametrize("options", ARGUMENTS, ids=str)
def test_arguments_do_what_they_do_with_hf(options):
    from lm_eval.models.huggingface import HFLM

    from gpt2_jax.evaluation.harness import GPT2JaxLM

    models = [
        HFLM(str(gpt2_jax.resolve("demo")), device="cpu", dtype="float32", **options),
        GPT2JaxLM("demo", **options),
    ]
    pairs = [("Once", " upon"), ("", " upon a"), ("<|endoftext|>Once ", "upon")]
    # Answers that are letters, to one question.
    pairs += [("The answer is", f" {letter}") for letter in "ABCD"]
    scored = []
    for model in models:
        answers = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
        (whole,) = model.loglikelihood_rolling(
            instances("loglikelihood_rolling", ("Once upon a time",)), disable_tqdm=True
        )
        scored.append(([answer[0] for answer in answers], [answer[1] for answer in answers], whole))
    (theirs, their_greedy, their_whole), (ours, our_greedy, our_whole) = scored
    # Near 0 a log-probability in float32 is the difference of two numbers of a hundred times it.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert our_greedy == their_greedy
    np.testing.assert_allclose(our_whole, their_whole, rtol=1e-4)
    for text in ("Once", "<|endoftext|>Once"):
        for add in (None, False, True):
            theirs, ours = (model.tok_encode(text, add_special_tokens=add) for model in models)
            assert theirs == ours
    theirs, ours = (model.tok_encode("Once upon a time", left_truncate_len=2) for model in models)
    assert theirs == ours


def test_prompts_are_truncated_as_hfs_are(adapter, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(str(gpt2_jax.resolve("demo")), device="cpu", dtype="float32", truncation=True)
    hf.tokenizer.model_max_length = adapter.max_length
    for truncation in (False, True):
        monkeypatch.setattr(adapter, "truncation", truncation)
        ids, _ = hf.tok_batch_encode([PAGE], left_truncate_len=200, truncation=truncation)
        assert adapter._prompt(PAGE, 200) == ids[0].tolist()


def test_what_is_drawn_from_is_hfs(adapter):
    from transformers import GenerationConfig

    from gpt2_jax.evaluation.harness import _sampler

    top_k = GenerationConfig().top_k or GenerationConfig._get_default_generation_params()["top_k"]
    expected = gpt2_jax.sampler_from_options({"top_k": top_k}, do_sample=True)
    assert _sampler({"temperature": 1.0}, ()) == expected
    plain = gpt2_jax.sampler_from_options({}, do_sample=True)
    assert _sampler({"do_sample": True, "top_k": 0}, ()) == plain
    assert not _sampler({"do_sample": None, "temperature": 0}, ()).draws
    with pytest.raises(ValueError, match="`temperature` must be greater than 0, got 0"):
        _sampler({"do_sample": True, "temperature": 0}, ())


def test_the_automatic_batch_is_what_memory_holds(adapter, monkeypatch):
    from gpt2_jax.evaluation import harness

    tried = []

    def score(params, requests, *, config, batch_size, share):
        tried.append(batch_size)
        assert len(requests) == batch_size and not share
        assert len(requests[0].ids) == adapter.max_length + 1
        if batch_size > 5:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(harness, "score", score)
    assert adapter._largest_batch(4) == 4  # on this CPU, untried
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert adapter._largest_batch(20) == 5
    assert tried == [20, 10, 5]


def test_an_end_of_text_beyond_the_vocabulary_stops_nothing(adapter, monkeypatch):
    assert adapter._stop_ids == (0,)
    small = adapter.config.replace(vocab_size=97, eos_token_id=(50256, 7))
    monkeypatch.setattr(adapter, "config", small)
    assert sorted(adapter._stop_ids) == [0, 7]
    monkeypatch.setattr(adapter, "tokenizer", types.SimpleNamespace(eot_id=50256))
    assert adapter._stop_ids == (7,)


def test_what_the_adapter_cannot_do_is_named(adapter):
    from gpt2_jax.evaluation.harness import GPT2JaxLM

    with pytest.raises(ValueError, match="`max_length` must be at most 256, got 300"):
        GPT2JaxLM("demo", max_length=300)
    for wrong in ("auto:4", 0, True):
        with pytest.raises(ValueError, match='`batch_size` must be a positive number or "auto"'):
            GPT2JaxLM("demo", batch_size=wrong)
    with pytest.raises(ValueError, match=r"`prefix_token_id` must be less than 4096 .*, got 4096"):
        GPT2JaxLM("demo", prefix_token_id=4096)
    with pytest.raises(ValueError, match="`add_bos_token` must be True or False, got 'false'"):
        GPT2JaxLM("demo", add_bos_token="false")
    with pytest.raises(ValueError, match="`max_gen_toks` must be a positive integer, got 'x'"):
        GPT2JaxLM("demo", max_gen_toks="x")
    for ask in (lambda: adapter.chat_template(True), lambda: adapter.apply_chat_template([])):
        with pytest.raises(ValueError, match="GPT-2 has no chat template: leave out"):
            ask()
    assert adapter.chat_template(False) is None
    with pytest.raises(ValueError, match="not supported: num_beams"):
        adapter.generate_until(instances("generate_until", ("Once", {"num_beams": 3})))
    with pytest.raises(ValueError, match="from 1 to 255, got 256"):
        adapter.generate_until(instances("generate_until", ("Once", {})))


# Our tasks.


def by_harness(figures):
    """The figures whose protocol is the harness's, by metric."""
    return {figure.metric: figure for figure in figures if figure.protocol.startswith("lm-eval")}


def test_our_lambada_gives_what_the_harness_gives(data, theirs, model):
    figures = by_harness(lambada(model, data / "lambada"))
    expected = theirs[0]["our_lambada"]
    np.testing.assert_allclose(figures["perplexity"].value, expected["perplexity,none"], rtol=1e-4)
    assert figures["accuracy"].value == expected["acc,none"]
    # The harness's standard error of a mean, by hand.
    accuracy = figures["accuracy"].value
    variance = accuracy * (1 - accuracy) / (figures["accuracy"].count - 1)
    np.testing.assert_allclose(figures["accuracy"].stderr, np.sqrt(variance), rtol=1e-9)


def test_our_hellaswag_gives_what_the_harness_gives(data, theirs, model):
    figures = by_harness(hellaswag(model, data / "hellaswag"))
    expected = theirs[0]["our_hellaswag"]
    assert figures["accuracy"].value == expected["acc,none"]
    assert figures["accuracy, normed per character"].value == expected["acc_norm,none"]


def test_our_wikitext_gives_what_the_harness_gives(data, theirs, model):
    figures = by_harness(wikitext(model, data / "wikitext"))
    expected = theirs[0]["our_wikitext"]
    for name in ("word perplexity", "byte perplexity", "bits per byte"):
        value = expected[name.replace(" ", "_") + ",none"]
        np.testing.assert_allclose(figures[name].value, value, rtol=1e-4)


def test_pages_are_detokenised_as_by_the_harness(data):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages = [*readers.articles(readers.read_wikitext(data / "wikitext")), PAGE]
    for page in pages:
        assert readers.detokenized(page) == wikitext_detokenizer({"page": page})
    assert readers.detokenized(pages[0]) != pages[0]


def test_brackets_are_removed_as_by_the_harness():
    from lm_eval.tasks.hellaswag.utils import preprocess

    text = " [header] Go [title] And  then [step] so.   [substeps] "
    assert readers.without_brackets(text) == preprocess(text)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 10, 23])
def test_rolling_windows_are_the_harnesss(count):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(1, count + 1))
    expected = []
    for pair in get_rolling_token_windows(ids, prefix_token=0, max_seq_len=5, context_len=1):
        context, continuation = make_disjoint_window(pair)
        expected.append((context + continuation, len(continuation)))
    assert rolling_windows(ids, prefix_id=0, window=5) == expected
