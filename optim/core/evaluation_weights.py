"""Evaluating weights other than the trained ones, such as averages of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from optim.kernels import backend as kernels


@dataclass(frozen=True)
class _Trained:
    """Variables and their trained values; a class, because Keras would track them in a list."""

    values: list[tuple[Any, Any]]


class EvaluationWeights:
    """Part of an optimizer that may evaluate other weights than it trains.

    `optim.Optimizer` and `optim.EMA` have it. Its interface, which callers look up by name:

    - ``swap_in_evaluation_weights()`` puts the weights to evaluate into the variables and keeps a
      copy of the trained ones, ``swap_back()`` restores those bit for bit. A second call of either
      has no effect, and neither does anything where the two do not differ. In plain Keras
      `optim.SwapEvaluationWeights` calls them, `kbtrain.Trainer` around each evaluation and export.
    - ``finalize_variable_values(variables)``, which Keras calls at the end of ``fit``, makes the
      weights to evaluate the trained ones. What follows (``evaluate``, ``save``, more training)
      starts from there.

    Between the first two the variables hold no state of the training: do not train, and save only
    what is meant for evaluation.
    """

    _trained: Any = None

    def _evaluated(self, variable: Any) -> tuple[Any, dict[str, Any]] | None:
        """The value to evaluate and the slots that go with it; None: the variable as it is."""
        raise NotImplementedError

    def swap_in_evaluation_weights(self) -> bool:
        """Put the weights to evaluate into the variables; `swap_back` undoes it.

        Returns:
            Whether that was done: False if they are there already, or are the trained ones.
        """
        if self._trained is not None or not self.built:  # type: ignore[attr-defined]
            return False
        trained = []
        with kernels.no_gradient():
            for variable in self._trainable_variables:  # type: ignore[attr-defined]
                if (result := self._evaluated(variable)) is not None:
                    trained.append((variable, ops.copy(ops.convert_to_tensor(variable))))
                    variable.assign(result[0])
        if not trained:
            return False
        self._trained = _Trained(trained)
        return True

    def swap_back(self) -> None:
        """Put the trained weights back into the variables."""
        trained, self._trained = self._trained, None
        if trained is not None:
            with kernels.no_gradient():
                for variable, value in trained.values:
                    variable.assign(value)

    def finalize_variable_values(self, var_list: list[Any]) -> None:
        """Make the weights to evaluate the trained ones; Keras calls it at the end of ``fit``.

        Args:
            var_list: The trained variables.
        """
        self.swap_back()
        if not self.built:  # type: ignore[attr-defined]
            return
        with kernels.no_gradient():
            for variable in self._trainable_variables:  # type: ignore[attr-defined]
                if (result := self._evaluated(variable)) is None:
                    continue
                variable.assign(result[0])
                for name, value in result[1].items():
                    self.slots_of(variable)[name].assign(value)  # type: ignore[attr-defined]


class SwapEvaluationWeights(keras.callbacks.Callback):  # type: ignore[misc]
    """Keras callback: ``model.fit`` validates with the weights that are meant to be evaluated.

    Needed for optimizers whose evaluated weights differ from the trained ones: the schedule-free
    ones, `optim.EMA`, and those of this package with ``use_ema=True``. Without it, the validation
    during ``fit`` sees the trained weights. After ``fit`` the model holds the evaluated ones with
    or without it.

    Args:
        on_epoch: Also swap between the end of an epoch and the beginning of the next, for callbacks
            that save the model there. Put those after this one.

    Raises:
        ValueError: At the beginning, if the model's optimizer has no evaluation weights.

    Example:
        >>> import numpy as np, keras, optim
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(optim.AdamW(0.1, use_ema=True), loss="mse")
        >>> data = np.ones((8, 3)), np.ones((8, 1))
        >>> swap = optim.SwapEvaluationWeights()
        >>> history = model.fit(*data, validation_data=data, callbacks=[swap], verbose=0)
        >>> model.evaluate(*data, verbose=0) == history.history["val_loss"][-1]
        True
    """

    def __init__(self, on_epoch: bool = False) -> None:
        super().__init__()
        self.on_epoch = on_epoch

    def _optimizer(self) -> EvaluationWeights:
        optimizer = self.model.optimizer
        while not isinstance(optimizer, EvaluationWeights):
            inner = getattr(optimizer, "inner_optimizer", None)
            if inner is None:
                raise ValueError(
                    "`SwapEvaluationWeights` needs an optimizer of `optim`; for a stock optimizer "
                    "with `use_ema=True` there is keras.callbacks.SwapEMAWeights, and `optim.EMA` "
                    f"wraps any optimizer. Received: {type(self.model.optimizer).__name__}"
                )
            optimizer = inner
        return optimizer

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin with the trained weights."""
        self._optimizer().swap_back()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Train the trained weights."""
        self._optimizer().swap_back()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Leave the evaluation weights to the callbacks that follow, if wanted."""
        if self.on_epoch:
            self._optimizer().swap_in_evaluation_weights()

    def on_test_begin(self, logs: Any = None) -> None:
        """Evaluate the evaluation weights."""
        self._optimizer().swap_in_evaluation_weights()

    def on_test_end(self, logs: Any = None) -> None:
        """Put the trained weights back."""
        self._optimizer().swap_back()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Predict with the evaluation weights."""
        self._optimizer().swap_in_evaluation_weights()

    def on_predict_end(self, logs: Any = None) -> None:
        """Put the trained weights back."""
        self._optimizer().swap_back()
