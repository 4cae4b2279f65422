"""Reports as files: of a Trainer's run, or of the folders of one or more runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.errors import ConfigurationError
from kbtrain.report.comparison import render_comparison
from kbtrain.report.page import render
from kbtrain.report.record import RunRecord
from kbtrain.report.recorder import update
from kbtrain.report.sources import load_runs
from kbtrain.utils.files.addresses import check_local
from kbtrain.utils.files.output_files import save_text

FILE_NAME = "report.html"


def report_of_trainer(trainer: Any, path: Any) -> Path:
    """Write the report of a Trainer's run; see ``Trainer.report``."""
    target = _target(path, trainer.args.output_folder)
    record: RunRecord = trainer.record
    if not trainer.state.is_world_process_zero:
        return target
    if not record.sessions:
        raise ConfigurationError(
            "report() needs a run: call fit() first. The report of a run in a folder is written by "
            "`kbtrain report FOLDER`."
        )
    update(record, trainer, trainer.state)
    save_text(target, render(record))
    return target


def report_of_folders(
    runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a run, or of several side by side.

    Args:
        runs: Folders of runs, or checkpoints.
        path: The page; by default ``report.html`` in the folder of a single run, or here.

    Returns:
        The path of the page.

    Raises:
        ConfigurationError: A folder holds no run.
        OutputError: The page cannot be written.
    """
    records = load_runs(runs)
    single = Path(runs[0]).expanduser() if len(runs) == 1 else Path()
    target = _target(path, single if single.is_dir() else single.parent)
    save_text(target, render(records[0]) if len(records) == 1 else render_comparison(records))
    return target


def _target(path: Any, folder: Path) -> Path:
    """The path of the page; one that is a folder gets ``report.html``."""
    if path is None:
        return folder / FILE_NAME
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError(
            f"A report is written to a path such as 'report.html'. Received: {path!r}."
        )
    check_local("path", path)
    target = Path(path).expanduser()
    return target / FILE_NAME if target.is_dir() else target
