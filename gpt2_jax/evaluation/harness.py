"""A model for EleutherAI's lm-evaluation-harness, whose tasks and rules are then those of its own `hf` model.

    python -m gpt2_jax.evaluation.harness run --model gpt2_jax --model_args pretrained=demo --tasks lambada_openai

is the harness's own command, `lm_eval`, which has no other way to learn of a model. In Python, importing this module
makes `model="gpt2_jax"` known to `lm_eval.simple_evaluate`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f'The harness is not installed: pip install "gpt2_jax[eval]" ({error}).'
    ) from None

from gpt2_jax.evaluation.score import score
from gpt2_jax.generation.generate import stream
from gpt2_jax.generation.options import WARPERS, sampler_from_options
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.loading import load_tokenizer
from gpt2_jax.pretrained.weights import load

MAX_GEN_TOKS = 256  # the harness's default
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # its names for one thing


@register_model("gpt2_jax")
class GPT2JaxLM(TemplateLM):
    """GPT-2 for the harness.

    Args:
      pretrained: a folder in HF's layout, a hub id, or "demo".
      tokenizer: whose tokenizer to use; by default the checkpoint's own, or GPT-2's where it has none.
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

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        batch_size: int | str = 8,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        del max_batch_size, device
        folder = resolve(pretrained, revision=revision)
        self.config, self.params = load(folder, dtype=dtype)
        self.tokenizer, self._tokenizer_name = (
            load_tokenizer(folder, tokenizer),
            str(tokenizer or pretrained),
        )
        self.max_length = int(max_length or self.config.n_positions)
        if self.max_length > self.config.n_positions:
            raise ValueError(
                f"`max_length` must be at most {self.config.n_positions}, got {self.max_length}."
            )
        if not str(batch_size).isdigit():
            raise ValueError(
                f"`batch_size` must be a number, got {batch_size!r}: there is no automatic one."
            )
        self.batch_size, self.key = int(batch_size), jax.random.key(int(seed))

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in the names of its caches."""
        return self._tokenizer_name

    @property
    def eot_token_id(self) -> int:
        """The id of `<|endoftext|>`, which also stands before a text that has no context."""
        return self.tokenizer.eot_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, in which `<|endoftext|>` is the special token, as for HF's tokenizer."""
        del add_special_tokens  # GPT-2's tokenizer adds none
        return self.tokenizer.encode(string, "all")

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of whole texts, in windows that share one token."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (string,) = request.args
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any):
        """Returns (log-probability, whether greedy) of each continuation; contexts are cut from the left."""
        with tqdm(total=len(requests), desc="Scoring", disable=disable_tqdm) as bar:
            scored = score(
                self.params,
                [
                    ([*context, *goal][-(self.max_length + 1) :], len(goal))
                    for _, context, goal in requests
                ],
                config=self.config,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        found = [
            (float(one.logprobs.sum(dtype=np.float64)), bool(one.greedy.all())) for one in scored
        ]
        for (strings, _, _), answer in zip(requests, found, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to one of the given texts, to `<|endoftext|>`, or to the length asked for."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                numbers.sort(key=lambda number: len(requests[number].args[0]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    contexts = [requests[number].args[0] for number in batch]
                    options = requests[batch[0]].args[1]
                    for number, text in zip(
                        batch, self._generate(contexts, dict(options)), strict=True
                    ):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return texts

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Continues contexts that have the same options."""
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        lengths = [int(options.pop(name)) for name in LENGTHS if name in options]
        room = lengths[0] if lengths else MAX_GEN_TOKS
        stops = () if self.eot_token_id is None else (self.eot_token_id,)
        sampler = _sampler(options, stops)
        if not 0 < room < self.max_length:
            raise ValueError(
                f"The tokens to generate must be from 1 to {self.max_length - 1}, got {room}."
            )
        encoded = [
            (self.tok_encode(text) or [self.prefix_token_id])[-(self.max_length - room) :]
            for text in contexts
        ]
        lengths = np.array([len(ids) for ids in encoded])
        ids = np.zeros((len(encoded), lengths.max()), np.int32)
        for row, one in zip(ids, encoded, strict=True):
            row[: len(one)] = one
        pieces = stream(
            self.params,
            ids,
            lengths,
            self.key,
            config=self.config,
            max_new_tokens=room,
            sampler=sampler,
            stop_ids=stops,
        )
        made: list[list[int]] = [[] for _ in contexts]
        for piece in pieces:
            for row, new, count in zip(
                made, np.asarray(piece.ids), np.asarray(piece.lengths), strict=True
            ):
                row += [id for id in new[:count].tolist() if id not in stops]
            texts = [self.tokenizer.decode(row) for row in made]
            if until and all(any(stop in text for stop in until) for text in texts):
                break
        for stop in until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts


def _sampler(options: dict[str, Any], stop_ids: tuple[int, ...] = ()) -> Any:
    """Returns the sampler of the harness's generation options: temperature 0 is greedy, and then no cut counts.

    Raises:
      ValueError: an option that is not supported.
    """
    do_sample = options.pop("do_sample", float(options.get("temperature") or 0.0) > 0)
    if do_sample:
        options["temperature"] = float(options.get("temperature") or 1.0)
    else:
        options = {name: value for name, value in options.items() if name not in WARPERS}
    return sampler_from_options(options, do_sample=do_sample, stop_ids=stop_ids)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
