"""The command `convert`: turns weights in HF's layout into one file of params, or back."""

import argparse

from gpt2_jax.commands.common import unwinding
from gpt2_jax.pretrained import conversion

DESCRIPTION = """\
Convert GPT-2 weights between HF's folder layout and one file of params, in either direction.

    {program} gpt2 params.safetensors --dtype bfloat16
    {program} params.safetensors my-gpt2 --verify

SRC is "demo", a folder, a hub id or a file *.safetensors of params; DST is a file if it ends in
.safetensors and a folder otherwise. A file holds its config; a folder gets SRC's tokenizer files as
well. Prints one line and, with --verify, the largest difference between these logits and PyTorch's.
Nothing is left at DST unless all went well.
"""


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION.format(program=program),
        # As it is written: the examples keep their lines.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("src", help='"demo", a folder, a hub id, or a .safetensors file of params')
    out.add_argument("dst", help="a folder, or a .safetensors file of params")
    # No `choices`: `convert` refuses others itself, for callers in Python too.
    out.add_argument(
        "--dtype", help="cast to float32, float16, bfloat16 or float64 (default: as they are)"
    )
    out.add_argument("--revision", help="branch, tag or commit on the hub")
    out.add_argument(
        "--config", help="config.json, or a folder with one, for a file that holds none"
    )
    out.add_argument(
        "--verify", action="store_true", help="compare logits with PyTorch's before finishing"
    )
    out.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    return out


def run(args: argparse.Namespace) -> int:
    """Converts, and says what was written."""
    # Interrupted, nothing is left at the destination.
    with unwinding():
        written = conversion.convert(
            args.src,
            args.dst,
            dtype=args.dtype,
            revision=args.revision,
            config_file=args.config,
            verified=args.verify,
            overwrite=args.overwrite,
        )
    # The result, and so on standard output, unlike the reports of other commands.
    if written.difference is not None:
        error, scale = written.difference
        figures = f"{error:.3g} (largest logit: {scale:.3g})"
        print(f"largest difference from PyTorch's logits: {figures}")
    print(f"{args.dst}: {written.n_parameters:,} parameters, {written.dtype}")
    return 0
