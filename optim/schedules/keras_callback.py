"""`FeedMetricSchedule`: in plain Keras, tells a schedule its metric."""

from typing import Any

import keras

from optim.schedules.metric_driven import MetricSchedule


class FeedMetricSchedule(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells the learning-rate schedule of a model's optimizer its metric, in ``model.fit``.

    Args:
        monitor: name of the metric in the logs of an epoch.
        schedule: a schedule to use with an optimizer that was made with a plain number, such as one
            of Keras' own; the default is the one the optimizer was made with.

    Raises:
        TypeError: if ``schedule`` does not answer to a metric.
        ValueError: when training begins: the optimizer has no such schedule, or cannot be given
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
                "`schedule` must be one that answers to a metric, such as optim.ReduceLROnPlateau. "
                f"Received: schedule={schedule!r}"
            )
        self.monitor = monitor
        self.schedule = schedule
        self._fed: MetricSchedule | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the schedule, and see that its rate is the optimizer's."""
        optimizer = self.model.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        self._fed = getattr(optimizer, "metric_schedule", None) or self.schedule
        if self._fed is None:
            raise ValueError(
                "The optimizer was not made with a learning rate that answers to a metric. Make it "
                "with one, optim.AdamW(optim.ReduceLROnPlateau(...)), or give this callback a "
                f"`schedule`. Received: optimizer={type(optimizer).__name__}"
            )
        if self.schedule not in (None, self._fed):
            raise ValueError(
                "The optimizer was made with one schedule that answers to a metric and this "
                "callback was given another. Give one of them only."
            )
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "An optimizer whose learning rate is a function of the step cannot answer to a "
                "metric too. Make it with a number as its learning rate."
            )
        if not self._fed.is_bound_to(optimizer.learning_rate):
            self._fed.bind(optimizer.learning_rate)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell the schedule the metric of this epoch."""
        logs = logs or {}
        if self.monitor not in logs:
            raise ValueError(
                f"There is no {self.monitor!r} among the logs of this epoch: "
                f"{', '.join(sorted(logs)) or 'there are none'}. "
                f"Received: monitor={self.monitor!r}"
            )
        if self._fed is not None:
            self._fed.on_metric(logs[self.monitor])
