"""Measures a GPT-2: `python scripts/evaluate.py --task wikitext`. See `gpt2-jax evaluate`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("evaluate", "evaluate.py")
