"""Triton kernels that are made of elementwise rules: their text, their launch, their check."""
