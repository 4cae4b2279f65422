"""Callbacks to choose from, by argument or in ``callbacks=[...]``; those of Keras and others."""
