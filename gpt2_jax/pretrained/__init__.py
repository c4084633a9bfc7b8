"""Checkpoints in and out: where they lie, how their files are laid out, what tensors are called."""
