"""The data sets on which GPT-2 was measured: their published formats, and the protocols behind the published figures.

Knows formats and protocols; what a model thinks of tokens is `evaluate.py`'s. A protocol is named in each figure,
because scores of different protocols differ by more than models do.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.score import Likelihood, Scored, perplexity, score
from gpt2_jax.model import Params
from gpt2_jax.tokenizer import Tokenizer

# The four models' zero-shot figures in "Language Models are Unsupervised Multitask Learners", table 3.
PAPER = {
    "lambada perplexity": (35.13, 15.60, 10.87, 8.63),
    "lambada accuracy": (0.4599, 0.5548, 0.6012, 0.6324),
    "cbt common nouns": (0.8765, 0.9235, 0.9345, 0.9330),
    "cbt named entities": (0.834, 0.871, 0.880, 0.8905),
    "wikitext-2": (29.41, 22.76, 19.93, 18.34),
    "enwik8": (1.16, 1.01, 0.97, 0.93),
    "text8": (1.17, 1.06, 1.02, 0.98),
}
SIZES = {
    (12, 768): 0,
    (24, 1024): 1,
    (36, 1280): 2,
    (48, 1600): 3,
}  # (n_layer, n_embd) -> column of the paper
TEST_BYTES = 5_000_000  # of enwik8 and text8, their last: the customary test set


class TaskError(ValueError):
    """Data that is not in the format of its task; the message names the file and the place."""


class Model(NamedTuple):
    """What is measured, and how."""

    params: Params
    config: GPT2Config
    tokenizer: Tokenizer
    batch_size: int = 8
    stride: int | None = None  # of perplexity; half a window by default
    limit: int | None = None  # how many examples to take; all by default
    progress: Callable[[str, int], Callable[[int], None]] = lambda title, total: lambda done: None

    def score(self, title: str, requests: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
        """Scores requests: see `evaluate.score`."""
        options = {"config": self.config, "batch_size": self.batch_size}
        return score(self.params, requests, progress=self.progress(title, len(requests)), **options)


class Figure(NamedTuple):
    """A number with everything that is needed to compare it."""

    task: str
    metric: str
    value: float
    stderr: float | None
    count: int  # of what was scored
    unit: str  # what that is
    protocol: str
    paper: float | None = None  # the paper's figure for a model of this size


def perplexity_of_file(model: Model, file: Path) -> list[Figure]:
    """Perplexity of any text: per token as in HF's guide, per word as the paper counts, and bits per byte."""
    text = _read(file)
    return _text_figures(model, "perplexity", text, text)


def wikitext(model: Model, file: Path) -> list[Figure]:
    """WikiText in its raw form (`wiki.test.raw`): HF's guide's figure, and the harness's by page and word."""
    lines = _read(file).split("\n")
    if not any(_is_title(line) for line in lines):
        raise TaskError(
            f"{file}: expected WikiText with headings such as ' = Title = ', found none."
        )
    rows = [
        line + "\n" if line.strip() else "" for line in lines
    ]  # as the data set on the hub has them
    figures = _text_figures(model, "wikitext", "\n\n".join(rows), "\n".join(lines))[:1]

    pages = list(pages_of(lines))[: model.limit]
    encoded = [model.tokenizer.encode(detokenized(page)) for page in pages]
    requests = [window for ids in encoded for window in rolling_windows(model, ids)]
    scored = model.score("wikitext, pages", requests)
    nll = -sum(float(one.logprobs.sum(dtype=np.float64)) for one in scored)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    octets = sum(len(page.encode()) for page in pages)
    protocol = "lm-eval wikitext 2: page by page, detokenised, rolling windows after <|endoftext|>"
    shared = {"task": "wikitext", "stderr": None, "protocol": protocol}
    return [
        *figures,
        Figure(
            metric="word perplexity",
            value=math.exp(nll / words),
            count=words,
            unit="words",
            paper=_paper(model, "wikitext-2"),
            **shared,
        ),
        Figure(
            metric="byte perplexity",
            value=math.exp(nll / octets),
            count=octets,
            unit="bytes",
            **shared,
        ),
        Figure(
            metric="bits per byte",
            value=nll / octets / math.log(2),
            count=octets,
            unit="bytes",
            **shared,
        ),
    ]


