"""One pass over an evaluation set: from batches to outputs, losses and metrics."""
