"""Evaluation and prediction with the Trainer's model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kbtrain import distributed
from kbtrain.callbacks.lazy_values import LazyMapping
from kbtrain.checkpoint import run_state
from kbtrain.data import Batches, Loader, as_loader, unpack
from kbtrain.distributed import host, placement
from kbtrain.distributed.agreement import agree
from kbtrain.distributed.same_data import described
from kbtrain.errors import ConfigurationError, DataError, OutOfMemoryError, first_lines
from kbtrain.evaluation.compiled_steps import EvalSteps
from kbtrain.evaluation.eval_loop import EvalSpec, Evaluation
from kbtrain.evaluation.generate import make_generator
from kbtrain.evaluation.results import EvalLoopOutput
from kbtrain.model import precision
from kbtrain.tracing.moment import Moment
from kbtrain.training.agreement import check_weights
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

MAX_UNSIZED = 20_000
"""Maximum number of batches of data without a length, which may be endless."""

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase


def evaluate(
    trainer: TrainerBase,
    steps: EvalSteps,
    dataloader: Any,
    prefix: str,
    gather: bool,
    keep_outputs: bool = False,
    ignore_keys: Sequence[str] | None = None,
) -> EvalLoopOutput:
    """Pass once over a data set with the Trainer's model.

    Args:
        trainer: The Trainer with model, metrics and callbacks.
        steps: The compiled evaluation steps.
        dataloader: Loader or iterable of batches.
        prefix: Prefix of every metric's name, joined by an underscore.
        gather: Whether to copy outputs and labels to the host, for ``compute_metrics``.
        keep_outputs: Whether to return them; the data then need not have labels.
        ignore_keys: Outputs to leave out, for a model that returns a dict.

    Raises:
        ConfigurationError: The prefix is not a string, or ``ignore_keys`` not a list of strings.
        DataError: There is no data, or it does not fit the model.
    """
    if not isinstance(prefix, str) or not prefix:
        raise ConfigurationError(
            "metric_key_prefix must be a string such as 'eval', the prefix of every metric's "
            f"name. Received: {prefix!r}."
        )
    check_ignore_keys(ignore_keys)
    bound, backend = trainer.bound, trainer.backend
    trainer.captured.due |= not trainer.is_in_train
    steps.renew(trainer.captured.check())
    policy = None if trainer.is_in_train else trainer.args.full_eval_policy
    alone = distributed.working("evaluation")
    with (
        contextlib.nullcontext() if trainer.is_in_train else alone,
        placement.settings(backend, trainer.args, bound.model),
        precision.computing_in(bound.model, policy),
    ):
        args, names = trainer.args, bound.label_names
        loader = trainer.eval_dataloader = as_loader(dataloader, label_names=names)
        max_batches = None if keep_outputs else args.eval_max_steps
        _check_ends(loader, max_batches, keep_outputs)
        batches = Batches(loader, names)
        first = batches.peek()
        if first is None:
            raise DataError(
                "The evaluation data has no samples. Pass a data set with at least one, or, with "
                "dataloader_drop_last, at least one full batch."
            )
        bound.build(first)
        if current().size > 1:
            facts = {"the first batch": described(first), "the samples": loader.num_examples}
            agree(current(), backend.exchange, facts)
        if current().size > 1 and not trainer.alike:  # each process initialised its own model
            backend.copy_from_first(run_state.model_variables(trainer.model))
            trainer.alike = True
        check_weights(trainer)
        with_loss = not keep_outputs or unpack(first, names).y is not None
        spec = EvalSpec(
            prefix=prefix,
            with_loss=with_loss,
            compute_metrics=trainer.compute_metrics if gather else None,
            keep_outputs=keep_outputs,
            batchwise=args.batch_eval_metrics,
            concatenate=args.eval_do_concat_batches,
            include=args.include_for_metrics,
            label_names=names,
            expected=loader.num_examples,
            max_batches=max_batches,
            bound=None if loader.sized or max_batches is not None else MAX_UNSIZED,
            batches_per_call=args.eval_accumulation_steps,
            generate=_generator(trainer) if gather and args.predict_with_generate else None,
        )
        metrics = bound.evaluation_metrics if with_loss else None
        # During training the metrics accumulate for the next log, so their state is saved and
        # restored, as are the seeds: an evaluation must not change later random numbers.
        kept = [*bound.advancing_variables]
        kept += bound.metric_variables if trainer.is_in_train else []
        saved = run_state.host_copies(kept)
        if metrics is not None:
            metrics.reset()
        trainer.position.set(Moment.of(trainer.state.global_step, trainer.state.epoch))

        def so_far() -> dict[str, Any]:
            return evaluation.loss_so_far() | ({} if metrics is None else metrics.result())

        evaluation = Evaluation(
            backend,
            steps.get(with_loss, spec.gather_from_model, policy, ignore_keys or ()),
            spec,
            before_batches=lambda: trainer.fire("on_prediction_step_begin"),
            on_batches=lambda count: _between_batches(trainer, count, so_far),
            every_batch=host.any_of(
                backend, {"batch": trainer.callback_handler.need_every_batch()}
            )["batch"],
            checks=bound.checks(with_labels=with_loss),
            pin=args.dataloader_pin_memory,
        )
        try:
            with trainer.evaluation_weights():
                return evaluation.run(batches, metrics)
        except Exception as error:
            if not backend.is_oom(error):
                raise
            raise OutOfMemoryError(
                f"The evaluation did not fit into memory: {first_lines(error)}. Lower "
                f"per_device_eval_batch_size. Received: {args.eval_batch_size}."
            ) from error
        finally:
            run_state.restore_values(kept, saved)
            trainer.captured.settle()


def _check_ends(loader: Loader, max_batches: int | None, keep_outputs: bool) -> None:
    """Check that endless data has a limit on the number of batches."""
    if max_batches is None and getattr(loader, "endless", False):
        take = "Take a part of it (`.take(n)` of a tf.data.Dataset; leave out `.repeat()`)"
        raise ConfigurationError(
            f"{getattr(loader, 'name', 'The data')} repeats endlessly, so its evaluation would "
            f"never finish. {take}{'.' if keep_outputs else ', or set eval_max_steps.'}"
        )


def check_ignore_keys(keys: Any) -> None:
    """Check that ``ignore_keys`` is a list of names, or None.

    Raises:
        ConfigurationError: It is not.
    """
    is_list = isinstance(keys, list | tuple | set | frozenset)
    if keys is not None and not (is_list and all(isinstance(key, str) for key in keys)):
        raise ConfigurationError(
            "ignore_keys must be a list of keys of the model's outputs, such as ['hidden']. "
            f"Received: ignore_keys={_shortened(keys)}. (A prefix is written "
            "metric_key_prefix=..., and data with labels is one argument: evaluate((x, y)).)"
        )


def _shortened(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"a {type(value).__name__}"


def _between_batches(
    trainer: TrainerBase, count: int, so_far: Callable[[], dict[str, Any]]
) -> None:
    """After each call: fire ``on_prediction_step``, and abort if the run must stop."""
    trainer.fire("on_prediction_step", batches=count, metrics=LazyMapping(so_far))
    trainer.stop_signals.between_batches(lambda: trainer.agreement.reason_to_abandon())


def _generator(trainer: TrainerBase) -> Callable[[Any], Any]:
    return make_generator(trainer.model, trainer.backend, trainer.args)
