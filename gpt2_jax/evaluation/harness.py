"""A model for EleutherAI's lm-evaluation-harness, which brings the tasks and their rules.

    python -m gpt2_jax.evaluation.harness run --model gpt2_jax \\
        --model_args pretrained=demo --tasks lambada_openai

is the harness's own command, `lm_eval`, which has no other way to learn of a model. In Python,
importing this module makes `model="gpt2_jax"` known to `lm_eval.simple_evaluate`. Figures are those
of the harness's `hf` model on the same folder.

Knows the harness's requests; scoring is `score.py`'s, and generating is `generation`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

# An extra: whoever imports this module without it learns what to install.
try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f'The harness is not installed: pip install "gpt2_jax[eval]" ({error}).'
    ) from None

from gpt2_jax.evaluation.score import ScoreRequest, after, rolling_windows, score, score_groups
from gpt2_jax.generation.generate import Generation, stream
from gpt2_jax.generation.options import OPTIONS, sampler_from_options
from gpt2_jax.model import pad_rows
from gpt2_jax.pretrained.loading import load_pretrained

MAX_NEW_TOKENS = 256  # where a task does not say: as in the harness's `hf` model
# The harness's names for how many tokens to generate; the first that is given counts.
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class GenerationSettings(NamedTuple):
    """What a task asks of generated texts."""

    max_new_tokens: int
    sampler: Any
    stop_texts: list[str]  # a text ends before the first of them

    def is_stopped(self, text: str) -> bool:
        """Returns whether a text holds what ends it."""
        return any(stop in text for stop in self.stop_texts)

    def cut(self, text: str) -> str:
        """Returns a text up to what ends it."""
        # One after the other, so the first place of any of them is what counts.
        for stop in self.stop_texts:
            text = text.split(stop)[0]
        return text


@register_model("gpt2_jax")
class GPT2JaxLM(TemplateLM):
    """GPT-2 for the harness.

    Args:
      pretrained: a folder in HF's layout, a hub id, or "demo".
      tokenizer: whose tokenizer to use; by default the checkpoint's own, or GPT-2's where it has
        none.
      revision: branch, tag or commit on the hub.
      dtype: of parameters and compute.
      max_length: the longest context; `n_positions` by default.
      batch_size: texts that pass through the model at once.
      seed: of sampled text.
      max_batch_size: is taken, as the harness gives it, and not needed.
      device: is taken, as the harness gives it; JAX chooses by `JAX_PLATFORMS`.

    Raises:
      ValueError: `max_length` is more than the model has positions, or the batch size is "auto".
    """

    # The harness passes `model_args` by keyword, most of them as texts: hence so many parameters.
    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | str | None = None,
        batch_size: int | str = 8,
        seed: int | str = 0,
        max_batch_size: int | str | None = None,
        device: str | None = None,
    ):
        super().__init__()
        del max_batch_size, device
        model = load_pretrained(
            pretrained, dtype=dtype, tokenizer_name=tokenizer, revision=revision
        )
        self.config = model.config
        self.params = model.params
        self.tokenizer = model.tokenizer
        # As it was asked for, not as a folder of this machine: it is part of names of caches.
        self._tokenizer_name = str(tokenizer or pretrained)
        self.max_length = int(max_length or self.config.n_positions)
        if self.max_length > self.config.n_positions:
            raise ValueError(
                f"`max_length` must be at most {self.config.n_positions}, got {self.max_length}."
            )
        if not str(batch_size).isdigit():
            raise ValueError(
                f"`batch_size` must be a number, got {batch_size!r}: there is no automatic one."
            )
        self.batch_size = int(batch_size)
        # The same for every batch, so that an answer does not depend on what was asked before.
        self.key = jax.random.key(int(seed))

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in the names of its caches."""
        return self._tokenizer_name

    @property
    def eot_token_id(self) -> int:
        """The id of what ends a text, `<|endoftext|>` in GPT-2.

        Raises:
          ValueError: the tokenizer has none.
        """
        if self.tokenizer.eot_id is None:
            raise ValueError(
                "The end of a text needs a tokenizer that names its `eos_token`, or has the token "
                f"<|endoftext|>; {self._tokenizer_name} does not."
            )
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text that has no context: of what begins a text.

        Raises:
          ValueError: the tokenizer has neither a beginning nor an end of texts.
        """
        bot_id = self.tokenizer.bot_id
        return self.eot_token_id if bot_id is None else bot_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns a text's ids, in which special tokens are found, as HF has it.

        What the tokenizer's template adds is added by default, unless the text begins with it.
        """
        if add_special_tokens is None:
            bot_id = self.tokenizer.bot_id
            beginning = "" if bot_id is None else self.tokenizer.decode([bot_id])
            add_special_tokens = not (beginning and string.startswith(beginning))
        return self.tokenizer.encode(string, "all", add_special_tokens=add_special_tokens)

    # Scoring. The harness's `loglikelihood` encodes its texts, and calls `_loglikelihood_tokens`.

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of whole texts, in nats, in windows that share one token."""
        windows: list[list[ScoreRequest]] = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            windows.append(
                rolling_windows(ids, prefix_id=self.prefix_token_id, window=self.max_length)
            )
        n_windows = sum(len(windows_of_text) for windows_of_text in windows)
        with tqdm(total=n_windows, desc="Scoring", disable=disable_tqdm) as bar:
            scored = score_groups(
                self.params,
                windows,
                config=self.config,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        totals: list[float] = []
        for request, windows_of_text in zip(requests, scored, strict=True):
            total = sum((window.total for window in windows_of_text), start=0.0)
            totals.append(total)
            # The harness's own cache of answers, where it was asked to keep one.
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability, whether greedy) of each continuation.

        Requests are ((context, continuation), their ids each). Contexts are cut from the left.
        """
        del options  # of other kinds of model
        to_score: list[ScoreRequest] = []
        for _, context, continuation in requests:
            ids, n_scored = after(context, continuation)
            # One longer than what the model reads, as the last token is scored but not read.
            to_score.append(ScoreRequest(ids[-(self.max_length + 1) :], n_scored))
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            scored = score(
                self.params,
                to_score,
                config=self.config,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        answers = [(continuation.total, continuation.all_greedy) for continuation in scored]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    # Generating.

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to a stop text, to `<|endoftext|>`, or to the length asked for.

        Raises:
          ValueError: an option is not supported, or the length leaves no room for a prompt.
        """
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for indices in _generation_batches(requests, self.batch_size):
                batch = [_context_and_options(requests[index]) for index in indices]
                contexts = [context for context, _ in batch]
                _, shared_options = batch[0]
                settings = self._settings(shared_options)
                continuations = self._continue(contexts, settings)
                for index, text in zip(indices, continuations, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update(len(indices))
        return texts

    def _settings(self, task_options: Mapping[str, Any]) -> GenerationSettings:
        """Returns the settings that a task's options say."""
        options = dict(task_options)
        until = options.pop("until", None) or []
        stop_texts = [until] if isinstance(until, str) else until
        # All of them are taken out: what stays must be options of the sampler.
        lengths = [options.pop(name) for name in LENGTH_OPTIONS if name in options]
        max_new_tokens = int(lengths[0]) if lengths else MAX_NEW_TOKENS
        sampler = _sampler(options, self._stop_ids)
        if not 0 < max_new_tokens < self.max_length:
            raise ValueError(
                f"The tokens to generate must be from 1 to {self.max_length - 1}, "
                f"got {max_new_tokens}."
            )
        return GenerationSettings(
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop_texts=[stop for stop in stop_texts if stop],  # an empty one would end every text
        )

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        """What ends a text whatever the task says."""
        eot_id = self.tokenizer.eot_id
        return () if eot_id is None else (eot_id,)

    def _continue(self, contexts: Sequence[str], settings: GenerationSettings) -> list[str]:
        """Continues contexts that have the same settings."""
        longest_prompt = self.max_length - settings.max_new_tokens
        prompts = [self._prompt(context)[-longest_prompt:] for context in contexts]
        ids, lengths = pad_rows(prompts)
        pieces = stream(
            self.params,
            ids,
            lengths,
            self.key,
            config=self.config,
            max_new_tokens=settings.max_new_tokens,
            sampler=settings.sampler,
            stop_ids=self._stop_ids,
        )
        generated: list[list[int]] = [[] for _ in contexts]
        texts = [""] * len(contexts)
        for piece in pieces:
            for row, new_ids in zip(generated, self._without_stop(piece), strict=True):
                row.extend(new_ids)
            # Whole rows, not their new ids alone: a stop text or a character may span two pieces.
            texts = [self.tokenizer.decode(row) for row in generated]
            # The rest of the stream is then never computed.
            if all(settings.is_stopped(text) for text in texts):
                break
        return [settings.cut(text) for text in texts]

    def _prompt(self, context: str) -> list[int]:
        """Returns a context's ids, at least one."""
        return self.tok_encode(context) or [self.prefix_token_id]

    def _without_stop(self, piece: Generation) -> Iterator[list[int]]:
        """Yields each row's new ids, without the one that ended it and what fills it up."""
        lengths = np.asarray(piece.lengths)
        for row, length in zip(np.asarray(piece.ids), lengths, strict=True):
            new_ids = row[:length].tolist()
            yield [token for token in new_ids if token not in self._stop_ids]


def _context_and_options(request: Instance) -> tuple[str, dict[str, Any]]:
    """Returns what a request to generate holds."""
    arguments: tuple[Any, ...] = request.args
    context, options = arguments
    return context, options


def _generation_batches(requests: Sequence[Instance], batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of requests that have the same options, the shortest contexts first."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        _, options = _context_and_options(request)
        # As a text, because options hold lists, which cannot be keys.
        groups.setdefault(repr(sorted(options.items())), []).append(index)
    for group in groups.values():
        # Contexts of like length waste little on padding. Characters say enough about tokens.
        by_length = sorted(group, key=lambda index: len(_context_and_options(requests[index])[0]))
        for start in range(0, len(by_length), batch_size):
            yield by_length[start : start + batch_size]


def _sampler(options: Mapping[str, Any], stop_ids: tuple[int, ...]) -> Any:
    """Returns the sampler of the harness's generation options.

    As in the harness, temperature 0 is greedy, and then options that cut a distribution are
    ignored.

    Raises:
      ValueError: an option that is not supported.
    """
    others = dict(options)
    temperature = float(others.pop("temperature", None) or 0.0)
    do_sample = others.pop("do_sample", temperature > 0)
    if do_sample:
        # Asked to sample without a temperature: the one that changes nothing.
        others["temperature"] = temperature or 1.0
    else:
        needs_draws = {name for name, option in OPTIONS.items() if option.needs == "do_sample"}
        others = {name: value for name, value in others.items() if name not in needs_draws}
    return sampler_from_options(others, do_sample=do_sample, stop_ids=stop_ids)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
