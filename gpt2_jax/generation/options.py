"""HF's generation options, by their names and in their order, as a sampler; and `generation_config.json`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.generation import sampling
from gpt2_jax.generation.sampling import Categorical, Chain, Greedy


class Context(NamedTuple):
    """What some options need to know besides their value."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int | None
    keep: int  # how many tokens a cut must leave


class Option(NamedTuple):
    """How an option becomes a transform, and the values, besides None, that change nothing."""

    make: Callable[[Any, Context], Any]
    neutral: tuple = ()


def _sequence_bias(value: Any, context: Context) -> sampling.SequenceBias:
    pairs = list(value.items() if isinstance(value, Mapping) else value)
    sequences = tuple(tuple(sequence) for sequence, _ in pairs)
    return sampling.SequenceBias(sequences, np.array([bias for _, bias in pairs], np.float32))


def _bad_words(value: Sequence[Sequence[int]], context: Context) -> Any:
    words = [
        word for word in value if not (len(word) == 1 and word[0] in context.stop_ids)
    ]  # as HF has it
    return sampling.SequenceBias.ban(words) if words else Chain()


def _forced_last(value: int | Sequence[int], context: Context) -> sampling.Force:
    if context.max_new_tokens is None:
        raise ValueError("`forced_eos_token_id` needs to know `max_new_tokens`.")
    return sampling.Force(_ids(value), step=context.max_new_tokens - 1)


def _ids_of(transform: Any) -> list[int]:
    """Returns the ids that a transform acts on, where it was given any."""
    if isinstance(transform, sampling.SequenceBias):
        return [id for sequence in transform.sequences for id in sequence]
    return list(getattr(transform, "ids", ()))


def _ids(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


PROCESSORS = {  # for every search, in HF's order; the two of OpenAI's follow the one that they resemble
    "sequence_bias": Option(_sequence_bias),
    "repetition_penalty": Option(lambda value, _: sampling.RepetitionPenalty(value), (1.0,)),
    "frequency_penalty": Option(lambda value, _: sampling.FrequencyPenalty(value), (0.0,)),
    "presence_penalty": Option(lambda value, _: sampling.PresencePenalty(value), (0.0,)),
    "no_repeat_ngram_size": Option(lambda value, _: sampling.NoRepeatNGram(value), (0,)),
    "bad_words_ids": Option(_bad_words),
    "min_length": Option(
        lambda value, context: sampling.Suppress(context.stop_ids, length=value), (0,)
    ),
    "min_new_tokens": Option(
        lambda value, context: sampling.Suppress(context.stop_ids, steps=value), (0,)
    ),
    "forced_bos_token_id": Option(lambda value, _: sampling.Force((value,), length=1)),
    "forced_eos_token_id": Option(_forced_last),
    "exponential_decay_length_penalty": Option(
        lambda value, context: sampling.ExponentialDecayLength(context.stop_ids, *value)
    ),
    "suppress_tokens": Option(lambda value, _: sampling.Suppress(_ids(value)), ([],)),
    "begin_suppress_tokens": Option(
        lambda value, _: sampling.Suppress(_ids(value), steps=1), ([],)
    ),
}
WARPERS = {  # for sampling alone, in HF's order
    "temperature": Option(lambda value, _: sampling.Temperature(value), (1.0,)),
    "top_h": Option(lambda value, _: sampling.TopH(value)),
    "top_k": Option(lambda value, context: sampling.TopK(max(value, context.keep)), (0,)),
    "top_p": Option(lambda value, context: sampling.TopP(value, context.keep), (1.0,)),
    "min_p": Option(lambda value, context: sampling.MinP(value, context.keep)),
    "typical_p": Option(lambda value, context: sampling.Typical(value, context.keep), (1.0,)),
    "epsilon_cutoff": Option(lambda value, context: sampling.Epsilon(value, context.keep), (0.0,)),
    "eta_cutoff": Option(lambda value, context: sampling.Eta(value, context.keep), (0.0,)),
}
LAST = {"renormalize_logits": Option(lambda value, _: sampling.Renormalize(), (False,))}
BEAMS = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
}  # arguments of `beam_search`, HF's defaults
NEEDS_STOP_IDS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")

# Keys of a `generation_config.json` that change no token, and others with the one value that is supported.
SILENT = (
    "transformers_version",
    "_from_model_config",
    "use_cache",
    "cache_implementation",
    "bos_token_id",
)
ONLY = {
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "remove_invalid_values": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}


