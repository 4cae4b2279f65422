"""What the rules have in common: running means and their bias, the steps of Adam and RAdam, L2."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

Tensor = Any


def moving_average(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """``beta * average + (1 - beta) * value``, with the right fixed point in float32.

    A ``beta`` near 1 rounds so that the factors no longer add up to 1 (0.999 by 1e-5 of their
    difference); written as a step of size ``1 - beta`` nothing is lost. For a small ``beta`` that
    form would cancel instead.

    Args:
        average: float32 tensor.
        value: float32 tensor of the same shape.
        beta: Decay rate in [0, 1).

    Returns:
        float32 tensor of the same shape.
    """
    if beta < 0.5:
        return beta * average + (1.0 - beta) * value
    return average + (1.0 - beta) * (value - average)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta ** step`` without the cancellation that float32 has for ``beta`` near 1.

    Args:
        beta: Decay rate in [0, 1).
        step: float32 scalar, at least 1.

    Returns:
        float32 scalar.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -ops.expm1(step * log_beta)


def add_l2(gradient: Tensor, parameter: Tensor, weight_decay: float) -> Tensor:
    """The gradient of the loss plus ``weight_decay / 2`` times the squared norm.

    Args:
        gradient: float32 tensor.
        parameter: float32 tensor of the same shape.
        weight_decay: A Python number; with 0 nothing is computed.

    Returns:
        float32 tensor of the same shape.
    """
    return gradient + weight_decay * parameter if weight_decay else gradient


def adam_moments(
    slots: dict[str, Tensor], gradient: Tensor, beta_1: float, beta_2: float
) -> dict[str, Tensor]:
    """Adam's running means with one more gradient.

    Args:
        slots: With ``"momentum"`` and ``"velocity"``, and ``"velocity_max"`` for AMSGrad.
        gradient: float32 tensor of the same shape.
        beta_1: Decay rate of the mean.
        beta_2: Decay rate of the mean square.

    Returns:
        The new slots.
    """
    new = {
        "momentum": moving_average(slots["momentum"], gradient, beta_1),
        "velocity": moving_average(slots["velocity"], gradient * gradient, beta_2),
    }
    if "velocity_max" in slots:
        new["velocity_max"] = ops.maximum(slots["velocity_max"], new["velocity"])
    return new


def adam_denominator(
    slots: dict[str, Tensor], step: Tensor, beta_2: float, epsilon: float
) -> Tensor:
    r""":math:`\sqrt{\hat v} + \epsilon`, where PyTorch and optax put the epsilon.

    Args:
        slots: With ``"velocity"``; the largest one counts if ``"velocity_max"`` is there too.
        step: float32 scalar, at least 1.
        beta_2: Decay rate of the mean square.
        epsilon: Not negative.

    Returns:
        float32 tensor of the shape of the slots.
    """
    velocity = slots.get("velocity_max", slots["velocity"])
    return ops.rsqrt(bias_correction(beta_2, step)) * ops.sqrt(velocity) + epsilon


def rectify(beta_2: float, step: Tensor, limit: float = 5.0) -> tuple[Tensor, Tensor]:
    r"""Whether the variance is tractable at a step, and the factor that rectifies it.

    As it is written, :math:`\rho_t` is the small difference of two numbers near
    :math:`\rho_\infty`, and float32 would get the update at which the rectification begins wrong
    for a :math:`\beta_2` near 1. With :math:`a = -\ln \beta_2` and :math:`x = a t` it is

    .. math:: \rho_t = \rho_\infty - 2/a + (2/a)\,(1 - x / (e^x - 1))

    whose first difference is a constant (computed in float64), and whose last factor has a series.
    In float64 the series is not exact enough, nor needed.

    Args:
        beta_2: Decay rate of the mean square, in [0, 1).
        step: float32 scalar, at least 1.
        limit: What :math:`\rho_t` must exceed for the variance to count as tractable, at least 4.

    Returns:
        A boolean scalar, and a float32 scalar that is 1 where the first is false.
    """
    rho_inf = 2.0 / (1.0 - beta_2) - 1.0
    if rho_inf <= limit:  # never tractable: rho stays below its limit
        return ops.less(step, 0.0), ops.ones_like(step)
    a = -math.log(beta_2)
    x = step * a
    if keras.utils.standardize_dtype(step.dtype) == "float64":
        lost = 1.0 - x / ops.expm1(x)
    else:
        small = ops.minimum(x, 1.0)
        square = small * small
        series = square * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
        lost = ops.where(x < 1.0, 0.5 * small - series, 1.0 - x / ops.expm1(ops.maximum(x, 1.0)))
    rho = (rho_inf - 2.0 / a) + (2.0 / a) * lost
    rectified = rho > limit
    rho = ops.where(rectified, rho, 5.0)  # any at which the factor is finite
    constant = rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0))
    factor = ops.sqrt((rho - 4.0) * (rho - 2.0) / rho * constant)
    return rectified, ops.where(rectified, factor, 1.0)
