"""`Optimizer`: a Keras optimizer whose algorithm is one pure rule, float32 for most variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from optim.core import precision
from optim.core.arguments import CommonArguments, check_common
from optim.core.averaging import Averaging
from optim.core.checks import check_gradient, check_range
from optim.core.grouping import Grouped
from optim.core.parameter_groups import Group, assign, path_of
from optim.core.rule import Slot, Tensor, UpdateRule, advance, elementwise, fused, initializer_of
from optim.kernels import backend as kernels

__all__ = [
    "CommonArguments",
    "Optimizer",
    "Slot",
    "Tensor",
    "UpdateRule",
    "check_range",
    "elementwise",
    "fused",
]


@dataclass(frozen=True)
class _State:
    """The groups, rules and slots of all variables, by index.

    A class of its own, because Keras wraps every bare list and dict that is set on an optimizer in
    a container that tracks variables, and these are tracked already.
    """

    groups: list[Group | None]
    rules: list[Optimizer]
    slots: list[dict[str, Any]]


class Optimizer(Averaging, Grouped, keras.optimizers.Optimizer):  # type: ignore[misc]
    """Base of the optimizers of this package: a Keras optimizer made from one pure rule.

    A subclass defines which slots the rule keeps (`slot_shapes`), the rule itself (`update`) and
    its hyperparameters (``get_config``). Everything else is here and the same for all:
    float32 arithmetic and float32 state (float64 for a variable in float64), low-precision
    variables that follow their float32 trajectory (`optim.core.precision`), weight decay per
    variable, sparse gradients, and the execution by the kernels of the running backend.

    A subclass may treat variables differently. `rule_for` names the optimizer whose rule a variable
    gets (Muon gives its matrices one and everything else AdamW's), `learning_rate_multiplier_of`
    and `weight_decay_of` its learning rate and decay. And it may evaluate other weights than it
    trains: `evaluated` is the pure function for that (see `EvaluationWeights` for who calls it).
    A rule that needs random numbers takes them from a slot or from a pure function of a seed, the
    step and the variable, so that a resumed run draws the same ones.

    It differs from a stock Keras optimizer on purpose in two things. Clipping, accumulation and the
    moving average are float32 too. With ``gradient_accumulation_steps`` the learning-rate schedule
    and the moving average count updates, not micro-batches.

    Args:
        learning_rate: A number, a `keras.optimizers.schedules.LearningRateSchedule` (a function of
            the number of updates so far), a metric-driven schedule
            (`optim.schedules.metric_driven`) or a callable without arguments.
        weight_decay: Decoupled decay, as a fraction of ``learning_rate * variable`` per update.
            `exclude_from_weight_decay` leaves variables out.
        clipnorm: Largest norm of the gradient of one variable.
        clipvalue: Largest absolute value of a gradient element.
        global_clipnorm: Largest norm of all gradients together.
        use_ema: Keep a moving average of the variables, put in their place by
            ``finalize_variable_values``.
        ema_momentum: Share of the old average that an update keeps.
        ema_overwrite_frequency: Overwrite the variables by their average every that many updates.
        loss_scale_factor: Gradients are divided by it.
        gradient_accumulation_steps: Update once per that many calls, with the mean gradient.
        name: Prefix of the paths of the state variables.
        kernel: ``None`` for the fastest execution on the running backend, ``"reference"`` to
            execute the rule as it is written, variable by variable.
        parameter_groups: Learning rates, decays and rules of some variables, see
            `optim.core.parameter_groups`.

    Raises:
        ValueError: If an argument is out of range, or two ways of clipping are given; when the
            state is made: if no variable goes to a group.

    Example:
        >>> import keras, optim
        >>> from keras import ops
        >>> class SignDescent(optim.Optimizer):
        ...     def slot_shapes(self, shape):
        ...         return {}
        ...     def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        ...         decayed = parameter - learning_rate * weight_decay * parameter
        ...         return decayed - learning_rate * ops.sign(gradient), {}
        >>> variable = keras.Variable([1.0, -1.0])
        >>> SignDescent(0.25).apply([ops.array([3.0, 2.0])], [variable])
        >>> [float(x) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -1.25]
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        *,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        kernel: str | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if kernel not in (None, "reference"):
            raise ValueError(
                "`kernel` must be None (the fastest execution on this backend) or 'reference' "
                f"(the rule as it is written). Received: kernel={kernel!r}"
            )
        checked = check_common(
            learning_rate,
            {
                "weight_decay": weight_decay,
                "clipnorm": clipnorm,
                "clipvalue": clipvalue,
                "global_clipnorm": global_clipnorm,
                "use_ema": use_ema,
                "ema_momentum": ema_momentum,
                "ema_overwrite_frequency": ema_overwrite_frequency,
                "loss_scale_factor": loss_scale_factor,
                "gradient_accumulation_steps": gradient_accumulation_steps,
            },
        )
        # Not a function of the step: it assigns the variable that a number would have created.
        metric_schedule = learning_rate if hasattr(learning_rate, "on_metric") else None
        if metric_schedule is not None:
            checked["learning_rate"] = metric_schedule.rate
        super().__init__(**checked, name=name)
        self.kernel = kernel
        self.metric_schedule = metric_schedule
        if metric_schedule is not None:
            metric_schedule.bind(self._learning_rate)
        self.set_parameter_groups(parameter_groups)

    # ---- what a subclass provides ---------------------------------------------------------------

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The state the rule keeps for a variable.

        Args:
            shape: Shape of the variable.

        Returns:
            Slot name -> shape of a float32 tensor of zeros, or a `Slot` with another dtype or
            first value. ``"residual"`` is taken by the base class.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `slot_shapes(self, shape)`; return {{}} for a rule "
            "without state."
        )

    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        slots: dict[str, Tensor],
        step: Tensor,
        learning_rate: Tensor,
        weight_decay: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule: one update of one tensor, a pure function written in `keras.ops`.

        Args:
            parameter: float32 tensor; float64, as all that is float32 here, for a variable in it.
            gradient: float32 tensor of the same shape.
            slots: Slot name -> tensor, as in `slot_shapes`.
            step: float32 scalar, 1 at the first update.
            learning_rate: float32 scalar, times the variable's multiplier.
            weight_decay: The variable's decay, 0.0 if it is excluded. A Python number, known when
                the rule is traced.

        Returns:
            The new parameter and the new slots, shapes and dtypes unchanged.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `update(self, parameter, gradient, slots, step, "
            "learning_rate, weight_decay)`."
        )

    def rule_for(self, variable: Any) -> Optimizer:
        """The optimizer whose pure part applies to a variable; called once, when state is created.

        Its `slot_shapes`, `update`, `evaluated`, hyperparameters and weight decay are used; its
        learning rate, clipping, counter and whatever else belongs to an optimizer as a whole are
        not: those of this optimizer apply to every variable.

        Args:
            variable: One of the variables the optimizer is built with.

        Returns:
            This optimizer, unless a subclass chooses another.
        """
        return self

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        config = {**super().get_config(), "kernel": self.kernel}
        if self.metric_schedule is not None and isinstance(self._learning_rate, keras.Variable):
            config["learning_rate"] = keras.saving.serialize_keras_object(self.metric_schedule)
        if self._parameter_groups:
            config["parameter_groups"] = self.parameter_groups
        return config

    # ---- state ----------------------------------------------------------------------------------

    def build(self, variables: list[Any]) -> None:
        """Create the state.

        Args:
            variables: The variables that will be updated, in the order of the gradients.
        """
        if self.built:
            return
        dtypes = {precision.working_dtype(variable) for variable in variables}
        self._widest = "float64" if "float64" in dtypes else "float32"
        super().build(variables)
        # In a rebuilt optimizer all variables of a group may be frozen; groups were checked before.
        groups = assign(self._parameter_groups, variables, strict=not self._has_been_built)
        rules = [
            self._resolve_rule(variable)
            if group is None or group.optimizer is None
            else group.optimizer._resolve_rule(variable)
            for variable, group in zip(variables, groups, strict=True)
        ]
        self._check_averaged_once(rules)
        slots = [
            {}
            if self._overwrite_variable_with_gradient(variable)
            else self._new_slots(variable, rule)
            for variable, rule in zip(variables, rules, strict=True)
        ]
        self._state = _State(groups, rules, slots)
        if not self._has_been_built:
            self._check_decay_of_groups(variables)
        self._has_been_built = True

    def check_variables(self, variables: Sequence[Any]) -> None:
        """Check the names in the arguments, where `build` gets a part of the variables only.

        Args:
            variables: All of them, whose state several processes divide.
        """
        assign(self._parameter_groups, variables, strict=not self._has_been_built)
        self._has_been_built = True

    def _resolve_rule(self, variable: Any) -> Optimizer:
        rule = self.rule_for(variable)
        return self if rule is self else rule._resolve_rule(variable)

    def _new_slots(self, variable: Any, rule: Optimizer) -> dict[str, Any]:
        declared = rule.slot_shapes(tuple(variable.shape))
        if not isinstance(declared, Mapping):
            raise TypeError(
                f"{type(rule).__name__}.slot_shapes must return a dict from the name of a slot to "
                f"its shape. Received: {declared!r}."
            )
        slots = dict(declared)
        if precision.needs_residual(keras.utils.standardize_dtype(variable.dtype)):
            slots["residual"] = tuple(variable.shape)
        return {
            name: self._add_slot(variable, name, slot if isinstance(slot, Slot) else Slot(slot))
            for name, slot in slots.items()
        }

    def _add_slot(self, variable: Any, name: str, slot: Slot) -> Any:
        prefix = path_of(variable)
        dtype = precision.working_dtype(variable) if slot.dtype == "float32" else slot.dtype
        same_shape = tuple(slot.shape) == tuple(variable.shape)
        with kernels.colocated(variable):
            return self.add_variable(
                shape=slot.shape,
                initializer=initializer_of(slot, variable),
                dtype=dtype,
                name=f"{prefix}_{name}".replace("/", "_").replace(":", "_"),
                layout=getattr(variable, "_layout", None) if same_shape else None,
            )

    def add_variable_from_reference(
        self, reference_variable: Any, name: str | None = None, initializer: Any = "zeros"
    ) -> Any:
        """As in Keras, but in the working dtype; moving averages and accumulated gradients too.

        Args:
            reference_variable: The variable whose shape and placement the new one takes.
            name: Last part of the new variable's name.
            initializer: Its initial value.

        Returns:
            A `keras.Variable`.
        """
        slot = Slot(tuple(reference_variable.shape), initializer=initializer)
        return self._add_slot(reference_variable, name or "var", slot)

    def slots_of(self, variable: Any) -> dict[str, Any]:
        """The state kept for a variable.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            Slot name -> `keras.Variable`.
        """
        result: dict[str, Any] = self._state.slots[self._get_variable_index(variable)]
        return result

    # ---- applying gradients ---------------------------------------------------------------------

    def apply(self, grads: list[Tensor], trainable_variables: list[Any] | None = None) -> None:
        """Update the variables.

        Args:
            grads: One gradient per variable; ``None`` leaves the variable and its state alone.
            trainable_variables: The variables; needed at the first call unless `build` was called.

        Raises:
            ValueError: If there are not as many gradients as variables, or one has another shape.
        """
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if len(grads) != len(trainable_variables):
                raise ValueError(
                    "`apply` takes one gradient per variable, None for a variable without one. "
                    f"Received: {len(grads)} gradients, {len(trainable_variables)} variables"
                )
        with kernels.no_gradient():
            super().apply(grads, trainable_variables)

    _widest = "float32"

    def _backend_apply_gradients(self, grads: list[Tensor], trainable_variables: list[Any]) -> None:
        pairs = list(zip(grads, trainable_variables, strict=True))
        for gradient, variable in pairs:
            check_gradient(gradient, variable)
        # Dense and of the working dtype before Keras clips or accumulates them.
        clips = self.clipnorm or self.clipvalue or self.global_clipnorm
        as_they_are = not (clips or self.gradient_accumulation_steps)
        grads = [kernels.dense_gradient(*pair, as_they_are) for pair in pairs]
        with precision.arithmetic(self._widest):
            super()._backend_apply_gradients(grads, trainable_variables)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Does nothing: decay is part of the rule."""

    def _backend_update_step(
        self, grads: list[Tensor], trainable_variables: list[Any], learning_rate: Any
    ) -> None:
        step = kernels.next_step(self.iterations, self._widest)
        kernels.execute(
            self, grads, trainable_variables, step, ops.cast(learning_rate, self._widest)
        )

    def _clip_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        if self._widest == "float32":
            result: list[Tensor] = super()._clip_gradients(grads)
            return result
        # The global norm may be over gradients of two dtypes.
        dtypes = [keras.utils.standardize_dtype(g.dtype) for g in grads]
        clipped = super()._clip_gradients([ops.cast(g, "float64") for g in grads])
        return [ops.cast(g, dtype) for g, dtype in zip(clipped, dtypes, strict=True)]

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Any) -> None:
        """Keras' entry for a single variable: execute the rule and assign the results.

        Args:
            gradient: Gradient of the variable.
            variable: The variable to update.
            learning_rate: The learning rate of this update.
        """
        check_gradient(gradient, variable)
        gradient = kernels.dense_gradient(gradient, variable)
        step = kernels.next_step(self.iterations, self._widest)
        rate = ops.cast(learning_rate, self._widest)
        with precision.arithmetic(self._widest):
            self.update_variable(gradient, variable, step, rate)

    def update_variable(
        self,
        gradient: Tensor,
        variable: Any,
        step: Tensor,
        learning_rate: Tensor,
        through: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None = None,
    ) -> None:
        """Execute the rule for one variable, as it is written, and assign the results.

        Args:
            gradient: Tensor of the shape of the variable, of its working dtype.
            variable: The variable to update.
            step: Scalar of at least that precision, 1 at the first update.
            learning_rate: Scalar likewise, not yet multiplied for this variable.
            through: Called as ``through(pure, value, gradient, slots)``, returns what
                ``pure(value, gradient, slots)`` would: the new value and slots.
        """
        if self._widest == "float64":
            step, learning_rate = (ops.cast(x, gradient.dtype) for x in (step, learning_rate))
        slots = self.slots_of(variable)
        update_rule = self.update_rule_of(variable)
        old_value = ops.convert_to_tensor(variable)
        old_slots = {name: ops.convert_to_tensor(slot) for name, slot in slots.items()}
        rate = update_rule.learning_rate(learning_rate)

        def pure(value: Tensor, gradient: Tensor, slots: dict[str, Tensor]) -> Any:
            rule, decay = update_rule.optimizer, update_rule.weight_decay
            return advance(rule, value, gradient, slots, step, rate, decay)

        if through is None:
            value, new_slots = pure(old_value, gradient, old_slots)
        else:
            value, new_slots = through(pure, old_value, gradient, old_slots)
        # A rule may return an old value for another slot. It is copied: the tensor that was read
        # may be the variable's own memory, which the assignments below overwrite one by one.
        old = [old_value, *old_slots.values()]
        moved = {
            name: ops.copy(new_slots[name])
            for name in slots
            if any(new_slots[name] is x for x in old) and new_slots[name] is not old_slots[name]
        }
        if any(value is x for x in old_slots.values()):
            value = ops.copy(value)
        self.assign(variable, value)
        for name, slot in slots.items():
            self.assign(slot, moved.get(name, new_slots[name]))

    # ---- counting updates, averaging ------------------------------------------------------------

    def _get_current_learning_rate(self) -> Any:
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            count = self.iterations
            if self._widest == "float64" and hasattr(self._learning_rate, "keeps_float64"):
                count = ops.cast(count, "float64")  # and so is the rate
            return self._learning_rate(count)
        return super()._get_current_learning_rate()