def sampler_from_options(
    options: Mapping[str, Any],
    *,
    do_sample: bool = False,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    vocab_size: int | None = None,
    num_beams: int = 1,
) -> Greedy | Categorical:
    """Returns the sampler that HF's `generate` is with these options, such as `{"top_k": 50, "temperature": 0.7}`.

    Two names are OpenAI's: `frequency_penalty` and `presence_penalty`. An option that is None, or has the value that
    changes nothing, is left out. Nothing is cut that is not asked for: HF's own default is `top_k=50`.

    Args:
      options: HF's name of each option to its value.
      do_sample: draw tokens; otherwise the likeliest is taken.
      stop_ids: what ends a text, for the options that are about its length.
      max_new_tokens: for `forced_eos_token_id`.
      vocab_size: what ids must be less than, where it is given.
      num_beams: from 2 on, for `beam_search`: then cuts leave one token more than there are stop ids, at least two.

    Raises:
      ValueError: an option is unknown, out of range, needs `do_sample`, or needs a stop id.
    """
    known = PROCESSORS | WARPERS | LAST
    if unknown := sorted(options.keys() - known.keys()):
        raise ValueError(
            f"These options are not supported: {', '.join(unknown)}. There are {', '.join(known)}."
        )
    chosen = {
        name: options[name]
        for name in known
        if options.get(name) is not None and options[name] not in known[name].neutral
    }
    if not do_sample and (idle := [name for name in chosen if name in WARPERS]):
        raise ValueError(f"{', '.join(idle)} acts on random draws: set `do_sample`.")
    if not stop_ids and (idle := [name for name in chosen if name in NEEDS_STOP_IDS]):
        raise ValueError(f"{', '.join(idle)} acts on stop ids, and there are none.")
    if {"forced_bos_token_id", "begin_suppress_tokens"} <= chosen.keys():
        raise ValueError(
            "`forced_bos_token_id` and `begin_suppress_tokens` are both about the first token: give one."
        )
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if name in chosen and set(_ids(chosen[name])) <= set(
            _ids(chosen.get("suppress_tokens", ()))
        ):
            raise ValueError(
                f"`{name}` ({chosen[name]}) is in `suppress_tokens`, so no token would be left."
            )
    keep = 1 if num_beams == 1 else max(2, 1 + len(stop_ids))
    context = Context(tuple(stop_ids), max_new_tokens, keep)
    transforms = {name: known[name].make(value, context) for name, value in chosen.items()}
    for name, transform in transforms.items():
        for id in _ids_of(transform):
            if vocab_size is not None and not 0 <= id < vocab_size:
                raise ValueError(
                    f"`{name}` must hold ids in [0, {vocab_size}) (`vocab_size`), got {id}."
                )
    chain = Chain(tuple(transforms.values()))
    return Categorical(chain) if do_sample else Greedy(chain)


def load_generation_config(
    folder: str | Path, *, config: GPT2Config, prompt_length: int | None = None
) -> dict[str, Any]:
    """Reads a checkpoint's `generation_config.json` into arguments: `generate(..., **arguments)`.

    If `num_beams` is one of them, they are those of `beam_search`.

    As in HF's `generate`, sampling is cut to the 50 likeliest tokens unless the file says otherwise.

    Args:
      folder: the checkpoint.
      config: its configuration, for what the file leaves out.
      prompt_length: of the prompts, padding included, where the file gives a `max_length`, which counts it.

    Returns:
      `sampler`, `stop_ids`, and, where the file has them, `pad_id`, `max_new_tokens`, `num_return_sequences`,
      `num_beams`, `length_penalty` and `early_stopping`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, or an option is unknown, unsupported or out of range; the message names it.
    """
    file = Path(folder) / "generation_config.json"
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(options).__name__}.")
    options = {name: value for name, value in options.items() if name not in SILENT}
    for name, only in ONLY.items():
        if (value := options.pop(name, None)) not in (None, only):
            raise ValueError(
                f"{file}: `{name}` must be {only!r}, the one value that is supported; got {value!r}."
            )
    stops = options.pop("eos_token_id", None)
    out: dict[str, Any] = {"stop_ids": config.eos_token_ids if stops is None else _ids(stops)}
    beams = {
        name: default if (value := options.pop(name, None)) is None else value
        for name, default in BEAMS.items()
    }
    if beams["num_beams"] != 1:
        out |= beams
    elif idle := [name for name, default in BEAMS.items() if beams[name] != default]:
        raise ValueError(f"{file}: {', '.join(idle)} acts on beams: set `num_beams`.")
    if (count := options.pop("num_return_sequences", None)) is not None:
        out["num_return_sequences"] = count
    if (pad := options.pop("pad_token_id", None)) is not None:
        out["pad_id"] = pad
    longest, new = options.pop("max_length", None), options.pop("max_new_tokens", None)
    if new is None and longest is not None:
        if prompt_length is None:
            raise ValueError(
                f"{file}: `max_length` counts the prompt, so `prompt_length` must be given."
            )
        new = longest - prompt_length
    if new is not None:
        out["max_new_tokens"] = new
    do_sample = options.pop("do_sample", None) or False
    if do_sample:
        options.setdefault("top_k", 50)
    try:
        sampler = sampler_from_options(
            options,
            do_sample=do_sample,
            stop_ids=out["stop_ids"],
            max_new_tokens=new,
            vocab_size=config.vocab_size,
            num_beams=beams["num_beams"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return {"sampler": sampler, **out}
