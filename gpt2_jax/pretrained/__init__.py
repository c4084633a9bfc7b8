"""Checkpoints in and out: where they lie, how their files are laid out, what tensors are called."""

from gpt2_jax.lazy import modules_of

__getattr__ = modules_of(__name__)  # `gpt2_jax.pretrained.name` without an import of its own
