"""Callbacks: the events of a run, and early stopping."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.config import converters as kinds
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
"""All events, by the reference's names."""

STEP_EVENTS = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
)
"""The events of every update."""


class TrainerCallback:
    """Base class: override the events you want.

    Every event is called as ``event(args, state, control, **kwargs)`` with the keyword arguments
    ``trainer, model, processing_class, optimizer, lr_scheduler, train_dataloader,
    eval_dataloader``, and ``logs`` (``on_log``) or ``batches``, the number of them since the last
    such event (``on_prediction_step``). It may change ``control`` in place, or return another one.

    While ``fit`` runs there are also, and None elsewhere or before there is one:

    - ``batch``: the micro-batches of the newest update, NumPy arrays in the structure of the data
      set; one, unless gradients are accumulated.
    - ``loss``: of that update, once it has been started; ``float(loss)`` waits for the device.
    - ``metrics``: those of the training since the last log, by name (in ``on_prediction_step``
      those of the evaluation so far); looking into it waits for the device. ``on_evaluate`` and
      ``on_predict`` get a dict of their results under this name.

    Nothing is copied or waited for unless it is looked at.

    A callback with a state defines ``state()`` and ``load_state(state)`` (JSON values); they are
    saved in checkpoints and restored on resume.

    Attributes:
        every_step: Whether the events of an update, or of a batch of an evaluation, have to come
            for each one. A callback that sets it to False lets many run in one call to the device;
            it then sees the last of them only.

    Example:
        >>> class StopAtThree(TrainerCallback):
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 3
    """

    every_step: bool = True

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """The Trainer has been made."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """``fit`` is about to run its first step (a resumed one has been restored)."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """``fit`` is done; the best model has been loaded if that was asked for."""

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
        """The update has been started; the variables hold the new values."""

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Once for every micro-batch of an update but the last."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An update is complete; ``state.global_step`` counts it."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """An evaluation has ended, with its ``metrics``."""

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A prediction has ended, with its ``metrics``."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A checkpoint has been saved."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Something has been logged: ``logs``."""

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """A batch of an evaluation or prediction is done."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Reserved, as in the reference, for uploads; kbtrain itself never uploads."""


class EarlyStoppingCallback(TrainerCallback):
    """Stop when ``metric_for_best_model`` has not improved for some evaluations.

    An improvement is measured against the last accepted best, so steady small gains add up to one
    (the reference measures against the previous best and stops in spite of them).

    A resumed run goes on counting where it was. Where patience or threshold are not given, it also
    has those of the run it goes on with; where they are and differ, the new ones hold.

    Args:
        early_stopping_patience: Evaluations without improvement before stopping; 1 by default.
        early_stopping_threshold: How much better than the best a value must be; 0 by default.

    Raises:
        ConfigurationError: The patience is below 1 or the threshold negative; at the start of
            training: no ``metric_for_best_model`` or no evaluation strategy.
    """

    def __init__(
        self,
        early_stopping_patience: int | None = None,
        early_stopping_threshold: float | None = None,
    ) -> None:
        self._given = {
            "early_stopping_patience": early_stopping_patience,
            "early_stopping_threshold": early_stopping_threshold,
        }
        self.early_stopping_patience, self.early_stopping_threshold = _early_stopping(
            1 if early_stopping_patience is None else early_stopping_patience,
            0.0 if early_stopping_threshold is None else early_stopping_threshold,
        )
        self.best: float | None = None
        self.early_stopping_patience_counter = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there will be something to watch; a fresh run forgets the last one."""
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
        # An evaluation of another data set (another prefix) has nothing to say about this one; the
        # trainer itself refuses a name that is nowhere.
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
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """Best value and counter, and what they are compared with."""
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
        saved = dict(zip(self._given, _early_stopping(*map(state.get, self._given)), strict=True))
        for name, value in saved.items():
            if value is None:  # a checkpoint of before this was saved
                continue
            if self._given[name] is None:
                setattr(self, name, value)
            elif self._given[name] != value:
                logger.warning(
                    "Resuming with another setting: %s was %s and is %s now.",
                    name,
                    value,
                    self._given[name],
                )


def _early_stopping(patience: Any, threshold: Any) -> tuple[Any, Any]:
    """Patience and threshold, if early stopping can have them.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        return kinds.optional(kinds.whole(1))(patience), kinds.optional(kinds.real(0.0))(threshold)
    except kinds.Unfit:
        raise ConfigurationError(
            "EarlyStoppingCallback needs early_stopping_patience, a whole number of at least 1, "
            f"and early_stopping_threshold >= 0. Received: {patience!r}, {threshold!r}."
        ) from None


def metric_value(metrics: dict[str, Any], name: str | None) -> float:
    """The metric ``name`` (with or without ``eval_``) out of an evaluation's results.

    Raises:
        ConfigurationError: There is none of that name (the message lists those there are), or it
            is no number.
    """
    for key in (name, f"eval_{name}"):
        if key not in metrics:
            continue
        try:
            return float(metrics[key])
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"metric_for_best_model={name!r} must be a number, to be compared. "
                f"Received: {key}={metrics[key]!r}."
            ) from None
    known = ", ".join(sorted(k for k in metrics if k.startswith("eval_")))
    raise ConfigurationError(
        f"metric_for_best_model={name!r} is not among the results of the evaluation: {known}. "
        "Set it to one of these (the prefix eval_ may be left out), or add the metric."
    )
