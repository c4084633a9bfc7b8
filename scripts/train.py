"""Trains a GPT-2 on token files: `python scripts/train.py DATA --out RUN`. See `gpt2-jax train`."""

from gpt2_jax_cli import main

if __name__ == "__main__":
    main("train", "train.py")
