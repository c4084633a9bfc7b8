"""A model for EleutherAI's lm-evaluation-harness, which brings the tasks and their rules.

    python -m gpt2_jax.evaluation.harness run --model gpt2_jax \\
        --model_args pretrained=demo --tasks lambada_openai

is the harness's own command, `lm_eval`, which has no other way to learn of a model. In Python,
importing this module makes `model="gpt2_jax"` known to `lm_eval.simple_evaluate`. Figures are those
of the harness's `hf` model on the same folder.

Knows the harness's requests; scoring is `score.py`'s, and generating is `generation`'s.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from tqdm import tqdm

# An extra: whoever imports this module without it learns what to install.
try:
    # The harness looks for its own models only as long as it knows none: this makes them known.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f'The harness is not installed: pip install "gpt2_jax[eval]" ({error}).'
    ) from None

from gpt2_jax.config import as_count, ids_within
from gpt2_jax.evaluation.pairs import encode_pair
from gpt2_jax.evaluation.score import ScoreRequest, after, rolling_windows, score, score_groups
from gpt2_jax.generation.from_options import sampler_from_options
from gpt2_jax.generation.generate import Generation, stream
from gpt2_jax.generation.generation_config import HF_TOP_K
from gpt2_jax.generation.options import OPTIONS
from gpt2_jax.inputs import pad_rows
from gpt2_jax.pretrained.loading import load_pretrained

MAX_BATCH_SIZE = 64  # where "auto" begins: as in the harness's `hf` model
BATCH_SIZE_ON_CPU = 8
MAX_NEW_TOKENS = 256  # where a task does not say: as in the harness's `hf` model
# The harness's names for how many tokens to generate; the first that is given counts.
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


NO_CHAT_TEMPLATE = "GPT-2 has no chat template: leave out `--apply_chat_template`."


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
      dtype: of parameters and compute; "auto" for that of the file.
      max_length: the longest context; `n_positions` by default.
      max_gen_toks: how many tokens to generate where a task does not say.
      batch_size: texts that pass through the model at once; "auto" for as many as memory holds.
      max_batch_size: the most that "auto" tries.
      add_bos_token: puts `<|endoftext|>` before a text that does not begin with it.
      prefix_token_id: what stands before a text that has no context; `<|endoftext|>` by default.
      truncation: cuts a prompt to its first `max_length` tokens before, as always, it is cut from
        the left to make room for what is generated.
      logits_cache: whether answers of one token to the same question share a pass.
      seed: of sampled text. A question that is asked several times gets as many answers, each the
        same whatever the batch size.
      device: is taken, as the harness gives it; JAX chooses by `JAX_PLATFORMS`.

    Raises:
      ValueError: an argument is of a wrong type, `max_length` is more than the model has positions,
        or `prefix_token_id` is outside the vocabulary.
    """

    # The harness passes `model_args` by keyword, with the names of its `hf`: hence so many.
    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | str | None = None,
        max_gen_toks: int | str = MAX_NEW_TOKENS,
        batch_size: int | str = 8,
        max_batch_size: int | str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | str | None = None,
        truncation: bool | None = False,
        logits_cache: bool = True,
        seed: int | str = 0,
        device: str | None = None,
    ):
        super().__init__()
        del device
        self.add_bos_token = _flag("add_bos_token", add_bos_token)
        self.truncation = _flag("truncation", truncation)
        self.logits_cache = _flag("logits_cache", logits_cache)
        self.max_gen_toks = _number("max_gen_toks", max_gen_toks)
        model = load_pretrained(
            pretrained,
            dtype=None if dtype == "auto" else dtype,
            tokenizer_name=tokenizer,
            revision=revision,
        )
        self.config = model.config
        self.params = model.params
        self.tokenizer = model.tokenizer
        # As it was asked for, not as a folder of this machine: it is part of names of caches.
        self._tokenizer_name = str(tokenizer or pretrained)
        self._prefix_id = self._checked_prefix(prefix_token_id)
        self.max_length = _number("max_length", max_length or self.config.n_positions)
        if self.max_length > self.config.n_positions:
            raise ValueError(
                f"`max_length` must be at most {self.config.n_positions}, got {self.max_length}."
            )
        most = _number("max_batch_size", max_batch_size or MAX_BATCH_SIZE)
        is_auto = batch_size == "auto"
        self.batch_size = self._largest_batch(most) if is_auto else _batch_size(batch_size)
        self.key = jax.random.key(_number("seed", seed, least=0))

    def _checked_prefix(self, prefix_token_id: int | str | None) -> int | None:
        """Returns the id that was asked for, which must be in the vocabulary."""
        if prefix_token_id is None:
            return None
        prefix_id = _number("prefix_token_id", prefix_token_id, least=0)
        if prefix_id >= self.config.vocab_size:
            expected = f"less than {self.config.vocab_size} (`vocab_size`)"
            raise ValueError(f"`prefix_token_id` must be {expected}, got {prefix_id}.")
        return prefix_id

    def _largest_batch(self, most: int) -> int:
        """Returns how many of the longest texts pass through the model at once, by trying."""
        # There memory is the machine's, which swaps before it says so, and larger batches are no
        # faster.
        if jax.default_backend() == "cpu":
            return min(most, BATCH_SIZE_ON_CPU)
        # Of any id. One more than the model reads, as the last is scored and not read.
        longest = ScoreRequest([0] * (self.max_length + 1), 1)
        size = most
        while size > 1:
            texts = [longest] * size
            try:
                # Sharing, equal texts would be one row, and the trial would say nothing.
                score(self.params, texts, config=self.config, batch_size=size, share=False)
                return size
            except jax.errors.JaxRuntimeError as error:
                # Of another error, smaller batches would be no cure.
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                size //= 2
        return 1

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
                "A text without a context needs a tokenizer that names its `eos_token`, or has the"
                f" token <|endoftext|>; {self._tokenizer_name} does not: give a `prefix_token_id`."
            )
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text that has no context: of what begins a text.

        Raises:
          ValueError: the tokenizer has neither a beginning nor an end of texts.
        """
        if self._prefix_id is not None:
            return self._prefix_id
        bot_id = self.tokenizer.bot_id
        return self.eot_token_id if bot_id is None else bot_id

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns None, for no template; raises `ValueError` where one is asked for."""
        if chat_template:
            raise ValueError(NO_CHAT_TEMPLATE)
        return None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Raises `ValueError`: there is no template."""
        del chat_history, add_generation_prompt
        raise ValueError(NO_CHAT_TEMPLATE)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Returns a text's ids, in which special tokens are found, as HF has it.

        What the tokenizer's template or `add_bos_token` adds is added unless the text begins with
        it, or `add_special_tokens` says. Of the ids the last `left_truncate_len` are returned,
        where that is given.
        """
        if add_special_tokens is None:
            add_special_tokens = self._adds_special_tokens(string)
        ids = self.tokenizer.encode(string, "all", add_special_tokens=add_special_tokens)
        if add_special_tokens and self.add_bos_token and not self.tokenizer.template.before:
            ids = [self._bos_id, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    @property
    def _bos_id(self) -> int:
        bot_id = self.tokenizer.bot_id
        return self.eot_token_id if bot_id is None else bot_id

    def _adds_special_tokens(self, string: str) -> bool:
        """Returns whether a text gets what the tokenizer adds, where nobody says."""
        has_prefix = self._prefix_id is not None or self.tokenizer.bot_id is not None
        if has_prefix and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            return False
        return self.add_bos_token is not False

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of both, by the rule that the tasks of this library share."""
        return encode_pair(self.tok_encode, context, continuation)

    # Scoring. The harness's `loglikelihood` encodes its texts, and calls `_loglikelihood_tokens`.

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of whole texts, in nats, in windows that share one token."""
        # Window by window of all texts together, so that batches are full whatever their lengths.
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
                share=bool(self.logits_cache),
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
        # In the order of the requests: the harness pairs answers with questions by their places.
        texts = [""] * len(requests)
        keys = _keys_of(self.key, requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for indices in _generation_batches(requests, self.batch_size):
                batch = [_context_and_options(requests[index]) for index in indices]
                contexts = [context for context, _ in batch]
                # `_generation_batches` puts together only what has equal options.
                _, shared_options = batch[0]
                settings = self._settings(shared_options)
                continuations = self._continue(contexts, keys[np.array(indices)], settings)
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
        max_new_tokens = int(lengths[0]) if lengths else self.max_gen_toks
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
        """What ends a text whatever the task says: the tokenizer's id and the config's."""
        ids = ids_within((self.tokenizer.eot_id,), self.config.vocab_size)
        return tuple({*ids, *self.config.eos_token_ids})

    def _continue(
        self, contexts: Sequence[str], keys: Key[Array, " B"], settings: GenerationSettings
    ) -> list[str]:
        """Continues contexts that have the same settings, each with a key of its own."""
        longest_prompt = self.max_length - settings.max_new_tokens
        prompts = [self._prompt(context, longest_prompt) for context in contexts]
        ids, lengths = pad_rows(prompts)
        pieces = stream(
            self.params,
            ids,
            lengths,
            keys,
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

    def _prompt(self, context: str, longest: int) -> list[int]:
        """Returns a context's last ids, at least one."""
        # Of an empty context there is nothing to read, and no model begins from nothing.
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if self.truncation:
            ids = ids[: self.max_length]
        return ids[-longest:]

    def _without_stop(self, piece: Generation) -> Iterator[list[int]]:
        """Yields each row's new ids, without the one that ended it and what fills it up."""
        lengths = np.asarray(piece.lengths)
        for row, length in zip(np.asarray(piece.ids), lengths, strict=True):
            new_ids = row[:length].tolist()
            yield [token for token in new_ids if token not in self._stop_ids]


def _number(name: str, value: int | str, least: int = 1) -> int:
    """Returns an argument that is a number, which the harness may give as a text."""
    is_written = isinstance(value, str) and value.isdecimal()
    return as_count(name, int(value) if is_written else value, least)


def _batch_size(value: int | str) -> int:
    """Returns a batch size that is not "auto"."""
    try:
        return _number("batch_size", value)
    except ValueError:
        expected = 'a positive number or "auto"'
        raise ValueError(f"`batch_size` must be {expected}, got {value!r}.") from None


def _flag(name: str, value: bool | None) -> bool | None:
    """Returns an argument that is true, false or not given."""
    # "false" is true to Python.
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    return value


def _context_and_options(request: Instance) -> tuple[str, dict[str, Any]]:
    """Returns what a request to generate holds."""
    arguments: tuple[Any, ...] = request.args
    context, options = arguments
    return context, options


def _keys_of(key: Key[Array, ""], requests: Sequence[Instance]) -> Key[Array, " Q"]:
    """Returns a key for each request: of its text and options, and of how often it came before.

    So an answer depends neither on what else is asked nor on the batch that it is made in, and a
    question that is asked again gets another one.
    """
    questions = [repr(request.args).encode() for request in requests]
    asked_before: Counter[bytes] = Counter()
    repeats = []
    for question in questions:
        repeats.append(asked_before[question])
        asked_before[question] += 1
    # Not `hash`, which Python salts anew in every process.
    numbers = np.array([zlib.crc32(question) for question in questions], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jax.vmap(jax.random.fold_in)(keys, np.array(repeats, np.uint32))


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
    given = others.pop("temperature", None)
    # Asked to sample without a temperature: the one that changes nothing.
    temperature = 1.0 if given is None else float(given)
    do_sample = others.pop("do_sample", None)
    if do_sample is None:
        do_sample = given is not None and temperature > 0
    if do_sample:
        others["temperature"] = temperature  # one of 0 is refused, as `hf` refuses it
        others.setdefault("top_k", HF_TOP_K)  # what `hf` draws from unless it is told otherwise
    else:
        needs_draws = {name for name, option in OPTIONS.items() if option.needs == "do_sample"}
        # Tasks give such options beside `do_sample=False`; ours would call them a mistake.
        others = {name: value for name, value in others.items() if name not in needs_draws}
    return sampler_from_options(others, do_sample=do_sample, stop_ids=stop_ids)


if __name__ == "__main__":
    # By now this module has registered its model, which the command then finds.
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
