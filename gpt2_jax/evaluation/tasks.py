"""The tasks on which GPT-2 was measured: the protocols behind the published figures.

Knows protocols and statistics; files are read by `readers.py`, and what a model thinks of tokens is
for `score.py` to find. A protocol is named in each figure, because scores of different protocols
differ by more than models do.

`Q` stands for the questions of a task.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.pairs import pair_request
from gpt2_jax.evaluation.readers import (
    EndingQuestion,
    TaskError,
    articles,
    as_on_the_hub,
    detokenized,
    fetch,
    read_cbt,
    read_enwik8,
    read_hellaswag,
    read_lambada,
    read_text,
    read_text8,
    read_wikitext,
    without_brackets,
)
from gpt2_jax.evaluation.score import (
    Likelihood,
    Progress,
    Scored,
    ScoreRequest,
    after,
    bits,
    perplexity,
    rolling_windows,
    score,
    score_groups,
    sliding_windows,
)
from gpt2_jax.model import Params
from gpt2_jax.tokenizer import Tokenizer

# What whoever measures a model needs; `fetch` and its error come from `readers.py`.
__all__ = ["TASKS", "Figure", "Model", "TaskError", "fetch"]

# Zero-shot figures of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019),
# table 3, for 117M, 345M, 762M and 1542M parameters as the paper counts them. Its accuracies on
# LAMBADA are with a filter of stop words (section 3.3), which no protocol here has.
PAPER = {
    "lambada perplexity": (35.13, 15.60, 10.87, 8.63),
    "lambada accuracy": (0.4599, 0.5548, 0.6012, 0.6324),
    "cbt common nouns": (0.8765, 0.9235, 0.9345, 0.9330),
    "cbt named entities": (0.834, 0.871, 0.880, 0.8905),
    "wikitext-2": (29.41, 22.76, 19.93, 18.34),
    "enwik8": (1.16, 1.01, 0.97, 0.93),
    "text8": (1.17, 1.06, 1.02, 0.98),
}
# (n_layer, n_embd) -> column of the table above: the paper's sizes are told by their shape, since a
# folder may have any name.
PAPER_COLUMNS = {(12, 768): 0, (24, 1024): 1, (36, 1280): 2, (48, 1600): 3}

CBT_SETS = {"CN": "cbt common nouns", "NE": "cbt named entities"}  # as in `cbtest_CN_test.txt`
TEST_BYTES = 5_000_000  # of enwik8 and text8, their last: the customary test set

# For each question the log-probabilities of its answers; questions may differ in how many.
AnswerLogprobs = Sequence[Float[np.ndarray, " _"]]


def _silent(title: str, total: int) -> Progress:
    """Reports no progress."""
    del title, total
    return lambda n_done: None


class Model(NamedTuple):
    """What is measured, and how."""

    params: Params
    config: GPT2Config
    tokenizer: Tokenizer
    batch_size: int = 8
    stride: int | None = None  # of perplexity, in tokens; half a window by default
    limit: int | None = None  # how many questions or articles to take; all by default
    # (title, total) -> a function that is told how many more are done, such as `tqdm.update`.
    progress: Callable[[str, int], Progress] = _silent

    @property
    def window(self) -> int:
        """How many tokens the model sees at once."""
        return self.config.n_positions

    @property
    def perplexity_stride(self) -> int:
        """How many tokens lie between the starts of perplexity's windows."""
        return self.stride or self.window // 2

    @property
    def prefix_id(self) -> int:
        """The id that stands before a text: of what begins one, `<|endoftext|>` in GPT-2.

        Raises:
          ValueError: the tokenizer has none.
        """
        if self.tokenizer.bot_id is None:
            expected = "names its `bos_token` or `eos_token`, or has the token <|endoftext|>"
            raise ValueError(f"This task needs a tokenizer that {expected}, got none.")
        return self.tokenizer.bot_id

    def score(self, title: str, requests: Sequence[ScoreRequest]) -> list[Scored]:
        """Scores requests and reports progress under a title: see `score.score`."""
        return score(
            self.params,
            requests,
            config=self.config,
            batch_size=self.batch_size,
            progress=self.progress(title, len(requests)),
        )

    def score_groups(
        self, title: str, groups: Sequence[Sequence[ScoreRequest]]
    ) -> list[list[Scored]]:
        """Scores requests that belong together: see `score.score_groups`."""
        n_requests = sum(len(group) for group in groups)
        return score_groups(
            self.params,
            groups,
            config=self.config,
            batch_size=self.batch_size,
            progress=self.progress(title, n_requests),
        )

    def likelihood(self, title: str, text: str) -> Likelihood:
        """Returns how well the model predicts a text, by windows: see `score.perplexity`."""
        ids = self.tokenizer.encode(text)
        windows = sliding_windows(len(ids), window=self.window, stride=self.perplexity_stride)
        return perplexity(
            self.params,
            ids,
            config=self.config,
            window=self.window,
            stride=self.perplexity_stride,
            batch_size=self.batch_size,
            progress=self.progress(title, len(list(windows))),
        )


