"""Stochastic weight averaging: the mean of the weights at several moments of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.schedule import (
    check_count,
    check_unit,
    epochs_done,
    is_between_epochs,
)
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.data import Batches, as_loader, map_structure, micro_batches, unpack
from kbtrain.errors import ConfigurationError
from kbtrain.model.variable_names import name_variables
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")


class WeightAveraging(TrainerCallback):
    """Stochastic weight averaging: the model ends with the mean of the weights of a run.

    After ``start``, and from then on every ``every`` epochs or updates, the trainable weights are
    added to an equal average, in float32 (float64 for such weights), on the device. It is part of
    checkpoints, so a resumed run continues it exactly. For an exponential average use ``ema`` in
    ``TrainingArguments``.

    Reference: Izmailov et al., 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization" (arXiv:1803.05407). They use a high constant learning rate from ``start`` on.

    Args:
        start: Epochs (or updates) done at the first average.
        every: Epochs (or updates) between two averages.
        unit: "epochs" or "steps".
        evaluate: Whether evaluations use the average as well. Checkpoints then hold it for
            ``load_weights`` and ``load_best_model_at_end``.
        batch_norm_batches: Batches of the training data from which the statistics of
            ``BatchNormalization`` layers are computed again for the average: means over these
            batches of what the layers see in training. 0 keeps those of the training.

    Raises:
        ConfigurationError: An argument is invalid; when training begins, the run cannot average.

    Attributes:
        count: The number of averaged weights.
    """

    decides_alike = True
    every_step = False

    def __init__(
        self,
        start: int,
        every: int = 1,
        unit: str = "epochs",
        evaluate: bool = False,
        batch_norm_batches: int = 0,
    ) -> None:
        owner = "WeightAveraging"
        self.unit = check_unit(unit, owner)
        self.start = check_count(start, "start", owner, 1)
        self.every = check_count(every, "every", owner, 1)
        self.batch_norm_batches = check_count(batch_norm_batches, "batch_norm_batches", owner)
        self.evaluate = evaluate
        self.count = 0
        self._averages: dict[str, keras.Variable] = {}
        self._counts: dict[str, int] = {}
        self._arrays: Mapping[str, np.ndarray] | None = None

    # --- the average ------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin without an average, or continue the one of the checkpoint."""
        trainer, model = kwargs["trainer"], kwargs["model"]
        if args.load_best_model_at_end and not self.evaluate:
            raise ConfigurationError(
                "WeightAveraging gives the model the average at the end, and "
                "load_best_model_at_end=True the best trained weights. Set evaluate=True, which "
                "evaluates and saves averages, or load_best_model_at_end=False."
            )
        if any(trainer.backend.owned_blocks(v) is not None for v in model.variables):
            raise ConfigurationError(
                "WeightAveraging needs whole weights on every process, and here they are divided "
                "among devices. Use ema in TrainingArguments, or no division of the weights."
            )
        arrays, self._arrays = self._arrays, None
        self._averages, self._counts = {}, {}
        for name, variable in name_variables(model.variables).items():
            if state.global_step and arrays is not None and f"average/{name}" in arrays:
                average = self._average_of(name, variable)
                average.assign(np.asarray(arrays[f"average/{name}"]))
                self._counts[name] = int(np.asarray(arrays[f"count/{name}"]))
        self.count = max(self._counts.values(), default=0)

    def _average_of(self, name: str, variable: keras.Variable) -> keras.Variable:
        if name not in self._averages:
            dtype = (
                "float64"
                if keras.backend.standardize_dtype(variable.dtype) == "float64"
                else ("float32")
            )
            self._averages[name] = keras.Variable(
                ops.cast(ops.copy(variable.value), dtype), dtype=dtype, trainable=False
            )
        return self._averages[name]

    def _add(self, model: Any) -> None:
        for name, variable in name_variables(model.variables).items():
            if not variable.trainable:
                continue
            average = self._average_of(name, variable)
            count = self._counts[name] = self._counts.get(name, 0) + 1
            value = ops.cast(variable.value, average.dtype)
            average.assign(average.value + (value - average.value) / count)
        self.count += 1

    def _is_due(self, done: int) -> bool:
        return done >= self.start and (done - self.start) % self.every == 0

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average after an update."""
        if self.unit == "steps" and self._is_due(state.global_step):
            self._add(kwargs["model"])

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average after an epoch."""
        trainer = kwargs["trainer"]
        complete = is_between_epochs(trainer)
        if self.unit == "epochs" and complete and self._is_due(epochs_done(trainer)):
            self._add(kwargs["model"])

    def next_step(self, state: TrainerState) -> int | None:
        """The next update after which weights are averaged."""
        if self.unit == "epochs":
            return None
        passed = state.global_step - self.start
        return self.start if passed < 0 else state.global_step + self.every - passed % self.every

    # --- its use ----------------------------------------------------------------------------------

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model the average, unless the best of several evaluated ones was loaded."""
        trainer = kwargs["trainer"]
        if not self.count:
            logger.warning(
                "WeightAveraging: the run ended before the first average (after %d %s); the model "
                "keeps its last weights.",
                self.start,
                self.unit,
            )
        elif trainer.loaded_best is None and trainer.interruption is None:
            self._assign(kwargs["model"])
            self._renew_statistics(trainer)
            updates = f"{self.count} update{'s' if self.count > 1 else ''}"
            trainer.weights_note = f"the average of the weights of {updates}"
            trainer.weights_step = state.global_step if self.evaluate else None
            logger.info("The model holds the average of %d weights.", self.count)

    @contextlib.contextmanager
    def evaluating(self, trainer: Any) -> Iterator[bool]:
        """Context in which the model holds the average, if evaluations use it."""
        if not (self.evaluate and self.count and trainer.training_weights):
            yield False
            return
        model = trainer.model
        changed = [*model.trainable_variables]
        if self.batch_norm_batches:
            changed = [*model.variables, *trainer.bound.advancing_variables]
        changed = list({id(v): v for v in changed}.values())
        before = [ops.copy(v.value) for v in changed]
        try:
            self._assign(model)
            self._renew_statistics(trainer)
            yield True
        finally:
            for variable, value in zip(changed, before, strict=True):
                variable.assign(value)

    def _assign(self, model: Any) -> None:
        named = name_variables(model.variables)
        for name, average in self._averages.items():
            named[name].assign(ops.cast(ops.copy(average.value), named[name].dtype))

    def _renew_statistics(self, trainer: Any) -> None:
        """Compute the statistics of ``BatchNormalization`` for the weights in the model."""
        if not self.batch_norm_batches:
            return
        model = trainer.model
        layers = [
            layer
            for layer in walk_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
        ]
        momenta = [layer.momentum for layer in layers]
        names = trainer.bound.label_names
        loader = as_loader(trainer.get_train_dataloader(), label_names=names)
        batches = Batches(loader, names)
        try:
            with contextlib.closing(batches):
                for index, batch in enumerate(_first(batches, self.batch_norm_batches)):
                    for layer in layers:  # the mean over the batches so far
                        layer.momentum = index / (index + 1)
                    x = unpack(batch, names).x
                    model(map_structure(ops.convert_to_tensor, x), training=True)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum

    # --- state ------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """The average and the number of weights in it, by variable."""
        values = {
            f"average/{name}": np.array(ops.convert_to_numpy(average.value))
            for name, average in self._averages.items()
        }
        counts = {f"count/{name}": np.array(count) for name, count in self._counts.items()}
        return values | counts

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Remember what a checkpoint holds; ``on_train_begin`` uses it."""
        self._arrays = dict(arrays)


def _first(batches: Batches, count: int) -> Iterator[Any]:
    """The first batches of the training data."""
    for block in batches.blocks(0, 0, 1, lambda: 1):
        for batch in micro_batches(block.chunks, 0):
            yield batch
            count -= 1
            if not count:
                return
