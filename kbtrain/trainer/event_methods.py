"""The Trainer's methods that log, and those about callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kbtrain.evaluation.gather import plain_values
from kbtrain.model.losses.pairs import as_extra

if TYPE_CHECKING:
    from kbtrain.callbacks.base import TrainerCallback
    from kbtrain.callbacks.handler import CallbackHandler
    from kbtrain.callbacks.state import TrainerControl, TrainerState
    from kbtrain.config.training_args import TrainingArguments
    from kbtrain.tracing.captured import Captured


class EventMethods:
    """Methods of ``Trainer`` for what is logged and who is told."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    captured: Captured
    _tracked: dict[str, Any]

    def track(self, name: str, value: Any) -> None:
        """Log the mean of ``value`` over the updates; call it where the loss is computed.

        Args:
            name: The name in the logs (with ``eval_`` before it in evaluations).
            value: A number or a tensor, of which the mean is taken.

        Raises:
            ConfigurationError: The name has a meaning already, or the value is no number.
        """
        self._tracked[name] = as_extra(name, value, "track() got")

    def log(self, logs: Mapping[str, Any], start_time: float | None = None) -> None:
        """Add an entry to ``state.log_history`` and tell the callbacks.

        Args:
            logs: Names and numbers.
            start_time: For subclasses that hand it on, as in the reference; of no effect, as logs
                of the training have their speed already.
        """
        entry = {**plain_values(logs, "log() got"), "epoch": self.state.epoch}
        self.state.remember(entry)
        self.fire("on_log", logs=entry)

    def fire(self, event: str, **kwargs: Any) -> None:
        """Call ``event`` of all callbacks."""
        self.captured.after_event(event)
        self.control = self.callback_handler.fire(
            event, self.args, self.state, self.control, **kwargs
        )

    def add_callback(self, callback: Any) -> None:
        """Add a callback object or class."""
        self.callback_handler.add(callback)

    def pop_callback(self, callback: Any) -> TrainerCallback | None:
        """Remove a callback (object or class) and return it; None if it is not there."""
        return self.callback_handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback (object or class)."""
        self.pop_callback(callback)
