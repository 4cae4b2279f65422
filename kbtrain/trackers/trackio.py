"""Trackio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

PROJECT = "kbtrain"
"""The project of runs without one, which Trackio requires."""


class TrackioCallback(Tracker):
    """Log to Trackio on this machine (extra ``trackio``).

    ``project`` and ``run_name`` name the run. ``trackio show`` opens the dashboard.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = require("trackio", "trackio", "report_to='trackio'")
        self._run: Any = None

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start a run, or continue one."""
        self._run = self._library.init(
            project=args.project or PROJECT,
            name=self.run or args.run_name,
            config=args.to_sanitized_dict(),
            resume="never" if self.run is None else "allow",
            embed=False,
        )
        self.run = self._run.name

    def write(self, values: dict[str, float], step: int) -> None:
        """Log the values with their step."""
        self._run.log(values, step=step)

    def finish(self, completed: bool) -> None:
        """Finish the run."""
        self._run.finish()