def lambada(model: Model, file: Path) -> list[Figure]:
    """LAMBADA as OpenAI published it (`lambada_test.jsonl`: `{"text": ...}`): the last word after all others."""
    texts = [_field(file, number, row, "text", str) for number, row in enumerate(_rows(file))][
        : model.limit
    ]
    requests = []
    for number, text in enumerate(texts):
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word:
            raise TaskError(f"{file}, line {number + 1}: expected several words, got {text!r}.")
        requests.append(_pair(model, context, f" {word}"))
    scored = model.score("lambada", requests)
    logprobs = np.array([one.logprobs.sum(dtype=np.float64) for one in scored])
    whole = np.array([one.greedy.all() for one in scored])
    last = np.array([one.greedy[-1] for one in scored])
    shared = {"task": "lambada", "count": len(texts), "unit": "texts"}
    harness = "lm-eval lambada_openai: the whole last word, all its tokens"
    spread = math.exp(-logprobs.mean()) * _stderr(logprobs)
    return [
        Figure(
            metric="perplexity",
            value=math.exp(-logprobs.mean()),
            stderr=spread,
            protocol=harness,
            paper=_paper(model, "lambada perplexity"),
            **shared,
        ),
        Figure(
            metric="accuracy", value=whole.mean(), stderr=_stderr(whole), protocol=harness, **shared
        ),
        Figure(
            metric="accuracy of the last token",
            value=last.mean(),
            stderr=_stderr(last),
            protocol="the paper's: the last BPE token alone",
            paper=_paper(model, "lambada accuracy"),
            **shared,
        ),
    ]


def hellaswag(model: Model, file: Path) -> list[Figure]:
    """HellaSwag's validation set (`hellaswag_val.jsonl`): which of four endings; with the norms of llm.c and lm-eval.

    The harness's protocol needs the fields `activity_label`, `ctx_a` and `ctx_b`; where they are missing it is left
    out, and llm.c's is the one.
    """
    rows = list(_rows(file))[: model.limit]
    for number, row in enumerate(rows):
        endings = _field(file, number, row, "endings", list)
        _field(file, number, row, "ctx", str)
        label = int(_field(file, number, row, "label", (int, str)))
        if not 0 <= label < len(endings):
            raise TaskError(
                f"{file}, line {number + 1}: expected a label in [0, {len(endings)}), got {label}."
            )
    labels = np.array([int(row["label"]) for row in rows])

    encode = model.tokenizer.encode
    pairs = [
        [(encode(row["ctx"]), encode(f" {ending}")) for ending in row["endings"]] for row in rows
    ]
    totals = _choices(model, "hellaswag, llm.c", pairs)
    sizes = [[len(ending) for _, ending in pair] for pair in pairs]
    protocol = 'llm.c: ctx, then " " + ending'
    figures = _accuracies("hellaswag", totals, sizes, labels, protocol, "per token")

    if all({"activity_label", "ctx_a", "ctx_b"} <= row.keys() for row in rows):
        pairs, sizes = [], []
        for row in rows:
            query = _brackets(
                f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            )
            endings = [_brackets(ending) for ending in row["endings"]]
            requests = [_pair(model, query, f" {ending}") for ending in endings]
            pairs.append([(ids[:-count], ids[-count:]) for ids, count in requests])
            sizes.append([len(ending) for ending in endings])
        totals = _choices(model, "hellaswag, lm-eval", pairs)
        protocol = "lm-eval hellaswag 1: activity: ctx, brackets removed"
        figures += _accuracies("hellaswag", totals, sizes, labels, protocol, "per character")
    return figures


def cbt(model: Model, file: Path) -> list[Figure]:
    """The Children's Book Test (`cbtest_CN_test_2500ex.txt`, `cbtest_NE_...`): which of ten words is missing.

    Each word is put in, and the probability of it and of the rest of the sentence is compared, as the paper says; the
    paper's detokeniser was not published, and the text is taken as it is.
    """
    pairs, labels = [], []
    for context, sentence, answer, candidates in list(_cbt_questions(file))[: model.limit]:
        before, _, after = sentence.partition("XXXXX")
        start = f"{context} {before}".rstrip()
        requests = [_pair(model, start, f" {word}{after}") for word in candidates]
        pairs.append([(ids[:-count], ids[-count:]) for ids, count in requests])
        labels.append(candidates.index(answer))
    hits = np.array([np.argmax(row) for row in _choices(model, "cbt", pairs)]) == labels
    kind = {"CN": "cbt common nouns", "NE": "cbt named entities"}.get(
        file.name.split("_")[1 if "_" in file.name else 0]
    )
    return [
        Figure(
            task="cbt",
            metric="accuracy",
            value=hits.mean(),
            stderr=_stderr(hits),
            count=len(hits),
            unit="questions",
            protocol="ours, after the paper: the word and the rest of its sentence, tokenised as published",
            paper=_paper(model, kind) if kind else None,
        )
    ]


