"""One call of ``fit``: preparation, the loop, and the result."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kbtrain.callbacks.state import TrainerState, TrainingPlan, make_plan, steps_until_due
from kbtrain.checkpoint import Checkpoint, frozen_base, run_state, validated_json
from kbtrain.checkpoint.storage.faults import is_folder
from kbtrain.config.diff import compare_arguments
from kbtrain.config.validation import check_saves_follow_evaluations, resolve_steps
from kbtrain.data import Batches, Block, Loader, as_loader, weighted
from kbtrain.data.block_length import BlockLength
from kbtrain.data.token_count import count_tokens
from kbtrain.distributed import host, placement
from kbtrain.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    NonFiniteError,
    first_lines,
)
from kbtrain.model import custom_steps
from kbtrain.model.forward import items_counter
from kbtrain.model.trainable_flags import TrainableFlags
from kbtrain.model.variables import unique
from kbtrain.model.wrappers import gradient_checkpointing, neftune
from kbtrain.model.wrappers.debug_overflow import Diagnosis
from kbtrain.optimization import changing_variables, evaluation_weights, metric_driven
from kbtrain.optimization.division import division_of
from kbtrain.training import actions, best_model, custom_step_arguments
from kbtrain.training.agreement import Agreement, check_alike
from kbtrain.training.build_step import live_train_step, trained_variables
from kbtrain.training.dataloaders import in_epochs, warn_of_inexact_resume
from kbtrain.training.loop import train_loop
from kbtrain.training.optimizer import build_optimizer, why_total_is_needed
from kbtrain.training.run import Run
from kbtrain.utils import rng
from kbtrain.utils.files.filesystem import parse_checkpoint_name
from kbtrain.utils.html import notebook_table, number
from kbtrain.utils.machine.memory import measured
from kbtrain.utils.machine.processes import current

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


class TrainOutput(NamedTuple):
    """Result of ``Trainer.fit``.

    Attributes:
        global_step: Updates done.
        training_loss: Mean loss over all updates of the run that were not skipped, including those
            before a resume; NaN if there were none, or if a custom ``train_step`` returns none.
        metrics: ``train_loss``, ``epoch`` and the speed of this call.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]

    def _repr_html_(self) -> str:
        values = {"global_step": self.global_step, "training_loss": self.training_loss}
        shown = {name: number(value) for name, value in {**values, **self.metrics}.items()}
        return notebook_table("TrainOutput", shown)


def fit(
    trainer: TrainerBase,
    checkpoint: Checkpoint | None,
    prepared: Callable[[], None] = lambda: None,
) -> TrainOutput:
    """Train from the beginning, or from a checkpoint, to the end.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint to resume from, or None.
        prepared: Called when everything is ready for the first update.
    """
    try:
        return _fit(trainer, checkpoint, prepared)
    finally:
        frozen_base.forget(trainer.model)


def _fit(
    trainer: TrainerBase, checkpoint: Checkpoint | None, prepared: Callable[[], None]
) -> TrainOutput:
    args = trainer.args
    with measured(trainer.backend, "train", args.skip_memory_metrics) as memory:
        run = prepare(trainer, checkpoint)
        prepared()
        trainer.current_run, trainer.training_weights = run, True
        trainer.control.new_training()
        trainer.fire("on_train_begin")
        begun = True
        if args.eval_on_start and checkpoint is None:
            begun = actions.evaluate_at_start(trainer)
        run.times.restart()
        with contextlib.closing(run.batches), wrapped_calls(trainer):
            if begun:
                with _ending_at_nonfinite(trainer, run):
                    train_loop(trainer, run)
                    run.read()
        with run.times.of("other"):
            trainer.callback_handler.tell("phase", "finishing")
            trainer.saver.wait()
            host.barrier(trainer.backend)  # the checkpoints are complete for all processes
        run.seconds = run.times.total
    return _finish(trainer, run, memory)


