"""The Trainer's methods for what a run leaves behind: models, tables, files with results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain import persistence, processing, reports
from kbtrain.errors import ConfigurationError
from kbtrain.evaluation_weights import swapped_in
from kbtrain.local_path import check_local
from kbtrain.output_files import explained, save_json, save_text
from kbtrain.talking import say

if TYPE_CHECKING:
    import keras

    from kbtrain.state import TrainerState
    from kbtrain.training_args import TrainingArguments


class ReportMethods:
    """Methods of ``Trainer`` that write, print or format."""

    args: TrainingArguments
    state: TrainerState
    optimizer: keras.optimizers.Optimizer | None
    training_weights: bool
    processing_class: Any

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Save the model for use without kbtrain.

        Args:
            output_dir: A folder, which gets ``model.keras``, ``training_args.json`` and the files
                of ``processing_class``, or a path that ends in ``.keras``. The default is
                ``args.output_dir``.

        Returns:
            The path of the ``.keras`` file.

        Raises:
            ConfigurationError: ``output_dir`` is no path.
            OutputError: It cannot be written to.
        """
        if not isinstance(output_dir, str | os.PathLike | None):
            raise ConfigurationError(
                "save_model takes the path of a folder or of a .keras file. "
                f"Received: {output_dir!r}."
            )
        check_local("output_dir", output_dir)
        target = Path(self.args.output_dir if output_dir is None else output_dir).expanduser()
        if target.suffix != ".keras":
            save_text(target / "training_args.json", self.args.to_json_string() + "\n")
            with explained(target):
                processing.save(self.processing_class, target)
            target = target / "model.keras"
        model: Any = self.model  # type: ignore[attr-defined]
        with swapped_in(self.optimizer if self.training_weights else None, model.variables):
            persistence.save_keras_file(model, target)
        return target

    def save_state(self) -> Path:
        """Write ``trainer_state.json`` into the output directory."""
        path = Path(self.args.output_dir) / "trainer_state.json"
        save_json(path, self.state.to_dict())
        return path

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Metrics as people read them: MB, h:mm:ss, four decimals."""
        return reports.metrics_format(metrics)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print a table of metrics under the title ``split`` ("train", "eval", "test")."""
        if self.state.is_world_process_zero:
            say(reports.metrics_table(split, metrics), error_stream=False)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> Path:
        """Write ``{split}_results.json``, and add to ``all_results.json`` if ``combined``."""
        return reports.save_metrics(Path(self.args.output_dir), split, metrics, combined)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> Path:
        """Write ``README.md`` about the run (results, loss plot, settings, versions).

        Args:
            language: Of the model, if it has one.
            license: Of the model.
            tags: More tags for the card's header.
            model_name: The title; the default is ``args.run_name`` or the folder's name.
            finetuned_from: The model that this one began as.
            tasks: What it is for, as model hubs call it ("text-classification").
            dataset_tags: Names of the data sets, for the header.
            dataset: Names of the data sets, for people.
            dataset_args: Which part of them.

        Returns:
            The path of the card.

        Raises:
            OutputError: It cannot be written.
        """
        facts = reports.CardFacts(
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset,
            dataset_args,
        )  # fmt: skip
        return reports.create_model_card(self, facts)  # type: ignore[arg-type]
