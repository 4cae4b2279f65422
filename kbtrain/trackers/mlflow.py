"""MLflow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

MAX_PARAMS = 100
"""Parameters that one call may log."""

MAX_LENGTH = 500
"""Characters that a parameter may have with every version of MLflow."""

_REFUSED = re.compile(r"[^\w\-. /:]")


class MlflowCallback(Tracker):
    """Log to MLflow (extra ``mlflow``).

    ``project`` is the experiment, ``run_name`` the run's name. The server is set by MLflow itself
    (``MLFLOW_TRACKING_URI``). A run that the user has started is used and left open.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = require("mlflow", "mlflow", "report_to='mlflow'")
        self._own = True

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start a run, or use the active one."""
        active, fresh = self._library.active_run(), self.run is None
        self._own = active is None
        if self._own:
            if args.project is not None:
                self._library.set_experiment(args.project)
            active = self._library.start_run(run_id=self.run, run_name=args.run_name)
        self.run = active.info.run_id
        if fresh:  # parameters cannot be changed afterwards
            settings = {k: str(v)[:MAX_LENGTH] for k, v in args.to_sanitized_dict().items()}
            names = list(settings)
            for first in range(0, len(names), MAX_PARAMS):
                part = names[first : first + MAX_PARAMS]
                self._library.log_params({name: settings[name] for name in part})

    def write(self, values: dict[str, float], step: int) -> None:
        """Log the values; characters that MLflow refuses in names become underscores."""
        clean = {_REFUSED.sub("_", name): value for name, value in values.items()}
        self._library.log_metrics(clean, step=step)

    def finish(self, completed: bool) -> None:
        """End the run, unless the user started it."""
        if self._own:
            self._library.end_run(status="FINISHED" if completed else "FAILED")
