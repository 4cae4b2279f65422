"""One call of ``fit``: the loop, the actions it triggers, the train step and the state of a run."""
