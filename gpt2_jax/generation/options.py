"""HF's generation options by their names: one table.

From `OPTIONS` come the sampler of `sampler_from_options`, the options of the command line and the
table in the documentation. Knows transforms by name alone, and imports them where one is made: the
table is read without JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from gpt2_jax import generation  # whose modules are imported when a transform is made
from gpt2_jax.generation import ranges
from gpt2_jax.generation.ranges import Range


class Context(NamedTuple):
    """What some options need to know besides their value."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int | None
    min_tokens_to_keep: int  # how many tokens a cut must leave


Maker = Callable[[Any, Context], Any]  # an option's value -> a transform


class Option(NamedTuple):
    """One option: what the command line, the sampler and the documentation need to know of it.

    Attributes:
      name: HF's, or OpenAI's.
      kind: of its value: "int", "float", "id", "ids", "runs" of ids, "biases" of runs, "decay" (a
        start and a factor), "flag", "early_stopping" or "model".
      metavar: what its value is called in the help.
      help: what it does, as a phrase.
      here: what it is in this library, for the documentation.
      make: makes its transform; None for an argument of a search.
      range: of its value; None where it is no number.
      neutral: the values, besides None, that change nothing. The first is HF's default.
      needs: the option without which it does nothing: "do_sample", "stop_ids", "num_beams" or
        "assistant_model".
      hint: what else to say to a value out of range.
      differs: from HF, for the documentation.
    """

    name: str
    kind: str
    metavar: str | tuple[str, ...] | None
    help: str
    here: str
    make: Maker | None = None
    range: Range | None = None
    neutral: tuple[Any, ...] = ()
    needs: str | None = None
    hint: str = ""
    differs: str = ""


# Makers. What most transforms take is the option's value, and cuts also how many tokens they leave.


def _rule(name: str) -> Maker:
    """Returns the maker of a class in `rules` that takes the option's value."""

    def make(value: Any, context: Context) -> Any:
        del context
        return getattr(generation.rules, name)(value)

    return make


def _cut(name: str) -> Maker:
    """Returns the maker of a class in `cuts` that also takes how many tokens must stay."""

    def make(value: Any, context: Context) -> Any:
        return getattr(generation.cuts, name)(value, context.min_tokens_to_keep)

    return make


def _temperature(value: Any, context: Context) -> Any:
    del context
    return generation.cuts.Temperature(value)


def _top_h(value: Any, context: Context) -> Any:
    del context
    return generation.cuts.TopH(value)


def _top_k(value: Any, context: Context) -> Any:
    # HF's `min_tokens_to_keep` acts on the number itself here, and so on ties as well.
    return generation.cuts.TopK(max(value, context.min_tokens_to_keep))


def _sequence_bias(value: Any, context: Context) -> Any:
    # Not at the top: the table is read without any arrays.
    import numpy as np

    del context
    pairs = bias_pairs(value)
    sequences = tuple(tuple(sequence) for sequence, _ in pairs)
    biases = np.array([bias for _, bias in pairs], np.float32)
    return generation.rules.SequenceBias(sequences, biases)


def _bad_words(value: Any, context: Context) -> Any:
    # As in HF's code: a stop id that stands alone is no bad word.
    stops = [[stop_id] for stop_id in context.stop_ids]
    words = [word for word in value if list(word) not in stops]
    if not words:
        # A maker owes a transform, and this one does nothing.
        return generation.transforms.Chain()
    return generation.rules.SequenceBias.ban(words)


def _min_length(value: Any, context: Context) -> Any:
    # HF counts the prompt in `min_length` and not in `min_new_tokens`.
    return generation.rules.Suppress(context.stop_ids, length=value)


def _min_new_tokens(value: Any, context: Context) -> Any:
    return generation.rules.Suppress(context.stop_ids, steps=value)


def _forced_first(value: Any, context: Context) -> Any:
    del context
    # HF acts where the text has one token, which for GPT-2 is a prompt of one.
    return generation.rules.Force((value,), length=1)


