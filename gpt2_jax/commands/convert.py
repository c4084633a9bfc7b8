"""The command `convert`: turns a checkpoint of any format into one that is written here."""

import argparse

from gpt2_jax.commands.common import unwinding
from gpt2_jax.pretrained import conversion

DESCRIPTION = """\
Convert GPT-2 weights: any format that is read into any that is written (docs/checkpoints.md).

    {program} gpt2 params.safetensors --dtype bfloat16
    {program} out/ckpt.pt my-gpt2 --verify
    {program} my-gpt2 my-gpt2.gguf

SRC is "demo", a hub id, a folder or a file. DST is a file of params if it ends in .safetensors, a
file for llama.cpp in .gguf, for nanoGPT in .pt or .pth, for Flax in .msgpack; and otherwise a
folder in HF's layout, which gets SRC's tokenizer files as well. Prints one line and, with --verify,
the largest difference between these logits and PyTorch's. Nothing is left at DST unless all went
well.
"""


def parser(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    out = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION.format(program=program),
        # As it is written: the examples keep their lines.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("src", help='"demo", a hub id, a folder, or a file')
    out.add_argument("dst", help="a folder, or a file by its ending")
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
