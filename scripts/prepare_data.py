"""Turns texts into token files: `python scripts/prepare_data.py TEXT ... --out FOLDER`. See `gpt2_jax/corpus.py`."""

import argparse
import sys

from gpt2_jax.training.corpus import prepare


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        description="Turn texts into token files that train.py reads.",
        epilog="example: python scripts/prepare_data.py input.txt --out data/shakespeare_char --tokenizer char",
    )
    out.add_argument(
        "inputs",
        nargs="+",
        metavar="TEXT",
        help="text file, folder of *.txt, or - for standard input",
    )
    out.add_argument(
        "--out", required=True, metavar="FOLDER", help="where train.bin, val.bin and the rest go"
    )
    out.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, char (a token for each character), bpe (trained on these texts), or a model's: hub id, folder or"
        " demo (default: gpt2)",
    )
    out.add_argument("--vocab_size", type=int, metavar="N", help="tokens of a bpe")
    out.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="for validation, of each file (default: 0.1)",
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
        "--overwrite", action="store_true", help="replace the files that are in the folder"
    )
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    return out


def main() -> int:
    """Prepares; returns 2 after a user's mistake."""
    options = vars(parser().parse_args())
    quiet = options.pop("quiet")
    try:
        meta = prepare(options.pop("inputs"), options.pop("out"), progress=not quiet, **options)
    except (ValueError, OSError, ImportError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    for name in ("train", "val"):
        if not quiet and name in meta:
            part = meta[name]
            ratio = part["bytes"] / part["tokens"]
            print(
                f"{name}: {part['tokens']:,} tokens, {ratio:.2f} bytes each, {part['documents']:,} documents",
                file=sys.stderr,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
