"""What is done when it is due: log, evaluate, save, and load the best model at the end."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain import metric_schedule, persistence
from kbtrain.callbacks import metric_value
from kbtrain.saving import Snapshot

if TYPE_CHECKING:
    from kbtrain.run import Run
    from kbtrain.trainer import Trainer

logger = logging.getLogger("kbtrain")


def log_window(trainer: Trainer, run: Run) -> None:
    """Log the means since the last log; nothing if there was no update since."""
    logs = run.take_window()
    if not logs:
        return
    if (metrics := trainer.bound.metrics) is not None:
        logs |= metrics.result()
        metrics.reset()
    trainer.log(logs)


def evaluate(trainer: Trainer) -> None:
    """Evaluate, tell a learning rate that answers to a metric, see whether it is the best."""
    metrics = trainer.evaluate()
    metric_schedule.tell(trainer.lr_scheduler, trainer.args, metrics)
    note_if_best(trainer, metrics)


def evaluate_at_start(trainer: Trainer) -> None:
    """Evaluate before the first update: no learning rate answers to that."""
    note_if_best(trainer, trainer.evaluate())


def note_if_best(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Remember the best evaluation so far; with ``save_strategy="best"`` it is saved."""
    args, state = trainer.args, trainer.state
    if args.metric_for_best_model is None:
        return
    value, best = metric_value(metrics, args.metric_for_best_model), state.best_metric
    if best is None:
        best = -math.inf if args.greater_is_better else math.inf
    better = value > best if args.greater_is_better else value < best
    if better:
        state.best_metric, state.best_global_step = value, state.global_step
    if args.save_strategy == "best":
        trainer.control.should_save = better


def look_around(trainer: Trainer) -> bool:
    """Between two steps: see to a failed save, and to who asks the run to save and stop.

    Returns:
        Whether the run is to stop here although it has not reached its end.
    """
    trainer.saver.poll()
    control = trainer.control
    reason = trainer.watch.reason(trainer.saver.longest)
    if reason is None or control.should_training_stop:
        return False
    trainer.interruption = reason
    control.should_training_stop = True
    control.should_save = trainer.args.save_strategy != "no"
    logger.warning(
        "%s: %s at step %d of %d, then stopping.",
        reason,
        "saving" if control.should_save else "not saving (save_strategy='no')",
        trainer.state.global_step,
        trainer.state.max_steps,
    )
    return True


def save(trainer: Trainer, run: Run) -> None:
    """Write ``checkpoint-{step}`` and delete what ``save_total_limit`` leaves no room for.

    ``on_save`` comes once the checkpoint is complete, so whoever listens makes the run wait.
    """
    state, args = trainer.state, trainer.args
    former_best = state.best_model_checkpoint
    path = str(trainer.store.path(state.global_step))
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = path

    def failed() -> None:
        if state.best_model_checkpoint == path:
            state.best_model_checkpoint = former_best

    listened_to = bool(trainer.callback_handler.listeners("on_save"))
    background = args.save_async and not listened_to
    if trainer.saver.save(_snapshot(trainer, run), background, args.on_save_error, failed):
        trainer.fire("on_save")


def _snapshot(trainer: Trainer, run: Run) -> Snapshot:
    """Copy everything of a checkpoint to the host: what training waits for."""
    state, args = trainer.state, trainer.args
    state.stateful_callbacks = trainer.callback_handler.state()
    trained = persistence.gather_model(trainer.model)
    evaluated = persistence.gather_evaluation(trainer.model, trainer.optimizer, trained)
    arrays = {"model": trained | (evaluated if args.save_only_model else {})}
    documents = {"trainer_state": state.to_dict(), "training_args": args.to_dict()}
    if (config := persistence.model_config(trainer.model)) is not None:
        documents["model_config"] = config
    if not args.save_only_model:
        more_arrays, more_documents = persistence.gather_training(
            trainer.backend,
            trainer.model,
            trainer.optimizer,
            trainer.bound.metric_variables,
            run.progress,
        )
        arrays |= more_arrays
        if evaluated:
            arrays["evaluation"] = evaluated
        documents |= more_documents
        if metric_schedule.is_metric_driven(trainer.lr_scheduler):
            documents["lr_scheduler"] = copy.deepcopy(trainer.lr_scheduler.state())
    best = state.best_model_checkpoint
    return Snapshot(
        step=state.global_step,
        arrays=arrays,
        documents=documents,
        info=persistence.environment(trainer.backend),
        places={"model": persistence.places(trainer.model)},
        keep=args.save_total_limit,
        protect=(Path(best),) if best else (),
    )


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of the run's folder, to name it in a message."""
    trainer.saver.settle()
    listed = trainer.store.list()
    return listed[-1][1] if listed else None


def load_best(trainer: Trainer) -> None:
    """Put the weights of the best checkpoint into the model."""
    state, store = trainer.state, trainer.store
    path = state.best_model_checkpoint
    if path is None or not Path(path).exists():
        logger.warning(
            "load_best_model_at_end: the best step %s has no checkpoint; the model keeps its last "
            "weights.",
            state.best_global_step,
        )
        return
    persistence.restore_model(trainer.model, store.load(path))
    if store.path(state.best_global_step or 0).name != Path(path).name:
        logger.warning(
            "load_best_model_at_end: the best step %s has no checkpoint; these are the weights of "
            "the best one that was saved, %s.",
            state.best_global_step,
            path,
        )
        return
    logger.info(
        "Loaded the best model: %s (%s = %s).",
        path,
        trainer.args.metric_for_best_model,
        state.best_metric,
    )
    if trainer.args.save_total_limit == 1:
        store.delete([item for item in store.list() if item[1] != Path(path)])
