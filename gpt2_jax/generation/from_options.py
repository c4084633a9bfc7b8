"""A sampler of HF's options: what each makes, in HF's order, and what does not go together.

Knows the table of `options`; nothing of where the choice came from.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2_jax import generation  # whose modules are imported when a transform is made
from gpt2_jax.generation.options import ELSEWHERE, OPTIONS, Context, Option, as_ids, bias_pairs

if TYPE_CHECKING:
    from gpt2_jax.generation.sampling import Categorical, Greedy


def sampler_from_options(
    options: Mapping[str, Any],
    *,
    do_sample: bool = False,
    stop_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    vocab_size: int | None = None,
    num_beams: int = 1,
) -> "Greedy | Categorical":
    """Returns the sampler that HF's `generate` is with these options.

    Options are such as `{"top_k": 50, "temperature": 0.7}`; two names are OpenAI's:
    `frequency_penalty` and `presence_penalty`. An option that is None, or has the value that
    changes nothing, is left out. Nothing is cut that is not asked for: HF's own default is
    `top_k=50`. It compiles nothing.

    Args:
      options: HF's name of each option to its value.
      do_sample: draw tokens; otherwise the likeliest is taken.
      stop_ids: what ends a text, for the options that are about its length.
      max_new_tokens: for `forced_eos_token_id`.
      vocab_size: what ids must be less than, where it is given.
      num_beams: from 2 on, for `beam_search`: then cuts leave one token more than there are stop
        ids, at least two.

    Raises:
      ValueError: an option is unknown, out of range, needs `do_sample`, or needs a stop id.

    Examples:
      >>> sampler = gpt2_jax.sampler_from_options({"top_k": 40, "temperature": 0.8}, do_sample=True)
      >>> sampler.transform.transforms  # in HF's order
      (Temperature(temperature=0.8), TopK(k=40))
    """
    # What changes nothing is left out first: a file may spell out what a check would refuse.
    chosen = _chosen(options)
    # All of them before anything is made, so that messages have the user's names.
    _check_needs(chosen, do_sample, stop_ids)
    _check_ranges(chosen)
    _check_first_and_last(chosen)
    if vocab_size is not None:
        _check_ids(chosen, stop_ids, vocab_size)
    # As in HF's code: a beam that ends must leave another one to go on.
    min_tokens_to_keep = 1 if num_beams == 1 else max(2, 1 + len(stop_ids))
    context = Context(tuple(stop_ids), max_new_tokens, min_tokens_to_keep)
    transforms = []
    for name, value in chosen.items():
        make = OPTIONS[name].make
        assert make is not None, name  # `_chosen` takes no others
        transforms.append(make(value, context))
    # Even of none: every sampler has a transform, which beams and speculation look for.
    chain = generation.transforms.Chain(tuple(transforms))
    samplers = generation.sampling
    return samplers.Categorical(chain) if do_sample else samplers.Greedy(chain)


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that change something, in the order of their transforms.

    Raises:
      ValueError: there is no transform for one.
    """
    known = [option for option in OPTIONS.values() if option.make is not None]
    names = [option.name for option in known]
    unknown = sorted(options.keys() - set(names))
    if unknown:
        listed = ", ".join(unknown)
        supported = ", ".join(names)
        raise ValueError(
            f"These options are not supported: {listed}. There are {supported}.{_advice(unknown)}"
        )
    # In the order of the table, whatever order the user's are in: transforms do not commute.
    return {
        option.name: options[option.name]
        for option in known
        if not changes_nothing(option, options.get(option.name))
    }


def _advice(unknown: Sequence[str]) -> str:
    """Returns what else there is for options that are no transforms made of a value."""
    elsewhere = {name: here for name, here, _ in ELSEWHERE if here != "raises"}
    known = [f"`{name}` is {elsewhere[name]}" for name in unknown if name in elsewhere]
    return f" Elsewhere: {'; '.join(known)}." if known else ""


def changes_nothing(option: Option, value: Any) -> bool:
    """Returns whether a value is None or neutral.

    An array, with a number for each row, may be neutral in some rows: it is not compared.
    """
    if value is None:
        return True
    # numpy's and JAX's arrays, traced ones too, without importing either.
    is_array = hasattr(value, "shape")
    return not is_array and value in option.neutral


def _check_needs(chosen: Mapping[str, Any], do_sample: bool, stop_ids: Sequence[int]) -> None:
    """Raises `ValueError` for options that would do nothing."""
    # HF warns, or passes such options over: who asks for them has mistaken what is done.
    if not do_sample:
        idle = [name for name in chosen if OPTIONS[name].needs == "do_sample"]
        if idle:
            raise ValueError(f"{', '.join(idle)} acts on random draws: set `do_sample`.")
    if not stop_ids:
        idle = [name for name in chosen if OPTIONS[name].needs == "stop_ids"]
        if idle:
            raise ValueError(f"{', '.join(idle)} acts on stop ids, and there are none.")


def _check_ranges(chosen: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a number out of its option's range."""
    # Here with the option's name; the class would name its own field.
    for name, value in chosen.items():
        expected = OPTIONS[name].range
        if expected is not None:
            generation.transforms.check_range(name, value, expected)


def _check_first_and_last(chosen: Mapping[str, Any]) -> None:
    """Raises `ValueError` where a token would be forced and removed at once."""
    # HF then moves the second on by a token after a prompt of one, which nobody expects.
    if "forced_bos_token_id" in chosen and "begin_suppress_tokens" in chosen:
        both = "`forced_bos_token_id` and `begin_suppress_tokens`"
        raise ValueError(f"{both} are both about the first token: give one.")
    # Here by ids, unlike above: another token that is suppressed is no contradiction.
    suppressed = set(as_ids(chosen.get("suppress_tokens", ())))
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if name not in chosen:
            continue
        # HF suppresses after it has forced, and so leaves no token at all.
        if suppressed.issuperset(as_ids(chosen[name])):
            named = f"`{name}` ({chosen[name]})"
            raise ValueError(f"{named} is in `suppress_tokens`, so no token would be left.")


def _check_ids(chosen: Mapping[str, Any], stop_ids: Sequence[int], vocab_size: int) -> None:
    """Raises `ValueError` for an id outside the vocabulary."""
    expected = f"ids in [0, {vocab_size}) (`vocab_size`)"
    for name, value in chosen.items():
        # Before any array is made: JAX would drop an id beyond the last without a word.
        ids = list(_ids_in(OPTIONS[name], value))
        if OPTIONS[name].needs == "stop_ids":
            ids += stop_ids  # its transform acts on these
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"`{name}` must hold {expected}, got {token}.")


def _ids_in(option: Option, value: Any) -> Iterable[int]:
    """Returns every token id in an option's value."""
    if option.kind in ("id", "ids"):
        return as_ids(value)
    if option.kind == "runs":
        return [token for run in value for token in run]
    if option.kind == "biases":
        return [token for run, _ in bias_pairs(value) for token in run]
    return ()
