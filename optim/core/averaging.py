"""`Averaging`: moving averages of the weights, and which weights are evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from optim.core import precision
from optim.core.evaluation_weights import EvaluationWeights


class Averaging(EvaluationWeights):
    """Part of `optim.Optimizer`: the moving average of Keras' arguments, and `evaluated`."""

    use_ema: bool
    ema_momentum: float
    ema_overwrite_frequency: int | None
    gradient_accumulation_steps: int | None
    iterations: Any
    rule_of: Any
    slots_of: Any
    assign: Any
    _iterations: Any
    _widest: str
    _get_variable_index: Any
    _model_variables_moving_average: list[Any]
    _trainable_variables: list[Any]

    def evaluated(self, parameter: Any, slots: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The value to evaluate where it is not the one that is trained; a pure function.

        Args:
            parameter: The trained value, float32.
            slots: Slot name -> tensor.

        Returns:
            ``None`` if it is the trained value. Else the value to evaluate, and the slots with
            which training would continue from there if it became the trained one; given those two,
            this function returns them unchanged.
        """
        return None

    def _check_averaged_once(self, rules: Iterable[Any]) -> None:
        """Raise if ``use_ema`` would hide the average that a group's rule evaluates."""
        own = [type(rule).__name__ for rule in rules if evaluates_another_value(rule)]
        if self.use_ema and own:
            raise ValueError(
                "`use_ema=True` averages weights of which some are evaluated as an average "
                f"already, by {own[0]} in `parameter_groups`. Leave one of the two out. "
                "Received: use_ema=True"
            )

    def _evaluated(self, variable: Any) -> tuple[Any, dict[str, Any]] | None:
        if self.use_ema:
            average = self._model_variables_moving_average[self._get_variable_index(variable)]
            return None if average is None else (_copy(average, variable.dtype), {})
        rule = self.rule_of(variable)
        if not evaluates_another_value(rule):
            return None
        slots = {n: ops.convert_to_tensor(slot) for n, slot in self.slots_of(variable).items()}
        dtype = keras.utils.standardize_dtype(variable.dtype)
        working = precision.working_dtype(variable)
        value = ops.convert_to_tensor(variable)
        if precision.needs_residual(dtype):
            value = precision.join(value, slots.pop("residual"), dtype)
        result = rule.evaluated(ops.cast(value, working), slots)
        return None if result is None else (_copy(result[0], dtype), result[1])

    def _update_model_variables_moving_average(self, trainable_variables: list[Any]) -> None:
        if not self.use_ema:
            return
        share: Any = 1.0 - self.ema_momentum
        if self._widest == "float64":
            share = ops.convert_to_tensor(share, "float64")
        if self.gradient_accumulation_steps:
            share = ops.where(self._updates_now(), share, 0.0)
        # Up to the first update the average is the variable itself.
        share = ops.cast(ops.where(ops.equal(self.iterations, 0), 1.0, share), self._widest)
        for variable, average in self._averages(trainable_variables):
            change = ops.cast(ops.convert_to_tensor(variable), average.dtype) - average
            average.assign(average + ops.cast(share, average.dtype) * change)

    def _backend_apply_gradients(self, grads: list[Any], trainable_variables: list[Any]) -> None:
        """Keras' own update, with the overwriting by averages counted in updates.

        Keras checks the frequency at each micro-batch of an update, on JAX in separate code. So it
        is hidden from Keras here.
        """
        frequency, self.ema_overwrite_frequency = self.ema_overwrite_frequency, None
        try:
            super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]
        finally:
            self.ema_overwrite_frequency = frequency
        if self.use_ema and frequency:
            due = ops.equal((self.iterations + 1) % frequency, 0)
            if self.gradient_accumulation_steps:
                due = ops.logical_and(due, self._updates_now())
            for variable, average in self._averages(self._trainable_variables):
                value = ops.cast(average, variable.dtype)
                self.assign(variable, ops.where(due, value, ops.convert_to_tensor(variable)))

    def _overwrite_model_variables_with_average_value(self, trainable_variables: list[Any]) -> None:
        # Here rather than in Keras, because the average has another dtype than the variable.
        for variable, average in self._averages(trainable_variables):
            self.assign(variable, ops.cast(average, variable.dtype))

    def _averages(self, trainable_variables: list[Any]) -> list[tuple[Any, Any]]:
        """The variables that are averaged, each with its average."""
        averages = self._model_variables_moving_average
        pairs = zip(trainable_variables, averages, strict=True)
        return [(variable, average) for variable, average in pairs if average is not None]

    def _updates_now(self) -> Any:
        """Whether this call is the last micro-batch of an update."""
        return (self._iterations + 1) % self.gradient_accumulation_steps == 0


def evaluates_another_value(rule: Any) -> bool:
    """Whether what a rule trains is not what is evaluated, as with the schedule-free ones."""
    return type(rule).evaluated is not Averaging.evaluated


def _copy(value: Any, dtype: str) -> Any:
    """A copy in its own memory: on JAX two variables must not share a buffer that is donated."""
    return ops.copy(ops.cast(ops.convert_to_tensor(value), dtype))
