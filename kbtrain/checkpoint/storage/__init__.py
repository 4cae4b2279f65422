"""Bytes and folders of checkpoints: written, verified and read without Keras."""
