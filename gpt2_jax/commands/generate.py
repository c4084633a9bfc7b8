"""The command `generate`: continues prompts.

Text goes to standard output, everything else to standard error.
"""

import argparse
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

import gpt2_jax
from gpt2_jax.commands.common import (
    COMMANDS,
    DEFAULT_MODEL,
    Report,
    add_mesh_argument,
    add_model_arguments,
    as_json,
    check_numbers,
    mesh_of,
    reporter,
    unwinding,
)
from gpt2_jax.commands.interactive import converse
from gpt2_jax.config import DTYPES
from gpt2_jax.files import decode_text, lines_of, read_json_object
from gpt2_jax.generation import ranges
from gpt2_jax.generation.generate import compile_first_token
from gpt2_jax.generation.options import DRAWS, OPTIONS, RULES, SEARCHES, Option
from gpt2_jax.generation.ranges import Range
from gpt2_jax.generation.text import Continuation
from gpt2_jax.pretrained.loading import Pretrained, load_pretrained
from gpt2_jax.quantised import n_weights
from gpt2_jax.tokenizer import Tokenizer, check_no_surrogates

# An option's kind in the table of generation options -> how `argparse` reads it.
KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "id": {"type": int},
    "ids": {"type": int, "action": "append"},
    "runs": {"type": int, "action": "append", "nargs": "+"},
    # A bias and its ids: `argparse` knows one type for all values of an option.
    "biases": {"type": float, "action": "append", "nargs": "+"},
    "decay": {"type": float, "nargs": 2},
    "flag": {"action": "store_true"},
    "early_stopping": {"choices": ("true", "false", "never")},
    "model": {},
}
# A command line has texts alone, HF two booleans and a text.
EARLY_STOPPING = {None: False, "false": False, "true": True, "never": "never"}

# What an option may need -> what it acts on, and the option that gives it that.
NEEDS = {"do_sample": ("random draws", "--do_sample"), "num_beams": ("beams", "--num_beams")}

NUMBERS = {
    "num_samples": ranges.COUNT,
    "max_tokens": ranges.COUNT,
    "seed": Range(low=0, high=2**32, high_open=True),
}
FALLBACK = (
    f"{DEFAULT_MODEL} is not here and the hub cannot be reached: this is demo, the package's small"
    " story model. For GPT-2, connect once, or give a folder with --from_pretrained."
)
DEFAULT_GUESSES = 5  # at a time, HF's `num_assistant_tokens` having no fixed number of its own

# Probabilities from which on a token is green, ..., red, as numbers of the terminal's 256 colours.
SHADES = ((0.5, 34), (0.2, 112), (0.05, 178), (0.01, 208), (0.0, 196))


class Session(NamedTuple):
    """What continues prompts, and how."""

    args: argparse.Namespace
    model: Pretrained
    sampler: Any
    key: PRNGKeyArray | None  # of random draws
    report: Report


class Texts(NamedTuple):
    """Finished texts of a search, `R` for each of `B` prompts, in the order of the prompts."""

    ids: Int[np.ndarray, "BR N"]
    lengths: Int[np.ndarray, " BR"]
    logprobs: Float[np.ndarray, "BR N"]
    scores: Float[np.ndarray, " BR"] | None  # of beams


# Arguments.


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    commands = "\n".join(f"  gpt2-jax {name:10}{what}" for name, what in COMMANDS.items())
    out = argparse.ArgumentParser(
        prog=program,
        description="Continue a prompt with GPT-2.",
        epilog="Example, with the small story model that ships with the package (no network "
        "needed):\n"
        f'  {program} "Once upon a time" --from_pretrained demo --do_sample --temperature 0.8 '
        f"--seed 1\n\nCommands, each with its own --help:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument(
        "prompt", nargs="*", help="one or more prompts; without any, standard input is the prompt"
    )
    _add_model(out.add_argument_group("model"))
    text = out.add_argument_group("text")
    _add_text(text)
    _add_form(text)
    search = out.add_argument_group("search and speculation")
    for option in SEARCHES:
        _add_option(search, option)
    # All others are None unless given: then those that would do nothing can be told.
    out.set_defaults(num_beams=1)
    _add_display(out)
    return out


