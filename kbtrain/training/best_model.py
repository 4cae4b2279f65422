"""The best model of a run: the best evaluated, the best saved, and loading it.

The two differ if a save fails or an evaluation has no checkpoint: ``state.best_metric`` is the best
of all evaluations, ``state.best_model_checkpoint`` the best of those with a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import evaluation_name, metric_value
from kbtrain.checkpoint import Checkpoint, run_state
from kbtrain.checkpoint.storage.faults import is_folder
from kbtrain.checkpoint.storage.folder_reader import nothing, read_checkpoint
from kbtrain.distributed import host
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
)
from kbtrain.utils.files.filesystem import parse_checkpoint_name
from kbtrain.utils.machine.processes import current

if TYPE_CHECKING:
    from kbtrain.callbacks.state import TrainerState
    from kbtrain.config.training_args import TrainingArguments
    from kbtrain.training.run import Run
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")

Saved = tuple[str | None, float | None]


def note(trainer: TrainerBase, metrics: dict[str, Any]) -> None:
    """Record an evaluation if it is the best so far; with ``save_strategy="best"`` save it."""
    args, state, run = trainer.args, trainer.state, trainer.current_run
    if args.metric_for_best_model is None:
        return
    value = metric_value(metrics, args.metric_for_best_model)
    if _better(args, value, state.best_metric):
        state.best_metric, state.best_global_step = value, state.global_step
    if run is not None:
        run.score = state.global_step, value
    if args.save_strategy == "best":
        better = _better(args, value, state.best_saved_metric)
        trainer.control.should_save = host.broadcast(trainer.backend, better)


def _better(args: TrainingArguments, value: float, best: float | None) -> bool:
    if best is None:
        best = -math.inf if args.greater_is_better else math.inf
    return value > best if args.greater_is_better else value < best


def begin_saving(trainer: TrainerBase, run: Run) -> Saved:
    """Register the checkpoint about to be written as the best one saved, if it is.

    Returns:
        The previous best one, for ``take_back`` if the write fails.
    """
    state = trainer.state
    if trainer.args.should_save:
        with contextlib.suppress(CheckpointUnreadableError):  # out of reach for now
            _forget_lost(trainer)
    before = state.best_model_checkpoint, state.best_saved_metric
    if (value := _value_to_save(trainer, run)) is not None:
        state.best_model_checkpoint = str(trainer.store.path(state.global_step))
        state.best_saved_metric = value
    return before


def _value_to_save(trainer: TrainerBase, run: Run) -> float | None:
    """The metric of this step, if its checkpoint will be the best one."""
    args, state = trainer.args, trainer.state
    if run.score is None or run.score[0] != state.global_step:
        return None
    value = run.score[1]
    if not _better(args, value, state.best_saved_metric):
        return None
    # If no best model will be loaded, only the best step counts, as in Transformers, unless its
    # checkpoint is known to be missing.
    best = state.best_global_step == state.global_step
    return value if best or args.load_best_model_at_end or run.best_is_lost else None


def take_back(trainer: TrainerBase, run: Run, step: int, before: Saved) -> None:
    """Undo ``begin_saving`` after a write that failed.

    Args:
        trainer: The Trainer.
        run: The run.
        step: The step whose checkpoint could not be written.
        before: The result of ``begin_saving``.
    """
    state = trainer.state
    if state.best_model_checkpoint != before[0]:
        state.best_model_checkpoint, state.best_saved_metric = before
        run.best_is_lost |= state.best_global_step == step


def _forget_lost(trainer: TrainerBase, damaged: Collection[str] = ()) -> None:
    """If the best checkpoint was deleted, replace it by the best remaining one.

    Args:
        trainer: The Trainer.
        damaged: Checkpoints to treat as lost.
    """
    state = trainer.state
    path = state.best_model_checkpoint
    if path is None or (path not in damaged and is_folder(Path(path))):
        return
    state.best_model_checkpoint = state.best_saved_metric = None
    for entry in state.log_history:
        value = _logged(entry, trainer.args.metric_for_best_model)
        place = trainer.store.path(int(entry["step"]))
        if value is None or str(place) in damaged or not trainer.store.owns(place):
            continue
        if _better(trainer.args, value, state.best_saved_metric):
            state.best_model_checkpoint, state.best_saved_metric = str(place), value


def _logged(entry: Mapping[str, Any], metric: str | None) -> float | None:
    """The metric in a log entry of an evaluation; None if it has none."""
    found = entry.get(evaluation_name(str(metric)))
    return float(found) if isinstance(found, float | int) else None


def recall(state: TrainerState, metric: str | None) -> None:
    """Find the metric of the best checkpoint for a state saved by an earlier kbtrain."""
    if state.best_model_checkpoint is None or state.best_saved_metric is not None:
        return
    step = parse_checkpoint_name(Path(state.best_model_checkpoint).name)
    if step == state.best_global_step:
        state.best_saved_metric = state.best_metric
        return
    for entry in state.log_history:
        if entry.get("step") == step and (value := _logged(entry, metric)) is not None:
            state.best_saved_metric = value


def load(trainer: TrainerBase) -> None:
    """Load the weights of the best checkpoint into the model, unless it already has them.

    Process 0 loads them, and the others get them from it.

    Raises:
        CheckpointUnreadableError: The weights cannot be read at this time.
    """
    path = _load(trainer) if current().rank == 0 else None
    if current().size == 1:
        trainer.loaded_best = path
        return
    variables = run_state.model_variables(trainer.model)
    chosen = host.broadcast(trainer.backend, None if path is None else str(path))
    trainer.loaded_best = None if chosen is None else Path(chosen)
    divided = any(trainer.backend.owned_blocks(v) is not None for v in variables)
    if current().rank and chosen is not None and divided:  # process 0 has its own blocks only
        run_state.restore_model(trainer.model, read_checkpoint(Path(chosen), True, nothing))
    trainer.backend.copy_from_first(variables)


def _load(trainer: TrainerBase) -> Path | None:
    """Load the weights of the best checkpoint, and return its path; None if there is none.

    Raises:
        CheckpointUnreadableError: The weights cannot be read at this time.
    """
    state, store = trainer.state, trainer.store
    try:
        _forget_lost(trainer)
        if _is_in_memory(trainer):
            logger.warning(
                "load_best_model_at_end: the best step %s has no checkpoint; the model keeps the "
                "weights of step %s, the best available.",
                state.best_global_step,
                state.global_step,
            )
            return None
        checkpoint = _read(trainer)
    except CheckpointUnreadableError as error:
        raise CheckpointUnreadableError(
            f"load_best_model_at_end: {error} Training itself is complete (step "
            f"{state.global_step}): fit(resume_from_checkpoint=True) trains no more and loads the "
            "best model; so does kbtrain.load_weights(model, that checkpoint)."
        ) from error
    if checkpoint is None:
        logger.warning(
            "load_best_model_at_end: %s; the model keeps its last weights.",
            "no evaluation gave a best step"
            if state.best_global_step is None
            else f"the best step {state.best_global_step} has no checkpoint",
        )
        return None
    run_state.restore_model(trainer.model, checkpoint)
    path = checkpoint.path
    if path.name != store.path(state.best_global_step or 0).name:
        logger.warning(
            "load_best_model_at_end: the best step %s has no checkpoint; these are the weights of "
            "the best one that was saved, %s.",
            state.best_global_step,
            path,
        )
        return path
    logger.info(
        "Loaded the best model: %s (%s = %s).",
        path,
        trainer.args.metric_for_best_model,
        state.best_metric,
    )
    if trainer.args.save_total_limit == 1:
        store.keep_only(path)
    return path


def _is_in_memory(trainer: TrainerBase) -> bool:
    """Whether the model holds the best weights because their checkpoint could not be saved."""
    state, run = trainer.state, trainer.current_run
    step = state.global_step
    if state.best_model_checkpoint is not None:
        if Path(state.best_model_checkpoint).name == trainer.store.path(step).name:
            return False
        if run is not None and run.score is not None and run.score[0] == step:
            saved = state.best_saved_metric
            return saved is not None and _better(trainer.args, run.score[1], saved)
    return state.best_global_step == step


def _read(trainer: TrainerBase) -> Checkpoint | None:
    """Read the best intact checkpoint; None if there is none."""
    state, damaged = trainer.state, set[str]()
    while (path := state.best_model_checkpoint) is not None:
        try:
            return trainer.store.load(path, lazy=current().size > 1)
        except (CheckpointDamagedError, CheckpointNotFoundError) as error:
            logger.warning("load_best_model_at_end: %s", error)
            damaged.add(path)
            _forget_lost(trainer, damaged)
    return None