@contextlib.contextmanager
def _ending_at_nonfinite(trainer: TrainerBase, run: Run) -> Iterator[None]:
    """Context that ends training normally at an update that is not finite, if that was asked."""
    try:
        yield
    except NonFiniteError as error:
        if not run.ends_at_nonfinite:
            raise
        trainer.control.should_training_stop = True
        trainer.control.stop_reason = f"TerminateOnNaN: {first_lines(error).split('. ')[0]}"
        logger.warning("Training ends here (TerminateOnNaN): %s", error)


@contextlib.contextmanager
def wrapped_calls(trainer: TrainerBase) -> Iterator[None]:
    """Context that applies NEFTune noise and gradient checkpointing, if they are enabled."""
    args, model = trainer.args, trainer.model
    noise = neftune.noise(model, args.neftune_noise_alpha)
    again = gradient_checkpointing.recomputed(
        model, trainer.backend, args.gradient_checkpointing, args.gradient_checkpointing_kwargs
    )
    with noise, again:
        yield


def _finish(trainer: TrainerBase, run: Run, memory: dict[str, float]) -> TrainOutput:
    """Log the result, and leave the model with its final weights."""
    state, progress = trainer.state, run.progress
    finite = state.global_step - progress.skipped
    loss = progress.loss_sum / finite if finite > 0 else math.nan
    metrics = run.speed(run.times.total) | memory | {"epoch": state.epoch}
    if run.has_loss:
        metrics["train_loss"] = loss
    trainer.log(metrics)
    # As in Keras, the model holds the evaluation weights from here on.
    evaluation_weights.finalize(trainer.optimizer, trainer.model.trainable_variables)
    trainer.training_weights = False
    if trainer.args.load_best_model_at_end and trainer.interruption is None:
        trainer.callback_handler.tell("phase", "loading the best model")
        best_model.load(trainer)
    trainer.fire("on_train_end")
    return TrainOutput(state.global_step, loss, metrics)


def prepare(trainer: TrainerBase, checkpoint: Checkpoint | None) -> Run:
    """Build model, optimizer and compiled step, and restore the checkpoint if there is one.

    Raises:
        ConfigurationError, DataError: Arguments, data and model do not fit together.
        CheckpointMismatchError: The checkpoint belongs to another model or optimizer.
    """
    args, tell = trainer.args, trainer.callback_handler.tell
    tell("phase", "reading the first batch")
    if trainer.model_init is not None:
        rng.set_seed(args.seed)
        trainer.adopt(trainer.call_model_init())
    elif trainer.bound.is_outdated:
        trainer.adopt(trainer.model)
    names = trainer.bound.label_names
    loader = as_loader(trainer.get_train_dataloader(), label_names=names)
    loader = in_epochs(weighted(loader, trainer.class_weight, names), args)
    trainer.train_dataloader = loader
    plan = _plan(trainer, loader)
    if args.save_strategy != "no":
        warn_of_inexact_resume(loader)
    batches = Batches(loader, names)
    first = batches.peek()
    if first is None:
        raise ConfigurationError("The training data has no batches; see dataloader_drop_last.")
    bound = trainer.bound
    tell("phase", "building the model")
    forward = bound.build(first)
    trainer.backend.check_model(bound.model)
    trainable = trained_variables(bound.model)
    if bound.overridden.train_step:
        custom_step_arguments.check_arguments(trainer)
        custom_steps.build_by_step(trainer.backend, bound.model, first)
    trainable_at_start = TrainableFlags.of(bound.model)
    check_alike(trainer, loader, first, plan.max_steps)
    trainer.captured.new_fit()
    trainer.agreement = Agreement(trainer)
    frozen_base.read(bound.model)
    placement.divide(trainer.backend, args, bound.model)
    optimizer = build_optimizer(trainer, plan.max_steps)
    if (
        not bound.overridden.train_step
    ):  # a user's optimizer may have been built for other trainable variables
        changing_variables.sync_variables(optimizer, bound.model)
    trainer.state = _fresh_state(trainer, plan, loader)
    if bound.metrics is not None:
        bound.metrics.reset()
    progress = run_state.Progress(batch_size=loader.batch_size, num_examples=loader.num_examples)
    if checkpoint is not None:
        tell("phase", f"restoring {checkpoint.path.name}")
        progress = _restore(trainer, checkpoint, optimizer, loader)
        progress.move_to(loader.batch_size)
    start_alike(trainer, optimizer)
    frozen_base.read_blocks(bound.model)

    halted = keras.Variable(0, dtype="int32", trainable=False, name="halted")
    step = live_train_step(trainer, forward, halted, plan, progress)
    explain = None
    if "underflow_overflow" in args.debug:
        count_items = items_counter(trainer.compute_loss_func, names)
        explain = Diagnosis(
            trainer.backend, bound.model, forward, count_items, trainable, bound.variables()
        ).explain
    return Run(
        explain=explain,
        is_compiled=step.has_traced,
        checks=bound.checks(),
        trainable_at_start=trainable_at_start,
        backend=trainer.backend,
        plan=plan,
        batches=batches,
        accumulation=args.gradient_accumulation_steps,
        step=step,
        newest_only=bound.overridden.train_step,
        running_loss=bound.overridden.train_step
        and any(m.name == "loss" for m in bound.model.metrics),
        state=trainer.state,
        progress=progress,
        on_nonfinite=args.on_nonfinite,
        last_checkpoint=lambda: actions.last_checkpoint(trainer),
        limit=lambda: min(
            _updates_until_action(trainer), step.horizon(args.gradient_accumulation_steps)
        ),
        first_step=trainer.state.global_step,
        count_tokens=_token_counter(trainer),
        # As in Keras: a custom step may count its calls in Python.
        block_length=BlockLength.of(1 if bound.overridden.train_step else args.steps_per_execution),
        pin=args.dataloader_pin_memory,
    )


