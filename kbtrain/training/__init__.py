"""One ``fit``: the loop, what is done when it is due, the train step and the state of a run."""
