"""Looks into a GPT-2: `python scripts/inspect_model.py "Once upon a time" --from_pretrained demo --out lens.png`.

What is drawn follows from the site: a residual stream's logit lens, an attention pattern's heads, or, with a second
prompt that gives its activations, the heat map of patching them in.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gpt2_jax.config import GPT2Config
from gpt2_jax.files import replacing
from gpt2_jax.interpretability import plot
from gpt2_jax.interpretability import reading as lens
from gpt2_jax.interpretability.taps import axis_masks, capture, find_sites, site_axes
from gpt2_jax.model import Params, apply
from gpt2_jax.pretrained.hub import resolve
from gpt2_jax.pretrained.loading import load_tokenizer
from gpt2_jax.pretrained.weights import load
from gpt2_jax.tokenizer import Tokenizer

View = tuple[dict[str, Any], Callable[[], Any]]  # numbers for JSON, and what draws them


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        description="Draw what a GPT-2 computes for a prompt.",
        epilog='example: python scripts/inspect_model.py "The king was" --donor "The queen was" --site resid_pre '
        "--from_pretrained demo --out patching.png",
    )
    out.add_argument("prompt", help="the text to look at")
    out.add_argument(
        "--from_pretrained",
        default="gpt2",
        metavar="MODEL",
        help="hub id, folder or demo (default: gpt2)",
    )
    out.add_argument(
        "--model_name",
        metavar="NAME",
        help="whose tokenizer (default: the model's own, or GPT-2's)",
    )
    out.add_argument(
        "--site",
        metavar="SITE",
        help='"h.*.resid_post" for a logit lens (the default), "h.2.attn.pattern" for the heads of a layer; '
        'with --donor, a site within each layer, such as "resid_pre" (the default) or "attn.z"',
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
        help="the next tokens whose difference of logits is measured (default: what the model predicts)",
    )
    out.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="places patched at once (default: 8)"
    )
    out.add_argument("--out", metavar="FILE", help="the picture: .png, .svg or .pdf")
    out.add_argument("--json", action="store_true", help="print the numbers as a JSON object")
    out.add_argument("--quiet", action="store_true", help="no progress")
    return out


def view_lens(
    params: Params, config: GPT2Config, tokenizer: Tokenizer, args: argparse.Namespace
) -> View:
    """The likeliest next tokens by every stream."""
    ids, tokens = encode(tokenizer, args.prompt)

    @jax.jit
    def run(params, ids):
        _, acts = capture(params, ids, config=config, sites=args.site)
        probabilities = {
            site: jax.nn.softmax(lens.stream_logits(params, x[0], config=config))
            for site, x in acts.items()
        }
        return {site: (x.argmax(-1), x.max(-1)) for site, x in probabilities.items()}

    found, sites = jax.device_get(run(params, ids)), find_sites(args.site, config)
    best = [[tokenizer.decode([i]) for i in found[site][0].tolist()] for site in sites]
    probabilities = [found[site][1].tolist() for site in sites]
    numbers = {"tokens": tokens, "sites": sites, "best": best, "probabilities": probabilities}
    return numbers, partial(plot.plot_lens, best, probabilities, tokens, sites, "logit lens")


def view_patterns(
    params: Params, config: GPT2Config, tokenizer: Tokenizer, args: argparse.Namespace
) -> View:
    """What each head of some layers attends to."""
    ids, tokens = encode(tokenizer, args.prompt)
    _, acts = jax.jit(partial(capture, config=config, sites=args.site))(params, ids)
    patterns = {site: np.asarray(acts[site][0]) for site in find_sites(args.site, config)}
    numbers = {"tokens": tokens, "patterns": {site: x.tolist() for site, x in patterns.items()}}
    if len(patterns) > 1 and args.out:
        raise ValueError(
            f"--out draws the heads of one layer, got the sites {', '.join(patterns)}."
        )
    site, pattern = next(iter(patterns.items()))
    return numbers, partial(plot.plot_patterns, pattern, tokens, site)


def view_patching(
    params: Params, config: GPT2Config, tokenizer: Tokenizer, args: argparse.Namespace
) -> View:
    """What patching in the donor's activations does to the difference of two logits, everywhere."""
    (ids, tokens), (donor_ids, donor_tokens) = (
        encode(tokenizer, args.prompt),
        encode(tokenizer, args.donor),
    )
    if len(tokens) != len(donor_tokens):
        raise ValueError(
            f"--donor must have the {len(tokens)} tokens of the prompt, got {len(donor_tokens)}."
        )
    of_donor, unpatched = (
        jax.jit(partial(apply, config=config))(params, text)[:, -1] for text in (donor_ids, ids)
    )
    if args.answers:
        chosen = [tokenizer.encode(answer)[0] for answer in args.answers]
    else:
        chosen = [int(logits[0].argmax()) for logits in (of_donor, unpatched)]
    answers = [tokenizer.decode([i]) for i in chosen]
    if chosen[0] == chosen[1]:
        raise ValueError(f"Both texts go on with {answers[0]!r}: give two --answers to tell apart.")

    def metric(logits):
        return logits[0, chosen[0]] - logits[0, chosen[1]]

    masks = axis_masks(f"h.0.{args.site}", args.over, len(tokens), config=config)
    _, donors = jax.jit(partial(capture, config=config, sites=f"h.*.{args.site}"))(
        params, donor_ids
    )
    run = jax.jit(partial(lens.patch_each, metric=metric, config=config, site=args.site))
    parts = [masks[i : i + args.batch_size] for i in range(0, len(masks), args.batch_size)]
    bar = tqdm(parts, desc="patching", disable=args.quiet)
    values = np.concatenate([run(params, ids, donors, part) for part in bar], axis=1)  # [L, N]
    heads = [f"head {head}" for head in range(config.n_head)]
    both = [f"{token} {head}" for token in tokens for head in heads]
    labels = {"T": tokens, "H": heads, "TH": both, "": ["all"]}.get(
        args.over, [str(i) for i in range(len(masks))]
    )
    quantity = f"logit of {answers[0]!r} - {answers[1]!r}"
    numbers = {
        "tokens": tokens,
        "site": args.site,
        "over": args.over,
        "labels": labels,
        "metric": quantity,
    }
    numbers |= {
        "unpatched": float(metric(unpatched)),
        "donor": float(metric(of_donor)),
        "values": values.tolist(),
    }
    changes = values - metric(unpatched)
    return numbers, partial(
        plot.plot_sweep, changes, labels, f"patching {args.site}", f"change of the {quantity}"
    )


