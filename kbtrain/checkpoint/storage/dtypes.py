"""The dtypes that arrays of a checkpoint may have, the same on every machine."""

from __future__ import annotations

import ml_dtypes
import numpy as np

NATIVE = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
"""Dtypes that HDF5 supports."""

# Dtypes that HDF5 lacks: stored as unsigned integers with the same bits.
_EXTENDED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int2", "int4", "uint2", "uint4"),
    )
    if hasattr(ml_dtypes, name)
}
DTYPES = {dtype.name: dtype for dtype in NATIVE} | _EXTENDED
"""All dtypes, by name."""
