"""From a list of samples to one batch: stacking, padding, packing, masking."""