def _forced_last(value: Any, context: Context) -> Any:
    # HF's is the last of `max_length`, which for one prompt is the same token.
    if context.max_new_tokens is None:
        raise ValueError("`forced_eos_token_id` needs to know `max_new_tokens`.")
    # Of several ids, any may come.
    return generation.rules.Force(as_ids(value), step=context.max_new_tokens - 1)


def _decay(value: Any, context: Context) -> Any:
    # HF has them as a pair too, the start counted from the end of the prompt.
    start, factor = value
    return generation.rules.ExponentialDecayLength(context.stop_ids, start, factor)


def _suppress(value: Any, context: Context) -> Any:
    del context
    return generation.rules.Suppress(as_ids(value))


def _suppress_first(value: Any, context: Context) -> Any:
    del context
    # HF counts from the prompt's end, and so from step 0, as here.
    return generation.rules.Suppress(as_ids(value), steps=1)


def _renormalize(value: Any, context: Context) -> Any:
    del value, context
    return generation.transforms.Renormalize()


# Rules, for every search. The order of transforms is HF's
# (`GenerationMixin._get_logits_processor`): rules, then cuts for sampling alone. OpenAI's two
# follow the one that they resemble.
RULES = (
    Option(
        name="sequence_bias",
        kind="biases",
        metavar=("BIAS", "ID"),
        help="add BIAS to the logit that completes this run of tokens",
        here="`SequenceBias`",
        make=_sequence_bias,
        differs="padding is no context",
    ),
    Option(
        name="repetition_penalty",
        kind="float",
        metavar="R",
        help="above 1, makes tokens that have come, in the prompt too, less likely",
        here="`RepetitionPenalty`",
        make=_rule("RepetitionPenalty"),
        range=ranges.POSITIVE,
        neutral=(1.0,),
    ),
    Option(
        name="frequency_penalty",
        kind="float",
        metavar="F",
        help="lowers a token's logit by F for each time that it was generated",
        here="`FrequencyPenalty`",
        make=_rule("FrequencyPenalty"),
        range=ranges.FINITE,
        neutral=(0.0,),
        differs="OpenAI's",
    ),
    Option(
        name="presence_penalty",
        kind="float",
        metavar="F",
        help="lowers the logit of tokens that were generated by F",
        here="`PresencePenalty`",
        make=_rule("PresencePenalty"),
        range=ranges.FINITE,
        neutral=(0.0,),
        differs="OpenAI's",
    ),
    Option(
        name="no_repeat_ngram_size",
        kind="int",
        metavar="N",
        help="never repeat a run of N tokens",
        here="`NoRepeatNGram`",
        make=_rule("NoRepeatNGram"),
        range=ranges.COUNT_OR_0,
        neutral=(0,),
        differs="padding is no token",
    ),
    Option(
        name="bad_words_ids",
        kind="runs",
        metavar="ID",
        help="never write this run",
        here="`SequenceBias.ban`",
        make=_bad_words,
        differs="padding is no context",
    ),
    Option(
        name="min_length",
        kind="int",
        metavar="N",
        help="do not end before N tokens, those of the prompt included",
        here="`Suppress(stop_ids, length=)`",
        make=_min_length,
        range=ranges.COUNT_OR_0,
        neutral=(0,),
        needs="stop_ids",
        differs="padding does not count",
    ),
    Option(
        name="min_new_tokens",
        kind="int",
        metavar="N",
        help="do not end before N new tokens",
        here="`Suppress(stop_ids, steps=)`",
        make=_min_new_tokens,
        range=ranges.COUNT_OR_0,
        neutral=(0,),
        needs="stop_ids",
    ),
    Option(
        name="forced_bos_token_id",
        kind="id",
        metavar="ID",
        help="after a prompt of one token, take this one",
        here="`Force(ids, length=1)`",
        make=_forced_first,
    ),
    Option(
        name="forced_eos_token_id",
        kind="id",
        metavar="ID",
        help="make this the last of --max_tokens tokens",
        here="`Force(ids, step=)`",
        make=_forced_last,
        differs="the last of `max_new_tokens`",
    ),
    Option(
        name="exponential_decay_length_penalty",
        kind="decay",
        metavar=("START", "FACTOR"),
        help="after START new tokens, make the end more likely, by FACTOR for each",
        here="`ExponentialDecayLength`",
        make=_decay,
        needs="stop_ids",
    ),
    Option(
        name="suppress_tokens",
        kind="ids",
        metavar="ID",
        help="never take this token",
        here="`Suppress(ids)`",
        make=_suppress,
        neutral=([],),  # a file may spell out that nothing is suppressed
    ),
    Option(
        name="begin_suppress_tokens",
        kind="ids",
        metavar="ID",
        help="do not begin with this token",
        here="`Suppress(ids, steps=1)`",
        make=_suppress_first,
        neutral=([],),
    ),
)
# What shapes random draws. A range holds the neutral value as well, even where its class does not.
DRAWS = (
    Option(
        # First of all draws, as in HF: the cuts that follow see the distribution that it has made.
        name="temperature",
        kind="float",
        metavar="T",
        help="below 1 is safer, above 1 is wilder",
        here="`Temperature`",
        make=_temperature,
        range=ranges.POSITIVE,
        neutral=(1.0,),
        needs="do_sample",
        hint="without --do_sample it is 0",
    ),
    Option(
        name="top_h",
        kind="float",
        metavar="H",
        help="draw from the likeliest that hold H of the entropy",
        here="`TopH`",
        make=_top_h,
        range=ranges.POSITIVE_FRACTION,
        needs="do_sample",
    ),
    Option(
        name="top_k",
        kind="int",
        metavar="K",
        help="draw from the K likeliest tokens",
        here="`TopK`",
        make=_top_k,
        range=ranges.COUNT,
        neutral=(0,),  # in HF's files; who types it has mistaken it for a number of tokens
        needs="do_sample",
        differs="none unless given; HF's default is 50",
    ),
    Option(
        name="top_p",
        kind="float",
        metavar="P",
        help="draw from the likeliest that hold P of the probability",
        here="`TopP`",
        make=_cut("TopP"),
        range=ranges.FRACTION,
        neutral=(1.0,),
        needs="do_sample",
        differs="ties in a fixed order",
    ),
    Option(
        name="min_p",
        kind="float",
        metavar="P",
        help="draw from those at least P times as likely as the first",
        here="`MinP`",
        make=_cut("MinP"),
        range=ranges.FRACTION,
        needs="do_sample",
    ),
    Option(
        name="typical_p",
        kind="float",
        metavar="P",
        help="draw from the most typical that hold P of the probability",
        here="`Typical`",
        make=_cut("Typical"),
        range=ranges.POSITIVE_FRACTION,
        neutral=(1.0,),
        needs="do_sample",
    ),
    # HF's two cutoffs are probabilities; 0 cuts nothing.
    Option(
        name="epsilon_cutoff",
        kind="float",
        metavar="E",
        help="draw from those of at least the probability E",
        here="`Epsilon`",
        make=_cut("Epsilon"),
        range=ranges.FRACTION_BELOW_1,
        neutral=(0.0,),
        needs="do_sample",
    ),
    Option(
        name="eta_cutoff",
        kind="float",
        metavar="E",
        help="the same, with less than E where many tokens are likely",
        here="`Eta`",
        make=_cut("Eta"),
        range=ranges.FRACTION_BELOW_1,
        neutral=(0.0,),
        needs="do_sample",
    ),
)
# Arguments of searches. One of them is a transform that only beams notice.
SEARCHES = (
    Option(
        name="num_beams",
        kind="int",
        metavar="N",
        help="search with N beams (default: 1)",
        here="`beam_search`",
        range=ranges.COUNT,
        neutral=(1,),
    ),
    Option(
        name="length_penalty",
        kind="float",
        metavar="P",
        help="above 0, prefer longer beams (default: 1)",
        here="`beam_search`",
        range=ranges.FINITE,
        neutral=(1.0,),
        needs="num_beams",
    ),
    Option(
        name="early_stopping",
        kind="early_stopping",  # HF's three values: False, True and "never"
        metavar=None,
        help="when beams are done, see docs/generation.md (default: false)",
        here="`beam_search`",
        neutral=(False,),
        needs="num_beams",
    ),
    Option(
        # Greedy choice and draws notice no constant that is taken off all logits; beams add it up.
        name="renormalize_logits",
        kind="flag",
        metavar=None,
        help="let options leave beams log-probabilities",
        here="`Renormalize`",
        make=_renormalize,
        neutral=(False,),
        needs="num_beams",
    ),
    Option(
        name="assistant_model",
        kind="model",
        metavar="MODEL",
        help="let a smaller model guess, for the same text sooner",
        here="`draft_params=` of `speculate`",
        differs="batches",
    ),
    Option(
        name="num_assistant_tokens",
        kind="int",
        metavar="N",
        help="its guesses at a time (default: 5)",
        here="`num_draft_tokens=` of `speculate`",
        range=ranges.COUNT,
        needs="assistant_model",
        differs="a fixed number",
    ),
    Option(
        name="prompt_lookup_num_tokens",
        kind="int",
        metavar="N",
        help="guess N tokens from the text so far",
        here="`speculate` without a draft model",
        range=ranges.COUNT,
        differs="batches",
    ),
)
OPTIONS = {option.name: option for option in (*RULES, *DRAWS, *SEARCHES)}

