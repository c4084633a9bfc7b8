"""The command `prepare`: turns texts into token files that `train` reads, and looks after them."""

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any

from gpt2_jax.commands.common import unwinding
from gpt2_jax.tokenizer import MISSING_BYTES
from gpt2_jax.training import corpus
from gpt2_jax.training.manifest import PARTS
from gpt2_jax.training.prepare import SHARD_TOKENS, prepare
from gpt2_jax.training.shards import merge
from gpt2_jax.training.texts import Reading, Shard

# What looks after a folder that is there, and what else may be given with it.
CARE = {
    "merge": {"overwrite", "quiet"},
    "verify": {"quiet"},
    "index": {"overwrite", "quiet"},
}


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description="Turn texts into token files that the command train reads.",
        epilog=f"example: {program} input.txt --out data/shakespeare_char --tokenizer char",
    )
    out.add_argument(
        "inputs",
        nargs="*",
        metavar="TEXT",
        help="text file, folder of *.txt, or - for standard input; with --field, files of records",
    )
    out.add_argument("--out", metavar="FOLDER", help="where train.bin, val.bin and the rest go")
    out.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, char (a token for each character), bpe (trained on these texts), or a model's: "
        "hub id, folder or demo (default: gpt2)",
    )
    # Without a default: a bpe must be given one, and with any other tokenizer it is refused.
    out.add_argument("--vocab_size", type=int, metavar="N", help="tokens of a bpe")
    out.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="for validation, of each file (default: 0.1)",
    )
    out.add_argument(
        "--field",
        metavar="NAME",
        help="the field of records that is their text: in .jsonl, .json, .csv, .tsv and .parquet",
    )
    out.add_argument(
        "--eot_as_text",
        action="store_true",
        help="read <|endoftext|> as text, where it otherwise parts documents",
    )
    out.add_argument(
        "--unwrap",
        action="store_true",
        help="join the lines of each paragraph, as printed books need it",
    )
    out.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each core)"
    )
    out.add_argument(
        "--missing_bytes",
        choices=MISSING_BYTES,
        default="error",
        help="what becomes of bytes that a model's vocabulary lacks: an error, or drop them as HF "
        "does (default: error)",
    )
    out.add_argument(
        "--overwrite", action="store_true", help="replace the files that are in the folder"
    )
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_large(out.add_argument_group("a corpus larger than memory, read document by document"))
    _add_care(out.add_argument_group("a folder that is there, instead of texts"))
    return out


def _add_large(group: argparse._ArgumentGroup) -> None:
    """Adds what divides a corpus into files and shards."""
    group.add_argument(
        "--shard",
        metavar="K/N",
        help="write the K-th of N shares of the documents, 1/N to N/N, each anywhere and in any "
        "order; --merge makes one corpus of them",
    )
    group.add_argument(
        "--shard_tokens",
        type=int,
        metavar="N",
        help=f"tokens of a file at the most (default: one file without --shard, {SHARD_TOKENS} "
        "with it)",
    )


def _add_care(group: argparse._ArgumentGroup) -> None:
    """Adds what looks after token files."""
    group.add_argument(
        "--merge", metavar="FOLDER", help="make one corpus of the shards in it; moves no token"
    )
    group.add_argument(
        "--verify", metavar="FOLDER", help="read all of it, and compare it with its manifest.json"
    )
    group.add_argument(
        "--index",
        metavar="FOLDER",
        help="read all of it, and write its manifest.json, by which it is opened in no time",
    )


def parse_shard(text: str) -> Shard:
    """Returns the shard that is meant by a text such as "3/64".

    Raises:
      ValueError: it is another text, or there is no such shard.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise ValueError(f"--shard must be K/N, as in 3/64, got {text!r:.40}.")
    shard = Shard(int(match[1]), int(match[2]))
    if not 1 <= shard.number <= shard.count:
        raise ValueError(
            f"--shard must be in 1/{shard.count} to {shard.count}/{shard.count}, got {text}."
        )
    return shard


def run(args: argparse.Namespace) -> int:
    """Prepares, or looks after a folder, and reports what was done.

    Raises:
      ValueError: what is given does not go together.
    """
    chosen = [name for name in CARE if getattr(args, name) is not None]
    if chosen:
        _check_alone(args, chosen[0])
        # Interrupted, nothing is left in the folder; here as below.
        with unwinding():
            return _look_after(args, chosen[0])
    if not args.inputs or args.out is None:
        raise ValueError("Expected texts and --out FOLDER, or --merge, --verify or --index FOLDER.")
    reading = Reading(field=args.field, unwrap=args.unwrap, eot_as_text=args.eot_as_text)
    with unwinding():
        meta = prepare(
            args.inputs,
            args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            val_fraction=args.val_fraction,
            reading=reading,
            workers=args.workers,
            missing_bytes=args.missing_bytes,
            shard=None if args.shard is None else parse_shard(args.shard),
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    _report(args, meta)
    return 0


def _check_alone(args: argparse.Namespace, chosen: str) -> None:
    """Raises `ValueError` for what would be passed over where a folder is looked after."""
    defaults = parser("")
    given = {name for name, value in vars(args).items() if value != defaults.get_default(name)}
    if not args.inputs:
        given.discard("inputs")  # an empty list, whose default is None
    others = sorted(given - CARE[chosen] - {chosen})
    if others:
        shown = ["texts" if name == "inputs" else f"--{name}" for name in others]
        raise ValueError(f"--{chosen} cannot be combined with {', '.join(shown)}.")


def _look_after(args: argparse.Namespace, chosen: str) -> int:
    """Merges, verifies or indexes a folder."""
    progress = not args.quiet
    if chosen == "merge":
        _report(args, merge(args.merge, overwrite=args.overwrite))
        return 0
    if chosen == "verify":
        found = corpus.verify(args.verify, progress=progress)
    else:
        found = corpus.index(args.index, overwrite=args.overwrite, progress=progress)
    if not args.quiet:
        counts = ", ".join(f"{value:,} {name}" for name, value in found.items())
        print(f"{chosen}: {counts}", file=sys.stderr)
    return 0


def _report(args: argparse.Namespace, meta: Mapping[str, Any]) -> None:
    """Reports what a folder has: the results are the files."""
    for name in PARTS:
        # There is no validation part where its fraction is 0.
        if args.quiet or name not in meta:
            continue
        part = meta[name]
        n_tokens = part["tokens"]
        bytes_per_token = part["bytes"] / n_tokens
        sizes = f"{bytes_per_token:.2f} bytes each, {part['documents']:,} documents"
        print(f"{name}: {n_tokens:,} tokens, {sizes}", file=sys.stderr)
