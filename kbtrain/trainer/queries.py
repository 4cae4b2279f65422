"""The Trainer's methods that answer a question and change nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.data import as_loader
from kbtrain.errors import ConfigurationError
from kbtrain.model import build as building
from kbtrain.model.bound_model import BoundModel
from kbtrain.optimization.factory import learning_rates

if TYPE_CHECKING:
    from kbtrain.callbacks.state import TrainerState
    from kbtrain.config.training_args import TrainingArguments


class QuestionMethods:
    """Methods of ``Trainer`` that only look."""

    args: TrainingArguments
    state: TrainerState
    bound: BoundModel
    optimizer: keras.optimizers.Optimizer | None

    @property
    def label_names(self) -> list[str]:
        """Keys of a batch that hold labels: ``args.label_names``, or the usual one."""
        return ["labels"] if self.args.label_names is None else list(self.args.label_names)

    def is_world_process_zero(self) -> bool:
        """Whether this process is the first of all, which writes what is written once."""
        return self.state.is_world_process_zero

    def is_local_process_zero(self) -> bool:
        """Whether this process is the first of its machine."""
        return self.state.is_local_process_zero

    def get_total_train_batch_size(self, args: TrainingArguments | None = None) -> int:
        """Samples in one update: per device, times accumulation, times processes.

        Args:
            args: Arguments other than the Trainer's own.
        """
        args = self.args if args is None else args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def get_learning_rates(self) -> list[float]:
        """The learning rates of the next update, each that some variable has once.

        Raises:
            ConfigurationError: There is no optimizer yet: ``fit`` makes it.
        """
        if self.optimizer is None:
            raise ConfigurationError("There is no optimizer before fit() has begun.")
        return learning_rates(self.optimizer, self.bound.model.trainable_variables)

    def get_decay_parameter_names(self, model: keras.Model | None = None) -> list[str]:
        """Paths of the trainable variables that weight decay applies to.

        Args:
            model: A model other than the Trainer's own.
        """
        return building.decay_parameter_names(self.bound.model if model is None else model)

    def get_num_trainable_parameters(self) -> int:
        """Number of trainable scalars in the model."""
        return sum(math.prod(v.shape) for v in self.bound.model.trainable_variables)

    def num_examples(self, dataloader: Any) -> int | None:
        """Samples in an epoch of ``dataloader``; None if it does not know."""
        return as_loader(dataloader).num_examples