def encode(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, list[str]]:
    """Returns a text's ids, `[1, T]`, and its tokens."""
    ids = tokenizer.encode(text)
    return np.array([ids], np.int32), [tokenizer.decode([i]) for i in ids]


def choose(args: argparse.Namespace, config: GPT2Config) -> Callable[..., View]:
    """Returns what there is to see at a site."""
    if args.donor is not None:
        args.site = args.site or "resid_pre"
        return view_patching
    args.site = args.site or "h.*.resid_post"
    axes = {site_axes(site, config) for site in find_sites(args.site, config)}
    if axes == {("B", "H", "T", "S")}:
        return view_patterns
    if axes == {("B", "T", "D")}:
        return view_lens
    raise ValueError(
        f"--site must be streams of width D or attention patterns, got {args.site}; or give a --donor."
    )


def main() -> int:
    """Looks; returns 2 after a user's mistake."""
    args = parser().parse_args()
    try:
        if not (args.out or args.json):
            raise ValueError("Expected --out FILE, --json, or both.")
        if args.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}.")
        if not args.prompt or args.donor == "":
            raise ValueError("The texts must not be empty.")
        folder = resolve(args.from_pretrained)
        config, params = load(folder, dtype="float32")
        tokenizer = load_tokenizer(folder, args.model_name)
        numbers, draw = choose(args, config)(params, config, tokenizer, args)
        if args.out:
            with replacing(Path(args.out), overwrite=True) as file:
                draw().savefig(file, dpi=150)
        if args.json:
            print(json.dumps(numbers))
    except (ValueError, OSError, ImportError) as error:
        print(f"inspect_model.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
