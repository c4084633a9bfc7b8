"""Generates text: `python scripts/generate.py "Once upon a time" --from_pretrained demo`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("generate")