class Figure(NamedTuple):
    """A number with everything that is needed to compare it."""

    # The fields' names are also those of the command's JSON.
    task: str
    metric: str
    value: float
    stderr: float | None  # standard error of the value; None where the protocol has none
    count: int  # of what was scored
    unit: str  # what that is
    protocol: str
    paper: float | None = None  # the paper's figure for a model of this size


# Texts: perplexity, WikiText, enwik8 and text8.


def perplexity_of_file(model: Model, file: Path) -> list[Figure]:
    """Perplexity of any text: as in HF's guide, as the paper counts, and in bits per byte."""
    text = read_text(file)
    likelihood = model.likelihood("perplexity", text)
    windows = _windows(model)
    return [
        _token_perplexity("perplexity", likelihood, f"HF's guide: {windows}"),
        _word_perplexity(
            "perplexity",
            likelihood,
            n_words=len(text.split()),
            protocol=f"the paper's: the same sum over words; {windows}",
        ),
        _bits_per_byte(
            "perplexity",
            likelihood,
            n_bytes=len(text.encode()),
            protocol=f"the same sum; {windows}",
        ),
    ]


def wikitext(model: Model, file: Path) -> list[Figure]:
    """WikiText in its raw form (`wiki.test.raw`): HF's guide's figure, and the harness's."""
    lines = read_wikitext(file)
    likelihood = model.likelihood("wikitext", as_on_the_hub(lines))
    protocol = f"HF's guide: {_windows(model)}"
    pages = list(islice(articles(lines), model.limit))
    return [
        _token_perplexity("wikitext", likelihood, protocol),
        *_figures_of_pages(model, pages),
    ]


def _figures_of_pages(model: Model, pages: Sequence[str]) -> list[Figure]:
    """Returns the harness's figures: the model reads detokenised pages, words are the published."""
    requests: list[ScoreRequest] = []
    for page in pages:
        ids = model.tokenizer.encode(detokenized(page))
        requests += rolling_windows(ids, prefix_id=model.prefix_id, window=model.window)
    # All windows of all pages together, so that batches hold windows of like length.
    scored = model.score("wikitext, pages", requests)

    nll = -sum(window.total for window in scored)
    # By a regular expression, unlike `page.split()`: white space at either end counts a word more.
    n_words = sum(len(re.split(r"\s+", page)) for page in pages)
    # Of the published pages, like the words: the harness divides by what stands in the set.
    n_bytes = sum(len(page.encode()) for page in pages)

    def figure(metric: str, value: float, count: int, unit: str) -> Figure:
        return Figure(
            task="wikitext",
            metric=metric,
            value=value,
            stderr=None,
            count=count,
            unit=unit,
            protocol=(
                "lm-eval wikitext 2: page by page, detokenised, rolling windows after <|endoftext|>"
            ),
        )

    word_perplexity = figure("word perplexity", math.exp(nll / n_words), n_words, "words")
    return [
        word_perplexity._replace(paper=_paper_figure(model, "wikitext-2")),
        figure("byte perplexity", math.exp(nll / n_bytes), n_bytes, "bytes"),
        figure("bits per byte", bits(nll / n_bytes), n_bytes, "bytes"),
    ]


def enwik8(model: Model, file: Path) -> list[Figure]:
    """The last five million bytes of enwik8: bits per byte, scored by tokens."""
    return [_bits_per_byte_of_tail(model, "enwik8", read_enwik8(file, TEST_BYTES))]


def text8(model: Model, file: Path) -> list[Figure]:
    """The last five million bytes of text8: bits per byte, scored by tokens."""
    return [_bits_per_byte_of_tail(model, "text8", read_text8(file, TEST_BYTES))]


def _bits_per_byte_of_tail(model: Model, task: str, text: str) -> Figure:
    # Bits per byte do not depend on the tokenizer, though tokens are what is scored.
    figure = _bits_per_byte(
        task,
        model.likelihood(task, text),
        n_bytes=len(text.encode()),  # not TEST_BYTES: the file may be shorter
        protocol=f"ours: the last {TEST_BYTES:,} bytes by {_windows(model)}",
    )
    return figure._replace(paper=_paper_figure(model, task))


def _windows(model: Model) -> str:
    """Returns how a protocol names its windows."""
    return f"window {model.window}, stride {model.perplexity_stride}"


# A likelihood as figures. The standard errors are first-order ones, of a sum of independent tokens:
# the error of `f(loss)` is the error of `loss` times the slope of `f` there.


