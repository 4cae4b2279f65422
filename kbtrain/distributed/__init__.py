"""Placement of a run: devices and their precision."""
