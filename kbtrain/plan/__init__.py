"""What a run would need on devices that are not here: memory, operations, transfers, time."""
