"""Checkpoints of other tools: each format read, and some written, in HF's names and HF's layout."""
