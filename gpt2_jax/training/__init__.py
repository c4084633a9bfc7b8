"""From texts to a trained model: token files, batches, the step, recipes, checkpoints, runs."""

from gpt2_jax.lazy import modules_of

__getattr__ = modules_of(__name__)  # `gpt2_jax.training.name` without an import of its own
