"""The events of a run, and the callbacks that listen to them."""
