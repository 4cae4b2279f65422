"""The state and control of a run, and when logging, evaluating and saving are due."""

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
from kbtrain.utils.files.output_files import save_json
from kbtrain.utils.html import notebook_table, number
from kbtrain.utils.json_types import matches_type
from kbtrain.utils.machine.processes import current
from kbtrain.utils.timing import SPEED_SUFFIXES

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


logger = logging.getLogger("kbtrain")

_warned: set[tuple[int, str]] = set()
"""Attributes, by the id of their state, that a warning has reported as not saved."""

_SHOWN_LOGS = 8  # in a notebook

HISTORY_LIMIT = 5000
"""Entries of ``log_history`` that are kept, because every checkpoint holds all of them."""


@dataclass
class TrainerControl:
    """Flags that callbacks may set; the training loop reads and clears them.

    Attributes:
        should_training_stop: Stop after this step; stays set.
        should_epoch_stop: Skip to the next epoch; cleared at ``on_epoch_begin``.
        should_save: Save now; cleared at ``on_step_begin`` and after saving.
        should_evaluate: Evaluate now; cleared at ``on_step_begin`` and after the evaluation.
        should_log: Log now; cleared at ``on_step_begin`` and after logging.
        stop_reason: Why ``should_training_stop`` was set, in words that fit after "ended: "; a
            callback may set it too.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    stop_reason: str | None = None

    def new_training(self) -> None:
        """Clear the flag that lasts for a whole run."""
        self.should_training_stop = False
        self.stop_reason = None

    def new_epoch(self) -> None:
        """Clear the flag that lasts for an epoch."""
        self.should_epoch_stop = False

    def new_step(self) -> None:
        """Clear the flags that last for a step."""
        self.should_save = self.should_evaluate = self.should_log = False


class _InSteps:
    """A field that is a value on the device for code in a traced step.

    Args:
        default: Its initial value.
    """

    def __init__(self, default: float) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, state: TrainerState | None, owner: type) -> Any:
        if state is None:  # `dataclass` reads the default from the class
            return self._default
        value = Position.read(state, self._name)
        return vars(state)[self._name] if value is None else value

    def __set__(self, state: TrainerState, value: float) -> None:
        vars(state)[self._name] = value


@dataclass
class TrainerState:
    """Progress of a run; saved as a readable ``trainer_state.json``.

    In code that is part of a compiled step (``compute_loss``, a loss, a layer) ``global_step`` and
    ``epoch`` are values on the device, see ``kbtrain.tracing.position``.

    Attributes:
        epoch: Epochs done, including the fraction of the current one.
        global_step: Optimizer updates done.
        max_steps: Total updates of this run; 0 while unknown, for data without a length.
        num_train_epochs: Total epochs of this run.
        logging_steps: Updates between two logs.
        eval_steps: Updates between two evaluations.
        save_steps: Updates between two checkpoints.
        train_batch_size: Samples of one micro-batch.
        num_input_tokens_seen: Tokens trained on, if ``include_num_input_tokens_seen`` counts them.
        log_history: The newest 5,000 logs, each with its ``step``. The JSON-lines log has all.
        best_metric: Best value of ``metric_for_best_model`` so far.
        best_global_step: The step at which it was measured.
        best_model_checkpoint: The best saved checkpoint: that of ``best_global_step``, or another
            one if saving it failed; None if there is none.
        best_saved_metric: The value of ``metric_for_best_model`` at that checkpoint.
        is_local_process_zero: Whether this process is the first on its machine.
        is_world_process_zero: Whether this process is the first of all.
        is_hyper_param_search: Whether this is a trial of ``hyperparameter_search``.
        trial_name: The trial's ``run_name``.
        trial_params: The trial's hyperparameters.
        stateful_callbacks: States of the callbacks that have one, by class name.
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
    is_local_process_zero: bool = field(default_factory=lambda: current().local_rank == 0)
    is_world_process_zero: bool = field(default_factory=lambda: current().rank == 0)
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def append_log(self, entry: dict[str, Any]) -> None:
        """Append to ``log_history``, dropping the oldest entries beyond the limit."""
        self.log_history.append({**entry, "step": self.global_step})
        del self.log_history[:-HISTORY_LIMIT]

    def continue_from(self, saved: TrainerState) -> None:
        """Take over the progress of a resumed run, but not its intervals and lengths."""
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
        """All attributes as JSON values; entries of the log are shared, not copied.

        Attributes set by the user are converted if possible (arrays, sets, paths); others are left
        out with a warning.
        """
        # A deep copy of a log of 100,000 entries would take longer than a checkpoint.
        values: dict[str, Any] = {"log_history": list(self.log_history)}
        for name, value in vars(self).items():
            if name in values or value is None or isinstance(value, bool | int | float | str):
                values.setdefault(name, value)
                continue
            try:
                values[name] = to_json_value(value)
            except Exception as error:  # a user's object may raise anything
                if (id(self), name) not in _warned:
                    _warned.add((id(self), name))
                    logger.warning(
                        "TrainerState.%s cannot be saved as JSON (%s) and is left out of "
                        "checkpoints; use numbers, strings, lists and dicts.",
                        name,
                        error,
                    )
                if name in type(self).__dataclass_fields__:
                    values[name] = getattr(type(self)(), name)
        return values

    def _repr_html_(self) -> str:
        """Where the run is, and its newest logs, for a notebook."""
        planned = f" of {self.max_steps:,}" if self.max_steps else ""
        values: dict[str, Any] = {
            "global_step": f"{self.global_step:,}{planned}",
            "epoch": number(self.epoch),
        }
        if self.best_global_step is not None:
            values["best_metric"] = f"{number(self.best_metric)}, at step {self.best_global_step:,}"
        if self.best_model_checkpoint is not None:
            values["best_model_checkpoint"] = self.best_model_checkpoint
        logs: dict[str, list[str]] = {}
        for log in self.log_history[-_SHOWN_LOGS:]:
            shown = [f"{n} {number(v)}" for n, v in log.items() if _tells_progress(n)]
            logs.setdefault(f"log of step {log['step']:,}", []).extend(shown)
        values |= {name: ", ".join(shown) for name, shown in logs.items() if shown}
        return notebook_table("TrainerState", values)

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write the state in the format of ``trainer_state.json``.

        Raises:
            OutputError: The file cannot be written.
        """
        save_json(Path(json_path), self.to_dict())

    @classmethod
    def load_from_json(cls, json_path: str | os.PathLike[str]) -> TrainerState:
        """Read a ``trainer_state.json``, also one written by Transformers.

        Args:
            json_path: The file. Unknown fields (``total_flos``) are ignored.

        Raises:
            ConfigurationError: The file does not hold the state of a run.
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
                f"{path} does not hold the state of a run, as trainer_state.json does. "
                f"Received: {received}"
            )
        return cls(**known)


