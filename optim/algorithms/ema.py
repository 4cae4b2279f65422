"""`EMA`: any Keras optimizer, and an average of the weights to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from optim.core import precision
from optim.core.averaging import evaluates_another_value
from optim.core.checks import check_flag
from optim.core.evaluation_weights import EvaluationWeights
from optim.core.optimizer import Optimizer, check_range
from optim.core.parameter_groups import path_of
from optim.kernels import backend as kernels


@dataclass(frozen=True)
class _Averages:
    """By index; None where a variable is overwritten with its gradient."""

    variables: list[Any]


@keras.saving.register_keras_serializable(package="optim")
class EMA(EvaluationWeights, keras.optimizers.Optimizer):  # type: ignore[misc]
    r"""A Keras optimizer with an exponential moving average of the weights it trains.

    After the update :math:`t` of the inner optimizer:

    .. math::
        \beta_t &= \min(\beta, (1 + t) / (10 + t)) \\
        a_t &= \beta_t\, a_{t-1} + (1 - \beta_t)\, p_t, \qquad a_1 = p_1

    The average is float32 whatever the dtype of the variable. It does not influence the training.
    It is evaluated and saved in place of the weights: by `kbtrain.Trainer`, and in plain Keras
    during ``fit`` with `optim.SwapEvaluationWeights`; after ``fit`` the model holds it.

    An optimizer's own ``use_ema=True`` does nearly the same; its average of a stock optimizer has
    the dtype of the variable and is too close to the first weights at first (no :math:`\beta_t`).
    A `keras.optimizers.LossScaleOptimizer` goes around this, not inside.

    Args:
        inner_optimizer: Any Keras optimizer, unless it has evaluation weights of its own.
        decay: Largest share of the old average that an update keeps, in [0, 1).
        warmup: Let the share grow with the updates, as above. Without, it is ``decay`` at once.
        name: Prefix of the paths of the averages.

    Raises:
        TypeError: If ``inner_optimizer`` is no optimizer.
        ValueError: If ``decay`` is out of range, or the inner optimizer averages already or scales
            the loss.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0])
        >>> optimizer = optim.EMA(keras.optimizers.SGD(1.0), decay=0.5, warmup=False)
        >>> for _ in range(2):
        ...     optimizer.apply([keras.ops.array([1.0])], [variable])
        >>> float(keras.ops.convert_to_numpy(variable)[0])
        -1.0
        >>> optimizer.finalize_variable_values([variable])
        >>> float(keras.ops.convert_to_numpy(variable)[0])
        -0.5

    Reference:
        - [Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging](https://doi.org/10.1137/0330046)
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        decay: float = 0.999,
        warmup: bool = True,
        name: str | None = None,
    ) -> None:
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`inner_optimizer` must be a Keras optimizer. "
                f"Received: {type(inner_optimizer).__name__}"
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`EMA` goes inside the loss scaling, which skips updates: use "
                "LossScaleOptimizer(EMA(optimizer)). Received: inner_optimizer=LossScaleOptimizer"
            )
        if _averages_already(inner_optimizer):
            raise _averaged_twice(inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.decay = check_range("decay", decay, 0.0, 1.0)
        self.warmup = check_flag("warmup", warmup)

    # ---- what is averaged -----------------------------------------------------------------------

    def build(self, variables: list[Any]) -> None:
        """Create the state.

        Args:
            variables: The variables that will be updated, in the order of the gradients.
        """
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        if isinstance(self.inner_optimizer, Optimizer):
            for rule in map(self.inner_optimizer.rule_of, variables):
                if evaluates_another_value(rule):
                    raise _averaged_twice(rule)
        super().build(variables)
        self._averages = _Averages([self._new_average(variable) for variable in variables])

    def _new_average(self, variable: Any) -> Any:
        if self._overwrite_variable_with_gradient(variable):
            return None
        prefix = path_of(variable)
        with kernels.colocated(variable):
            return self.add_variable(
                shape=tuple(variable.shape),
                dtype=precision.working_dtype(variable),
                name=f"{prefix}_average".replace("/", "_").replace(":", "_"),
                layout=getattr(variable, "_layout", None),
            )

    def apply(self, grads: list[Any], trainable_variables: list[Any] | None = None) -> None:
        """Let the inner optimizer update the variables, then average them.

        Args:
            grads: One gradient per variable.
            trainable_variables: The variables; needed at the first call unless `build` was called.
        """
        if not self.built:
            self.build(list(trainable_variables or []))
        widest = "float32"
        if any(a is not None and a.dtype == "float64" for a in self._averages.variables):
            widest = "float64"
        with kernels.no_gradient(), precision.arithmetic(widest):
            before = self.inner_optimizer.iterations + 0
            self.inner_optimizer.apply(grads, trainable_variables)
            count = self.inner_optimizer.iterations
            share = self._share(ops.cast(count, widest))
            # Accumulation and loss scaling have calls that are no updates.
            share = ops.where(ops.equal(before, count), 0.0, share)
            for variable, average in zip(
                self._trainable_variables, self._averages.variables, strict=True
            ):
                if average is not None:
                    change = ops.cast(ops.convert_to_tensor(variable), average.dtype) - average
                    average.assign(average + ops.cast(share, average.dtype) * change)

    def _share(self, count: Any) -> Any:
        """What the newest weights contribute after ``count`` updates, the first one all."""
        kept: Any = self.decay
        if self.warmup:
            kept = ops.minimum(kept, (1.0 + count) / (10.0 + count))
        one, rest = (ops.convert_to_tensor(x, count.dtype) for x in (1.0, 1.0 - kept))
        return ops.where(count <= 1.0, one, rest)

    def _evaluated(self, variable: Any) -> tuple[Any, dict[str, Any]] | None:
        average = self._averages.variables[self._get_variable_index(variable)]
        if average is None:
            return None
        # Before the first update there is no average.
        value = ops.where(
            ops.equal(self.iterations, 0),
            ops.convert_to_tensor(variable),
            ops.cast(ops.convert_to_tensor(average), variable.dtype),
        )
        return ops.copy(value), {}

    # ---- the inner optimizer's ------------------------------------------------------------------

    @property
    def variables(self) -> list[Any]:
        """The averages and the inner optimizer's state."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of updates."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def scale_loss(self, loss: Any) -> Any:
        """As the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: list[Any] | None = None, var_names: list[str] | None = None
    ) -> None:
        """As for the inner optimizer.

        Args:
            var_list: Variables without weight decay.
            var_names: Patterns of names without weight decay.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "decay": self.decay,
            "warmup": self.warmup,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> EMA:
        """The inverse of `get_config`.

        Args:
            config: What that returned.
            custom_objects: Classes by name, for an inner optimizer that is not registered.

        Returns:
            A new optimizer.
        """
        inner = keras.saving.deserialize_keras_object(
            config["inner_optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "inner_optimizer": inner})


def _averages_already(optimizer: Any) -> bool:
    own = isinstance(optimizer, Optimizer) and evaluates_another_value(optimizer)
    return own or optimizer.use_ema or isinstance(optimizer, EMA)


def _averaged_twice(optimizer: Any) -> ValueError:
    return ValueError(
        "The inner optimizer evaluates an average of its own (`use_ema=True`, or a schedule-free "
        "one, also in one of its groups): use it without `EMA`. "
        f"Received: inner_optimizer={type(optimizer).__name__}"
    )
