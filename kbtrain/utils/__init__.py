"""Small helpers that do not depend on training: files, logging, randomness, timing, memory."""
