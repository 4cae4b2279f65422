"""Checkpoints as bytes and folders: written, verified and read without Keras."""
