"""The callback interface with the events of a run, and early stopping."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.config import converters
from kbtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)
"""The events that Transformers has, too."""

ALL_EVENTS = (
    *EVENTS,
    "on_epoch_results",
    "on_evaluate_begin",
    "on_predict_begin",
    "on_prediction_step_begin",
)
"""All events."""

STEP_EVENTS = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
)
"""The events of every update."""


class TrainerCallback:
    """Base class of callbacks: override the events you need.

    Every event is called as ``event(args, state, control, **kwargs)`` with the keyword arguments
    ``trainer, model, processing_class, optimizer, lr_scheduler, train_dataloader,
    eval_dataloader``, and ``logs`` (``on_log``) or ``batches``, the number of batches since the
    last such event (``on_prediction_step``). It may change ``control`` in place, or return another
    one.

    During ``fit`` there are also the following; outside of it, or before the first update, they are
    None:

    - ``batch``: the micro-batches of the latest update, NumPy arrays in the structure of the data
      set; a single one unless gradients are accumulated.
    - ``loss``: the loss of that update, once it has been dispatched; ``float(loss)`` waits for the
      device.
    - ``metrics``: the training metrics since the last log, by name (in ``on_prediction_step`` the
      loss and the metrics of the evaluation so far); accessing them waits for the device.
      ``on_evaluate`` and ``on_predict`` get a dict of their results under this name.

    These are lazy: values are fetched on first access.

    A callback with a state defines ``state()`` and ``load_state(state)`` (JSON values), or
    ``arrays()`` and ``load_arrays(arrays)``; the state is saved in checkpoints and restored on
    resume.

    Attributes:
        every_step: Whether the callback needs the events of every update, or of every batch of an
            evaluation. If False, many updates may run in one call to the device, and the callback
            gets only the events of the last one.
        decides_alike: Whether what the callback requests (to stop, to save) follows from what it
            gets from the Trainer, so that with several processes it is the same on all of them. If
            False, the processes ask each other after its events.

    Example:
        >>> class StopAtThree(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 3
    """

    every_step: bool = True
    decides_alike: bool = False

    def next_step(self, state: TrainerState) -> int | None:
        """The next step after which the callback needs ``on_step_end``, if not after every one.

        Args:
            state: The progress of the run.
        """

    def evaluating(self, trainer: Any) -> contextlib.AbstractContextManager[bool]:
        """Context in which the model holds the weights to evaluate, such as an average.

        Evaluations run in it, and what it yields is saved for ``load_weights``.

        Args:
            trainer: The Trainer.

        Returns:
            A context that restores the weights; its value says whether they were changed.
        """
        return contextlib.nullcontext(False)

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays to save in checkpoints, by name.

        The name of an array that belongs to a variable of the model is its kind, a slash, and the
        variable's path: a resumed process may have other paths, and gets its own.
        """
        return {}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what ``arrays`` returned, before ``on_train_begin``."""

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """The Trainer has been created."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """``fit`` is about to run its first step; a resumed run has been restored."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """``fit`` is done; the best model has been loaded if that was requested."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A pass over the data begins."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A pass over the data has ended."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An update begins."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """The variables still hold their values from before this update."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """The update has been dispatched; the variables hold the new values."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A micro-batch of an update is done; not called for the last one."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An update is complete; ``state.global_step`` counts it."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An evaluation has ended; ``metrics`` are its results."""

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A prediction has ended; ``metrics`` are its results."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A checkpoint has been saved."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Values have been logged: ``logs``."""

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A batch of an evaluation or prediction is done."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A push to the Hub begins."""

    # Transformers has none of the following.

    def on_epoch_results(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """The evaluation at the end of an epoch, if one was due, is done; its save comes next."""

    def on_evaluate_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An evaluation begins; the names of its results will begin with ``prefix``."""

    def on_predict_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A prediction begins; the names of its results will begin with ``prefix``."""

    def on_prediction_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A batch of an evaluation or prediction begins."""


class EarlyStoppingCallback(TrainerCallback):
    """Stop when ``metric_for_best_model`` has not improved for some evaluations.

    An improvement is measured against the last accepted best, so steady small gains add up
    (Transformers compares with the previous best and stops in spite of them).

    A resumed run continues counting. If patience or threshold are not given, it also restores those
    of the original run; if given, the new ones apply.

    Args:
        early_stopping_patience: Evaluations without improvement before stopping; 1 by default.
        early_stopping_threshold: How much better than the best value a value must be; 0 by default.

    Raises:
        ConfigurationError: The patience is below 1 or the threshold is negative; at the start of
            training: ``metric_for_best_model`` or the evaluation strategy is missing.
    """

    decides_alike = True

    def __init__(
        self,
        early_stopping_patience: int | None = None,
        early_stopping_threshold: float | None = None,
    ) -> None:
        self._given = {
            "early_stopping_patience": early_stopping_patience,
            "early_stopping_threshold": early_stopping_threshold,
        }
        self.early_stopping_patience, self.early_stopping_threshold = _check_early_stopping(
            1 if early_stopping_patience is None else early_stopping_patience,
            0.0 if early_stopping_threshold is None else early_stopping_threshold,
        )
        self.best: float | None = None
        self.early_stopping_patience_counter = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there will be a metric to monitor; a new run resets the counter."""
        if args.metric_for_best_model is None or args.eval_strategy == "no":
            raise ConfigurationError(
                "EarlyStoppingCallback needs metric_for_best_model and an eval_strategy other than "
                f"'no'. Received: metric_for_best_model={args.metric_for_best_model!r}, "
                f"eval_strategy={args.eval_strategy!r}."
            )
        if state.global_step == 0:
            self.best, self.early_stopping_patience_counter = None, 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count evaluations without improvement."""
        metrics = kwargs["metrics"]
        name = args.metric_for_best_model
        # Skip evaluations of other data sets, which have other prefixes. The Trainer raises an
        # error if no evaluation has the metric.
        if not kwargs["trainer"].is_in_train or not {name, f"eval_{name}"} & metrics.keys():
            return
        value = metric_value(metrics, name)
        sign = 1 if args.greater_is_better else -1
        gain = math.inf if self.best is None else sign * (value - self.best)
        if gain > self.early_stopping_threshold and not math.isnan(value):
            self.best, self.early_stopping_patience_counter = value, 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "Early stopping at step %d: no improvement in %d evaluations.",
                state.global_step,
                self.early_stopping_patience_counter,
            )
            counted = self.early_stopping_patience_counter
            control.should_training_stop = True
            control.stop_reason = (
                f"early stopping: no better {name} for {counted} "
                f"evaluation{'s' if counted > 1 else ''}"
            )

    def state(self) -> dict[str, Any]:
        """Best value, counter, patience and threshold."""
        return {
            "best": self.best,
            "counter": self.early_stopping_patience_counter,
            "early_stopping_patience": self.early_stopping_patience,
            "early_stopping_threshold": self.early_stopping_threshold,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        best = state["best"]
        self.best = None if best is None else float(best)
        self.early_stopping_patience_counter = int(state["counter"])
        saved = dict(
            zip(self._given, _check_early_stopping(*map(state.get, self._given)), strict=True)
        )
        for name, value in saved.items():
            if value is None:  # a checkpoint of an earlier version
                continue
            if self._given[name] is None:
                setattr(self, name, value)
            elif self._given[name] != value:
                logger.warning(
                    "Resuming with a different setting: %s was %s and is %s now.",
                    name,
                    value,
                    self._given[name],
                )


def _check_early_stopping(patience: Any, threshold: Any) -> tuple[Any, Any]:
    """Validate patience and threshold.

    Raises:
        ConfigurationError: One of them is invalid.
    """
    try:
        check_patience = converters.optional(converters.whole(1))
        check_threshold = converters.optional(converters.real(0.0))
        return check_patience(patience), check_threshold(threshold)
    except converters.InvalidValue:
        raise ConfigurationError(
            "EarlyStoppingCallback needs early_stopping_patience, a whole number of at least 1, "
            f"and early_stopping_threshold >= 0. Received: {patience!r}, {threshold!r}."
        ) from None


def evaluation_name(metric: str) -> str:
    """The name that a metric has in the results of an evaluation: with ``eval_``."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def metric_value(metrics: dict[str, Any], name: str | None) -> float:
    """The value of the metric ``name`` (with or without ``eval_``) in an evaluation's results.

    Raises:
        ConfigurationError: There is no such metric (the message lists the existing ones), or its
            value is not a number.
    """
    for key in (name, f"eval_{name}"):
        if key not in metrics:
            continue
        try:
            return float(metrics[key])
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"metric_for_best_model={name!r} must be a number, so that it can be compared. "
                f"Received: {key}={metrics[key]!r}."
            ) from None
    known = ", ".join(sorted(k for k in metrics if k.startswith("eval_")))
    raise ConfigurationError(
        f"metric_for_best_model={name!r} is not among the results of the evaluation: {known}. "
        "Set it to one of these (the prefix eval_ may be omitted), or add the metric."
    )