def _tells_progress(name: str) -> bool:
    return name not in ("step", "epoch") and not name.endswith(SPEED_SUFFIXES)


def to_json_value(value: Any) -> Any:
    """Convert a value to JSON types, sharing no memory with it.

    Raises:
        TypeError: It cannot be converted.
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
    """Set the flags that are due after an update.

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
    """The number of updates that can run before the next log, evaluation or checkpoint is due."""
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
    """Set the flags that are due after an epoch.

    Args:
        args: The strategies.
        state: Progress of the run.
        control: The flags to set.
        ends: Whether the run ends here although its length was not known before.
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
    """The number of updates and epochs of a run.

    Attributes:
        max_steps: Total updates; 0 if unknown, for data without a length.
        num_epochs: Total epochs; the last one may be incomplete.
        steps_per_epoch: Updates in one epoch; 0 if unknown.
        batches_per_epoch: Micro-batches in one epoch; None for data without a length.
    """

    max_steps: int
    num_epochs: int
    steps_per_epoch: int
    batches_per_epoch: int | None

    def epoch_at(self, epoch: int, batch: int, accumulation: int) -> float:
        """Epochs done after ``batch`` micro-batches of ``epoch``.

        For data without a length the whole run of ``max_steps`` is one epoch; without ``max_steps``
        an epoch counts only at its end.
        """
        total = self.batches_per_epoch or self.max_steps * accumulation or math.inf
        return epoch + batch / total


def make_plan(
    batches: int | None, accumulation: int, num_train_epochs: float, max_steps: int
) -> TrainingPlan:
    """Count updates as Transformers does: an incomplete last accumulation is an update too.

    Args:
        batches: Micro-batches per epoch; None for data without a length.
        accumulation: Micro-batches per update.
        num_train_epochs: Epochs; may be fractional.
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
