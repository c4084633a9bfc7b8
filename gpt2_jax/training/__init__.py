"""From texts to a trained model: token files, batches, the training step, recipes, checkpoints, whole runs."""
