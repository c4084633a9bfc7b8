"""From texts to a trained model: token files, batches, the step, recipes, checkpoints, runs."""
