"""Converts GPT-2 weights: `python weights_convert.py gpt2 params.safetensors`. See `--help`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("convert", "weights_convert")