def _add_model(group: argparse._ArgumentGroup) -> None:
    """Adds which model runs, and where."""
    add_model_arguments(group)
    # None unless given: only where nobody asked for a model may another one take its place.
    group.set_defaults(from_pretrained=None)
    group.add_argument(
        "--dtype",
        choices=(*DTYPES, "int8"),
        default="float32",
        help="parameters and compute; int8: weights of 8 bits (default: float32)",
    )
    group.add_argument(
        "--device", choices=("cpu", "gpu", "tpu"), help="where to run (default: the best there is)"
    )
    add_mesh_argument(group)


def _add_text(group: argparse._ArgumentGroup) -> None:
    """Adds what the text is to be like, and when it ends."""
    group.add_argument(
        "--max_tokens", type=int, default=100, metavar="N", help="new tokens to make (default: 100)"
    )
    group.add_argument(
        "--do_sample",
        action="store_true",
        help="draw tokens at random; otherwise the likeliest is taken",
    )
    # Draws first: they are what most users look for.
    for option in (*DRAWS, *RULES):
        _add_option(group, option)
    group.add_argument(
        "--seed",
        type=int,
        help="makes --do_sample repeatable (default: a new one each time, reported)",
    )
    group.add_argument(
        "--num_samples",
        "--num_return_sequences",  # HF's name
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt (default: 1)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )
    group.add_argument(
        "--allow_special",
        action="store_true",
        help="read <|endoftext|> in a prompt as the special token",
    )
    group.add_argument(
        "--no_special_tokens",
        action="store_true",
        help="add nothing to a prompt, where the tokenizer has tokens that begin and end each text",
    )
    group.add_argument(
        "--overflow",
        choices=("error", "stop", "slide"),
        default="error",
        help="when the context is full: refuse at the start, end there, or go on from the last "
        "half (default: error)",
    )
    group.add_argument(
        "--lines",
        action="store_true",
        help="take each line of standard input as a prompt of its own",
    )


def _add_form(group: argparse._ArgumentGroup) -> None:
    """Adds what form each text must have."""
    group.add_argument(
        "--regex", metavar="PATTERN", help="write what matches this regular expression, and end"
    )
    group.add_argument(
        "--json_schema",
        metavar="SCHEMA",
        help="write JSON of this schema, and end: a file, or the schema itself",
    )


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    """Adds an option of the table."""
    # A copy: what is added below is for this option, not for all of its kind.
    settings = dict(KINDS[option.kind])
    text = option.help
    if option.needs == "do_sample":
        text += "; needs --do_sample"
    if settings.get("action") == "append":
        text += "; may be repeated"
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    group.add_argument(f"--{option.name}", help=text, **settings)


def _add_display(out: argparse.ArgumentParser) -> None:
    """Adds how continuations are shown."""
    out.add_argument(
        "--interactive",
        action="store_true",
        help="write a text in turns: each line that you type is added to it and continued (/new "
        "begins another, Ctrl-C ends a turn, Ctrl-D ends all); what was read is not read again",
    )
    out.add_argument(
        "--show_probs",
        action="store_true",
        help="colour each token by its probability, green to red, when finished",
    )
    out.add_argument("--json", action="store_true", help="print one JSON object per continuation")
    out.add_argument("--quiet", action="store_true", help="nothing on standard error but mistakes")


# Checks.


