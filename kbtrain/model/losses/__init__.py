"""Losses as ``(sum, count)`` pairs, one per output, matched to their labels."""
