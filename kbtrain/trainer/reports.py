"""Artifacts of a run: the saved model, metric tables, result files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint import divided_state
from kbtrain.checkpoint import processing_class as processing
from kbtrain.checkpoint.formats.keras_file import save_keras_file
from kbtrain.data.plain_values import plain_values
from kbtrain.errors import ConfigurationError
from kbtrain.optimization.division import division_of
from kbtrain.optimization.evaluation_weights import swapped_in
from kbtrain.report.model_card import MODEL_FILE, shown
from kbtrain.trainer.first_process import written_by_first
from kbtrain.utils.files.addresses import check_local
from kbtrain.utils.files.output_files import explained, read_json, save_json, save_text
from kbtrain.utils.machine.processes import current

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Format metrics for reading: bytes in MB, runtimes as h:mm:ss.cc, floats with 4 decimals.

    Example:
        >>> metrics_format({"train_runtime": 3725.126, "eval_mem_cpu_alloc_delta": 3 << 20})
        {'train_runtime': '1:02:05.13', 'eval_mem_cpu_alloc_delta': '3MB'}
        >>> metrics_format({"eval_loss": 0.123456, "epoch": 3.0})
        {'eval_loss': '0.1235', 'epoch': '3.0'}
    """
    return {n: shown(n, value) for n, value in plain_values(metrics, "metrics_format got").items()}


def metrics_table(split: str, metrics: Mapping[str, Any]) -> str:
    """A table of metrics: a title and one aligned line per metric, sorted by name."""
    shown = metrics_format(metrics)
    names = max(map(len, shown), default=0)
    values = max(map(len, shown.values()), default=0)
    lines = [f"  {name:<{names}} = {shown[name]:>{values}}" for name in sorted(shown)]
    return "\n".join([f"***** {split} metrics *****", *lines])


def save_metrics(folder: Path, split: str, metrics: Mapping[str, Any], combined: bool) -> Path:
    """Write ``{split}_results.json``, and update ``all_results.json`` if ``combined``."""
    path = folder / f"{split}_results.json"
    metrics = plain_values(metrics, "save_metrics got")
    if current().rank:
        return path
    save_json(path, metrics)
    if combined:
        everything = folder / "all_results.json"
        save_json(everything, read_json(everything) | metrics)
    return path


def save_state(trainer: TrainerBase) -> Path:
    """Write ``trainer_state.json`` into the output directory."""
    path = trainer.args.output_folder / "trainer_state.json"
    if trainer.args.should_save:
        save_json(path, trainer.state.to_dict())
    return path


def save_model(trainer: TrainerBase, output_dir: str | Path | None) -> Path:
    """Save the model, its processing class and the arguments; see ``Trainer.save_model``."""
    if not isinstance(output_dir, str | os.PathLike | None):
        raise ConfigurationError(
            f"save_model takes the path of a folder or of a .keras file. Received: {output_dir!r}."
        )
    check_local("output_dir", output_dir)
    target = Path(trainer.args.output_folder if output_dir is None else output_dir).expanduser()
    with written_by_first(str(target)):
        return _save_model(trainer, target)


def _save_model(trainer: TrainerBase, target: Path) -> Path:
    writes, folder = trainer.args.should_save, target.suffix != ".keras"
    divided = divided_state.divided_variables(trainer.backend, trainer.model)
    if folder and writes:
        save_text(target / "training_args.json", trainer.args.to_json_string() + "\n")
        with explained(target):
            processing.save_processing_class(trainer.processing_class, target)
    target = target / MODEL_FILE if folder else target
    optimizer = trainer.optimizer if trainer.training_weights else None
    if not writes and not divided and division_of(optimizer) is None:
        return target
    with swapped_in(optimizer, trainer.model.variables):
        values = [(v, trainer.backend.whole_value(v)) for v in divided]
        if writes:
            save_keras_file(trainer.model, target, values)
    return target