# Options that the documentation has besides: HF's names, what they are here, how they differ.
ELSEWHERE = (
    ("max_matching_ngram_size", "`speculate` without a draft model", ""),
    ("num_return_sequences", "of `generate`, `stream`, `beam_search`, `complete`", ""),
    ("eos_token_id", "`stop_ids=`", ""),
    (
        "pad_token_id",
        "`pad_id=`",
        "for 0, HF's `beam_search` writes a stop id"
        " ([#47286](https://github.com/huggingface/transformers/pull/47286))",
    ),
    ("stop_strings", "`stop=` of `complete`, `stream_text`", "the text ends before it"),
    ("max_length", "`max_new_tokens=`", "past the context: `overflow=`"),
    ("max_new_tokens", "`max_new_tokens=`", "past the context: `overflow=`"),
    ("guidance_scale", "`Guidance`", ""),
    ("prefix_allowed_tokens_fn", "`PrefixAllowedTokens`", "padding is no token"),
    ("output_logits", '`outputs="logits"`', ""),
    ("output_scores", '`outputs="scores"`', ""),
    ("output_hidden_states", '`outputs="h.*.resid_post"`', "of the last token alone"),
    ("diversity_penalty", "raises", ""),
    ("penalty_alpha", "raises", ""),
    ("watermarking_config", "raises", ""),
)


def options_table() -> str:
    """Returns the documentation's table of options, as Markdown."""
    # A test holds docs/generation.md to it.
    rows = [("option (HF's name)", "here", "differs from HF"), ("---", "---", "---")]
    for option in OPTIONS.values():
        rows.append((f"`{option.name}`", option.here, option.differs))
    for name, here, differs in ELSEWHERE:
        rows.append((f"`{name}`", here, differs))
    lines = []
    for row in rows:
        cells = " | ".join(row).rstrip()
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def as_ids(value: Any) -> tuple[int, ...]:
    """Returns one id, or a sequence of ids, as a tuple."""
    return (int(value),) if isinstance(value, Integral) else tuple(value)


def bias_pairs(value: Any) -> list[tuple[Sequence[int], float]]:
    """Returns `sequence_bias` as pairs: HF has it as a mapping or as a list of pairs."""
    return list(value.items() if isinstance(value, Mapping) else value)
