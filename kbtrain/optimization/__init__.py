"""From arguments to an optimizer and a schedule, by name, with parameter groups and averages."""
