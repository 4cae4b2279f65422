"""Finds the checkpoint that a run resumes from, the same on all processes; makes its saver."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.backends.protocol import Backend
from kbtrain.checkpoint import Checkpoint, CheckpointStore
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer
from kbtrain.config.training_args import TrainingArguments
from kbtrain.distributed import get_peers, host
from kbtrain.errors import CheckpointNotFoundError
from kbtrain.training import actions
from kbtrain.utils.processes import current

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase


def resolve_together(trainer: TrainerBase, resume: Any) -> Checkpoint | None:
    """Find the checkpoint for ``resume_from_checkpoint``, or warn of those of a former run.

    Args:
        trainer: The Trainer.
        resume: See ``CheckpointStore.resolve``.

    Raises:
        CheckpointError: As for ``CheckpointStore.resolve``; or another process cannot see the
            checkpoint that process 0 has chosen.
    """
    checkpoint = _resolve(trainer.store, trainer.backend, resume)
    if checkpoint is None and trainer.args.save_strategy != "no" and trainer.args.should_save:
        actions.warn_of_former_run(trainer)
    return checkpoint


def _resolve(store: CheckpointStore, backend: Backend, resume: Any) -> Checkpoint | None:
    """Find the checkpoint: process 0 chooses, and the others follow."""
    if current().size == 1:
        return store.resolve(resume)
    # Lazy: of variables that are divided, each process reads its blocks.
    checkpoint = store.resolve(resume, lazy=True) if current().rank == 0 else None
    chosen = host.broadcast(backend, None if checkpoint is None else str(checkpoint.path))
    if checkpoint is not None or chosen is None:
        return checkpoint
    try:
        return store.follow(chosen, lazy=True)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"Process {current().rank} cannot find {chosen}, from which process 0 resumes. All "
            "processes read the checkpoint: put output_dir on storage that every machine sees, or "
            f"copy {Path(chosen).name} to each."
        ) from error


def make_saver(store: CheckpointStore, args: TrainingArguments) -> AsyncCheckpointer:
    """The saver of a run; with several processes they tell each other what became of a save.

    Args:
        store: The checkpoints of the run.
        args: Its arguments, which say whether this process writes.
    """
    return AsyncCheckpointer(store, writes=args.should_save, peers=get_peers())
