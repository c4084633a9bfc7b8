"""The command `inspect`: draws what a GPT-2 computes for a prompt, or prints the numbers.

What is drawn follows from the site: a residual stream's logit lens, an attention pattern's heads,
or, with a second prompt that gives its activations, the heat map of patching them in. A file ending
in .html becomes a page to point at. What is computed stands in `interpretability/views.py`.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from gpt2_jax.commands.common import add_model_arguments, check_numbers, unwinding
from gpt2_jax.files import replacing
from gpt2_jax.generation import ranges
from gpt2_jax.interpretability import page, plot, views
from gpt2_jax.interpretability.sites import find_sites, site_axes
from gpt2_jax.pretrained.loading import Pretrained, load_pretrained
from gpt2_jax.tokenizer import Tokenizer

# An extra, and slow to import: only who draws needs it, and `plot` imports it then.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150  # of pictures made of pixels: labels of 7 points stay readable
PAGE_ENDINGS = (".html", ".htm")


class Text(NamedTuple):
    """A prompt as the model reads it."""

    ids: Int[np.ndarray, "1 T"]
    tokens: list[str]


class View(NamedTuple):
    """What there is to see."""

    numbers: dict[str, Any]  # for JSON
    # Not yet drawn: who wants the numbers alone need not have matplotlib.
    write: Callable[[Path], None]  # the picture or the page, to a file


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description="Draw what a GPT-2 computes for a prompt.",
        epilog=f'example: {program} "The king was" --donor "The queen was" --site resid_pre '
        "--from_pretrained demo --out patching.png",
    )
    out.add_argument("prompt", help="the text to look at")
    add_model_arguments(out)
    out.add_argument(
        "--site",
        metavar="SITE",
        help='"h.*.resid_post" for a logit lens (the default), "h.2.attn.pattern" for the heads of '
        'a layer; for a page, the patterns it shows (default: "h.*.attn.pattern"); with --donor, a '
        'site within each layer, such as "resid_pre" (the default) or "attn.z"',
    )
    out.add_argument(
        "--donor",
        metavar="PROMPT",
        help="a text of as many tokens, whose activations are patched in",
    )
    out.add_argument(
        "--over",
        default="T",
        metavar="AXES",
        help="patch at each of T, positions, H, heads, or TH (default: T)",
    )
    out.add_argument(
        "--answers",
        nargs=2,
        metavar=("DONOR'S", "PROMPT'S"),
        help="the next tokens whose difference of logits is measured (default: what the model "
        "predicts)",
    )
    out.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="places patched at once (default: 8)"
    )
    out.add_argument(
        "--out",
        metavar="FILE",
        help="the picture: .png, .svg or .pdf; or .html, a page that shows each token's "
        "probability and each head's attention where one points",
    )
    out.add_argument("--json", action="store_true", help="print the numbers as a JSON object")
    out.add_argument("--quiet", action="store_true", help="no progress")
    return out


def run(args: argparse.Namespace) -> int:
    """Looks, draws and prints."""
    # All of this before the model is loaded, which takes seconds.
    if not (args.out or args.json):
        raise ValueError("Expected --out FILE, --json, or both.")
    check_numbers(args, {"batch_size": ranges.COUNT})
    # An empty donor was given: it is not the same as none.
    if not args.prompt or args.donor == "":
        raise ValueError("The texts must not be empty.")
    if is_page(args) and args.donor is not None:
        raise ValueError(f"A page shows one text: --out {args.out} takes no --donor.")
    model = load_pretrained(
        args.from_pretrained,
        dtype="float32",  # figures are to show the model, not the rounding of its storage
        tokenizer_name=args.model_name,
        revision=args.revision,
        missing_bytes=args.missing_bytes,
    )
    view = choose_view(model, args)
    if args.out:
        # A picture is whole or not there; what is in its place gives way, as with any plot.
        with unwinding(), replacing(Path(args.out), overwrite=True) as file:
            view.write(file)
    if args.json:
        # In ASCII, as `json` has it by itself: tokens may hold what a terminal cannot spell.
        print(json.dumps(view.numbers))
    return 0


def is_page(args: argparse.Namespace) -> bool:
    """Returns whether a page is asked for, not a picture."""
    return args.out is not None and Path(args.out).suffix.lower() in PAGE_ENDINGS


def choose_view(model: Pretrained, args: argparse.Namespace) -> View:
    """Returns what there is to see at a site.

    Raises:
      ValueError: there is no such site, or nothing to see at it.
    """
    if args.donor is not None:
        return patching(model, args)
    if is_page(args):
        return text_page(model, args)
    sites = args.site or "h.*.resid_post"
    # As a set: several sites are one picture only if all are of one kind.
    axes = {site_axes(site, model.config) for site in find_sites(sites, model.config)}
    # By axes, not by names, so that any site of the kind will do.
    if axes == {("B", "H", "T", "S")}:
        return patterns(model, args)
    if axes == {("B", "T", "D")}:
        return lens(model, args.prompt, sites)
    expected = "streams of width D or attention patterns"
    raise ValueError(f"--site must be {expected}, got {sites}; or give a --donor.")


def lens(model: Pretrained, prompt: str, sites: str) -> View:
    """Returns the likeliest next tokens by every stream."""
    text = encode(model.tokenizer, prompt)
    view = views.view_lens(model.params, text.ids, config=model.config, sites=sites)
    best = page.spelled_rows(model.tokenizer, view.best)
    # As Python's numbers: `json` knows none of numpy's.
    numbers = {
        "tokens": text.tokens,
        "sites": view.sites,
        "best": best,
        "probabilities": view.probabilities.tolist(),
    }
    draw = partial(plot.plot_lens, best, view.probabilities, text.tokens, view.sites, "logit lens")
    return View(numbers, partial(save_figure, draw))


def patterns(model: Pretrained, args: argparse.Namespace) -> View:
    """Returns what each head of some layers attends to."""
    text = encode(model.tokenizer, args.prompt)
    view = views.view_patterns(model.params, text.ids, config=model.config, sites=args.site)
    first_site, *other_sites = view.sites
    # Known only now: a pattern of names may match any number of layers.
    if other_sites and args.out:
        names = ", ".join(view.sites)
        raise ValueError(f"--out draws the heads of one layer, got the sites {names}.")
    by_site = {}
    for site, pattern in zip(view.sites, view.patterns, strict=True):
        by_site[site] = pattern.tolist()
    numbers = {"tokens": text.tokens, "patterns": by_site}
    draw = partial(plot.plot_patterns, view.patterns[0], text.tokens, first_site)
    return View(numbers, partial(save_figure, draw))


def patching(model: Pretrained, args: argparse.Namespace) -> View:
    """Returns what patching in the donor's activations does to the difference of two logits."""
    plan = views.SweepPlan(args.site or "resid_pre", args.over, args.batch_size)
    text = encode(model.tokenizer, args.prompt)
    donor = encode(model.tokenizer, args.donor)
    # Activations are put in place by place, so both texts must have as many places.
    if len(text.tokens) != len(donor.tokens):
        expected = f"the {len(text.tokens)} tokens of the prompt"
        raise ValueError(f"--donor must have {expected}, got {len(donor.tokens)}.")
    contrast = views.contrast(
        model.params,
        text.ids,
        donor.ids,
        first_tokens(model.tokenizer, args.answers),
        config=model.config,
    )
    # Before the sweep, which takes long.
    first, second = page.spelled(model.tokenizer, contrast.answers)
    if first == second:
        raise ValueError(f"Both texts go on with {first!r}: give two --answers to tell apart.")
    swept = views.view_patching(
        model.params,
        text.ids,
        donor.ids,
        contrast,
        config=model.config,
        plan=plan,
        progress=partial(tqdm, desc="patching", disable=args.quiet),
    )
    labels = views.sweep_labels(
        plan.over, text.tokens, n_heads=model.config.n_head, count=swept.values.shape[1]
    )
    quantity = f"logit of {first!r} - {second!r}"
    numbers = {
        "tokens": text.tokens,
        "site": plan.site,
        "over": plan.over,
        "labels": labels,
        "metric": quantity,
        "unpatched": contrast.unpatched,
        "donor": contrast.donor,
        "values": swept.values.tolist(),
    }
    title = f"patching {plan.site}"
    draw = partial(plot.plot_sweep, swept.changes, labels, title, f"change of the {quantity}")
    return View(numbers, partial(save_figure, draw))


