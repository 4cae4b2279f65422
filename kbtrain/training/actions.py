"""The actions of the loop: log, evaluate, save, stop."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain import distributed
from kbtrain.callbacks.state import to_json_value
from kbtrain.checkpoint import frozen_base, name_variables, processing_class, run_state
from kbtrain.checkpoint.async_checkpointer import Snapshot
from kbtrain.errors import CheckpointError, CheckpointUnreadableError
from kbtrain.optimization import changing_variables, metric_driven
from kbtrain.training import best_model
from kbtrain.training.agreement import check_weights
from kbtrain.training.stop_signals import EvaluationAbandoned
from kbtrain.utils import rng

if TYPE_CHECKING:
    from kbtrain.callbacks.state import TrainerState
    from kbtrain.training.run import Run
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def log_window(trainer: TrainerBase, run: Run) -> None:
    """Log the means since the last log, if there was an update."""
    logs = run.take_window()
    if not logs:
        return
    if (metrics := trainer.bound.metrics) is not None:
        logs |= metrics.result()
        if run.epoch_results is not None:
            run.epoch_results.keep(metrics)
        metrics.reset()
    own = {*logs, "epoch", "step"}
    trainer.log(logs | trainer.callback_handler.log_values(trainer, own))


def evaluate(trainer: TrainerBase) -> bool:
    """Evaluate, update a metric-driven learning rate, and check for a new best model.

    Returns:
        False if a stop request interrupted the evaluation, which then leaves no trace.
    """
    metrics = _evaluate_or_stop(trainer)
    if metrics is None:
        return False
    metric_driven.report_metric(trainer.lr_scheduler, trainer.args, metrics)
    best_model.note(trainer, metrics)
    return True


def evaluate_at_start(trainer: TrainerBase) -> bool:
    """Evaluate before the first update, which does not affect a metric-driven learning rate.

    Returns:
        As for ``evaluate``.
    """
    metrics = _evaluate_or_stop(trainer)
    if metrics is None:
        trainer.interruption = trainer.agreement.stop_reason(now=True)
        logger.warning("%s: stopping before the first step.", trainer.interruption)
        return False
    best_model.note(trainer, metrics)
    return True


def _evaluate_or_stop(trainer: TrainerBase) -> dict[str, Any] | None:
    """Evaluate, unless a stop request arrives first.

    An evaluation may take hours, while a preemption notice leaves seconds. The resumed run
    restarts the evaluation.

    Returns:
        The results; None if the evaluation was abandoned. The log, the states of callbacks and the
        random states are then restored.
    """
    if trainer.agreement.stop_reason(now=True) is not None:
        return None
    logged, handler = list(trainer.state.log_history), trainer.callback_handler
    states = copy.deepcopy(handler.state())
    random_state = rng.capture_random_state(trainer.backend)
    trainer.agreement.begin_evaluation()
    try:
        with trainer.stop_signals.abandoning():
            keys = trainer.ignore_keys_for_eval
            # Passed only if set: a subclass may override `evaluate` without this argument.
            return trainer.evaluate() if keys is None else trainer.evaluate(ignore_keys=keys)
    except EvaluationAbandoned:
        trainer.state.log_history[:] = logged
        handler.load_state(states)
        rng.restore_random_state(trainer.backend, *random_state)
        return None


def check_stop_requests(trainer: TrainerBase) -> bool:
    """Between two steps: raise the error of a failed save, and handle a request to stop.

    Returns:
        Whether the run must stop here, before its end.
    """
    trainer.saver.poll()
    reason = trainer.agreement.stop_reason()
    if reason is None or trainer.control.should_training_stop:
        return False
    _stop(trainer, reason, saving=trainer.args.save_strategy != "no")
    return True


def leave_unfinished(trainer: TrainerBase, run: Run, after: str) -> None:
    """Save and stop instead of evaluating; the resumed run starts with the evaluation.

    Args:
        trainer: The Trainer.
        run: The run.
        after: "step" or "epoch", where the evaluation was due.
    """
    run.progress.unfinished = {"after": after, "save": trainer.control.should_save}
    logger.warning(
        "The evaluation of step %d is postponed to the resumed run.", trainer.state.global_step
    )
    reason = trainer.agreement.stop_reason(now=True)
    _stop(trainer, reason, saving=trainer.args.save_strategy != "no")


def position(state: TrainerState) -> str:
    """The position of a run: "7 of 20", or "7" if its length is unknown."""
    return (
        f"{state.global_step} of {state.max_steps}" if state.max_steps else f"{state.global_step}"
    )


def _stop(trainer: TrainerBase, reason: str | None, saving: bool) -> None:
    """Make the loop save, if enabled, and end."""
    if trainer.interruption is None:
        trainer.interruption = reason
        told = trainer.stop_signals.announce()
        logger.log(
            logging.INFO if told else logging.WARNING,  # one line is enough
            "%s: %s at step %s, then stopping.",
            trainer.interruption,
            "saving" if saving else "not saving (save_strategy='no')",
            position(trainer.state),
        )
    trainer.control.should_training_stop = True
    trainer.control.should_save = saving


def save(trainer: TrainerBase, run: Run) -> None:
    """Write ``checkpoint-{step}`` and delete checkpoints beyond ``save_total_limit``.

    ``on_save`` fires when the checkpoint is complete, so a listener makes the run wait for it.
    """
    args, step = trainer.args, trainer.state.global_step
    distributed.at(f"saving checkpoint-{step}")
    check_weights(trainer)
    if not args.should_save and trainer.saver.peers is None:
        best_model.begin_saving(trainer, run)
        trainer.fire("on_save")
        return
    # First: the outcome of the previous save determines which checkpoint is the best and must be
    # kept, and its host buffers are reused for the next snapshot.
    trainer.saver.wait()
    former_best = best_model.begin_saving(trainer, run)
    trainer.callback_handler.tell("saving", f"checkpoint-{step}")
    push = None if trainer.pusher is None else trainer.pusher.at_save(trainer)

    def failed() -> None:
        best_model.take_back(trainer, run, step, former_best)

    listened_to = bool(trainer.callback_handler.listeners("on_save"))
    background = args.save_async and not listened_to
    if trainer.saver.save(_snapshot(trainer, run), background, args.on_save_error, failed, push):
        trainer.fire("on_save")


def _snapshot(trainer: TrainerBase, run: Run) -> Snapshot:
    """Copy the contents of a checkpoint to the host; training waits only for this.

    A process that does not write what is whole on every process copies its blocks of the rest.
    """
    state, args = trainer.state, trainer.args
    blocks_only = not trainer.saver.writes
    state.stateful_callbacks = _callback_states(trainer)
    if not trainer.bound.overridden.train_step and trainer.optimizer is not None:
        # A callback may have frozen or unfrozen layers after the newest update.
        changing_variables.sync_variables(trainer.optimizer, trainer.model)
    unchanged = frozen_base.note_changes(trainer.model)
    buffers = trainer.saver.buffers
    trained = run_state.gather_model(trainer.model, buffers, blocks_only)
    evaluated = run_state.gather_evaluation(
        trainer.model, trainer.optimizer, trained, buffers, blocks_only
    )
    with trainer.callback_handler.evaluating(trainer) as swapped:
        if swapped:
            evaluated |= run_state.gather_model(trainer.model, None, blocks_only)
    arrays = {"model": trained | (evaluated if args.save_only_model else {})}
    documents = {"trainer_state": state.to_dict(), "training_args": args.to_dict()}
    if (config := run_state.model_config(trainer.model)) is not None:
        documents["model_config"] = config
    named = name_variables(run_state.model_variables(trainer.model))
    if (frozen := frozen_base.document(trainer.model, named, unchanged)) is not None:
        documents[frozen_base.DOCUMENT] = frozen
    if not args.save_only_model:
        more_arrays, more_documents = run_state.gather_training(
            trainer.backend,
            trainer.model,
            trainer.optimizer,
            trainer.bound.metric_variables,
            run.progress,
            trainer.other_optimizers,
            buffers,
            blocks_only,
        )
        arrays |= more_arrays
        if of_callbacks := trainer.callback_handler.arrays():
            arrays["callbacks"] = of_callbacks
        if evaluated:
            arrays["evaluation"] = evaluated
        documents |= more_documents
        if (flags := _trained(trainer, run)) is not None:
            documents["trainable"] = flags
        if metric_driven.is_metric_driven(trainer.lr_scheduler):
            documents["lr_scheduler"] = copy.deepcopy(trainer.lr_scheduler.state())
    best = state.best_model_checkpoint
    return Snapshot(
        step=state.global_step,
        arrays=arrays,
        documents=documents,
        info=run_state.environment(trainer.backend.name),
        places={"model": run_state.cached_keras_layout(trainer.model)},
        keep=args.save_total_limit,
        protect=(Path(best),) if best else (),
        other_files=_processing_files(trainer, run, documents),
    )


def _trained(trainer: TrainerBase, run: Run) -> dict[str, Any] | None:
    if run.trainable_at_start is None or trainer.optimizer is None:
        return None
    return run_state.trained_document(trainer.model, trainer.optimizer, run.trainable_at_start)


def _callback_states(trainer: TrainerBase) -> dict[str, list[Any]]:
    """The states of the callbacks, as JSON values.

    Raises:
        CheckpointError: A state cannot be saved, and ``on_save_error`` is ``"raise"``; otherwise a
            warning is logged and the checkpoint is written without it.
    """
    found = {}
    for name, states in trainer.callback_handler.state().items():
        try:
            found[name] = [to_json_value(one) for one in states]
        except Exception as error:  # a user's object may raise anything during serialization
            text = (
                f"The state of the callback {name} cannot be saved as JSON ({error}): its state() "
                "should return numbers, text, lists and dicts."
            )
            if trainer.args.on_save_error == "raise":
                raise CheckpointError(text) from error
            logger.warning("%s Checkpoints are written without it (on_save_error='warn').", text)
    return found


def _processing_files(
    trainer: TrainerBase, run: Run, documents: Iterable[str]
) -> Mapping[str, bytes]:
    """The files that ``processing_class`` writes, collected once per run because it takes time.

    Raises:
        CheckpointError: It cannot be saved, and ``on_save_error`` is ``"raise"``; otherwise a
            warning is logged and the checkpoint is written without it.
    """
    if trainer.processing_class is None or not trainer.saver.writes:
        return {}
    if run.processing_files is None:
        step = trainer.state.global_step
        try:
            run.processing_files = processing_class.files_of(
                trainer.processing_class, trainer.store, step, documents
            )
        except CheckpointError as error:
            if trainer.args.on_save_error == "raise":
                raise
            logger.warning(
                "%s. The checkpoint is written without it (on_save_error='warn'); a resumed run "
                "does not need it.",
                error,
            )
    return run.processing_files or {}


def warn_of_former_run(trainer: TrainerBase) -> None:
    """Warn if a run that starts from scratch will save beside checkpoints of an earlier run."""
    try:
        listed = trainer.store.kept()
    except CheckpointUnreadableError as error:
        logger.warning("%s A fresh run does not need them.", error)
        return
    if listed:
        logger.warning(
            "%s holds checkpoints of a former run (%s to %s). This one begins at step 0, replaces "
            "those of its own steps and deletes no others: until it is further than they are, "
            "resume_from_checkpoint=True would go on from the former run. Resume, delete them, or "
            "choose another output_dir.",
            trainer.store.place,
            listed[0][1].name,
            listed[-1][1].name,
        )


def last_checkpoint(trainer: TrainerBase) -> Path | None:
    """The newest checkpoint of the run's folder, to name it in a message."""
    trainer.saver.settle()
    listed = trainer.store.list()
    return listed[-1][1] if listed else None
