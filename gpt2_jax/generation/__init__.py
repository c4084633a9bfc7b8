"""From a model's logits to texts: samplers, decoding, beams, speculation, conversations."""

from gpt2_jax.lazy import modules_of

__getattr__ = modules_of(__name__)  # `gpt2_jax.generation.name` without an import of its own
