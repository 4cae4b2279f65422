"""What a run knows of itself: progress, decisions for the next moment, and when things are due."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from kbtrain.errors import ConfigurationError
from kbtrain.tracing.position import Position
from kbtrain.utils.json_types import matches_type
from kbtrain.utils.output_files import save_json

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


logger = logging.getLogger("kbtrain")

_warned: set[tuple[int, str]] = (
    set()
)  # of which attributes a warning has said that they are left out

HISTORY_LIMIT = 5000
"""Entries of ``log_history`` that are kept: every checkpoint holds them all."""


@dataclass
class TrainerControl:
    """Switches that callbacks may set; the loop reads and clears them.

    Attributes:
        should_training_stop: Stop after this step; stays set.
        should_epoch_stop: Go on with the next epoch; cleared at ``on_epoch_begin``.
        should_save: Save now; cleared at ``on_step_begin`` and when it has been done.
        should_evaluate: Evaluate now; cleared likewise.
        should_log: Log now; cleared likewise.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def new_training(self) -> None:
        """Clear the switch that lasts for a whole run."""
        self.should_training_stop = False

    def new_epoch(self) -> None:
        """Clear the switch that lasts for an epoch."""
        self.should_epoch_stop = False

    def new_step(self) -> None:
        """Clear the switches that last for a step."""
        self.should_save = self.should_evaluate = self.should_log = False


class _InSteps:
    """A field that code in a traced step finds as a value on the device.

    Args:
        default: Its first value.
    """

    def __init__(self, default: float) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, state: TrainerState | None, owner: type) -> Any:
        if state is None:  # the default, which `dataclass` asks for
            return self._default
        value = Position.read(state, self._name)
        return vars(state)[self._name] if value is None else value

    def __set__(self, state: TrainerState, value: float) -> None:
        vars(state)[self._name] = value