def start_alike(trainer: TrainerBase, optimizer: keras.optimizers.Optimizer) -> None:
    """Start every process with the values of process 0: each has initialised its own model."""
    if current().size == 1:
        return
    variables = [*run_state.model_variables(trainer.model), *trainer.bound.metric_variables]
    for each in (optimizer, *trainer.other_optimizers.values()):
        if division_of(each) is None:
            variables += each.variables
    trainer.backend.copy_from_first(unique([*variables, rng.global_seed_variable()]))
    trainer.alike = True


def _token_counter(trainer: TrainerBase) -> Callable[[Block], int] | None:
    mode, labels = trainer.args.include_num_input_tokens_seen, trainer.bound.label_names
    if mode == "no":
        return None
    padding = getattr(trainer.processing_class, "pad_token_id", None) or 0
    return lambda block: count_tokens(block.chunks, block.updates, mode, labels, padding)


def _plan(trainer: TrainerBase, loader: Loader) -> TrainingPlan:
    args = trainer.args
    if not loader.sized and args.max_steps <= 0:
        why = why_total_is_needed(trainer)
        if why is not None:
            raise ConfigurationError(
                "The training data has no length, so the number of steps cannot be counted, and "
                f"{why} needs it: set max_steps, or steps_per_epoch. "
                f"Received: {type(trainer.train_dataset).__name__}, max_steps={args.max_steps}."
            )
    batches = len(loader) if loader.sized else None
    return make_plan(
        batches, args.gradient_accumulation_steps, args.num_train_epochs, args.max_steps
    )


def _fresh_state(trainer: TrainerBase, plan: TrainingPlan, loader: Loader) -> TrainerState:
    args = trainer.args
    state = TrainerState(
        max_steps=plan.max_steps,
        num_train_epochs=plan.num_epochs,
        logging_steps=resolve_steps(args.logging_steps, plan.max_steps),
        eval_steps=resolve_steps(args.eval_steps or 0, plan.max_steps),
        save_steps=resolve_steps(args.save_steps, plan.max_steps),
        train_batch_size=loader.batch_size,
    )
    if trainer.trial is not None:
        state.is_hyper_param_search, state.trial_name = True, args.run_name
        state.trial_params = dict(trainer.trial.params)
    if args.load_best_model_at_end and args.save_strategy == args.eval_strategy == "steps":
        check_saves_follow_evaluations(state.save_steps, state.eval_steps)
    return state


