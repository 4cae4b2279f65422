"""The user interface: ``Trainer``, checks of its arguments, reports and search."""