def enwik8(model: Model, file: Path, name: str = "enwik8") -> list[Figure]:
    """The last five million bytes of enwik8 or text8: bits per byte, scored by tokens."""
    text = file.read_bytes()[-TEST_BYTES:].decode("utf-8", "replace")
    found = _likelihood(model, name, text)
    octets = len(text.encode())
    return [
        Figure(
            task=name,
            metric="bits per byte",
            value=found.nll / octets / math.log(2),
            stderr=found.stderr * found.tokens / octets / math.log(2),
            count=octets,
            unit="bytes",
            protocol=f"ours: the last {TEST_BYTES:,} bytes by {_windows(model)}",
            paper=_paper(model, name),
        )
    ]


def text8(model: Model, file: Path) -> list[Figure]:
    """See `enwik8`."""
    return enwik8(model, file, "text8")


TASKS: dict[str, Callable[[Model, Path], list[Figure]]] = {
    "perplexity": perplexity_of_file,
    "wikitext": wikitext,
    "lambada": lambada,
    "hellaswag": hellaswag,
    "cbt": cbt,
    "enwik8": enwik8,
    "text8": text8,
}


HUB = {  # task -> repository, configuration and split on the hub
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
}


def fetch(task: str, folder: Path) -> Path:
    """Downloads a task's data from the hub and writes it to a file in its published format.

    Raises:
      TaskError: the hub has no such data, or it could not be had.
      ImportError: `datasets` is not installed.
    """
    if task not in HUB:
        raise TaskError(f"{task} is not on the hub in a known form: give its file with --data.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            'Downloading data needs `datasets`: pip install "gpt2_jax[eval]".'
        ) from None
    repository, name, split = HUB[task]
    try:
        rows = load_dataset(repository, name, split=split)
    except Exception as error:  # of the hub, the network, or the data's format
        raise TaskError(
            f"{repository} could not be had ({error}): give its file with --data."
        ) from error
    file = folder / task
    with file.open("w", encoding="utf-8", newline="") as opened:
        for row in rows:
            opened.write(row["text"] or "\n" if task == "wikitext" else json.dumps(row) + "\n")
    return file


def rolling_windows(model: Model, ids: Sequence[int]) -> list[tuple[list[int], int]]:
    """Returns requests that score each token once, the first after `<|endoftext|>`: the harness's rolling windows."""
    most, prefix = model.config.n_positions, model.tokenizer.eot_id
    ids = [prefix, *ids]
    ends = [*range(most + 1, len(ids), most), len(ids)]
    starts = [1, *ends[:-1]]
    return [
        (ids[max(end - most - 1, 0) : end], end - start)
        for start, end in zip(starts, ends, strict=True)
        if end > 1
    ]


def pages_of(lines: Sequence[str]) -> Iterator[str]:
    """Yields WikiText's articles: a title has one equals sign on either side."""
    page: list[str] = []
    for line in lines:
        if _is_title(line):
            if "\n".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    if "\n".join(page).strip():
        yield "\n".join(page)


def detokenized(page: str) -> str:
    """Returns a page of WikiText as the harness (`wikitext_detokenizer`) would have it written."""
    for old, new in (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        page = page.replace(old, new)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for pattern, new in (
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    ):
        page = re.sub(pattern, new, page)
    for old, new in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    ):
        page = page.replace(old, new)
    return page.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