def _restore_schedule(trainer: TrainerBase, checkpoint: Checkpoint) -> None:
    """Restore the state of a metric-driven schedule."""
    if not metric_driven.is_metric_driven(trainer.lr_scheduler):
        return
    if (state := checkpoint.documents.get("lr_scheduler")) is None:
        raise CheckpointMismatchError(
            f"{checkpoint.path} is from a run whose learning rate was not metric-driven, so it has "
            "no state of the schedule. Resume with the lr_scheduler_type of that run, or start a "
            "new run."
        )
    try:
        trainer.lr_scheduler.load_state(state)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatchError(f"{checkpoint.path}, lr_scheduler: {error}") from None


def _updates_until_action(trainer: TrainerBase) -> int:
    if trainer.agreement.every_step:
        return 1
    wanted = trainer.callback_handler.steps_until_wanted(trainer.state)
    return min(steps_until_due(trainer.args, trainer.state), wanted)


def _saved_state(trainer: TrainerBase, checkpoint: Checkpoint) -> TrainerState:
    """The state of a checkpoint, with the current path of the best one: folders may be moved."""
    state = TrainerState(**validated_json.fields_of(checkpoint, "trainer_state", TrainerState))
    if state.global_step != checkpoint.step:
        validated_json.damaged(
            checkpoint, "trainer_state", f"it is of step {state.global_step}, not {checkpoint.step}"
        )
    if state.best_model_checkpoint is not None:
        name = Path(state.best_model_checkpoint).name
        if parse_checkpoint_name(name) is None:
            validated_json.damaged(checkpoint, "trainer_state", f"the best checkpoint is {name!r}")
        places = [trainer.store.directory / name, checkpoint.path.parent / name]
        state.best_model_checkpoint = str(next((p for p in places if is_folder(p)), places[0]))
        best_model.recall(state, trainer.args.metric_for_best_model)
    return state


def _restore(
    trainer: TrainerBase, checkpoint: Checkpoint, optimizer: Any, loader: Loader
) -> run_state.Progress:
    """Restore the state saved in the checkpoint."""
    if (trained := run_state.trained_in(checkpoint)) is not None:
        # A callback had frozen or unfrozen layers.
        flags = trained[0]
        validated_json.attempt(checkpoint, "trainable", lambda: flags.apply(trainer.model))
        if not trainer.other_optimizers:
            changing_variables.sync_variables(optimizer, trainer.model)
    progress = run_state.restore_run(
        trainer.backend,
        trainer.model,
        optimizer,
        trainer.bound.metric_variables,
        checkpoint,
        trainer.other_optimizers,
    )
    before, now = progress.batch_size, loader.batch_size
    for change in compare_arguments(
        validated_json.mapping(checkpoint, "training_args"),
        trainer.args.to_dict(),
        (before, now) if before and now == trainer.args.total_train_batch_size else None,
    ):
        logger.warning("Resuming with a different setting: %s", change)
    trainer.state.continue_from(_saved_state(trainer, checkpoint))
    _restore_schedule(trainer, checkpoint)
    if trainer.args.restore_callback_states_from_checkpoint:
        states = trainer.state.stateful_callbacks
        validated_json.attempt(
            checkpoint, "trainer_state", lambda: trainer.callback_handler.load_state(states)
        )
        if of_callbacks := checkpoint.arrays.get("callbacks"):
            names = run_state.saved_names(trainer.model, checkpoint)
            trainer.callback_handler.load_arrays(of_callbacks, names)
    if trainer.args.ignore_data_skip:
        progress.batch = 0
    progress.check_length(loader.num_examples, checkpoint.path)
    logger.info("Resuming from %s at step %d.", checkpoint.path, trainer.state.global_step)
    return progress
