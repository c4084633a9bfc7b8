"""How good a model is: log-probabilities, perplexity, published tasks, the harness."""
