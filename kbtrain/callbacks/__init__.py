"""The events of a run, and the callbacks that handle them."""
