"""The command `prepare`: turns texts into token files that `train` reads."""

import argparse
import sys

from gpt2_jax.commands.common import unwinding
from gpt2_jax.tokenizer import MISSING_BYTES
from gpt2_jax.training import corpus
from gpt2_jax.training.texts import Reading


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description="Turn texts into token files that the command train reads.",
        epilog=f"example: {program} input.txt --out data/shakespeare_char --tokenizer char",
    )
    out.add_argument(
        "inputs",
        nargs="+",
        metavar="TEXT",
        help="text file, folder of *.txt, or - for standard input; with --field, files of records",
    )
    out.add_argument(
        "--out", required=True, metavar="FOLDER", help="where train.bin, val.bin and the rest go"
    )
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
    return out


def run(args: argparse.Namespace) -> int:
    """Prepares, and reports what was written."""
    reading = Reading(field=args.field, unwrap=args.unwrap, eot_as_text=args.eot_as_text)
    # Interrupted, nothing is left in the folder.
    with unwinding():
        meta = corpus.prepare(
            args.inputs,
            args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            val_fraction=args.val_fraction,
            reading=reading,
            workers=args.workers,
            missing_bytes=args.missing_bytes,
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    if args.quiet:
        return 0
    for name in ("train", "val"):
        # There is no validation part where its fraction is 0.
        if name not in meta:
            continue
        part = meta[name]
        n_tokens = part["tokens"]
        bytes_per_token = part["bytes"] / n_tokens
        sizes = f"{bytes_per_token:.2f} bytes each, {part['documents']:,} documents"
        # A report like those of the other commands: the results are the files.
        print(f"{name}: {n_tokens:,} tokens, {sizes}", file=sys.stderr)
    return 0
