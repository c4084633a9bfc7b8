"""A checkpoint's `generation_config.json` as arguments of `generate` or `beam_search`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config, ids_within
from gpt2_jax.files import read_json_object
from gpt2_jax.generation.from_options import sampler_from_options
from gpt2_jax.generation.options import OPTIONS

HF_TOP_K = 50  # what HF's `generate` cuts to when it samples, unless it is told otherwise

# Keys of a `generation_config.json` that change no token ...
IGNORED_KEYS = (
    "transformers_version",
    "_from_model_config",
    "use_cache",
    "cache_implementation",
    "bos_token_id",
)
# ... and others with the one value that is supported.
FIXED_KEYS = {
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
BEAM_ARGUMENTS = ("num_beams", "length_penalty", "early_stopping")


def load_generation_config(
    folder: str | Path, *, config: GPT2Config, prompt_length: int | None = None
) -> dict[str, Any]:
    """Reads a checkpoint's `generation_config.json` into arguments: `generate(..., **arguments)`.

    If `num_beams` is one of them, they are those of `beam_search`. It compiles nothing.

    As in HF's `generate`, sampling is cut to the 50 likeliest tokens unless the file says
    otherwise.

    Args:
      folder: the checkpoint.
      config: its configuration, for what the file leaves out.
      prompt_length: of the prompts, padding included, where the file gives a `max_length`, which
        counts it.

    Returns:
      `sampler`, `stop_ids`, and, where the file has them, `pad_id`, `max_new_tokens`,
      `num_return_sequences`, `num_beams`, `length_penalty` and `early_stopping`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, or an option is unknown, unsupported or out of range; the
        message names it.

    Examples:
      >>> written = (folder / "generation_config.json").write_text('{"num_beams": 4}')
      >>> gpt2_jax.load_generation_config(folder, config=config)["num_beams"]
      4
    """
    file = Path(folder) / "generation_config.json"
    # `read_json_object` names the file itself.
    keys = read_json_object(file)
    try:
        return _arguments(keys, config, prompt_length)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _arguments(
    keys: Mapping[str, Any], config: GPT2Config, prompt_length: int | None
) -> dict[str, Any]:
    """Returns the arguments that a generation config's keys stand for."""
    # Keys are taken out one by one: what is left over at the end is known to nobody.
    left = {name: value for name, value in keys.items() if name not in IGNORED_KEYS}
    _take_fixed(left)
    # Read as the config's own ids, which HF writes into this file too: checked, and those that a
    # small vocabulary lacks are left out.
    ids = {name: left.pop(name, None) for name in ("eos_token_id", "pad_token_id")}
    given = {name: value for name, value in ids.items() if value is not None}
    named = config.replace(**given)
    arguments: dict[str, Any] = {"stop_ids": named.eos_token_ids}
    pad_ids = ids_within((given.get("pad_token_id"),), config.vocab_size)
    # Before the sampler: searches are in the table of options, but have no transform.
    beams = _take_beams(left)
    max_new_tokens = _take_max_new_tokens(left, prompt_length)
    others = {
        "num_return_sequences": left.pop("num_return_sequences", None),
        "pad_id": pad_ids[0] if pad_ids else None,
        "max_new_tokens": max_new_tokens,
    }
    arguments |= beams
    arguments |= {name: value for name, value in others.items() if value is not None}
    do_sample = bool(left.pop("do_sample", None))
    # HF fills in its defaults for null as well: no cut is `"top_k": 0`.
    if do_sample and left.get("top_k") is None:
        left["top_k"] = HF_TOP_K
    # What is left must be options; whatever is none is named there.
    arguments["sampler"] = sampler_from_options(
        left,
        do_sample=do_sample,
        stop_ids=arguments["stop_ids"],
        max_new_tokens=max_new_tokens,
        vocab_size=config.vocab_size,
        num_beams=beams.get("num_beams", 1),
    )
    return arguments


def _take_fixed(left: dict[str, Any]) -> None:
    """Takes out the keys of which one value is supported; raises `ValueError` for another."""
    for name, only in FIXED_KEYS.items():
        value = left.pop(name, None)
        # null stands for the default, which is the one.
        if value is not None and value != only:
            supported = f"must be {only!r}, the one value that is supported"
            raise ValueError(f"`{name}` {supported}; got {value!r}.")


def _take_beams(left: dict[str, Any]) -> dict[str, Any]:
    """Takes out what is about beams, and returns it as arguments, if there is more than one beam.

    Raises:
      ValueError: there is one, and an option would do nothing.
    """
    values = {}
    idle = []
    for name in BEAM_ARGUMENTS:
        # The first of the neutral values is HF's default.
        default = OPTIONS[name].neutral[0]
        value = left.pop(name, None)  # None stands for HF's default
        values[name] = default if value is None else value
        if values[name] != default:
            idle.append(name)
    if values["num_beams"] != 1:
        return values
    if idle:
        raise ValueError(f"{', '.join(idle)} acts on beams: set `num_beams`.")
    return {}


def _take_max_new_tokens(left: dict[str, Any], prompt_length: int | None) -> int | None:
    """Takes out what is about the length of a text, and returns how many new tokens that means.

    Raises:
      ValueError: `max_length` counts the prompt, and its length is not known.
    """
    max_length = left.pop("max_length", None)
    max_new_tokens = left.pop("max_new_tokens", None)
    # As in HF's `generate`, the second counts where both are given.
    if max_new_tokens is not None or max_length is None:
        return max_new_tokens
    if prompt_length is None:
        raise ValueError("`max_length` counts the prompt, so `prompt_length` must be given.")
    return max_length - prompt_length
