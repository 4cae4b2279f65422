"""Finds the checkpoint that a run resumes from, the same on all processes; makes its saver."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint import Checkpoint, CheckpointStore, distributed
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer
from kbtrain.config.training_args import TrainingArguments
from kbtrain.distributed import get_peers
from kbtrain.training import actions
from kbtrain.utils.files.addresses import scheme_of
from kbtrain.utils.machine.processes import current

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
    checkpoint = _resolve(trainer.store, resume)
    if checkpoint is None and trainer.args.save_strategy != "no" and trainer.args.should_save:
        actions.warn_of_former_run(trainer)
    return checkpoint


def _resolve(store: CheckpointStore, resume: Any) -> Checkpoint | None:
    """Find the checkpoint: process 0 chooses, and all verify it together."""
    peers = get_peers()
    if scheme_of(resume) is not None and not store.is_remote and current().rank == 0:
        from kbtrain.checkpoint.remote.store import staged

        resume = staged(resume)
    if peers is None:
        return store.resolve(resume)
    # Lazy: of variables that are divided, each process reads its blocks.
    key = f"resuming {next(_resumed)}"
    return distributed.resolve(store, resume, peers, key, lazy=True)


_resumed = itertools.count(1)


def make_saver(store: CheckpointStore, args: TrainingArguments) -> AsyncCheckpointer:
    """The saver of a run; with several processes they tell each other what became of a save.

    Args:
        store: The checkpoints of the run.
        args: Its arguments, which say whether this process writes.
    """
    return AsyncCheckpointer(store, writes=args.should_save, peers=get_peers())
