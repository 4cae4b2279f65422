"""The user's model with its loss and metrics, in the form that a compiled step needs."""
