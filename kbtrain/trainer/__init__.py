"""What users call: ``Trainer``, its arguments, reports and search."""
