"""The user's model with its loss and metrics, bound to what a step needs of it."""
