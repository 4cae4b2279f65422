"""When a run pushes, what, and what becomes of it; a failure never ends the run."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError, HubError, first_lines
from kbtrain.hub import staging
from kbtrain.hub.presets import HUGGING_FACE, KAGGLE, KaggleModel, check_preset, is_preset
from kbtrain.hub.repository import Repository
from kbtrain.hub.unpushed import UnpushedCheckpoints
from kbtrain.hub.uploads import Uploads
from kbtrain.report.model_card import MODEL_FILE
from kbtrain.utils.files.filesystem import tree_size
from kbtrain.utils.files.output_files import explained
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

ANSWERS_WITHIN = 60.0
"""Seconds to wait for the Hub before training."""

PATIENCE, SLOWEST = 600.0, 1e6
"""How long to wait for a push: seconds, and bytes per second for what has to be uploaded."""

SaveModel = Callable[[Any, Path], Any]


class HubPusher:
    """Pushes the model of a run, and its checkpoints if wanted, to the Hugging Face Hub.

    Every process has one, since all take part in saving a model that is divided among them; the
    first one pushes. What is pushed is set aside in ``output_dir/.hub``, uploaded by a thread, and
    becomes one commit.

    Args:
        args: The arguments of the run.
        save_model: Saves the model of a Trainer into a folder.

    Raises:
        ConfigurationError: A setting is wrong, or a package or the token is missing.
    """

    def __init__(self, args: TrainingArguments, save_model: SaveModel) -> None:
        self._args = args
        self._save_model = save_model
        self._folder = args.output_folder.absolute()
        staging.check_folder(self._folder)
        self._stages = self._folder / staging.FOLDER
        self._uploads = Uploads()
        self._pushes = self._failures = 0
        self._last_failure: str | None = None
        self._unpushed = UnpushedCheckpoints()
        self._closed = True
        self.pushing = False
        """Whether a call of ``push_to_hub`` is saving the model."""
        name = repository_name(args)
        self._preset = name if is_preset(name) else None
        self.repository: Repository | KaggleModel | None = None
        if current().rank == 0:
            self.repository = make_repository(args)

    @property
    def name(self) -> str:
        """The repository's name."""
        return "" if self.repository is None else self.repository.name

    @property
    def preset(self) -> str | None:
        """The address for ``from_preset`` if a preset is pushed; None if it is ``model.keras``."""
        if self._preset is None or self._preset.startswith(KAGGLE):
            return self._preset
        return f"{HUGGING_FACE}{self.name}"

    # --- during fit -----------------------------------------------------------------------------

    def begin(self, model: Any) -> None:
        """Create the repository before training, and remove what a killed run has left.

        Args:
            model: The model, of which a preset may be wanted.

        Raises:
            ConfigurationError: The Hub refuses, or the model cannot be pushed as it should be.
        """
        if self._preset:
            check_preset(self._preset, self._args, model)
        if self.repository is None:
            return
        self._pushes = self._failures = 0
        self._last_failure, self._unpushed = None, UnpushedCheckpoints()
        self._closed = False
        shutil.rmtree(self._stages, ignore_errors=True)
        try:
            self._uploads.submit(self.repository.create).result(ANSWERS_WITHIN)
        except TimeoutError:
            self._failed(TimeoutError("The Hub does not answer."), "Creating the repository")
        except OSError as error:
            self._failed(error, "Creating the repository")

    def at_save(self, trainer: Any) -> Callable[[], None] | None:
        """Set the model aside for the push that belongs to a checkpoint, if there is to be one.

        Training waits for this; all processes call it.

        Args:
            trainer: The Trainer, at the step of the checkpoint.

        Returns:
            What to call when the checkpoint is complete; None if there is nothing to be done.
        """
        args, step = self._args, trainer.state.global_step
        if args.hub_strategy == "end" or trainer.trial is not None:
            return None
        checkpoint = trainer.store.path(step)
        later = functools.partial(self._unpushed.add, self._folders(checkpoint))
        # The newest state of a run that must stop is what it will be resumed from.
        wanted = args.hub_always_push or trainer.interruption is not None or not self._uploads.busy
        if self.repository is not None and not wanted:
            logger.info("No push of step %d: an earlier one is still running.", step)
            if current().size == 1:
                return later
        stage = self._stages / f"step-{step}"
        try:
            self._save_model(trainer, stage)
            self._save_preset(trainer, stage)
        except Exception as error:  # Keras, and the classes of a model, may raise anything
            self._failed(error, f"Saving the model of step {step} for a push")
            return None if self.repository is None else later
        if self.repository is None:
            return None
        if not wanted:
            return later
        trainer.fire("on_push_begin")
        by_epoch = args.save_strategy == "epoch"
        when = f"epoch {int(trainer.state.epoch)}" if by_epoch else f"step {step}"
        return functools.partial(self._push_checkpoint, stage, checkpoint, when)

    def _save_preset(self, trainer: Any, stage: Path) -> None:
        """Put the preset of the model in the place of ``model.keras``, if that is wanted."""
        if self._preset is None:
            return
        check_preset(self._preset, self._args, trainer.model)
        (stage / MODEL_FILE).unlink(missing_ok=True)
        stage.mkdir(parents=True, exist_ok=True)
        with trainer.evaluation_weights():
            trainer.model.save_to_preset(str(stage))

    def _push_checkpoint(self, stage: Path, checkpoint: Path, when: str) -> None:
        """Submit the push of a complete checkpoint; runs in the thread that has written it."""
        checkpoints = self._folders(checkpoint)
        try:
            for folder, path in checkpoints.items():
                staging.set_aside_checkpoint(path, stage / folder)
            staging.set_aside_run(self._folder, stage)
        except OSError as error:
            self._unpushed.add(checkpoints)
            self._failed(error, f"Setting {checkpoint.name} aside for a push")
            return
        self._submit(stage, f"Training in progress, {when}", checkpoints)

    def _folders(self, checkpoint: Path) -> dict[str, Path]:
        """The folder of the repository that a checkpoint becomes, if the strategy wants it."""
        if self._args.hub_strategy == "checkpoint":
            return {staging.LAST_CHECKPOINT: checkpoint}
        if self._args.hub_strategy == "all_checkpoints":
            return {checkpoint.name: checkpoint}
        return {}

    def finish(self, push: Callable[[], Any]) -> None:
        """At the end of ``fit``: push the final model; ``close`` waits for it.

        Args:
            push: Submits the push of the final model.
        """
        try:
            push()
        except Exception as error:
            if self.repository is not None:
                self._failed(error, "The last push")

    def close(self, waits: bool) -> None:
        """Wait for the pushes in flight, and say what has not arrived, once per ``begin``.

        Args:
            waits: Whether to wait; if not, the process may end before they have.
        """
        if self.repository is None or self._closed:
            return
        if self._uploads.busy:
            if not waits:
                logger.warning("A push to %s was not waited for.", self.name)
                return
            limit = self._limit()
            logger.info("Waiting at most %.0f s for the push to %s.", limit, self.name)
            if not self._uploads.wait(limit):
                self._failed(TimeoutError("It takes too long."), "The last push")
        self._closed = True
        shutil.rmtree(self._stages, ignore_errors=True)
        missing = ", ".join(self._unpushed.names())
        if self._last_failure is not None or missing:
            logger.warning(
                "%s on the Hub is not up to date (failures: %d). %s%s Everything is in %s; "
                "trainer.push_to_hub() tries again.",
                *(self.name, self._failures, self._last_failure or ""),
                *(f" Not pushed: {missing}." if missing else "", self._folder),
            )
        elif self._failures:
            logger.info("%d pushes to %s failed, a later one did not.", self._failures, self.name)

    def _limit(self) -> float:
        """Seconds to wait for what is set aside: no request has a time limit of its own."""
        return PATIENCE + tree_size(self._stages) / SLOWEST

    # --- any time -------------------------------------------------------------------------------

    def create(self, repository: Repository | KaggleModel) -> None:
        """Create a repository, after the pushes in flight, and wait for it.

        Args:
            repository: The repository.

        Raises:
            ConfigurationError, HubError: It failed.
        """
        if not repository.created:
            self._result(self._uploads.submit(repository.create), repository.name)

    def _result(self, future: Future[Any], name: str) -> Any:
        limit = self._limit()
        try:
            return future.result(limit)
        except TimeoutError:
            raise HubError(
                f"{name} on the Hub: no answer within {limit:.0f} s. Everything is in "
                f"{self._folder}; trainer.push_to_hub() tries again."
            ) from None

    def push(
        self,
        trainer: Any,
        message: str,
        repository: Repository | KaggleModel | None = None,
        blocking: bool = True,
    ) -> Any:
        """Push what is in ``output_dir`` after the pushes in flight.

        Args:
            trainer: The Trainer, whose model is saved there.
            message: The commit message.
            repository: Another repository than that of the arguments.
            blocking: Whether to wait for it.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``, or a future of it.

        Raises:
            ConfigurationError, HubError: It failed.
            OutputError: The files cannot be set aside.
        """
        stage = self._stages / f"push-{self._pushes}"
        with explained(stage):
            staging.set_aside_run(self._folder, stage)
            self._save_preset(trainer, stage)
        target = self.repository if repository is None else repository
        assert target is not None
        future = self._submit(stage, message, {}, target, told=not blocking)
        return self._result(future, target.name) if blocking else future

    def _submit(
        self,
        stage: Path,
        message: str,
        checkpoints: Mapping[str, Path],
        repository: Repository | KaggleModel | None = None,
        told: bool = True,
    ) -> Future[Any]:
        target = self.repository if repository is None else repository
        assert target is not None
        own = target is self.repository
        self._pushes += 1

        def upload() -> Any:
            pushed = dict(checkpoints)
            try:
                if own:  # only now is it known what became of the pushes before this one
                    pushed |= self._unpushed.set_aside(stage, checkpoints)
                info = target.commit(stage, message, list(pushed))
            except Exception as error:
                self._unpushed.add(checkpoints)
                if told:
                    self._failed(error, "A push")
                raise
            finally:
                shutil.rmtree(stage, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self._stages.rmdir()  # unless another push is set aside
            if own:
                self._unpushed.remove(pushed)
                if not self._unpushed.names():
                    self._last_failure = None
            logger.info("Pushed to %s: %s", target.name, message)
            return info

        return self._uploads.submit(upload)

    def _failed(self, error: BaseException, what: str) -> None:
        """Count a failure, and tell the first one."""
        self._failures += 1
        self._last_failure = first_lines(error) or type(error).__name__
        if self._failures == 1:
            logger.warning(
                "%s failed. %s Training continues; the next push has everything. This warning is "
                "shown once, and what has not arrived is said at the end.",
                what,
                self._last_failure,
            )
        else:
            logger.info("%s failed. %s", what, self._last_failure)

    # --- resuming -------------------------------------------------------------------------------

    def fetch(self, resume: Any) -> Any:
        """Download the checkpoint of ``resume_from_checkpoint="last-checkpoint"``.

        Args:
            resume: ``resume_from_checkpoint``. Any other value is returned as it is, and so is
                this one if there is a folder of that name.

        Returns:
            The path to resume from.

        Raises:
            HubError: The Hub cannot be reached, or has no such checkpoint.
        """
        if resume != staging.LAST_CHECKPOINT or Path(staging.LAST_CHECKPOINT).exists():
            return resume
        target = self._folder / staging.LAST_CHECKPOINT
        if isinstance(self.repository, Repository):
            self._folder.mkdir(parents=True, exist_ok=True)
            self.repository.download(staging.LAST_CHECKPOINT, target)
        return str(target)


def make_repository(args: TrainingArguments, **changes: Any) -> Repository | KaggleModel:
    """The repository that the arguments name.

    Args:
        args: The arguments of the run.
        **changes: ``token``, ``private`` and ``revision`` that differ from the arguments; None
            leaves them as they are.

    Raises:
        ConfigurationError: As for ``Repository`` and ``KaggleModel``.
    """
    name = repository_name(args)
    if name.startswith(KAGGLE):
        return KaggleModel(name)
    settings: Mapping[str, Any] = {
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "revision": args.hub_revision,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return Repository(name.removeprefix(HUGGING_FACE), **{**settings, **given})


def repository_name(args: TrainingArguments) -> str:
    """The repository's name as the arguments give it.

    Raises:
        ConfigurationError: ``output_dir`` has no name to take.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if not name:
        raise ConfigurationError(
            f"push_to_hub=True needs hub_model_id='user/name': output_dir={args.output_dir!r} has "
            "no name to take."
        )
    return name
