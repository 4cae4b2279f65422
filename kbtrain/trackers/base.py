"""The base class of experiment trackers: when a run opens and closes, and how values are named."""

from __future__ import annotations

import contextlib
import logging
import numbers
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.errors import KbtrainError
from kbtrain.trackers.completed import is_summary, nothing_to_do
from kbtrain.utils.best_effort import best_effort

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class Tracker(TrainerCallback):
    """Base class of trackers: implement ``open``, ``write`` and ``finish``.

    A run is opened when training starts, or by the first log outside of training, and closed when
    ``fit`` ends, also after an error. Later evaluations are added to the same run. A new training
    from the beginning opens a new run; a resumed training continues the old one, whose identity is
    saved in checkpoints.

    Attributes:
        run: Identity of the run at the tracker, set by ``open``; None before.
        stays_open: Whether a run that was opened outside of training stays open; False closes it
            after each log, for trackers whose data would not be safe otherwise.
    """

    decides_alike = True

    stays_open: bool = True

    def __init__(self) -> None:
        self.run: Any = None
        self._is_open = self._trained = False
        self._completed = True
        self._left_out: set[str] = set()
        self._warned = self._nothing_to_do = False

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start a run, or continue ``run`` if that is not None.

        Args:
            args: Settings to record with the run: ``args.to_sanitized_dict()``.
            trainer: The Trainer.
        """
        raise NotImplementedError

    def write(self, values: dict[str, float], step: int) -> None:
        """Record values under their names.

        Args:
            values: Numbers by name, such as ``train/loss`` and ``eval/accuracy``.
            step: Updates done.
        """
        raise NotImplementedError

    def finish(self, completed: bool) -> None:
        """Close the run.

        Args:
            completed: False if an error or an interrupt ended the training.
        """
        raise NotImplementedError

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a run."""
        if state.global_step == 0 and self._trained:
            self.close()
            self.run = None
        self._trained, self._completed = True, False
        self._nothing_to_do = nothing_to_do(state, kwargs)
        with self._errors_logged():
            self._ensure_open(args, state, kwargs["trainer"])

    @contextlib.contextmanager
    def _errors_logged(self) -> Iterator[None]:
        """Turn errors inside into one warning: the log is lost, training continues.

        Packages raise errors of their own for a full disk, a lost connection or a missing login.
        """
        try:
            yield
        except KbtrainError:
            raise
        except Exception as error:
            if not self._warned:
                logger.warning(
                    "%s could not write: %s: %s. Training continues; logs are lost to this tracker "
                    "until it works again, which is tried with each log.",
                    type(self).__name__,
                    type(error).__name__,
                    error,
                )
            self._warned = True

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the numbers among the logs."""
        if not state.is_world_process_zero:
            return
        if self._nothing_to_do and is_summary(kwargs["logs"]):
            return  # the run already has the summary of its training
        values = rewrite(self._numbers(kwargs["logs"]))
        with self._errors_logged():
            self._ensure_open(args, state, kwargs["trainer"])
            self.write(values, state.global_step)
        if not self.stays_open and not kwargs["trainer"].is_in_train:
            self.close()

    @best_effort
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the run as completed; it is closed when ``fit`` returns."""
        self._completed = True

    def _ensure_open(self, args: TrainingArguments, state: TrainerState, trainer: Any) -> None:
        if not self._is_open and state.is_world_process_zero:
            self.open(args, trainer)
            self._is_open = True

    def close(self) -> None:
        """Close the run if it is open."""
        if self._is_open:
            self._is_open = False
            self.finish(self._completed)

    def state(self) -> dict[str, Any]:
        """The identity of the run."""
        return {"run": self.run}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        run = state["run"]
        path = PurePath(run or "")  # raises a TypeError if it is not a string
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"The identity of a run must not be a path to another folder. Received: {run!r}"
            )
        self.run = run

    def _numbers(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The logs that are numbers; warns once about each other one."""
        found = {}
        for name, value in logs.items():
            if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:
                found[name] = float(value)
            elif name not in self._left_out:
                self._left_out.add(name)
                logger.warning(
                    "%s records only numbers: %r (%s) is left out.",
                    type(self).__name__,
                    name,
                    type(value).__name__,
                )
        return found


def rewrite(logs: Mapping[str, float]) -> dict[str, float]:
    """Group names as trackers do: ``eval/x`` for ``eval_x``, likewise test, else ``train/x``.

    Example:
        >>> rewrite({"loss": 1.0, "eval_loss": 2.0, "train_runtime": 3.0})
        {'train/loss': 1.0, 'eval/loss': 2.0, 'train/train_runtime': 3.0}
    """
    found = {}
    for name, value in logs.items():
        prefix, _, rest = name.partition("_")
        found[f"{prefix}/{rest}" if prefix in ("eval", "test") else f"train/{name}"] = value
    return found