def check_options(args: argparse.Namespace) -> None:
    """Raises `ValueError` for options that would do nothing or cannot be met."""
    # Before anything is loaded: a mistake is answered at once.
    for option in OPTIONS.values():
        _check_option(option, args)
    check_numbers(args, NUMBERS)
    _check_combinations(args)
    _check_form(args)
    if args.num_samples > 1 and not args.do_sample and args.num_beams == 1:
        advice = "add --do_sample or --num_beams"
        raise ValueError(f"--num_samples would repeat the one likeliest text: {advice}.")
    if args.num_beams > 1 and args.stop:
        raise ValueError("--stop does not act on beams, which end at the model's own stop ids.")
    if "" in args.stop:
        raise ValueError("--stop must not be empty.")
    for prompt in args.prompt:
        check_no_surrogates(prompt)  # bytes of the command line that are no UTF-8
    if args.prompt and args.lines:
        raise ValueError("--lines reads standard input: give no prompt with it.")


def _check_option(option: Option, args: argparse.Namespace) -> None:
    """Raises `ValueError` if an option was given and lacks what it needs, or is out of range."""
    value = getattr(args, option.name)
    # Not `not value`: a penalty of 0 was given, too. A flag that was not given is False.
    if value is None or value is False:
        return
    lacking = {
        "do_sample": not args.do_sample,
        "num_beams": args.num_beams == 1,
        "assistant_model": not args.assistant_model,
    }
    if option.needs is not None and lacking.get(option.needs):
        if option.needs not in NEEDS:
            raise ValueError(f"--{option.name} needs --{option.needs}.")
        what, remedy = NEEDS[option.needs]
        raise ValueError(f"--{option.name} acts on {what}: add {remedy}.")
    if option.range is not None and not option.range.contains(value):
        hint = f"; {option.hint}" if option.hint else ""
        raise ValueError(f"--{option.name} must be {option.range.asked(value)}, got {value}{hint}.")


