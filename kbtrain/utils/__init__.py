"""Small helpers that do not depend on training: randomness, logging, timing, text."""
