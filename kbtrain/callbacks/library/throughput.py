"""Floating-point operations per second, and the share of the device's peak: the MFU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.device_peaks import peak_flops
from kbtrain.callbacks.library.schedule import warn_without_logs
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.data import counting_leaf, signature, unpack, with_none, without_none
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.model.forward import items_counter
from kbtrain.model.losses.output_losses import counts_of, value_of
from kbtrain.model.losses.pairs import LossPair
from kbtrain.model.wrappers import gradient_checkpointing
from kbtrain.utils.best_effort import best_effort

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class ThroughputCallback(TrainerCallback):
    """Logs ``flops_per_second`` of the training and, on a known accelerator, ``mfu``.

    Model FLOPs utilization is the share of the devices' peak that the model's own products and
    convolutions reach, forward and backward. They are counted once for each shape of a batch, by
    tracing forward pass and gradients; what gradient checkpointing computes again, and the
    optimizer, do not count. The peak is that of products in the model's precision.

    Each log has the mean since the last one, without evaluations, saves, and calls that compile.
    Nothing is read from the device for it.

    Args:
        peak_flops: Floating-point operations a second of one device at its peak, for one that is
            not known.
        flops_per_sample: Floating-point operations of forward and backward pass for one sample;
            None counts them. Necessary if the model has a ``train_step`` of its own or kernels
            that the framework cannot count.

    Attributes:
        flops_per_second: The mean over this call of ``fit``; None before.
        mfu: The same as a share of the peak; None if that is unknown.

    Raises:
        ConfigurationError: A number is not positive.
    """

    every_step = False
    decides_alike = True

    def __init__(
        self, peak_flops: float | None = None, flops_per_sample: float | None = None
    ) -> None:
        self._peak_given = _check("peak_flops", peak_flops)
        self._flops_per_sample = _check("flops_per_sample", flops_per_sample)
        self._peak: float | None = None
        self._restart(0.0)

    def _restart(self, clock: float) -> None:
        self._counted: dict[Hashable, float] = {}
        self._works = True
        self._step = 0
        self._since = self._entered = clock
        self._flops = self._all_flops = self._all_seconds = 0.0
        self._compiles = False

    @property
    def flops_per_second(self) -> float | None:
        """The mean over this call of ``fit``."""
        return self._all_flops / self._all_seconds if self._all_seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """The mean over this call of ``fit`` as a share of the peak."""
        speed = self.flops_per_second
        return None if speed is None or self._peak is None else speed / self._peak

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out the peak."""
        trainer = kwargs["trainer"]
        self._restart(_clock(trainer))
        self._step = state.global_step
        warn_without_logs("ThroughputCallback", args, state)
        device = trainer.backend.device_info(args.chosen_device)
        dtype = trainer.model.dtype_policy.compute_dtype
        peak = self._peak_given or peak_flops(device, dtype, trainer.backend.tf32_is_on())
        self._peak = None if peak is None else peak * args.device_count * args.world_size
        if self._flops_per_sample is None and trainer.bound.overridden.train_step:
            self._works = False
            logger.warning(
                "ThroughputCallback cannot count the operations of a model's own train_step. "
                "Pass flops_per_sample=... to it."
            )

    @best_effort
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note whether the next call compiles."""
        trainer = kwargs["trainer"]
        self._entered, self._step = _clock(trainer), state.global_step
        self._compiles = not trainer.current_run.next_is_compiled

    @best_effort
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the operations of the updates since the last event."""
        if not self._works:
            return
        trainer, updates = kwargs["trainer"], state.global_step - self._step
        try:
            flops = updates * sum(self._of_batch(trainer, batch) for batch in kwargs["batch"])
        except Exception as error:
            self._works = False
            logger.warning(
                "The floating-point operations of an update could not be counted (%s: %s). Pass "
                "flops_per_sample=... to ThroughputCallback.",
                type(error).__name__,
                first_lines(error, 1),
            )
            return
        if self._compiles:
            self._since += _clock(trainer) - self._entered
        else:
            self._flops += flops

    def log_values(self, trainer: Any) -> dict[str, float]:
        """What a log of the training has from here: the speed since the last one."""
        clock = _clock(trainer)
        seconds, flops = clock - self._since, self._flops
        self._since, self._flops = clock, 0.0
        if not flops or seconds <= 0:
            return {}
        self._all_flops += flops
        self._all_seconds += seconds
        found = {"flops_per_second": float(f"{flops / seconds:.6g}")}
        if self._peak is not None:
            found["mfu"] = float(f"{flops / seconds / self._peak:.6g}")
        return found

    def _of_batch(self, trainer: Any, batch: Any) -> float:
        """The operations of one micro-batch on all devices."""
        batch = without_none(batch)
        key = signature(batch)
        if key not in self._counted:
            if self._flops_per_sample is not None:
                rows = _rows(batch, trainer.bound.label_names)
                self._counted[key] = self._flops_per_sample * rows
            else:
                self._counted[key] = count_flops(trainer, batch)
        return self._counted[key]


def count_flops(trainer: Any, batch: Any) -> float:
    """The floating-point operations of forward and backward pass for a micro-batch.

    Args:
        trainer: The Trainer; its model is built.
        batch: The micro-batch, NumPy arrays, without None.
    """
    backend, bound = trainer.backend, trainer.bound
    trainable = bound.model.trainable_variables
    count_items = items_counter(trainer.compute_loss_func, bound.label_names)

    def objective(batch: Any) -> tuple[Any, Any]:
        items = None if count_items is None else count_items(batch, 1)
        loss, _, _ = bound.forward(batch, items, training=True)
        total = loss.sum if isinstance(loss, LossPair) else value_of(loss, counts_of(loss))
        return total, None

    def step(batch: Any) -> Any:
        loss, _, gradients, _ = backend.value_and_grad(objective, trainable, batch)
        return loss, gradients

    counter: Callable[..., float] = backend.count_flops
    with gradient_checkpointing.switched_off():
        return counter(step, bound.variables(), batch)


def _rows(batch: Any, label_names: Any) -> int:
    return int(counting_leaf(*unpack(with_none(batch), label_names)).shape[0])


def _clock(trainer: Any) -> float:
    """Seconds of this call of ``fit`` without evaluations and saves."""
    times = trainer.current_run.times
    return float(times.total - times.other)


def _check(name: str, value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if value is not None and not number:
        raise ConfigurationError(
            f"ThroughputCallback needs {name} above 0, or None. Received: {value!r}."
        )
    return None if value is None else float(value)
