"""What a Trainer leaves behind: the saved model, result files, the report, the model card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbtrain.config.training_args import TrainingArguments
from kbtrain.hub import push
from kbtrain.hub.pusher import HubPusher
from kbtrain.plan import request as planning
from kbtrain.report import model_card, write
from kbtrain.trainer import reports
from kbtrain.training.trainer_base import TrainerBase
from kbtrain.utils.best_effort import print_line


def make_pusher(args: TrainingArguments) -> HubPusher | None:
    """What pushes to the Hub, if the arguments ask for it; not in a program that is planned.

    Raises:
        ConfigurationError: A setting is wrong, or the package or a token is missing.
    """
    wanted = args.push_to_hub and not planning.pending()
    return HubPusher(args, reports.save_model) if wanted else None


class RunArtifacts(TrainerBase):
    """The methods of ``Trainer`` that write files for people and other programs."""

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Context that uploads the files written in it, if ``output_dir`` is an address.

        During a training they are uploaded with the next checkpoint, and at its end.
        """
        outside = self.args.should_save and not self.is_in_train
        if outside:
            self.store.bring_files()
        yield
        if outside:
            self.store.send_files()

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Save the model for use without kbtrain.

        Args:
            output_dir: A folder, which gets ``model.keras``, ``training_args.json`` and the files
                of ``processing_class``, or a path that ends in ``.keras``. The default is
                ``args.output_dir``. With ``args.push_to_hub`` the model is also pushed, as in
                Transformers; if that fails, there is a warning.

        Returns:
            The path of the ``.keras`` file.

        Raises:
            ConfigurationError: ``output_dir`` is not a path.
            OutputError: It cannot be written to.
        """
        with self.uploading():
            path = reports.save_model(self, output_dir)
        push.push_saved(self)
        return path

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Push the model, a model card and the files of ``output_dir`` to the Hugging Face Hub.

        The repository is ``args.hub_model_id``; ``args.push_to_hub`` need not be set. Checkpoints,
        hidden files and those that begin with an underscore stay here. With several processes all
        of them make the call, and the first one pushes. Needs the extra ``hub``.

        Args:
            commit_message: The commit message.
            blocking: Whether to wait until everything has arrived.
            token: A token in place of ``args.hub_token``.
            revision: A branch in place of ``args.hub_revision``.
            private: Whether a new repository is private, in place of ``args.hub_private_repo``.
            **card: Arguments of ``create_model_card``.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``, or with ``blocking=False`` a future of it;
            None in other processes than the first.

        Raises:
            ConfigurationError: A setting is wrong, or the package or a token is missing.
            HubError: The Hub cannot be reached, or fails.
            OutputError: The model cannot be written to ``output_dir``.
        """
        pusher = self.pusher or HubPusher(self.args, reports.save_model)
        changes = {"token": token, "revision": revision, "private": private}
        return push.push_to_hub(self, pusher, commit_message, blocking, card, changes)

    def save_state(self) -> Path:
        """Write ``trainer_state.json`` into the output directory."""
        with self.uploading():
            return reports.save_state(self)

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Format metrics for reading: MB, h:mm:ss, four decimals."""
        return reports.metrics_format(metrics)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print a table of metrics under the title ``split`` ("train", "eval", "test")."""
        if self.state.is_world_process_zero:
            print_line(reports.metrics_table(split, metrics), error_stream=False)

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> Path:
        """Write ``{split}_results.json``, and update ``all_results.json`` if ``combined``."""
        with self.uploading():
            return reports.save_metrics(self.args.output_folder, split, metrics, combined)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report of the run: one HTML page with curves, settings and how to go on.

        The page loads nothing, so it can be sent and opened anywhere. ``report_to="html"`` keeps it
        up to date during the run, ``kbtrain report FOLDER`` writes it afterwards, also of several
        runs side by side.

        Args:
            path: The page; by default ``report.html`` in ``args.output_dir``.

        Returns:
            The path of the page.

        Raises:
            ConfigurationError: ``fit`` was not called yet.
            OutputError: It cannot be written.
        """
        with self.uploading():
            return write.report_of_trainer(self, path)

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> Path:
        """Write ``README.md`` about the run (results, usage, data, loss plot, settings, versions).

        It says which weights the model holds, and has the results of ``predict`` if it was called.
        Where ``huggingface_hub`` is installed, it checks the header.

        Args:
            language: Language of the model, if it has one.
            license: License of the model.
            tags: Additional tags for the card's header.
            model_name: The title; the default is ``args.run_name`` or the folder's name.
            finetuned_from: The base model.
            tasks: Its tasks, as named by model hubs ("text-classification").
            dataset_tags: Identifiers of the data sets, for the header. With one and a task the
                header has the results, in the format of model hubs.
            dataset: Names of the data sets, for the text.
            dataset_args: Configurations of the data sets.

        Returns:
            The path of the card.

        Raises:
            ConfigurationError: An argument is not text, or not a list of texts.
            OutputError: It cannot be written.
        """
        facts = model_card.CardFacts(
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset,
            dataset_args,
        )  # fmt: skip
        with self.uploading():
            return model_card.create_model_card(self, facts)
