"""The peak speed of accelerators: what a perfect program would reach."""

from __future__ import annotations

from kbtrain.utils.machine.devices import recognized


def peak_flops(device: str, dtype: str, tf32: bool) -> float | None:
    """Floating-point operations a second of one device at its peak; None if unknown.

    Args:
        device: Its name, as the framework gives it.
        dtype: The dtype of products.
        tf32: Whether products in float32 may use TensorFloat-32.
    """
    found = recognized(device)
    return None if found is None else found.peak(dtype, tf32)
