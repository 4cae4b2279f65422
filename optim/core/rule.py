"""What an update rule is made of: slots, marks for kernels, execution in any float dtype."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
from keras import ops

from optim.core import precision
from optim.core.parameter_groups import path_of
from optim.kernels import backend as kernels

Tensor = Any
"""A tensor of the running backend."""

Rule = TypeVar("Rule", bound=Callable[..., Any])


@dataclass(frozen=True)
class Slot:
    """A piece of state that is not a float32 tensor of zeros.

    What is float32 here is float64 for a variable in float64.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, as Keras names it.
        initializer: Its first value: a number, a Keras initializer or the name of one,
            ``"parameter"`` for the value the variable has when the optimizer is built, or
            ``"path"`` for an integer in [0, 2 ** 31) made of the variable's path.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    initializer: Any = "zeros"


class UpdateRule(NamedTuple):
    """How one variable is updated; variables with equal update rules can share a kernel call.

    Attributes:
        optimizer: The one whose pure part (`Optimizer.update` and hyperparameters) is executed.
        weight_decay: See `Optimizer.weight_decay_of`.
        learning_rate_multiplier: See `Optimizer.learning_rate_multiplier_of`.
    """

    optimizer: Any
    weight_decay: float
    learning_rate_multiplier: float

    def learning_rate(self, learning_rate: Tensor) -> Tensor:
        """A learning rate times this rule's multiplier."""
        multiplier = self.learning_rate_multiplier
        return learning_rate if multiplier == 1.0 else learning_rate * multiplier


def fused(name: str) -> Callable[[Rule], Rule]:
    """Mark an `Optimizer.update` as the rule that the kernels of this name also execute.

    The mark sits on the function, so a subclass that overrides ``update`` is never given to the
    kernel of its parent's rule.

    Args:
        name: Key in the ``FUSED`` table of the backend's kernel module; a backend without the key
            executes the rule itself.

    Returns:
        A decorator.
    """

    def mark(rule: Rule) -> Rule:
        rule.fused = name  # type: ignore[attr-defined]
        return rule

    return mark


def elementwise(rule: Rule) -> Rule:
    """Mark an `Optimizer.update` whose result at an element depends on that element alone.

    Scalars may enter: the step, the learning rate, slots of shape ``()``, and the sum or mean of
    all elements of something (`keras.ops.sum`, `keras.ops.mean`). Shapes, other reductions and
    products of matrices may not. A kernel may then execute the rule on tiles of a tensor.

    Args:
        rule: The method.

    Returns:
        The same method. As with `fused`, the mark is not inherited by a method that overrides it.
    """
    rule.elementwise = True  # type: ignore[attr-defined]
    return rule


def stackable(rule: Rule) -> Rule:
    """Mark an `Optimizer.update` that kernels may run on a stack of equal shapes at once.

    It is still given one tensor at a time, as `jax.vmap` and `torch.vmap` do: what it computes may
    not decide what Python does, and what is computed now and then goes through ``kernels.refresh``.

    Args:
        rule: The method.

    Returns:
        The same method. As with `fused`, the mark is not inherited by a method that overrides it.
    """
    rule.stackable = True  # type: ignore[attr-defined]
    return rule


def advance(
    rule: Any,
    value: Tensor,
    gradient: Tensor,
    slots: dict[str, Tensor],
    step: Tensor,
    learning_rate: Tensor,
    weight_decay: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Execute a rule on a value of any float dtype. Pure.

    Args:
        rule: The optimizer whose rule it is.
        value: The variable's value.
        gradient: Tensor of the same shape; like the slots and scalars it is float32, or float64 if
            the value is.
        slots: Slot name -> tensor, with the ``"residual"`` of a low-precision value.
        step: 1 at the first update.
        learning_rate: Times the variable's multiplier.
        weight_decay: The variable's decay.

    Returns:
        The new value and the new slots, dtypes unchanged.
    """
    dtype = keras.utils.standardize_dtype(value.dtype)
    scalars = (step, learning_rate, weight_decay)
    if dtype in ("float32", "float64"):
        return _checked(rule, rule.update(value, gradient, slots, *scalars), slots)
    rule_slots = {name: slot for name, slot in slots.items() if name != "residual"}
    total = precision.join(value, slots["residual"], dtype)
    result = rule.update(total, gradient, rule_slots, *scalars)
    total, rule_slots = _checked(rule, result, rule_slots)
    value, residual = precision.split(total, dtype)
    return value, {**rule_slots, "residual": residual}


def _checked(rule: Any, result: Any, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of ``update``, if it has the form that it must have.

    Raises:
        TypeError: It has not.
    """
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    if not is_pair or not isinstance(result[1], dict) or not slots.keys() <= result[1].keys():
        received = type(result).__name__
        if is_pair and isinstance(result[1], dict):
            received = f"slots {sorted(result[1])}"
        raise TypeError(
            f"{type(rule).__name__}.update must return (new value, new slots), the slots a dict "
            f"with the keys {sorted(slots)}. Received: {received}."
        )
    return result[0], result[1]


def initializer_of(slot: Slot, variable: Any) -> Any:
    """A slot's first value, as Keras takes it.

    Args:
        slot: The slot.
        variable: The variable that it belongs to.

    Returns:
        A Keras initializer, the name of one, or a function of a shape and a dtype.
    """
    initializer = slot.initializer
    if isinstance(initializer, Real):
        return keras.initializers.Constant(float(initializer))
    if initializer == "path":
        path = path_of(variable)
        number = zlib.crc32(path.encode()) >> 1
        return lambda shape, dtype: ops.full(shape, number, dtype)
    if initializer != "parameter":
        return initializer
    # By value: TensorFlow cannot lift an initializer that reads a variable out of a traced step.
    with kernels.outside_of_tracing():
        value = ops.convert_to_numpy(
            ops.cast(ops.convert_to_tensor(variable), precision.working_dtype(variable))
        )
    return lambda shape, dtype: ops.cast(np.array(value), dtype)
