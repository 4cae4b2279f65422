"""Float32 arithmetic on a low-precision variable: the rounded value plus what rounding cut off.

A bfloat16 weight of 1.0 cannot move by 0.001: the next value is 1.0078. So a bfloat16 or float16
variable is the rounded half of a float32 number, and a slot called ``"residual"`` keeps the rest:
``value + residual`` is that number exactly, and it is what the update rule sees.

The rounding is done on the bits of the float32 number. A cast down and up again does the same,
but a compiler that may keep excess precision (XLA by default, PyTorch's inductor) may remove such a
pair of casts, and then every residual is zero.

A float64 variable has float64 arithmetic and state, and no residual. Keras' own rules of promotion
make float32 of float64 on PyTorch and JAX; `keeping_float64` is for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from optim.core.fallback import PrivateApi

# Significand bits of float32 that each format drops.
_DROPPED_BITS = {"bfloat16": 16, "float16": 13}
_FLOAT16_LARGEST = 65504.0
# Below this a float16 is a multiple of 2**-24, and so is a float32 that 0.75 was added to.
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_SHIFT = 0.75


def working_dtype(variable: Any) -> str:
    """The dtype of a variable's arithmetic and state: ``"float64"`` for one in it, else float32.

    On JAX without ``jax_enable_x64`` a variable that calls itself float64 has a float32 value.
    """
    if keras.utils.standardize_dtype(variable.dtype) != "float64":
        return "float32"
    result: str = keras.utils.standardize_dtype(ops.convert_to_tensor(variable).dtype)
    return result


def schedule_dtype(step: Any) -> str:
    """The dtype of a schedule: float64 if the step is, or if Keras computes in it by default."""
    if keras.utils.standardize_dtype(getattr(step, "dtype", "int32")) == "float64":
        return "float64"
    if keras.config.floatx() != "float64":
        return "float32"
    result: str = keras.utils.standardize_dtype(ops.convert_to_tensor(np.zeros(1)).dtype)
    return result


@contextlib.contextmanager
def keeping_float64() -> Iterator[None]:
    """Inside, operations of Keras make float64 of float64, which they do on TensorFlow anyway.

    Their rules of promotion end with a step from 64 to 32 bits, and that table has no public
    interface.
    """
    table = _narrowing()
    before = table.get("float64")
    if before is not None:
        table["float64"] = "float64"
    try:
        yield
    finally:
        if before is not None:
            table["float64"] = before


def arithmetic(dtype: str) -> contextlib.AbstractContextManager[None]:
    """Inside, Keras computes in ``"float64"``, or as usual."""
    return keeping_float64() if dtype == "float64" else contextlib.nullcontext()


def _narrowing_table() -> dict[str, str]:
    from keras.src.backend.common import dtypes

    table: dict[str, str] = dtypes.BIT64_TO_BIT32_DTYPE
    table["float64"]  # KeyError if this is another table
    return table


_narrowing = PrivateApi(
    "Keeping float64 in operations of Keras",
    "keras",
    _narrowing_table,
    dict,
    "Where Keras makes float32 of float64, variables in float64 are updated so.",
)


def needs_residual(dtype: str) -> bool:
    """Whether variables of ``dtype`` keep a float32 residual."""
    return dtype in _DROPPED_BITS


def rounded(x: Any, dtype: str) -> Any:
    """Round a float32 tensor to the nearest value of ``dtype``, ties to even.

    Args:
        x: float32 tensor.
        dtype: ``"bfloat16"`` or ``"float16"``.

    Returns:
        float32 tensor of the shape of ``x``; infinite where ``dtype`` overflows.
    """
    dropped = _DROPPED_BITS[dtype]
    bits = ops.view(x, "int32")
    odd = ops.bitwise_and(ops.right_shift(bits, dropped), 1)
    bits = ops.bitwise_and(bits + ((1 << (dropped - 1)) - 1) + odd, -(1 << dropped))
    result = ops.view(bits, "float32")
    if dtype == "float16":
        subnormal = (x + _FLOAT16_SUBNORMAL_SHIFT) - _FLOAT16_SUBNORMAL_SHIFT
        result = ops.where(ops.abs(x) < _FLOAT16_SMALLEST_NORMAL, subnormal, result)
        overflow = ops.abs(result) > _FLOAT16_LARGEST
        result = ops.where(overflow, ops.sign(result) * float("inf"), result)
    # The bits of a NaN can carry over into an infinity, so a NaN is passed through.
    return ops.where(ops.isnan(x), x, result)


def join(value: Any, residual: Any, dtype: str) -> Any:
    """The float32 number that a low-precision value and its residual stand for.

    The variable may have been assigned since (weights were loaded, averaged, clipped to a
    constraint). Then the residual belongs to another value; it is used only where adding it still
    rounds to the value, so it can never be seen in the variable itself.

    Args:
        value: Tensor of ``dtype``.
        residual: float32 tensor of the same shape.
        dtype: ``"bfloat16"`` or ``"float16"``.

    Returns:
        float32 tensor of the same shape.
    """
    wide = ops.cast(value, "float32")
    total = wide + residual
    return ops.where(ops.equal(rounded(total, dtype), wide), total, wide)


def split(total: Any, dtype: str) -> tuple[Any, Any]:
    """The inverse of `join`: a value of ``dtype`` and the float32 remainder.

    Args:
        total: float32 tensor.
        dtype: ``"bfloat16"`` or ``"float16"``.

    Returns:
        ``(value, residual)``; the residual is 0 where the value is not finite.
    """
    nearest = rounded(total, dtype)
    residual = ops.where(ops.isfinite(nearest), total - nearest, ops.zeros_like(total))
    return ops.cast(nearest, dtype), residual
