"""Converts GPT-2 weights: `python weights_convert.py gpt2 params.safetensors`. See `--help`."""

from collections.abc import Sequence

import gpt2_jax_cli


def main(arguments: Sequence[str]) -> int:
    """Converts as the command line does, within a process of one's own; returns the exit code."""
    from gpt2_jax.commands.main import run

    return run(arguments, "convert", "weights_convert")


if __name__ == "__main__":
    gpt2_jax_cli.main("convert", "weights_convert")
