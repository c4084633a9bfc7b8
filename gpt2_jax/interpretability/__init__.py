"""Reading and changing what a model computes: sites, lenses, patching, circuits, pictures."""

from gpt2_jax.lazy import modules_of

__getattr__ = modules_of(__name__)  # `gpt2_jax.interpretability.name` without an import of its own