def _text_figures(model: Model, task: str, text: str, original: str) -> list[Figure]:
    """Perplexity per token, per word and bits per byte of a text, whose words are those of the original."""
    found = _likelihood(model, task, text)
    words, octets = len(original.split()), len(text.encode())
    windows = _windows(model)
    per_token, per_byte = found.stderr, found.stderr * found.tokens / octets / math.log(2)
    word_perplexity = math.exp(found.nll / words)
    return [
        Figure(
            task,
            "perplexity",
            found.perplexity,
            found.perplexity * per_token,
            found.tokens,
            "tokens",
            f"HF's guide: {windows}",
        ),
        Figure(
            task,
            "word perplexity",
            word_perplexity,
            word_perplexity * found.stderr * found.tokens / words,
            words,
            "words",
            f"the paper's: the same sum over words; {windows}",
        ),
        Figure(
            task,
            "bits per byte",
            found.nll / octets / math.log(2),
            per_byte,
            octets,
            "bytes",
            f"the same sum; {windows}",
        ),
    ]


def _likelihood(model: Model, title: str, text: str) -> Likelihood:
    ids = model.tokenizer.encode(text)
    window = model.config.n_positions
    stride = model.stride or window // 2
    progress = model.progress(title, max(1, math.ceil((len(ids) - window) / stride) + 1))
    options = {"config": model.config, "batch_size": model.batch_size, "progress": progress}
    return perplexity(model.params, ids, window=window, stride=stride, **options)


def _windows(model: Model) -> str:
    window = model.config.n_positions
    return f"window {window}, stride {model.stride or window // 2}"


def _pair(model: Model, context: str, continuation: str) -> tuple[list[int], int]:
    """Returns a request by the harness's rule: both are encoded together, spaces belong to what follows them."""
    kept = context.rstrip()
    whole = model.tokenizer.encode(kept + context[len(kept) :] + continuation)
    count = len(whole) - len(model.tokenizer.encode(kept))
    return ([model.tokenizer.eot_id, *whole] if count == len(whole) else whole), count


def _choices(
    model: Model, title: str, pairs: list[list[tuple[list[int], list[int]]]]
) -> list[np.ndarray]:
    """Returns the log-probability of each ending of each example."""
    scored = iter(
        model.score(
            title, [([*context, *end], len(end)) for pair in pairs for context, end in pair]
        )
    )
    return [np.array([next(scored).logprobs.sum(dtype=np.float64) for _ in pair]) for pair in pairs]


def _accuracies(task, totals, sizes, labels, protocol, norm) -> list[Figure]:
    plain = np.array([np.argmax(row) for row in totals]) == labels
    normed = (
        np.array([np.argmax(row / np.array(size)) for row, size in zip(totals, sizes, strict=True)])
        == labels
    )
    return [
        Figure(task, name, hits.mean(), _stderr(hits), len(hits), "questions", protocol)
        for name, hits in (("accuracy", plain), (f"accuracy, normed {norm}", normed))
    ]


def _stderr(values: np.ndarray) -> float:
    """Returns the standard error of a mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _paper(model: Model, name: str) -> float | None:
    column = SIZES.get((model.config.n_layer, model.config.n_embd))
    return None if column is None else PAPER[name][column]


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{file}: expected UTF-8, but {error.reason} at byte {error.start}."
        ) from None
    if not text.strip():
        raise TaskError(f"{file}: expected a text, got an empty one.")
    return text


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read(file).splitlines()):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise TaskError(
                    f"{file}, line {number + 1}: expected a JSON object, got {line[:40]!r}."
                )
            yield row


def _field(file: Path, number: int, row: dict[str, Any], name: str, kind: Any) -> Any:
    if not isinstance(row.get(name), kind):
        raise TaskError(f"{file}, line {number + 1}: expected a field `{name}`, got {sorted(row)}.")
    return row[name]


def _cbt_questions(file: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    context: list[str] = []
    for number, line in enumerate(_read(file).splitlines()):
        if not line.strip():
            continue
        place, _, rest = line.partition(" ")
        if not place.isdigit():
            raise TaskError(
                f"{file}, line {number + 1}: expected a numbered line, got {line[:40]!r}."
            )
        if "\t" not in rest:
            context.append(rest)
            continue
        sentence, answer, *_, candidates = rest.split("\t")
        options = candidates.split("|")
        if "XXXXX" not in sentence or answer not in options:
            raise TaskError(
                f"{file}, line {number + 1}: expected XXXXX and an answer among the candidates."
            )
        yield " ".join(context), sentence, answer, options
        context = []


def _is_title(line: str) -> bool:
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _brackets(text: str) -> str:
    """Returns a text of HellaSwag without the marks that WikiHow left in it (the harness's `preprocess`)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