@dataclass
class TrainerState:
    """Progress of a run; saved as ``trainer_state.json`` and readable by a person.

    In code that is part of a compiled step (``compute_loss``, a loss, a layer) ``global_step`` and
    ``epoch`` are values on the device, see `kbtrain.tracing.position`.

    Attributes:
        epoch: Epochs done, with the fraction of the current one.
        global_step: Optimizer updates done.
        max_steps: Updates this run will do in all; 0 while that is not known, for data without a
            length.
        num_train_epochs: Epochs this run will do in all.
        logging_steps: Updates between two logs.
        eval_steps: Updates between two evaluations.
        save_steps: Updates between two checkpoints.
        train_batch_size: Samples of one micro-batch.
        num_input_tokens_seen: Tokens trained on, if ``include_num_input_tokens_seen`` counts them.
        log_history: What was logged, each entry with its ``step``; the newest 5,000 entries. The
            JSON-lines log has all of them.
        best_metric: Best value of ``metric_for_best_model`` so far.
        best_global_step: The step it was measured at.
        best_model_checkpoint: The best checkpoint that was saved: that of this step, or of another
            one if that failed; None if there is none.
        best_saved_metric: Its value of ``metric_for_best_model``.
        is_local_process_zero: Whether this process is the first of its machine.
        is_world_process_zero: Whether this process is the first of all.
        is_hyper_param_search: Whether this is a trial of ``hyperparameter_search``.
        trial_name: The trial's ``run_name``.
        trial_params: What the search chose for it.
        stateful_callbacks: State of the callbacks that have one, by class name.
    """

    epoch: float = _InSteps(0.0)  # type: ignore[assignment]
    global_step: int = _InSteps(0)  # type: ignore[assignment]
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_input_tokens_seen: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    best_saved_metric: float | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def append_log(self, entry: dict[str, Any]) -> None:
        """Append to ``log_history``, and forget the oldest entry above the limit."""
        self.log_history.append({**entry, "step": self.global_step})
        del self.log_history[:-HISTORY_LIMIT]

    def continue_from(self, saved: TrainerState) -> None:
        """Take over what a resumed run goes on with; intervals and lengths are this run's own."""
        for name in (
            "epoch",
            "global_step",
            "num_input_tokens_seen",
            "log_history",
            "best_metric",
            "best_global_step",
            "best_model_checkpoint",
            "best_saved_metric",
            "stateful_callbacks",
        ):
            setattr(self, name, getattr(saved, name))

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON can hold them; entries of the log are shared, not copied.

        What a user has put on the state is converted where that is plain (arrays, sets, paths);
        what cannot be is left out, with a warning that names it.
        """
        # A deep copy of a log of 100,000 entries would take longer than a checkpoint.
        values: dict[str, Any] = {"log_history": list(self.log_history)}
        for name, value in vars(self).items():
            if name in values or value is None or isinstance(value, bool | int | float | str):
                values.setdefault(name, value)
                continue
            try:
                values[name] = to_json_value(value)
            except Exception as error:  # a user's object may do anything when it is looked at
                if (id(self), name) not in _warned:
                    _warned.add((id(self), name))
                    logger.warning(
                        "TrainerState.%s cannot be saved as JSON (%s) and is left out of what is "
                        "saved; use numbers, text, lists and dicts.",
                        name,
                        error,
                    )
                if name in type(self).__dataclass_fields__:
                    values[name] = getattr(type(self)(), name)
        return values

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write the state as ``trainer_state.json`` is written.

        Raises:
            OutputError: The file cannot be written.
        """
        save_json(Path(json_path), self.to_dict())

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """Read a ``trainer_state.json``, also one of Transformers.

        Args:
            json_path: The file. What it holds beyond these fields (``total_flos``) is left out.

        Raises:
            ConfigurationError: The file holds something else.
            FileNotFoundError: There is no such file.
        """
        path = Path(json_path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigurationError(f"{path} is not JSON: {error}") from None
        kinds = get_type_hints(cls)
        known = {k: v for k, v in found.items() if k in kinds} if isinstance(found, dict) else {}
        wrong = [name for name, value in known.items() if not matches_type(value, kinds[name])]
        if wrong or "global_step" not in known:
            received = f"{wrong[0]}={known[wrong[0]]!r:.80}" if wrong else f"{found!r:.80}"
            raise ConfigurationError(
                f"{path} holds no state of a run, as trainer_state.json does. Received: {received}"
            )
        return cls(**known)


def to_json_value(value: Any) -> Any:
    """A value in what JSON holds, sharing nothing with it.

    Raises:
        TypeError: It cannot be.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_json_value(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        return value.tolist()
    if not isinstance(value, type) and hasattr(value, "__array__"):
        return to_json_value(np.asarray(value))
    raise TypeError(f"an object of type {type(value).__name__}")


def decide_after_step(
    args: TrainingArguments, state: TrainerState, control: TrainerControl
) -> None:
    """Set the switches that are due after an update.

    With a step strategy, the last update also evaluates and saves, whatever the interval.
    """
    step = state.global_step
    last = 0 < state.max_steps <= step

    def due(interval: int) -> bool:
        return interval > 0 and step % interval == 0

    if step == 1 and args.logging_first_step:
        control.should_log = True
    if args.logging_strategy == "steps" and due(state.logging_steps):
        control.should_log = True
    if args.eval_strategy == "steps" and args.eval_delay <= step:
        control.should_evaluate |= due(state.eval_steps) or last
    if args.save_strategy == "steps":
        control.should_save |= due(state.save_steps) or last
    if last:
        control.should_training_stop = True


def steps_until_due(args: TrainingArguments, state: TrainerState) -> int:
    """Updates that can be run before something may be due: until then no one need look."""
    step = state.global_step
    intervals = [
        state.logging_steps if args.logging_strategy == "steps" else 0,
        state.eval_steps if args.eval_strategy == "steps" else 0,
        state.save_steps if args.save_strategy == "steps" else 0,
        1 if args.logging_first_step and step == 0 else 0,
    ]
    distances = [interval - step % interval for interval in intervals if interval > 0]
    if state.max_steps:
        distances.append(state.max_steps - step)
    return min(distances, default=1 << 31)


def decide_after_epoch(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, ends: bool = False
) -> None:
    """Set the switches that are due after an epoch.

    Args:
        args: The strategies.
        state: How far the run is.
        control: Where the switches are.
        ends: Whether this was the end of a run that was not known to end at this update.
    """
    if ends and state.global_step:
        step = state.global_step
        if args.eval_strategy == "steps" and args.eval_delay <= step and step % state.eval_steps:
            control.should_evaluate = True
        if args.save_strategy == "steps" and step % state.save_steps:
            control.should_save = True
    if args.logging_strategy == "epoch":
        control.should_log = True
    if args.eval_strategy == "epoch" and args.eval_delay <= state.epoch:
        control.should_evaluate = True
    if args.save_strategy == "epoch":
        control.should_save = True


@dataclass(frozen=True)
class TrainingPlan:
    """How many updates and epochs a run has.

    Attributes:
        max_steps: Updates in all; 0 if not known, for data without a length.
        num_epochs: Epochs in all, the last one possibly cut short.
        steps_per_epoch: Updates in one epoch; 0 if not known.
        batches_per_epoch: Micro-batches in one epoch; None for data without a length.
    """

    max_steps: int
    num_epochs: int
    steps_per_epoch: int
    batches_per_epoch: int | None

    def epoch_at(self, epoch: int, batch: int, accumulation: int) -> float:
        """Epochs done after ``batch`` micro-batches of ``epoch``.

        Data without a length counts the whole run of ``max_steps`` as one epoch; without these,
        too, an epoch is not counted before its end.
        """
        total = self.batches_per_epoch or self.max_steps * accumulation or math.inf
        return epoch + batch / total


def make_plan(
    batches: int | None, accumulation: int, num_train_epochs: float, max_steps: int
) -> TrainingPlan:
    """Count updates as the reference does: a short last accumulation group is an update too.

    Args:
        batches: Micro-batches per epoch; None for data without a length.
        accumulation: Micro-batches per update.
        num_train_epochs: Epochs; a fraction is allowed.
        max_steps: Updates; overrides the epochs if positive.
    """
    if batches is None and max_steps > 0:
        return TrainingPlan(max_steps, 2**31, max_steps, None)
    if batches is None:
        return TrainingPlan(0, math.ceil(num_train_epochs), 0, None)
    per_epoch = max(math.ceil(batches / accumulation), 1)
    if max_steps > 0:
        return TrainingPlan(max_steps, math.ceil(max_steps / per_epoch), per_epoch, batches)
    steps = math.ceil(num_train_epochs * per_epoch)
    return TrainingPlan(steps, math.ceil(num_train_epochs), per_epoch, batches)
