"""The control channel: messages between the processes of a run beside its collective operations."""
