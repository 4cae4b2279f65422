"""SwanLab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


class SwanLabCallback(Tracker):
    """Log to SwanLab (extra ``swanlab``).

    ``project`` and ``run_name`` name the run; the package's own settings apply. With
    ``SWANLAB_MODE=offline`` it stays on this machine, in ``swanlog`` of the output directory, and
    ``swanlab sync`` sends it later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._library = require("swanlab", "swanlab", "report_to='swanlab'")
        self._run: Any = None

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start a run, or continue one."""
        folder = args.output_folder.absolute() / "swanlog"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = self._library.init(
            project=args.project,
            name=args.run_name,
            config=args.to_sanitized_dict(),
            log_dir=str(folder),
            id=self.run,
            resume="never" if self.run is None else "allow",
        )
        self.run = self._run.id

    def write(self, values: dict[str, float], step: int) -> None:
        """Log the values with their step."""
        self._run.log(values, step=step)

    def finish(self, completed: bool) -> None:
        """Finish the run."""
        self._run.finish(state="success" if completed else "crashed")
