"""Turns texts into token files: `python scripts/prepare_data.py TEXT --out FOLDER`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("prepare", "prepare_data.py")
