"""`plot_schedule`: a picture of a learning-rate schedule. Needs Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optim.core.checks import check_count
from optim.registry import get_scheduler

_POINTS = 400


def plot_schedule(
    schedule: Any,
    num_training_steps: int = 1000,
    *,
    learning_rate: float = 1.0,
    num_warmup_steps: int = 0,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
    metrics: Sequence[float] | None = None,
    axes: Any = None,
) -> Any:
    """Draw the learning rate over the updates of a training.

    Args:
        schedule: A schedule, any function of the number of updates, or one of
            `optim.scheduler_names`.
        num_training_steps: Updates to draw; also given to a schedule that is made by name.
        learning_rate: The base learning rate of a schedule that is made by name.
        num_warmup_steps: The warm-up of a schedule that is made by name.
        scheduler_specific_kwargs: Further arguments of a schedule that is made by name.
        metrics: Results of evaluations, for a metric-driven schedule; the rate is then drawn over
            the evaluations. They change the state of the schedule, so pass one you do not train
            with.
        axes: Matplotlib axes to draw on; the default is a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If ``num_training_steps`` is below 1, the schedule is metric-driven and there
            are no ``metrics``, or one of `optim.get_scheduler`.

    Example:
        >>> import optim
        >>> axes = optim.plot_schedule("cosine", 100, num_warmup_steps=10)  # doctest: +SKIP
        >>> axes.figure.savefig("cosine.png")  # doctest: +SKIP
    """
    num_training_steps = check_count("num_training_steps", num_training_steps, 1)
    if isinstance(schedule, str):
        schedule = get_scheduler(
            schedule,
            learning_rate,
            num_warmup_steps,
            num_training_steps,
            scheduler_specific_kwargs,
        )
    if hasattr(schedule, "on_metric"):
        steps, rates, label = *_rates_over_evaluations(schedule, metrics), "evaluations"
    else:
        count = min(num_training_steps + 1, _POINTS)
        steps = np.unique(np.linspace(0, num_training_steps, count).astype(int)).tolist()
        rates, label = [float(schedule(step)) for step in steps], "updates"
    axes = _new_axes() if axes is None else axes
    axes.plot(steps, rates, label=type(schedule).__name__)
    axes.set_xlabel(label)
    axes.set_ylabel("learning rate")
    return axes


def _rates_over_evaluations(
    schedule: Any, metrics: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    if not metrics:
        raise ValueError(
            f"{type(schedule).__name__} is metric-driven: give the results of evaluations, such "
            f"as metrics=[3.0, 2.0, 2.0]. Received: metrics={metrics!r}"
        )
    rates = [schedule.rate]
    for metric in metrics:
        schedule.on_metric(metric)
        rates.append(schedule.rate)
    return list(range(len(rates))), rates


def _new_axes() -> Any:
    # Here, because nothing else of the package needs it.
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "optim.plot_schedule draws with Matplotlib, which is not installed: "
            "pip install matplotlib"
        ) from error
    return pyplot.subplots()[1]
