"""Where a run computes: devices and their precision."""
