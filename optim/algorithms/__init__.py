"""The optimizers, one file an algorithm."""