def _check_combinations(args: argparse.Namespace) -> None:
    """Raises `ValueError` for options that exclude each other."""
    # Three searches; a conversation, which is none of them; and a way to go on past the context.
    exclusive = {
        "--num_beams": args.num_beams > 1,
        "--assistant_model": args.assistant_model,
        "--prompt_lookup_num_tokens": args.prompt_lookup_num_tokens,
        "--interactive": args.interactive,
        "--overflow": args.overflow != "error",
    }
    given = [name for name, value in exclusive.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined.")
    if args.interactive:
        for name in ("json", "show_probs", "lines", "allow_special"):
            if getattr(args, name):
                raise ValueError(f"--interactive and --{name} cannot be combined.")
        if args.num_samples > 1:
            raise ValueError("--interactive writes one text: leave out --num_samples.")
    if args.show_probs and args.json:
        raise ValueError("--json has the probabilities already: leave out --show_probs.")


def _check_form(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what cannot be combined with a form of the texts."""
    forms = [f"--{name}" for name in ("regex", "json_schema") if getattr(args, name) is not None]
    if not forms:
        return
    # A form carries a state, which can neither be taken back nor go on in another text.
    others = {
        "--assistant_model": args.assistant_model,
        "--prompt_lookup_num_tokens": args.prompt_lookup_num_tokens,
        "--interactive": args.interactive,
        "--overflow slide": args.overflow == "slide",
    }
    given = [*forms, *(name for name, value in others.items() if value)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} cannot be combined.")


# The command.


def run(args: argparse.Namespace) -> int:
    """Checks the arguments, loads the model and prints the continuations."""
    check_options(args)
    # Before the model is loaded: standard input that is empty, or not UTF-8, is told at once.
    prompts = [] if args.interactive else read_prompts(args)
    # Drawn here, and not left to chance in the library, so that it can be reported.
    seed = secrets.randbits(32) if args.seed is None else args.seed
    report = reporter(args.quiet)
    # From here on: reading the prompts may have waited for someone who types.
    started = time.perf_counter()
    # Before the first array, with which JAX chooses its device for good.
    set_up_jax(args, report)
    # Without draws there is no use for one, and to make it loads three programs.
    key = jax.random.key(seed) if args.do_sample else None
    model = load_model(args, partial(compile_ahead, args=args, prompts=prompts, key=key))
    report(describe(model, args, seed, time.perf_counter() - started))
    # Only now, as ids in options are checked against the vocabulary.
    sampler = make_sampler(args, model)
    session = Session(args, model, sampler, key, report)
    if args.interactive:
        talk(session)
    elif is_search(args):
        search(session, prompts)
    else:
        stream(session, prompts)
    return 0


def load_model(args: argparse.Namespace, meanwhile: Callable[[Pretrained], object]) -> Pretrained:
    """Returns the model that is asked for; of none, GPT-2, or without a network the demo.

    `meanwhile` is called while its weights are read: see `load_pretrained`.

    Raises:
      ConnectionError: a model that was asked for is on the hub, which cannot be reached.
      ValueError: as `load_pretrained`.
    """
    asked_for = (args.from_pretrained, args.model_name, args.revision)
    may_fall_back = asked_for == (None, None, None)
    if args.from_pretrained is None:
        args.from_pretrained = DEFAULT_MODEL
    try:
        return _load(args, meanwhile)
    except ConnectionError:
        if not may_fall_back:
            raise
    # Even with --quiet: the text of another model than expected must not pass for GPT-2's.
    print(FALLBACK, file=sys.stderr, flush=True)
    args.from_pretrained = "demo"
    return _load(args, meanwhile)


def _load(args: argparse.Namespace, meanwhile: Callable[[Pretrained], object]) -> Pretrained:
    return load_pretrained(
        args.from_pretrained,
        dtype=args.dtype,
        mesh=mesh_of(args),
        tokenizer_name=args.model_name,
        revision=args.revision,
        missing_bytes=args.missing_bytes,
        meanwhile=meanwhile,
    )


def compile_ahead(
    model: Pretrained,
    *,
    args: argparse.Namespace,
    prompts: list[str],
    key: PRNGKeyArray | None,
) -> None:
    """Compiles the program of the first token, or loads it, while the model's weights are read."""
    # Searches have programs of their own; a form takes long to make, and is made later, once.
    if is_search(args) or args.interactive or args.regex or args.json_schema:
        return
    ids, lengths = encode_prompts(args, model.tokenizer, prompts)
    compile_first_token(
        model.params,
        ids,
        lengths,
        key,
        config=model.config,
        max_new_tokens=args.max_tokens,
        num_return_sequences=args.num_samples,
        overflow=args.overflow,
        sampler=make_sampler(args, model),
    )


def is_search(args: argparse.Namespace) -> bool:
    """Returns whether texts come from a search, which shows none before it ends."""
    return bool(args.num_beams > 1 or args.assistant_model or args.prompt_lookup_num_tokens)


def encode_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[str]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Returns the prompts' ids and lengths."""
    return gpt2_jax.encode_batch(
        tokenizer,
        prompts,
        allow_special=args.allow_special,
        add_special_tokens=not args.no_special_tokens,
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts from the arguments or from standard input."""
    if args.prompt and args.prompt != ["-"]:
        return args.prompt
    # To wait for a terminal would look like a hang; with "-" that is what was asked for.
    if sys.stdin is None or (sys.stdin.isatty() and not args.prompt):
        example = 'gpt2-jax "Once upon a time"'
        raise ValueError(f"No prompt: give one, as in  {example}, or pipe text in.")
    # Not as text: the locale's encoding need not be UTF-8.
    text = decode_text(sys.stdin.buffer.read(), "Standard input")
    if not args.lines:
        return [
            text.removesuffix("\n").removesuffix("\r")
        ]  # what `echo` adds, there and on Windows
    prompts = [line for line in lines_of(text) if line]
    if not prompts:
        raise ValueError("Standard input holds no line with a prompt.")
    return prompts


def set_up_jax(args: argparse.Namespace, report: Report) -> None:
    """Chooses the device, and keeps compiled programs in a cache folder where one can be written.

    Raises:
      ValueError: there is no such device.
    """
    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    # A folder that the user has set, by the environment, stays.
    if not jax.config.values["jax_compilation_cache_dir"]:
        # Where XDG's base directories have it. A user without a home is left with `~` as it is.
        cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(cache_home) / "gpt2_jax" / "xla"
        if is_writable(folder):
            jax.config.update("jax_compilation_cache_dir", str(folder))
        else:
            report(f"{folder} cannot be written: programs are compiled anew at every start.")
    # Every program: the smaller ones together take most of the time of a start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if args.device is None:
        return
    # JAX's own "gpu" means every vendor's at once, and fails where the plugin of one is missing.
    platform = "cuda" if args.device == "gpu" else args.device
    jax.config.update("jax_platforms", platform)
    # JAX looks for devices when it is first asked for one.
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second where its plugin is not installed
        reason = str(error).partition("\n")[0]  # advice for developers follows
        found = f"JAX finds no such device here ({reason or 'it has no plugin for one'})"
        raise ValueError(f"--device {args.device}: {found}.") from error


def is_writable(folder: Path) -> bool:
    """Returns whether files can be written in a folder, which is made if need be."""
    if not folder.is_absolute():  # `~` of a user without a home
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def make_sampler(args: argparse.Namespace, model: Pretrained) -> Any:
    """Returns the sampler that the options describe.

    Raises:
      ValueError: an option is out of range for this model.
    """
    # Those without a maker are arguments of searches, which are passed to them as such.
    options = {
        option.name: getattr(args, option.name) for option in OPTIONS.values() if option.make
    }
    if args.sequence_bias:
        biases = {}
        for bias, *ids in args.sequence_bias:
            biases[tuple(int(token) for token in ids)] = bias
        options["sequence_bias"] = biases
    sampler = gpt2_jax.sampler_from_options(
        options,
        do_sample=args.do_sample,
        stop_ids=model.config.eos_token_ids,
        max_new_tokens=args.max_tokens,
        vocab_size=model.config.vocab_size,
        num_beams=args.num_beams,
    )
    form = read_form(args, model)
    if form is None:
        return sampler
    # Before the options, so that cuts count what the form allows.
    return replace(sampler, transform=gpt2_jax.Chain((form, sampler.transform)))


def read_form(args: argparse.Namespace, model: Pretrained) -> Any:
    """Returns the transform of the form that texts must have; None if they may be of any.

    Raises:
      ImportError, ValueError: as `gpt2_jax.from_regex` and `from_json_schema`.
      OSError: the schema's file cannot be read.
    """
    stop_ids = model.config.eos_token_ids
    if args.regex is not None:
        return gpt2_jax.from_regex(args.regex, model.tokenizer, stop_ids=stop_ids)
    if args.json_schema is None:
        return None
    schema = args.json_schema
    if not schema.lstrip().startswith("{"):
        schema = read_json_object(Path(schema))
    return gpt2_jax.from_json_schema(schema, model.tokenizer, stop_ids=stop_ids)


def describe(model: Pretrained, args: argparse.Namespace, seed: int, seconds: float) -> str:
    """Returns a line about the model and where it runs."""
    n_parameters = n_weights(model.params)
    size = f"{n_parameters:,} parameters, {model.config.n_layer} layers, {args.dtype}"
    where = f"on {jax.devices()[0].device_kind}; ready after {seconds:.1f} s"
    drawn = f"; seed {seed}" if args.do_sample else ""
    return f"{args.from_pretrained}: {size}, {where}{drawn}"


# Three ways to continue a prompt.


def stream(session: Session, prompts: list[str]) -> None:
    """Prints continuations: a single one as it grows, others when they are finished."""
    args = session.args
    begun = time.perf_counter()
    # Its arguments are checked here, before the prompt is printed; the work begins with the first
    # of its pieces.
    growing = gpt2_jax.stream_text(
        session.model.params,
        session.model.tokenizer,
        prompts,
        session.key,
        config=session.model.config,
        max_new_tokens=args.max_tokens,
        stop=args.stop,
        allow_special=args.allow_special,
        add_special_tokens=not args.no_special_tokens,
        num_return_sequences=args.num_samples,
        overflow=args.overflow,
        sampler=session.sampler,
    )
    is_single = len(prompts) * args.num_samples == 1
    is_live = is_single and not args.json and not args.show_probs
    first_token_at = None
    rows: list[Continuation] = []
    with unwinding():
        if is_live:
            # At once: it stands there while the first token is computed.
            print(prompts[0], end="", flush=True)
        try:
            for rows in growing:
                if is_live:
                    print(rows[0].new, end="", flush=True)
                if first_token_at is None:
                    first_token_at = time.perf_counter()
        finally:  # also when interrupted, as far as they have come
            if is_live:
                print(flush=True)
            else:
                print_rows(rows, session)
    ended = time.perf_counter()
    n_tokens = sum(len(row.ids) for row in rows)
    n_later = n_tokens - len(rows)  # the first of each row came with the prompt's pass
    first_token_at = first_token_at or ended
    rate = f", then {n_later / (ended - first_token_at):.1f} tokens/s" if n_later else ""
    session.report(f"{n_tokens} tokens; the first after {first_token_at - begun:.2f} s{rate}")


def search(session: Session, prompts: list[str]) -> None:
    """Prints continuations that cannot be shown as they grow: those of beams and speculation."""
    args = session.args
    begun = time.perf_counter()
    tokenizer = session.model.tokenizer
    # Outside of `unwinding`, as nothing is begun yet.
    ids, lengths = encode_prompts(args, tokenizer, prompts)
    find = find_beams if args.num_beams > 1 else speculate
    with unwinding():
        texts = find(session, ids, lengths)
        rows = []
        for number, length in enumerate(texts.lengths):
            # Texts of one prompt stand together.
            source = number // args.num_samples
            context = ids[source, : lengths[source]].tolist()
            stop_ids = session.model.config.eos_token_ids
            row = Continuation(prompts[source], tokenizer, args.stop, stop_ids, context)
            new_ids = texts.ids[number, :length].tolist()
            # Up to a stop text, of which a search knows nothing.
            row.push(new_ids, texts.logprobs[number, :length].tolist())
            row.finish()
            if texts.scores is not None:
                row.score = float(texts.scores[number])
            rows.append(row)
        print_rows(rows, session)
    n_tokens = sum(len(row.ids) for row in rows)
    session.report(f"{n_tokens} tokens in {time.perf_counter() - begun:.2f} s")


def find_beams(
    session: Session, ids: Int[np.ndarray, "B P"], lengths: Int[np.ndarray, " B"]
) -> Texts:
    """Returns the best texts of a beam search."""
    args = session.args
    beams = gpt2_jax.beam_search(
        session.model.params,
        ids,
        lengths,
        session.key,
        config=session.model.config,
        max_new_tokens=args.max_tokens,
        num_beams=args.num_beams,
        num_return_sequences=args.num_samples,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        early_stopping=EARLY_STOPPING[args.early_stopping],
        sampler=session.sampler,
    )
    return Texts(
        ids=_merge_rows(beams.ids),
        lengths=np.ravel(beams.lengths),
        logprobs=_merge_rows(beams.logprobs),
        scores=np.ravel(beams.scores),
    )


def speculate(
    session: Session, ids: Int[np.ndarray, "B P"], lengths: Int[np.ndarray, " B"]
) -> Texts:
    """Returns the texts of speculation, and reports how good the guesses were."""
    args = session.args
    draft_config = draft_params = None
    if args.assistant_model:
        # Without a tokenizer: its ids must be the model's, and `speculate` compares how many.
        draft_config, draft_params = gpt2_jax.load(
            args.assistant_model, dtype=args.dtype, mesh=mesh_of(args)
        )
    # A model's guesses and the text's have a number each, and only one of the two guesses.
    n_guesses = args.num_assistant_tokens or args.prompt_lookup_num_tokens or DEFAULT_GUESSES
    made = gpt2_jax.speculate(
        session.model.params,
        # A row for each text: `speculate` has no `num_return_sequences`, and each row a key.
        np.repeat(ids, args.num_samples, axis=0),
        np.repeat(lengths, args.num_samples, axis=0),
        session.key,
        config=session.model.config,
        max_new_tokens=args.max_tokens,
        draft_params=draft_params,
        draft_config=draft_config,
        num_draft_tokens=n_guesses,
        sampler=session.sampler,
    )
    session.report(f"{made.accepted.sum()} of {made.drafted.sum()} guesses were right.")
    return Texts(
        ids=np.asarray(made.ids),
        lengths=np.asarray(made.lengths),
        logprobs=np.asarray(made.logprobs),
        scores=None,
    )


def _merge_rows(x: Any) -> np.ndarray:
    """Turns `[B, R, N]` into `[BR, N]`."""
    x = np.asarray(x)
    return x.reshape(-1, x.shape[-1])


def talk(session: Session) -> None:
    """Continues the prompts of the command line, then each line that is typed."""
    args = session.args
    conversation = gpt2_jax.Conversation(
        session.model.params,
        session.model.tokenizer,
        session.key,
        config=session.model.config,
        sampler=session.sampler,
        stop=args.stop,
        add_special_tokens=not args.no_special_tokens,
    )
    converse(conversation, args.prompt, max_new_tokens=args.max_tokens, report=session.report)


# Printing.


def print_rows(rows: Sequence[Continuation], session: Session) -> None:
    """Prints finished continuations, as JSON lines or as text parted by rules."""
    args = session.args
    # Each is flushed, so that whoever reads the lines sees them as they come.
    for number, row in enumerate(rows, start=1):
        if args.json:
            record = as_record(row, with_score=args.num_beams > 1)
            print(as_json(record), flush=True)
            continue
        rule = f"=== {number} of {len(rows)} ===\n" if len(rows) > 1 else ""
        text = colour(row, session.model.tokenizer) if args.show_probs else row.text
        print(f"{rule}{row.prompt}{text}", flush=True)


def as_record(row: Continuation, *, with_score: bool) -> dict[str, Any]:
    """Returns a continuation for JSON."""
    record = {
        "prompt": row.prompt,
        "text": row.text,
        "ids": row.ids,
        "logprobs": row.logprobs,
        # None where Ctrl-C came first: what there is ends as if the length had been reached.
        "finish_reason": row.finish_reason or "length",
    }
    if with_score:
        record["score"] = row.score
    return record


def colour(row: Continuation, tokenizer: Tokenizer) -> str:
    """Returns the text with each token coloured by its probability.

    A character made of several tokens has the colour of the least likely of them.
    """
    decoder = tokenizer.stream_decoder(row.context)
    coloured = ""
    n_shown = 0
    least_logprob = 0.0
    for token, logprob in zip(row.ids, row.logprobs, strict=True):
        least_logprob = min(least_logprob, logprob)
        decoded = decoder.push([token])  # "" until a character is complete
        text = decoded[: len(row.text) - n_shown]  # a stop text may have cut it off
        if not text:
            continue
        coloured += f"\x1b[38;5;{shade_of(least_logprob)}m{text}"
        n_shown += len(text)
        least_logprob = 0.0
    return f"{coloured}\x1b[0m{row.text[n_shown:]}"


def shade_of(logprob: float) -> int:
    """Returns the number of a colour for a token's log-probability."""
    probability = math.exp(logprob)
    for least, shade in SHADES:
        if probability >= least:
            return shade
    # Only for NaN, of which no comparison holds.
    return SHADES[-1][1]
