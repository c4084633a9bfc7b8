"""How good a model is: log-probabilities, perplexity, published tasks, and lm-evaluation-harness."""
