"""Comet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


class CometCallback(Tracker):
    """Log to Comet (extra ``comet_ml``).

    ``project`` and ``run_name`` name the experiment; the package's own settings apply
    (``COMET_API_KEY``, ``COMET_WORKSPACE``). ``COMET_START_ONLINE=0`` keeps experiments on this
    machine, as archives in the output directory that ``comet upload`` sends later. A running
    experiment of the user is used and left open.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = require("comet_ml", "comet_ml", "report_to='comet_ml'")
        self._experiment: Any = None
        self._own = True

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start an experiment, or use the running one."""
        active, fresh = self._library.get_running_experiment(), self.run is None
        self._own = active is None or active.ended
        if self._own:
            folder = args.output_folder.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            # Without its own logging, which would add names and steps of its own.
            settings = self._library.ExperimentConfig(
                name=args.run_name,
                log_code=False,
                auto_metric_logging=False,
                auto_param_logging=False,
                auto_log_co2=False,
                auto_output_logging=False,
                display_summary_level=0,
                offline_directory=str(folder),
            )
            active = self._library.start(
                project_name=args.project,
                experiment_key=self.run,
                mode="create" if fresh else "get",
                experiment_config=settings,
            )
        self._experiment, self.run = active, active.get_key()
        if fresh:
            active.log_parameters(args.to_sanitized_dict())

    def write(self, values: dict[str, float], step: int) -> None:
        """Log the values with their step."""
        self._experiment.log_metrics(values, step=step)

    def finish(self, completed: bool) -> None:
        """End the experiment, unless the user started it."""
        if self._own:
            self._experiment.end()
