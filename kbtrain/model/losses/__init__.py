"""Losses as ``(sum, count)`` pairs, one for each output, and the labels that belong to them."""
