"""The order in which the samples of an epoch are read."""
