"""`FeedMetricSchedule`: gives a metric-driven schedule its metric in plain Keras."""

from __future__ import annotations

from typing import Any

import keras

from optim.schedules.metric_driven import MetricSchedule


class FeedMetricSchedule(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives the metric-driven schedule of a model's optimizer its metric, in ``model.fit``.

    Args:
        monitor: Name of the metric in the logs of an epoch.
        schedule: A schedule to use with an optimizer that was made with a plain number, such as one
            of Keras' own; the default is the one the optimizer was made with.

    Raises:
        TypeError: If ``schedule`` is not metric-driven.
        ValueError: When training begins: the optimizer has no such schedule, or cannot be given
            one; after an epoch: the logs have no such metric.

    Example:
        >>> import numpy as np, keras, optim
        >>> schedule = optim.ReduceLROnPlateau(0.5, factor=0.5, patience=0)
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=optim.AdamW(schedule), loss=lambda y, p: 0.0 * p)
        >>> history = model.fit(
        ...     np.ones((2, 1)),
        ...     np.ones((2, 1)),
        ...     epochs=3,
        ...     verbose=0,
        ...     callbacks=[optim.FeedMetricSchedule("loss")],
        ... )
        >>> schedule.rate
        0.125
    """

    def __init__(self, monitor: str = "val_loss", schedule: MetricSchedule | None = None) -> None:
        super().__init__()
        if schedule is not None and not hasattr(schedule, "on_metric"):
            raise TypeError(
                "`schedule` must be metric-driven, such as optim.ReduceLROnPlateau. "
                f"Received: schedule={schedule!r}"
            )
        self.monitor = monitor
        self.schedule = schedule
        self._fed: MetricSchedule | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the schedule and bind it to the optimizer's learning rate."""
        optimizer = self.model.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        self._fed = getattr(optimizer, "metric_schedule", None) or self.schedule
        if self._fed is None:
            raise ValueError(
                "The optimizer was not made with a metric-driven learning rate. Make it "
                "with one, optim.AdamW(optim.ReduceLROnPlateau(...)), or give this callback a "
                f"`schedule`. Received: optimizer={type(optimizer).__name__}"
            )
        if self.schedule not in (None, self._fed):
            raise ValueError(
                "The optimizer was made with one metric-driven schedule and this callback was "
                "given another. Give only one of them."
            )
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "The learning rate of this optimizer is a function of the step, so it cannot be "
                "metric-driven too. Make the optimizer with a number as its learning rate."
            )
        if not self._fed.is_bound_to(optimizer.learning_rate):
            self._fed.bind(optimizer.learning_rate)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Pass the metric of this epoch to the schedule."""
        logs = logs or {}
        if self.monitor not in logs:
            raise ValueError(
                f"There is no {self.monitor!r} among the logs of this epoch: "
                f"{', '.join(sorted(logs)) or 'there are none'}. "
                f"Received: monitor={self.monitor!r}"
            )
        if self._fed is not None:
            self._fed.on_metric(logs[self.monitor])
