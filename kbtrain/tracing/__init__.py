"""Python values captured by a traced step, and when the step must be retraced."""
