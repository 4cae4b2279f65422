"""Float32 arithmetic on a low-precision variable: the rounded value plus what rounding cut off.

A bfloat16 weight of 1.0 cannot move by 0.001: the next value is 1.0078. So a bfloat16 or float16
variable is the rounded half of a float32 number, and a slot called ``"residual"`` keeps the rest:
``value + residual`` is that number exactly, and it is what the update rule sees.

The rounding is done on the bits of the float32 number. A cast down and up again does the same,
but a compiler that may keep excess precision (XLA by default, PyTorch's inductor) may remove such a
pair of casts, and then every residual is zero.
"""

from typing import Any

from keras import ops

# Significand bits of float32 that each format drops.
_DROPPED_BITS = {"bfloat16": 16, "float16": 13}
_FLOAT16_LARGEST = 65504.0
# Below this a float16 is a multiple of 2**-24, and so is a float32 that 0.75 was added to.
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_SHIFT = 0.75


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

    Somebody may have assigned the variable since (weights were loaded, averaged, clipped to a
    constraint). Then the residual belongs to another value; it is used only where adding it still
    rounds to the value, so it can never be seen in the variable itself.

    Args:
        value: tensor of ``dtype``.
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