def _token_perplexity(task: str, likelihood: Likelihood, protocol: str) -> Figure:
    return Figure(
        task=task,
        metric="perplexity",
        value=likelihood.perplexity,
        stderr=likelihood.perplexity * likelihood.stderr,
        count=likelihood.tokens,
        unit="tokens",
        protocol=protocol,
    )


def _word_perplexity(task: str, likelihood: Likelihood, *, n_words: int, protocol: str) -> Figure:
    word_perplexity = math.exp(likelihood.nll / n_words)
    return Figure(
        task=task,
        metric="word perplexity",
        value=word_perplexity,
        stderr=word_perplexity * likelihood.stderr * likelihood.tokens / n_words,
        count=n_words,
        unit="words",
        protocol=protocol,
    )


def _bits_per_byte(task: str, likelihood: Likelihood, *, n_bytes: int, protocol: str) -> Figure:
    return Figure(
        task=task,
        metric="bits per byte",
        value=bits(likelihood.nll / n_bytes),
        stderr=bits(likelihood.stderr * likelihood.tokens / n_bytes),
        count=n_bytes,
        unit="bytes",
        protocol=protocol,
    )


# LAMBADA: the last word of a text.


def lambada(model: Model, file: Path) -> list[Figure]:
    """LAMBADA as OpenAI published it (`lambada_test.jsonl`): the last word after all others."""
    questions = list(islice(read_lambada(file), model.limit))
    requests = [_harness_request(model, text.context, f" {text.word}") for text in questions]
    scored = model.score("lambada", requests)

    # Two protocols: the harness asks for all tokens of the word; the paper for the last one, after
    # the true ones before it, which is easier.
    logprobs = np.array([word.total for word in scored])
    word_is_greedy = np.array([word.all_greedy for word in scored])
    last_token_is_greedy = np.array([word.greedy[-1] for word in scored])

    harness = "lm-eval lambada_openai: the whole last word, all its tokens"
    paper = "the paper's: the last BPE token alone"
    # Per word, as each text has one that is scored.
    perplexity_per_word = math.exp(-logprobs.mean())
    perplexity_figure = Figure(
        task="lambada",
        metric="perplexity",
        value=perplexity_per_word,
        stderr=perplexity_per_word * _stderr_of_mean(logprobs),
        count=len(questions),
        unit="texts",
        protocol=harness,
        paper=_paper_figure(model, "lambada perplexity"),
    )
    whole = _accuracy("lambada", "accuracy", word_is_greedy, "texts", harness)
    last = _accuracy("lambada", "accuracy of the last token", last_token_is_greedy, "texts", paper)
    return [
        perplexity_figure,
        whole,
        last._replace(paper=_paper_figure(model, "lambada accuracy")),
    ]


# Questions with several answers: HellaSwag and the Children's Book Test.


def hellaswag(model: Model, file: Path) -> list[Figure]:
    """HellaSwag's validation set (`hellaswag_val.jsonl`): which of four endings.

    By the protocol of llm.c, and by the harness's, which is left out where the set lacks the fields
    `activity_label`, `ctx_a` and `ctx_b`.
    """
    questions = list(islice(read_hellaswag(file), model.limit))
    figures = _hellaswag_of_llm_c(model, questions)
    if all(question.harness_context is not None for question in questions):
        figures += _hellaswag_of_harness(model, questions)
    return figures


def _hellaswag_of_llm_c(model: Model, questions: Sequence[EndingQuestion]) -> list[Figure]:
    # The protocol knows GPT-2's own tokenizer, which adds nothing to a text.
    encode = partial(model.tokenizer.encode, add_special_tokens=False)
    requests: list[list[ScoreRequest]] = []
    for question in questions:
        # Encoded apart from the ending, unlike the harness: no token spans both.
        context = encode(question.context)
        requests.append([after(context, encode(f" {ending}")) for ending in question.endings])
    return _hellaswag_figures(
        questions,
        logprobs=_answer_logprobs(model, "hellaswag, llm.c", requests),
        sizes=[[request.n_scored for request in group] for group in requests],
        unit="token",
        protocol='llm.c: ctx, then " " + ending',
    )


def _hellaswag_of_harness(model: Model, questions: Sequence[EndingQuestion]) -> list[Figure]:
    requests: list[list[ScoreRequest]] = []
    n_characters: list[list[int]] = []
    for question in questions:
        context = question.harness_context or ""
        endings = [without_brackets(ending) for ending in question.endings]
        requests.append([_harness_request(model, context, f" {ending}") for ending in endings])
        n_characters.append([len(ending) for ending in endings])
    return _hellaswag_figures(
        questions,
        logprobs=_answer_logprobs(model, "hellaswag, lm-eval", requests),
        sizes=n_characters,
        unit="character",
        protocol="lm-eval hellaswag 1: activity: ctx, brackets removed",
    )