def text_page(model: Pretrained, args: argparse.Namespace) -> View:
    """Returns how likely each token is, what was likelier, and what each head attends to."""
    text = encode(model.tokenizer, args.prompt)
    sites = find_sites(args.site or "h.*.attn.pattern", model.config)
    # Before the pass, which takes long where the text is.
    page.check_size(len(sites), model.config.n_head, len(text.tokens))
    view = views.view_text(model.params, text.ids, config=model.config, sites=sites)
    best = page.spelled_rows(model.tokenizer, view.best)
    by_site = {}
    for site, pattern in zip(view.sites, view.patterns, strict=True):
        by_site[site] = pattern.tolist()
    numbers = {
        "tokens": text.tokens,
        "probabilities": view.probabilities.tolist(),
        "best": best,
        "best_probabilities": view.best_probabilities.tolist(),
        "patterns": by_site,
    }
    # The name that it was asked for by: a page is opened among others.
    made = page.text_page(view, text.tokens, best, title=f"{args.from_pretrained}: inspected")
    return View(numbers, made.save)


def save_figure(draw: Callable[[], "Figure"], file: Path) -> None:
    """Draws a figure and writes it; the file's ending says how."""
    draw().savefig(file, dpi=DOTS_PER_INCH)


def encode(tokenizer: Tokenizer, text: str) -> Text:
    """Returns a text's ids, and each token's text."""
    ids = tokenizer.encode(text)
    return Text(np.array([ids], np.int32), page.spelled(tokenizer, ids))


def first_tokens(tokenizer: Tokenizer, answers: list[str] | None) -> tuple[int, int] | None:
    """Returns the ids that two answers begin with.

    Raises:
      ValueError: an answer is empty.
    """
    if answers is None:
        return None
    if not all(answers):
        raise ValueError("The --answers must not be empty.")
    first, second = answers
    # An answer of several tokens is told by its first.
    # Without what a tokenizer puts before each text, which would be the first of both.
    bare = tokenizer.encode_batch([first, second], add_special_tokens=False)
    return bare[0][0], bare[1][0]
