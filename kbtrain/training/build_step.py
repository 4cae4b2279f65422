"""Builds the train step of a run, and rebuilds it when the Trainer's parts change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.callbacks.state import TrainingPlan
from kbtrain.checkpoint.run_state import Progress
from kbtrain.errors import ConfigurationError
from kbtrain.model import custom_steps, lora
from kbtrain.model.forward import ForwardPass, items_counter
from kbtrain.model.variables import unique
from kbtrain.optimization import changing_variables
from kbtrain.tracing.moment import Moment
from kbtrain.tracing.position import Decisions
from kbtrain.tracing.retrace import LiveStep
from kbtrain.training.optimizer import clips_above
from kbtrain.training.train_step import make_train_step
from kbtrain.utils import rng

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase


def trained_variables(model: keras.Model) -> list[keras.Variable]:
    """The trainable variables of the model.

    Raises:
        ConfigurationError: There are none.
    """
    trainable: list[keras.Variable] = model.trainable_variables
    if not trainable:
        raise ConfigurationError(
            f"The model {model.name!r} has no trainable variables: there is nothing to "
            "train. Set `trainable = True` on the layers that should learn."
        )
    return trainable


LONG = 1 << 31
"""The assumed number of updates of a run whose data has no length."""


def live_train_step(
    trainer: TrainerBase,
    forward: ForwardPass,
    halted: keras.Variable,
    plan: TrainingPlan,
    progress: Progress,
) -> LiveStep:
    """The compiled train step of a run, which is retraced when Python values change.

    Args:
        trainer: The Trainer; model and optimizer must be built.
        forward: The forward pass.
        halted: See ``make_train_step``.
        plan: The number of updates and epochs.
        progress: The run's progress.
    """
    traces, accumulation = trainer.traces, trainer.args.gradient_accumulation_steps

    # A custom step may train different parts of the model with different optimizers.
    own = trainer.bound.overridden.train_step
    follows = not own or changing_variables.has_all(trainer.optimizer, trainer.model)

    max_grad_norm = 0.0 if own else clips_above(trainer)

    def build(decisions: Decisions) -> Callable[[Any, int], dict[str, Any]]:
        args, bound, optimizer = trainer.args, trainer.bound, trainer.optimizer
        assert optimizer is not None
        trained = trained_variables(bound.model)
        lora.note_trained(bound.model, trained)
        if follows and not trainer.other_optimizers:
            changing_variables.sync_variables(optimizer, bound.model)
        optimizers = [optimizer, *trainer.other_optimizers.values()]
        state = [*bound.variables(), *(v for each in optimizers for v in each.variables), halted]
        variables = unique(state)
        trainer.backend.place(variables, args.chosen_device)
        step = (
            _own_step(trainer, halted, variables)
            if own
            else make_train_step(
                trainer.backend,
                traces.forward(forward, rng.global_seed_variable()),
                items_counter(trainer.compute_loss_func, bound.label_names),
                optimizer,
                trained,
                bound.metrics,
                max_grad_norm,
                args.on_nonfinite,
                halted,
                forward.has_terms,
            )
        )

        def update(chunks: list[dict[str, Any]]) -> dict[str, Any]:
            result = step(chunks)
            trainer.position.advance(sum(map(_micro_batches, chunks)))
            return result

        traced = traces.step(update, decisions, halted)
        backend, jit = trainer.backend, args.jit_compile
        compiled: Callable[[Any, int], dict[str, Any]]
        if own:
            eagerly = bool(bound.model.run_eagerly)
            compiled = backend.compile_model_steps(traced, variables, jit, eagerly)
        else:
            compiled = backend.compile_steps(traced, variables, jit, plan.max_steps or LONG)
        return compiled

    def moment(micro_batches: int) -> Moment:
        batches = plan.batches_per_epoch or plan.max_steps * accumulation or 1 << 30
        return Moment(
            trainer.state.global_step, progress.epoch, progress.batch, batches, micro_batches
        )

    return LiveStep(build, trainer.position, trainer.captured, moment)


def _own_step(
    trainer: TrainerBase, halted: keras.Variable, variables: list[keras.Variable]
) -> Callable[[Any], dict[str, Any]]:
    """The step of a model with a custom ``train_step``."""
    metrics = trainer.bound.metrics
    assert isinstance(metrics, custom_steps.ModelMetrics)
    return custom_steps.make_train_step(
        trainer.backend, trainer.model, metrics, trainer.args.on_nonfinite, halted, variables
    )


def _micro_batches(chunk: dict[str, Any]) -> int:
    if "single" in chunk:
        return 1
    length: int = keras.tree.flatten(chunk["stacked"])[0].shape[0]
    return length
