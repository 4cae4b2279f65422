"""One pass over an evaluation set: batches to outputs, losses, metrics and results."""
