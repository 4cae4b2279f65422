"""The peak speed of accelerators: what a perfect program would reach."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense products of one device, without sparsity, in 10^12 floating-point operations a second.

    Attributes:
        half: In bfloat16, or float16 where there is no bfloat16.
        tf32: In TensorFloat-32; None if the device has none.
        single: In float32; None if that is not published.
    """

    half: float
    tf32: float | None = None
    single: float | None = None


PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA's data sheets, which give some numbers with sparsity: half of those.
    (r"\bB200\b", Peak(2250.0, 1125.0, 75.0)),  # HGX B200
    (r"\bH200 NVL\b", Peak(835.5, 417.5, 60.0)),
    (r"\bH200\b", Peak(989.4, 494.7, 66.9)),
    (r"\bH100 NVL\b", Peak(835.5, 417.5, 60.0)),
    (r"\bH100 PCIe\b", Peak(756.0, 378.0, 51.0)),
    (r"\bH100\b", Peak(989.4, 494.7, 66.9)),
    (r"\bA100\b", Peak(312.0, 156.0, 19.5)),
    (r"\bL4\b", Peak(121.0, 60.0, 30.3)),
    (r"\bT4\b", Peak(65.0, None, 8.1)),
    (r"\bV100-PCIE\b", Peak(112.0, None, 14.0)),
    (r"\bV100\b", Peak(125.0, None, 15.7)),
    # Google's documentation of Cloud TPU, per chip; products in float32 use bfloat16.
    (r"\bTPU v6( lite|e)\b", Peak(918.0)),
    (r"\bTPU v5( lite|e)\b", Peak(197.0)),
    (r"\bTPU v5p?\b", Peak(459.0)),
    (r"\bTPU v4\b(?! lite)", Peak(275.0)),
)
"""Names of devices, as patterns, the more special ones first."""


def peak_flops(device: str, dtype: str, tf32: bool) -> float | None:
    """Floating-point operations a second of one device at its peak; None if unknown.

    Args:
        device: Its name, as the framework gives it.
        dtype: The dtype of products.
        tf32: Whether products in float32 may use TensorFloat-32.
    """
    peak = next((peak for name, peak in PEAKS if re.search(name, device)), None)
    if peak is None or dtype not in ("bfloat16", "float16", "float32"):
        return None
    if dtype != "float32" or peak.single is None:
        return 1e12 * peak.half
    return 1e12 * (peak.tf32 if tf32 and peak.tf32 is not None else peak.single)
