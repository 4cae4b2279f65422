"""Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

STEP = "train/global_step"


class WandbCallback(Tracker):
    """Log to Weights & Biases (extra ``wandb``).

    ``project`` and ``run_name`` name the run; the package's own environment variables apply
    (``WANDB_MODE=offline``, ``WANDB_PROJECT``). A run that the user has started with ``wandb.init``
    is used and left open.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = require("wandb", "wandb", "report_to='wandb'")
        self._run: Any = None
        self._own = True

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start a run, or use the active one."""
        self._own = self._library.run is None
        if self._own:
            args.output_folder.mkdir(parents=True, exist_ok=True)
            self._run = self._library.init(
                project=args.project,
                name=args.run_name,
                config=args.to_sanitized_dict(),
                dir=str(args.output_folder),
                id=self.run,
                resume="allow",
            )
        else:
            self._run = self._library.run
            self._run.config.update(args.to_sanitized_dict(), allow_val_change=True)
        self.run = self._run.id
        # Plot values over the updates: a run may go back to a checkpoint, but the package's own
        # step counter can only increase.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)

    def write(self, values: dict[str, float], step: int) -> None:
        """Log the values with their step."""
        self._run.log({**values, STEP: step})

    def finish(self, completed: bool) -> None:
        """Finish the run, unless the user started it."""
        if self._own:
            self._run.finish(exit_code=0 if completed else 1)
