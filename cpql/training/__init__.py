"""Training: the loop, what it learns from, runs and their checkpoints, evaluation and loggers."""
