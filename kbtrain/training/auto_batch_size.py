"""``auto_find_batch_size``: find micro-batches that fit into memory, with unchanged updates."""

from __future__ import annotations

import copy
import gc
import logging
from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint import Checkpoint, run_state, validated_json
from kbtrain.errors import ConfigurationError, OutOfMemoryError
from kbtrain.optimization import metric_driven
from kbtrain.training.fit import TrainOutput, fit
from kbtrain.utils import rng

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def smaller(batch_size: int, accumulation: int) -> tuple[int, int] | None:
    """The next smaller micro-batch size that divides the samples of an update.

    Args:
        batch_size: Samples of a micro-batch.
        accumulation: Micro-batches of an update.

    Returns:
        New values of both, with the same product; None below one sample.

    Example:
        >>> smaller(64, 1), smaller(6, 4), smaller(1, 8)
        ((32, 2), (4, 6), None)
    """
    update = batch_size * accumulation
    sizes = (size for size in range(batch_size - 1, 0, -1) if update % size == 0)
    return next(((size, update // size) for size in sizes), None)


def find_and_fit(trainer: TrainerBase, checkpoint: Checkpoint | None) -> TrainOutput:
    """Train, restarting with smaller micro-batches until one fits into memory.

    Each attempt starts from the same state, and its updates contain the same samples, so the
    result equals a run that starts with the size found. ``trainer.args`` then holds that size.

    Raises:
        OutOfMemoryError: Even a single sample does not fit.
        ConfigurationError: The Trainer does not control the size of the batches.
    """
    if checkpoint is not None:
        _go_on_with(trainer, validated_json.mapping(checkpoint, "training_args"))
    start = _Start(trainer)
    kept = trainer.store.list()
    while True:
        try:
            return fit(trainer, checkpoint, start.begin)
        except OutOfMemoryError as error:
            if not error.in_training:
                raise
            _choose_smaller(trainer, error)
        # Outside the handler, so that the traceback no longer keeps the failed attempt alive.
        gc.collect()
        trainer.backend.free_memory()
        trainer.saver.settle()
        written = [item for item in trainer.store.list() if item not in kept]
        trainer.store.delete([item for item in written if trainer.store.owns(item[1])])
        start.restore_values()


def _go_on_with(trainer: TrainerBase, saved: dict[str, Any]) -> None:
    """Start with the size that the saved run had found, if its updates had as many samples."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    found = {name: saved.get(name) for name in names}
    batch_size, accumulation = found.values()
    args = trainer.args
    if not isinstance(batch_size, int) or not isinstance(accumulation, int):
        return
    if batch_size * accumulation == (
        args.per_device_train_batch_size * args.gradient_accumulation_steps
    ):
        trainer.args = args.replace(**found)


def _choose_smaller(trainer: TrainerBase, error: OutOfMemoryError) -> None:
    args, loader = trainer.args, trainer.train_dataloader
    if loader is None or loader.batch_size != args.total_train_batch_size:
        raise ConfigurationError(
            "auto_find_batch_size=True cannot make these batches smaller: they come from the data "
            f"({getattr(loader, 'name', 'train_dataset')}) as they are. Make them smaller there, "
            f"or pass samples in place of batches. {error}"
        ) from error
    found = smaller(args.per_device_train_batch_size, args.gradient_accumulation_steps)
    if found is None:
        raise error
    size, accumulation = found
    logger.warning(
        "auto_find_batch_size: %d samples at a time do not fit into memory. Starting again with "
        "per_device_train_batch_size=%d, gradient_accumulation_steps=%d: the same %d samples in "
        "an update.",
        args.total_train_batch_size,
        size,
        accumulation,
        size * accumulation * args.device_count,
    )
    trainer.args = args.replace(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )


class _Start:
    """The state at the start of the first attempt, in host memory, for the next attempts.

    A model from ``model_init`` and an optimizer from the arguments are recreated anyway.
    """

    def __init__(self, trainer: TrainerBase) -> None:
        self._trainer = trainer
        self._variables: list[Any] = []
        self._values: list[Any] = []
        self._random: Any = None
        self._callbacks: Any = None
        self._schedule: Any = None

    def begin(self) -> None:
        """Record the state in the first attempt; restore the random state in later ones."""
        trainer = self._trainer
        if self._random is not None:
            rng.restore_random_state(trainer.backend, *self._random)
            return
        self._random = rng.capture_random_state(trainer.backend)
        self._callbacks = copy.deepcopy(trainer.callback_handler.state())
        if metric_driven.is_metric_driven(trainer.lr_scheduler):
            self._schedule = copy.deepcopy(trainer.lr_scheduler.state())
        if trainer.model_init is None:
            self._variables += run_state.model_variables(trainer.model)
        if trainer.given_optimizers[0] is not None or trainer.bound.compiled:
            assert trainer.optimizer is not None
            self._variables += trainer.optimizer.variables
        self._values = run_state.host_copies(self._variables)

    def restore_values(self) -> None:
        """Restore everything but the random state, which the next attempt consumes first."""
        if self._random is None:  # the attempt failed before the first update
            return
        run_state.restore_values(self._variables, self._values)
        self._trainer.callback_handler.load_state(copy.deepcopy(self._callbacks))
        if self._schedule is not None:
            self._trainer.lr_scheduler.load_state(copy.deepcopy(self._schedule))