def _hellaswag_figures(
    questions: Sequence[EndingQuestion],
    *,
    logprobs: AnswerLogprobs,
    sizes: Sequence[Sequence[int]],
    unit: str,
    protocol: str,
) -> list[Figure]:
    """Returns the accuracies of the likeliest endings, and of the likeliest for their size."""
    labels = np.array([question.label for question in questions])
    # A sum of log-probabilities favours short endings; a mean does not.
    logprobs_per_unit = [
        answers / np.array(answer_sizes)
        for answers, answer_sizes in zip(logprobs, sizes, strict=True)
    ]
    plain = _likeliest(logprobs) == labels
    normed = _likeliest(logprobs_per_unit) == labels
    # `acc` and `acc_norm` in the words of both; they norm by different units.
    return [
        _accuracy("hellaswag", "accuracy", plain, "questions", protocol),
        _accuracy("hellaswag", f"accuracy, normed per {unit}", normed, "questions", protocol),
    ]


def cbt(model: Model, file: Path) -> list[Figure]:
    """The Children's Book Test (`cbtest_CN_test_2500ex.txt`, `cbtest_NE_...`): the missing word.

    Each of ten words is put in, and the probability of it and of the rest of the sentence is
    compared, as the paper says. The paper's detokeniser was not published, and the text is taken as
    it is.
    """
    questions = list(islice(read_cbt(file), model.limit))
    requests: list[list[ScoreRequest]] = []
    for question in questions:
        # The rest of the sentence is scored too: what makes a word wrong may come after it.
        # The space before the gap goes to the word: to GPT-2's tokenizer it is part of it.
        context = f"{question.context} {question.before_gap}".rstrip()
        endings = [f" {word}{question.after_gap}" for word in question.candidates]
        requests.append([_harness_request(model, context, ending) for ending in endings])

    labels = np.array([question.label for question in questions])
    hits = _likeliest(_answer_logprobs(model, "cbt", requests)) == labels
    protocol = (
        "ours, after the paper: the word and the rest of its sentence, tokenised as published"
    )
    figure = _accuracy("cbt", "accuracy", hits, "questions", protocol)
    return [figure._replace(paper=_paper_figure(model, _cbt_set(file)))]


def _cbt_set(file: Path) -> str | None:
    """Returns which of the paper's two sets a file is, by its published name."""
    parts = file.name.split("_")
    short_name = parts[1] if len(parts) > 1 else parts[0]
    # A file of another name is measured as well, with no figure of the paper beside it.
    return CBT_SETS.get(short_name)


# Steps that tasks share.


def _harness_request(model: Model, context: str, continuation: str) -> ScoreRequest:
    """Returns the request that scores a continuation, by the harness's rule: see `pairs.py`."""
    # Without special tokens: what looks like one in a set is text.
    return pair_request(
        model.tokenizer.encode, context, continuation, prefix_id=lambda: model.prefix_id
    )


def _answer_logprobs(
    model: Model, title: str, questions: Sequence[Sequence[ScoreRequest]]
) -> AnswerLogprobs:
    """Returns the log-probability of each answer of each question."""
    scored = model.score_groups(title, questions)
    return [np.array([answer.total for answer in answers]) for answers in scored]


def _likeliest(logprobs: AnswerLogprobs) -> Int[np.ndarray, " Q"]:
    """Returns which answer of each question has the largest value, the first of equals."""
    return np.array([np.argmax(answers) for answers in logprobs])


def _accuracy(
    task: str, metric: str, hits: Bool[np.ndarray, " Q"], unit: str, protocol: str
) -> Figure:
    """Returns how often something was right."""
    return Figure(
        task=task,
        metric=metric,
        value=hits.mean(),
        stderr=_stderr_of_mean(hits),
        count=len(hits),
        unit=unit,
        protocol=protocol,
    )


def _stderr_of_mean(values: Shaped[np.ndarray, " Q"]) -> float:
    """Returns the standard error of a mean, from the spread of the values; NaN for a single one."""
    if len(values) < 2:
        return math.nan
    # `ddof=1`, the unbiased variance, as in the harness.
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _paper_figure(model: Model, name: str | None) -> float | None:
    """Returns the paper's figure for a model of this size, if it has one."""
    column = PAPER_COLUMNS.get((model.config.n_layer, model.config.n_embd))
    if column is None or name is None:
        return None
    return PAPER[name][column]


# In the order in which `--task all` measures them.
TASKS: dict[str, Callable[[Model, Path], list[Figure]]] = {
    "perplexity": perplexity_of_file,
    "wikitext": wikitext,
    "lambada": lambada,
    "hellaswag": hellaswag,
    "cbt": cbt,
    "enwik8": enwik8,
    "text8": text8,
}
