"""Generates text from a prompt: `python scripts/generate.py "Once upon a time" --from_pretrained demo`."""

from gpt2_jax.commands.generate import main

if __name__ == "__main__":
    main()
