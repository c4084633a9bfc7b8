"""Looks into a GPT-2: `python scripts/inspect_model.py "Once upon a time" --out lens.png`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("inspect", "inspect_model.py")
