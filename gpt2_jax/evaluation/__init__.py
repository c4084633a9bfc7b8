"""How good a model is: log-probabilities, perplexity, published tasks, the harness."""

from gpt2_jax.lazy import modules_of

__getattr__ = modules_of(__name__)  # `gpt2_jax.evaluation.name` without an import of its own
