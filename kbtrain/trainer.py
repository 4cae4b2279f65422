"""``Trainer``: what a user calls and may override. The work is done in the other rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kbtrain import (
    actions,
    backends,
    batch_size,
    building,
    evaluation,
    execution,
    optimization,
    rng,
    search,
    task_preprocessing,
    timed,
    trainer_checks,
)
from kbtrain.bound_model import BoundModel
from kbtrain.callback_handler import CallbackHandler
from kbtrain.checkpoint import CheckpointStore
from kbtrain.data import ColumnFilter, Loader
from kbtrain.errors import ConfigurationError, concise
from kbtrain.evaluation import EvalLoopOutput, EvalPrediction, PredictionOutput
from kbtrain.fitting import TrainOutput
from kbtrain.forward import default_loss
from kbtrain.generation import check_generates
from kbtrain.interruption import Watch
from kbtrain.keras_losses import resolve_loss
from kbtrain.live_step import Traces
from kbtrain.loaders import evaluation_set, is_named_datasets, make_loader
from kbtrain.memory import measured
from kbtrain.outputs import check_loss_weights
from kbtrain.own_methods import say_what_is_unused
from kbtrain.processing import padding_collator
from kbtrain.progress import display
from kbtrain.run import Run
from kbtrain.saving import Saver
from kbtrain.staleness import Captured
from kbtrain.state import TrainerControl, TrainerState
from kbtrain.traced_state import Position
from kbtrain.trackers import make_trackers
from kbtrain.trainer_events import EventMethods
from kbtrain.trainer_questions import QuestionMethods
from kbtrain.trainer_renames import KnownNames
from kbtrain.trainer_reports import ReportMethods
from kbtrain.trainer_search import SearchMethods
from kbtrain.training_args import TrainingArguments
from kbtrain.verbosity import set_log_level


class Trainer(EventMethods, QuestionMethods, ReportMethods, SearchMethods, KnownNames):
    """Trains and evaluates a Keras model, the same on PyTorch, TensorFlow and JAX.

    Args:
        model: A ``keras.Model``. A compiled one brings loss, metrics and optimizer if not given.
        args: ``TrainingArguments``; the default writes to ``tmp_trainer``.
        data_collator: Makes a batch of a list of samples; the default stacks them.
        train_dataset: Arrays ``(x, y)`` or ``(x, y, sample_weight)``, a dict of arrays (with the
            key "labels"), an object with ``__len__`` and ``__getitem__``, an iterable of samples
            (with ``max_steps``), or something that yields batches: a torch ``DataLoader``, a
            ``tf.data.Dataset``, a ``keras.utils.PyDataset``, a batched Grain data set.
        eval_dataset: The same, or a dict of several named ones.
        processing_class: A tokenizer or processor that is saved with the model and in every
            checkpoint; one with a ``pad_token_id`` also pads token data that has no collator.
        model_init: A function that returns the model; each ``fit`` begins with a new one. If
            it takes ``trial``, it gets that of ``hyperparameter_search`` (None outside of one).
        loss: Name of a Keras loss, ``keras.losses.Loss``, function ``(y_true, y_pred)``, or a dict
            or list of these for several outputs.
        metrics: Names or ``keras.metrics.Metric`` objects, updated on the device, without sample
            weights; for several outputs a dict or list of these.
        loss_weights: What the losses of several outputs are multiplied with in their sum: a dict or
            list of numbers. Those that a model was compiled with hold unless others are given.
        weighted_metrics: Metrics that the sample weights are applied to.
        compute_loss_func: ``(outputs, labels) -> loss``: a scalar mean, per-element losses, or
            ``(sum, count)``, optionally with a dict of values to log. With an argument
            ``num_items_in_batch`` it divides by that itself.
        compute_metrics: ``(EvalPrediction) -> dict``, once per evaluation, on the host; with
            ``batch_eval_metrics`` ``(EvalPrediction, compute_result) -> dict``, once per batch.
        callbacks: ``TrainerCallback`` objects or classes.
        optimizers: ``(keras optimizer, learning-rate schedule)``, either may be None.
        preprocess_logits_for_metrics: ``(outputs, labels) -> what is copied to the host``.

        class_weight: Number of a class -> weight of its samples in training, as in Keras; the
            product with sample weights, if there are some.
        validation_split: Share of ``train_dataset``, which must be arrays, that is evaluated in
            place of an ``eval_dataset`` and not trained on: its end, as in Keras.

    Raises:
        ConfigurationError: Arguments that do not fit together; unknown names.
        DataError: Data of an unknown kind.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=(x, y), loss="mse")  # doctest: +SKIP
        >>> trainer.fit().training_loss  # doctest: +SKIP
        0.1234
    """

    def __init__(
        self,
        model: keras.Model | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., keras.Model] | None = None,
        *,
        loss: Any = None,
        metrics: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        class_weight: Mapping[int, float] | None = None,
        validation_split: float | None = None,
    ) -> None:
        self.args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        self.backend = backends.load()
        self.train_dataset, self.eval_dataset = trainer_checks.datasets(
            train_dataset, eval_dataset, validation_split
        )
        self.class_weight = class_weight
        self.data_collator = data_collator
        self.model_init = model_init
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.processing_class = processing_class
        trainer_checks.check(self, model, loss, callbacks, optimizers)
        check_loss_weights(loss_weights, loss, compute_loss_func)
        rng.set_seed(self.args.seed)
        set_log_level(self.args.log_level)
        self._tracked: dict[str, Any] = {}
        self.given_loss, self.given_metrics = resolve_loss(loss), (metrics, weighted_metrics)
        self.given_loss_weights = loss_weights
        self.given_optimizers = optimizers
        self.optimizer: keras.optimizers.Optimizer | None = None
        # Those that a model with a train_step of its own has beside it, by name.
        self.other_optimizers: dict[str, keras.optimizers.Optimizer] = {}
        # Whether the model holds the weights in training, which may differ from those to evaluate.
        self.training_weights = False
        self.lr_scheduler: Any = None
        self.num_training_steps = 0
        self.train_dataloader: Loader | None = None
        self.eval_dataloader: Loader | None = None
        self.position = Position(self.backend)
        self.captured = Captured(self)
        self.traces = Traces(self.backend, self.position, self.captured, lambda: self.state)
        self.trial: Any = None  # of a hyperparameter search
        self.ignore_keys_for_eval: Sequence[str] | None = None
        self.adopt(self.call_model_init() if self.model_init is not None else model)
        self.store = CheckpointStore(self.args.output_dir)
        self.saver = Saver(self.store)
        self.watch = Watch(False, None)
        self.interruption: str | None = None
        self.state = TrainerState()
        self.control = TrainerControl()
        self.is_in_train = False
        self.current_run: Run | None = None
        self.callback_handler = CallbackHandler(
            [
                *make_trackers(tuple(self.args.report_to)),
                *timed.callbacks(self.args),
                *(callbacks or []),
                *display(self.args),
            ],
            self._callback_context,
        )
        self.fire("on_init_end")

    def adopt(self, model: Any) -> None:
        """Take a model, with what it was compiled with where nothing was given instead."""
        overridden = getattr(self.compute_loss, "__func__", None) is not Trainer.compute_loss
        self.bound = BoundModel(
            model,
            self.args,
            self.backend,
            loss=self.given_loss,
            loss_weights=self.given_loss_weights,
            metrics=self.given_metrics,
            has_loss_func=self.compute_loss_func is not None,
            compute_loss=trainer_checks.with_what_it_takes(self.compute_loss),
            preprocess=self.preprocess_logits_for_metrics,
            tracked=self._tracked,
            traces=self.traces,
            own_compute_loss=overridden,
        )
        say_what_is_unused(self, self.bound.own, overridden)
        if self.args.predict_with_generate:
            check_generates(model, self.args)
        names = building.input_names(model) if self.args.remove_unused_columns else None
        self._columns = None if names is None else ColumnFilter(names, self.args.label_names)

    @property
    def model(self) -> keras.Model:
        """The model in training; another one may be assigned."""
        return self.bound.model

    @model.setter
    def model(self, model: keras.Model) -> None:
        self.adopt(model)

    @property
    def loss(self) -> Any:
        """The loss in use: the one that was given, or the compiled model's."""
        return self.bound.loss

    def _callback_context(self) -> dict[str, Any]:
        """What every event gets; nothing in it waits for the device until it is looked at."""
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

    # --- what a user may override ---------------------------------------------------------------

    def compute_loss(
        self,
        model: keras.Model,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch; traced into the step. Override for a loss of your own.

        Args:
            model: Call it on the inputs; the ``training`` flag is set for you.
            inputs: A batch in the structure of the data set, as tensors.
            return_outputs: Whether to return ``(loss, outputs)``; the Trainer always asks for it.
            num_items_in_batch: Labels in the whole update if ``compute_loss_func`` takes it.

        Returns:
            The loss: a scalar (mean over the batch), per-element losses, ``(sum, count)``, or one
            of these with a dict of values to log.
        """
        loss: Any
        if self.bound.own.compute_loss and self.bound.forward is not None:
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
            columns = None  # it takes others than the model's inputs
        return make_loader(data, self.args, collate, name, train, columns, inputs)

    def create_scheduler(self, num_training_steps: int) -> Any:
        """The learning-rate schedule for a run of ``num_training_steps`` updates."""
        return optimization.make_schedule(self.args, num_training_steps)

    def create_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer of ``args.optim``; it does not decay norms and biases."""
        return optimization.make_optimizer(
            self.args, self.lr_scheduler, self.model, self.num_training_steps
        )

    # --- training -------------------------------------------------------------------------------

    @concise
    def fit(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        ignore_keys_for_eval: Sequence[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True continues from the newest intact checkpoint of
                ``output_dir`` (an error if there is none), ``"auto"`` does so if there is one, a
                path names one. The default is ``args.resume_from_checkpoint``.
            ignore_keys_for_eval: ``ignore_keys`` of the evaluations in this call.

        Returns:
            Updates done, mean loss, and metrics.

        Raises:
            NonFiniteError: The loss or gradient became NaN or infinite (``on_nonfinite="raise"``).
            CheckpointError: The checkpoint is missing, damaged, or of another model; or one could
                not be written (``on_save_error="raise"``).
            OutOfMemoryError: A micro-batch does not fit into memory.
            FolderInUseError: Another run is writing to ``output_dir``.
            TrainingInterrupted: SIGTERM or SIGUSR1 came and a checkpoint was saved; uncaught it
                ends the program with 143 or 138. After SIGINT it is ``KeyboardInterrupt``. After
                ``max_time`` the call returns, and ``interruption`` is ``"max_time"``.
            ConfigurationError, DataError: See the message.
        """
        if self.is_in_train:
            raise ConfigurationError("fit() was called while fit() runs, by a callback perhaps.")
        trainer_checks.check_resume(resume_from_checkpoint)
        evaluation.check_ignore_keys(ignore_keys_for_eval)
        args, resume = self.args, resume_from_checkpoint
        if resume is None:
            resume = args.resume_from_checkpoint
        self.is_in_train, self.interruption = True, None
        self.ignore_keys_for_eval = ignore_keys_for_eval
        self.watch = Watch(args.enable_jit_checkpoint, args.max_time)
        try:
            with self.watch, self.saver.running(args.save_strategy != "no", args.on_save_error):
                checkpoint = self.store.resolve(resume)
                if checkpoint is None and args.save_strategy != "no":
                    actions.warn_of_former_run(self)
                with execution.settings(self.backend, args, self.model):
                    output = batch_size.fit(self, checkpoint)
            newest = actions.last_checkpoint(self) if self.watch.received else None
            self.watch.raise_received(self.state.global_step, newest)
            return output
        finally:
            self.is_in_train, self.current_run = False, None
            self.callback_handler.close()

    train = fit

    def call_model_init(self) -> keras.Model:
        """A new model from ``model_init``, which gets the trial if it asks for one."""
        assert self.model_init is not None
        if search.takes_trial(self.model_init):
            return self.model_init(self.trial)
        return self.model_init()

    # --- evaluation and prediction --------------------------------------------------------------

    @concise
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, Any]:
        """Evaluate, log the result and return it.

        Args:
            eval_dataset: Data to use instead of ``self.eval_dataset``, or the name of one of its
                sets. A dict of named data sets is evaluated one by one (``eval_{name}_{metric}``).
            ignore_keys: Outputs that ``compute_metrics`` does not get, of a model that returns a
                dict; they stay on the device.
            metric_key_prefix: Put before every name.
        """
        data = evaluation_set(self.eval_dataset, eval_dataset)
        if is_named_datasets(data):
            results: dict[str, Any] = {}
            # By name and not for nothing: a subclass may have an `evaluate` without it.
            keys: dict[str, Any] = {} if ignore_keys is None else {"ignore_keys": ignore_keys}
            for name, one in data.items():
                prefix = f"{metric_key_prefix}_{name}"
                results |= self.evaluate(one, metric_key_prefix=prefix, **keys)
            return results
        loss_only = self.args.prediction_loss_only or self.compute_metrics is None
        loader = self.get_eval_dataloader(eval_dataset)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = evaluation.evaluate(
                self, loader, metric_key_prefix, gather=not loss_only, ignore_keys=ignore_keys
            )
        output.metrics.update(memory, epoch=self.state.epoch)
        self.log(output.metrics)
        self.fire("on_evaluate", metrics=output.metrics)
        return output.metrics

    @concise
    def predict(
        self,
        test_dataset: Any,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """The model's outputs for ``test_dataset``, in its order, with metrics if it has labels.

        Args:
            test_dataset: Data as for evaluation; labels may be missing.
            ignore_keys: Outputs to leave out, of a model that returns a dict.
            metric_key_prefix: Put before every metric's name.
        """
        loader = self.get_test_dataloader(test_dataset)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = evaluation.evaluate(
                self, loader, metric_key_prefix, True, keep_outputs=True, ignore_keys=ignore_keys
            )
        output.metrics.update(memory)
        self.fire("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    @concise
    def evaluation_loop(
        self,
        dataloader: Any,
        prediction_loss_only: bool | None = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Pass once over batches; nothing is logged, and no event but on_prediction_step comes.

        Args:
            dataloader: What ``get_eval_dataloader`` returns, or any iterable of batches.
            prediction_loss_only: Keep no outputs; the default is ``args.prediction_loss_only``.
            ignore_keys: Outputs to leave out, of a model that returns a dict.
            metric_key_prefix: Put before every metric's name.
        """
        default, given = self.args.prediction_loss_only, prediction_loss_only
        keep = not (default if given is None else given)
        return evaluation.evaluate(self, dataloader, metric_key_prefix, keep, keep, ignore_keys)
