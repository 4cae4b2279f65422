"""Callbacks to choose from, by argument or in ``callbacks=[...]``."""
