"""Collators: from a list of samples to a batch, by stacking, padding, packing or masking."""
