"""``TrainerBase``: the parts of a run, logging, and the methods that users may override.

The loop, evaluation and actions depend on this class only. ``Trainer`` adds construction and the
methods that users call.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.callbacks.handler import CallbackHandler
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.checkpoint import CheckpointStore, run_state
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer
from kbtrain.checkpoint.storage.faults import is_folder
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import ColumnFilter, Loader, as_loader, task_preprocessing
from kbtrain.data.plain_values import plain_values
from kbtrain.distributed import placement
from kbtrain.errors import CheckpointError, ConfigurationError
from kbtrain.hub.pusher import HubPusher
from kbtrain.model import build as building
from kbtrain.model.bound_model import BoundModel
from kbtrain.model.forward import default_loss
from kbtrain.model.losses.pairs import as_extra
from kbtrain.optimization import factory, weight_decay
from kbtrain.optimization.evaluation_weights import swapped_in
from kbtrain.optimization.factory import learning_rates
from kbtrain.report.record import RunRecord
from kbtrain.tracing.captured import CapturedValues
from kbtrain.tracing.position import Position
from kbtrain.tracing.retrace import Traces
from kbtrain.training.agreement import Agreement
from kbtrain.training.dataloaders import (
    evaluation_set,
    is_named_datasets,
    make_loader,
    padding_collator,
)
from kbtrain.training.run import Run
from kbtrain.training.stop_signals import StopSignals


class TrainerBase(ABC):
    """The interface of a Trainer towards the loop and the evaluation.

    Attributes:
        args: The arguments.
        backend: The backend in use.
        bound: The model with its loss and metrics.
        captured: The Python values that the compiled steps have captured.
        traces: Prepares a step for tracing.
        position: The position of the run, for traced code.
        store: The checkpoints of ``args.output_dir``.
        saver: Writes checkpoints.
        pusher: Pushes to the Hub; None without ``push_to_hub``.
        stop_signals: Requests to stop, from signals and ``max_time``.
        agreement: What several processes decide together in the running ``fit``.
        interruption: The reason why the run ended early, or None.
        resume_requested: ``resume_from_checkpoint`` of the last call of ``fit``.
        resumed_from: The checkpoint that the run continues from, or None.
        loaded_best: The best checkpoint, if its weights were loaded at the end of ``fit``.
        weights_note: Which weights a callback gave the model at the end of ``fit``, a phrase that
            fits after "the model holds"; None if none did.
        weights_step: The update at which these weights were evaluated and saved; None if they
            were not, or if there is no ``weights_note``.
        fit_began: When the last call of ``fit`` began, by ``time.perf_counter``.
        state: The progress of the run, as callbacks see it; saved in every checkpoint.
        record: The record of the run, which its report is made of; callbacks may add sections.
        control: Requests of callbacks to the loop.
        current_run: The running ``fit``, or None.
        is_in_train: Whether ``fit`` is running.
        training_weights: Whether the model holds the weights in training, which may differ from
            the evaluation weights.
        alike: Whether the model has the same values on all processes.
        optimizer: The optimizer of the last ``fit``; None before.
        other_optimizers: Further optimizers of a model with a custom ``train_step``, by name.
        lr_scheduler: The schedule, or None.
        num_training_steps: Updates of the run; 0 if unknown.
        given_optimizers: The argument ``optimizers`` of the Trainer.
        given_loss: The argument ``loss``, resolved.
        given_loss_weights: The argument ``loss_weights``.
        given_metrics: The arguments ``metrics`` and ``weighted_metrics``.
        trial: The trial, during a hyperparameter search.
        ignore_keys_for_eval: See ``Trainer.fit``.
    """

    args: TrainingArguments
    backend: Backend
    bound: BoundModel
    captured: CapturedValues
    traces: Traces
    position: Position
    store: CheckpointStore
    saver: AsyncCheckpointer
    pusher: HubPusher | None = None
    stop_signals: StopSignals
    agreement: Agreement
    interruption: str | None = None
    resume_requested: Any = None
    resumed_from: Path | None = None
    loaded_best: Path | None = None
    weights_note: str | None = None
    weights_step: int | None = None
    fit_began: float = 0.0
    state: TrainerState
    control: TrainerControl
    record: RunRecord
    callback_handler: CallbackHandler
    current_run: Run | None = None
    is_in_train: bool = False
    training_weights: bool = False
    alike: bool = False
    optimizer: keras.optimizers.Optimizer | None = None
    other_optimizers: dict[str, keras.optimizers.Optimizer]
    lr_scheduler: Any = None
    num_training_steps: int = 0
    given_optimizers: tuple[Any, Any]
    given_loss: Any
    given_loss_weights: Any
    given_metrics: tuple[Any, Any]
    trial: Any = None
    ignore_keys_for_eval: Sequence[str] | None = None
    train_dataset: Any
    eval_dataset: Any
    train_dataloader: Loader | None = None
    eval_dataloader: Loader | None = None
    class_weight: Mapping[int, float] | None
    data_collator: Callable[[list[Any]], Any] | None
    model_init: Callable[..., keras.Model] | None
    compute_loss_func: Callable[..., Any] | None
    compute_metrics: Callable[..., Any] | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    processing_class: Any
    _columns: ColumnFilter | None
    _tracked: dict[str, Any]

    @abstractmethod
    def adopt(self, model: Any) -> None:
        """Bind a model; its compiled loss and metrics are used unless others were passed."""

    @abstractmethod
    def fit(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        ignore_keys_for_eval: Sequence[str] | None = None,
    ) -> Any:
        """Train; see ``Trainer.fit``."""

    @abstractmethod
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, Any]:
        """Evaluate, log the result and return it."""

    @property
    def model(self) -> keras.Model:
        """The model in training. Another one may be assigned."""
        return self.bound.model

    @model.setter
    def model(self, model: keras.Model) -> None:
        self.adopt(model)

    def evaluation_sets(self) -> dict[str, Any]:
        """The evaluation sets by name, "eval" if there is one without; empty if there is none."""
        data = self.eval_dataset
        if is_named_datasets(data):
            return dict(data)
        return {} if data is None else {"eval": data}

    @property
    def loss(self) -> Any:
        """The loss in use: the one passed to the Trainer, or that of the compiled model."""
        return self.bound.loss

    def _callback_context(self) -> dict[str, Any]:
        """The keyword arguments of every event; device values are fetched on first access."""
        run = self.current_run
        return dict.fromkeys(("batch", "loss", "metrics")) | {
            **({} if run is None else run.newest(self.bound.metrics)),
            "trainer": self,
            "model": self.model,
            "processing_class": self.processing_class,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": self.train_dataloader,
            "eval_dataloader": self.eval_dataloader,
        }

    # --- logging and events --------------------------------------------------------------------

    def track(self, name: str, value: Any) -> None:
        """Log the mean of ``value`` over the updates; call it where the loss is computed.

        Args:
            name: The name in the logs (prefixed with ``eval_`` in evaluations).
            value: A number, or a tensor whose mean is taken.

        Raises:
            ConfigurationError: The name is reserved, or the value is not numeric.
        """
        self._tracked[name] = as_extra(name, value, "track() got")

    def log(self, logs: Mapping[str, Any], start_time: float | None = None) -> None:
        """Add an entry to ``state.log_history`` and fire ``on_log``.

        Args:
            logs: Names and numbers.
            start_time: Accepted for compatibility with Transformers; unused, as training logs
                include the speed already.
        """
        entry = {**plain_values(logs, "log() got"), "epoch": self.state.epoch}
        self.state.append_log(entry)
        self.fire("on_log", logs=entry)

    def fire(self, event: str, **kwargs: Any) -> None:
        """Call the method ``event`` of all callbacks."""
        self.captured.after_event(event)
        self.control = self.callback_handler.fire(
            event, self.args, self.state, self.control, **kwargs
        )

    # --- overridable methods --------------------------------------------------------------------

    def compute_loss(
        self,
        model: keras.Model,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the loss of one micro-batch. Override for a custom loss; traced into the step.

        Args:
            model: The model to call on the inputs; the ``training`` flag is already set.
            inputs: A batch in the structure of the data set, as tensors.
            return_outputs: Whether to return ``(loss, outputs)``; always True from the Trainer.
            num_items_in_batch: Labels in the whole update, if ``compute_loss_func`` takes it.

        Returns:
            The loss: a scalar (mean over the batch), per-element losses, ``(sum, count)``, or one
            of these with a dict of values to log.
        """
        loss: Any
        if self.bound.overridden.compute_loss and self.bound.forward is not None:
            loss, outputs = self.bound.forward.model_loss(inputs)
        else:
            loss, outputs = default_loss(
                model,
                inputs,
                num_items_in_batch,
                self.loss,
                self.bound.loss_weights,
                self.compute_loss_func,
                self.bound.label_names,
            )
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """The training batches; may return any iterable of batches."""
        if self.train_dataset is None:
            raise ConfigurationError("fit() needs a train_dataset. Received: None.")
        return self._make_loader(self.train_dataset, "train_dataset", train=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation set, in order; may return any iterable of batches."""
        data = evaluation_set(self.eval_dataset, eval_dataset)
        return self._make_loader(data, "eval_dataset", train=False)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of a set to predict, in order; may return any iterable of batches."""
        return self._make_loader(test_dataset, "test_dataset", train=False)

    def _make_loader(self, data: Any, name: str, train: bool) -> Loader:
        collate = self.data_collator or padding_collator(self.processing_class, data)
        inputs = self.bound.inputs()
        columns, names = self._columns, building.input_names(self.model)
        if self.data_collator is None and task_preprocessing.preprocesses(self.model, data, names):
            data, collate = task_preprocessing.preprocessed(self.model, data)
            columns = None  # it takes inputs other than the model's
        return make_loader(data, self.args, collate, name, train, columns, inputs)

    def create_scheduler(self, num_training_steps: int) -> Any:
        """Create the learning-rate schedule for a run of ``num_training_steps`` updates."""
        return factory.make_schedule(self.args, num_training_steps)

    def create_optimizer(self) -> keras.optimizers.Optimizer:
        """Create the optimizer of ``args.optim``, without decay of norms and biases."""
        return factory.make_optimizer(
            self.args, self.lr_scheduler, self.model, self.num_training_steps
        )

    def call_model_init(self) -> keras.Model:
        """Create a model with ``model_init``, passing the trial if it takes one."""
        assert self.model_init is not None
        with placement.initializing(self.backend, self.args):
            if takes_trial(self.model_init):
                return self.model_init(self.trial)
            return self.model_init()

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Context in which the model holds the weights that evaluations use, such as averages."""
        optimizer = self.optimizer if self.training_weights else None
        with swapped_in(optimizer, self.model.variables), self.callback_handler.evaluating(self):
            yield

    def weights_of_checkpoint(self, step: int) -> list[Any] | None:
        """The model's weights in a checkpoint of the run, as ``get_weights`` returns them.

        Args:
            step: The step of the checkpoint.

        Returns:
            The arrays; None if there is no intact checkpoint of this step.
        """
        path, model = self.store.path(step), self.model
        if not is_folder(path):
            return None
        now = model.get_weights()
        try:
            run_state.restore_model(model, self.store.load(path))
            return list(model.get_weights())
        except CheckpointError:
            return None
        finally:
            model.set_weights(now)

    def add_callback(self, callback: Any) -> None:
        """Add a callback object or class."""
        self.callback_handler.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback (object or class) and return it, or None if it was not found."""
        return self.callback_handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback (object or class)."""
        self.pop_callback(callback)

    # --- properties and queries ----------------------------------------------------------------

    @property
    def label_names(self) -> list[str]:
        """Keys of a batch that hold labels: ``args.label_names``, or the default one."""
        return ["labels"] if self.args.label_names is None else list(self.args.label_names)

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process, which writes files."""
        return self.state.is_world_process_zero

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process on its machine."""
        return self.state.is_local_process_zero

    def get_total_train_batch_size(self, args: TrainingArguments | None = None) -> int:
        """Samples in one update: per device, times accumulation, times processes.

        Args:
            args: Arguments to use in place of the Trainer's.
        """
        args = self.args if args is None else args
        return args.total_train_batch_size * args.gradient_accumulation_steps

    def get_learning_rates(self) -> list[float]:
        """The distinct learning rates of the variables in the next update.

        Raises:
            ConfigurationError: There is no optimizer yet; ``fit`` creates it.
        """
        if self.optimizer is None:
            raise ConfigurationError("There is no optimizer before fit() has begun.")
        return learning_rates(self.optimizer, self.bound.model.trainable_variables)

    def get_decay_parameter_names(self, model: keras.Model | None = None) -> list[str]:
        """Paths of the trainable variables that weight decay applies to.

        Args:
            model: A model to use in place of the Trainer's.
        """
        return weight_decay.decay_parameter_names(self.bound.model if model is None else model)

    def get_num_trainable_parameters(self) -> int:
        """Number of trainable scalars in the model."""
        return sum(math.prod(v.shape) for v in self.bound.model.trainable_variables)

    def num_examples(self, dataloader: Any) -> int | None:
        """Samples in an epoch of ``dataloader``; None if unknown."""
        return as_loader(dataloader).num_examples


def takes_trial(model_init: Any) -> bool:
    """Whether a function has a parameter ``trial``, or one without a default."""
    parameters = inspect.signature(model_init).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(
        p.name == "trial" or (p.default is inspect.Parameter.empty and p.kind in plain)
        for p in parameters
    )
