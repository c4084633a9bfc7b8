"""Checkpoints in and out: where they are found, how their files are laid out, what their tensors are called."""
