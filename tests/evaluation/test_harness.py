"""Our figures against lm-evaluation-harness with its own `hf` model on the same folder, for the shipped model."""

import json
from pathlib import Path

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.evaluation.tasks import Model, hellaswag, lambada, wikitext

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PAGE = (Path(__file__).parents[1] / "data" / "held-out.txt").read_text(encoding="utf-8")
SENTENCES = [
    sentence.strip() + "."
    for sentence in " ".join(PAGE.split()).split(".")
    if len(sentence.split()) > 8
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small sets in the published formats, from a page of the Grimms."""
    folder = tmp_path_factory.mktemp("data")
    texts = [sentence.rstrip(".") for sentence in SENTENCES[:16]]
    (folder / "lambada").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = []
    for number in range(12):
        first, *endings = (SENTENCES[(number * 3 + i) % len(SENTENCES)] for i in range(5))
        half = len(first) // 2
        row = {
            "activity_label": "Telling [tales]",
            "ctx_a": first[:half],
            "ctx_b": first[half:],
            "label": number % 4,
        }
        endings[1] += " [title] And  then [step] so."
        rows.append(row | {"ctx": first, "endings": endings})
    (folder / "hellaswag").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = PAGE.split()
    article = " \n = {} = \n \n {} \n \n = = Early life = = \n \n {} @-@ {} @,@ 1 's ( so ) \n"
    pages = [
        article.format(f"Title {i}", " ".join(words[i * 300 : i * 300 + 290 + i]), "well", "known")
        for i in range(3)
    ]
    (folder / "wikitext").write_text("".join(pages))
    (folder / "pages").write_text(
        "".join(json.dumps({"page": page}) + "\n" for page in wikitext_pages(pages))
    )
    return folder


def wikitext_pages(pages):
    """The articles as the harness's data set has them: from a title up to the line before the next."""
    lines = "".join(pages).split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(" = Title")]
    return ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def harness(model, args, data):
    """The harness's results on the small sets."""
    import lm_eval
    from lm_eval.tasks.hellaswag.utils import process_docs
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    def local(name):
        files = {"data_files": {"test": str(data / name)}, "cache_dir": str(data / "cache")}
        return {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = [
        local("lambada")
        | {
            "task": "our_lambada",
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc"} | mean,
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
            "metric_list": [{"metric": "acc"} | mean, {"metric": "acc_norm"} | mean],
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
            "metric_list": [{"metric": "exact_match"} | mean],
        },
    ]
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=args,
        tasks=tasks,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    scores = {
        task: {k: v for k, v in row.items() if isinstance(v, float)}
        for task, row in found["results"].items()
    }
    samples = {
        task: [sample["resps"] for sample in rows] for task, rows in found["samples"].items()
    }
    return scores, samples


@pytest.fixture(scope="module")
def theirs(data):
    """The harness with HF's model."""
    return harness("hf", f"pretrained={gpt2_jax.resolve('demo')},dtype=float32", data)


def test_the_adapter_gives_what_the_harness_gives_with_hf(data, theirs):
    import gpt2_jax.evaluation.harness  # noqa: F401  registers the model

    scores, samples = harness("gpt2_jax", "pretrained=demo", data)
    assert scores.keys() == theirs[0].keys()
    for task, row in theirs[0].items():
        assert row.keys() == scores[task].keys() and row
        for name, value in row.items():
            np.testing.assert_allclose(
                scores[task][name], value, rtol=1e-4, err_msg=f"{task} {name}"
            )
    assert samples["our_stories"] == theirs[1]["our_stories"]
    assert any(len(text[0][0]) > 5 for text in samples["our_stories"])


def test_our_tasks_give_what_the_harness_gives(data, theirs):
    config, params = gpt2_jax.load("demo", dtype="float32")
    model = Model(params, config, gpt2_jax.Tokenizer.load(gpt2_jax.resolve("demo")))

    def figures(task, name):
        return {
            figure.metric: figure
            for figure in task(model, data / name)
            if figure.protocol.startswith("lm-eval")
        }

    ours, reference = figures(lambada, "lambada"), theirs[0]["our_lambada"]
    np.testing.assert_allclose(ours["perplexity"].value, reference["perplexity,none"], rtol=1e-4)
    assert ours["accuracy"].value == reference["acc,none"]
    accuracy, count = (
        ours["accuracy"].value,
        ours["accuracy"].count,
    )  # the harness's stderr of a mean, by hand
    np.testing.assert_allclose(
        ours["accuracy"].stderr, np.sqrt(accuracy * (1 - accuracy) / (count - 1)), rtol=1e-9
    )

    ours, reference = figures(hellaswag, "hellaswag"), theirs[0]["our_hellaswag"]
    assert ours["accuracy"].value == reference["acc,none"]
    assert ours["accuracy, normed per character"].value == reference["acc_norm,none"]

    ours, reference = figures(wikitext, "wikitext"), theirs[0]["our_wikitext"]
    for name in ("word perplexity", "byte perplexity", "bits per byte"):
        np.testing.assert_allclose(
            ours[name].value, reference[name.replace(" ", "_") + ",none"], rtol=1e-4
        )


def test_what_the_adapter_cannot_do_is_named():
    from gpt2_jax.evaluation.harness import GPT2JaxLM

    with pytest.raises(ValueError, match="`max_length` must be at most 256, got 300"):
        GPT2JaxLM("demo", max_length=300)
    with pytest.raises(ValueError, match="`batch_size` must be a number, got 'auto'"):
        GPT2JaxLM("demo", batch_size="auto")
    with pytest.raises(ValueError, match="not supported: num_beams"):
        GPT2JaxLM("demo")._generate(["Once"], {"num_beams": 3})
    with pytest.raises(ValueError, match="from 1 to 255, got 256"):
        GPT2JaxLM("demo")._generate(["Once"], {})
