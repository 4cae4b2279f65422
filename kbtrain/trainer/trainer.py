"""``Trainer``: the class that users call. It delegates the work to the other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kbtrain import backends, distributed
from kbtrain.callbacks import by_argument
from kbtrain.callbacks.handler import CallbackHandler
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.checkpoint.remote import open_store
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import ColumnFilter
from kbtrain.display import make_display
from kbtrain.distributed import placement
from kbtrain.errors import concise
from kbtrain.evaluation import evaluate as evaluation
from kbtrain.evaluation.compiled_steps import EvalSteps
from kbtrain.evaluation.gather import EvalPrediction
from kbtrain.evaluation.generate import check_generates
from kbtrain.evaluation.results import EvalLoopOutput, PredictionOutput, Results
from kbtrain.model import build as building
from kbtrain.model.bound_model import BoundModel
from kbtrain.model.losses.keras_losses import resolve_loss
from kbtrain.model.losses.pairing import check_loss_weights
from kbtrain.plan.plan import Plan
from kbtrain.report.ending import held_step
from kbtrain.report.record import RunRecord
from kbtrain.report.recorder import RecordCallback
from kbtrain.tracing.captured import CapturedValues
from kbtrain.tracing.position import Position
from kbtrain.tracing.retrace import Traces
from kbtrain.trackers import make_trackers
from kbtrain.trainer import argument_checks, lr_finder, planning, search, session
from kbtrain.trainer.artifacts import RunArtifacts, make_pusher
from kbtrain.trainer.migration import KnownNames
from kbtrain.trainer.unused_arguments import warn_about_unused
from kbtrain.training.dataloaders import evaluation_set, is_named_datasets
from kbtrain.training.fit import TrainOutput
from kbtrain.training.resuming import make_saver
from kbtrain.training.stop_signals import StopSignals
from kbtrain.training.trainer_base import TrainerBase
from kbtrain.utils import rng
from kbtrain.utils.logging import set_log_level
from kbtrain.utils.machine.memory import measured


class Trainer(KnownNames, RunArtifacts, TrainerBase):
    """Trains and evaluates a Keras model, the same on PyTorch, TensorFlow and JAX.

    Args:
        model: A ``keras.Model``. Its compiled loss, metrics and optimizer are the defaults.
        args: ``TrainingArguments``; the default writes to ``tmp_trainer``.
        data_collator: Combines a list of samples into a batch; the default stacks them.
        train_dataset: Arrays ``(x, y)`` or ``(x, y, sample_weight)``, a dict of arrays (with the
            key "labels"), an object with ``__len__`` and ``__getitem__``, an iterable of samples
            (with ``max_steps``), or a source of batches: a torch ``DataLoader``, a
            ``tf.data.Dataset``, a ``keras.utils.PyDataset``, a batched Grain data set.
        eval_dataset: The same, or a dict of several named ones.
        processing_class: A tokenizer or processor that is saved with the model and in every
            checkpoint; one with a ``pad_token_id`` also pads token data that has no collator.
        model_init: A function that returns the model; each ``fit`` starts with a new one. If it
            takes ``trial``, it receives the trial of ``hyperparameter_search``, or None.
        loss: Name of a Keras loss, ``keras.losses.Loss``, function ``(y_true, y_pred)``, or a dict
            or list of these for several outputs.
        metrics: Names or ``keras.metrics.Metric`` objects, updated on the device, without sample
            weights; for several outputs a dict or list of these.
        loss_weights: Weights of the losses of several outputs in their sum: a dict or list of
            numbers. The default are those the model was compiled with.
        weighted_metrics: Metrics that the sample weights are applied to.
        compute_loss_func: ``(outputs, labels) -> loss``: a scalar mean, per-element losses, or
            ``(sum, count)``, optionally with a dict of values to log. With an argument
            ``num_items_in_batch`` it must divide by that number.
        compute_metrics: ``(EvalPrediction) -> dict``, once per evaluation, on the host; with
            ``batch_eval_metrics`` ``(EvalPrediction, compute_result) -> dict``, once per batch.
        callbacks: ``TrainerCallback`` objects or classes.
        optimizers: ``(keras optimizer, learning-rate schedule)``, either may be None.
        preprocess_logits_for_metrics: ``(outputs, labels) -> outputs to copy to the host``.
        class_weight: Class index -> weight of its samples in training, as in Keras; multiplied
            with sample weights, if there are any.
        validation_split: Fraction at the end of ``train_dataset``, which must be arrays, to hold
            out for evaluation in place of an ``eval_dataset``, as in Keras.

    Raises:
        ConfigurationError: Arguments conflict, or a name is unknown.
        DataError: The type of the data is not supported.

    Example:
        >>> import keras, numpy as np
        >>> from kbtrain import Trainer, TrainingArguments
        >>> x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> args = TrainingArguments(max_steps=60, learning_rate=0.3, logging_strategy="no")
        >>> trainer = Trainer(model, args, train_dataset=(x, 2 * x), loss="mse")
        >>> trainer.fit().global_step
        60
        >>> trainer.evaluate((x, 2 * x))["eval_loss"] < 0.1
        True
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
        self.backend.prepare()
        distributed.initialize()
        self.train_dataset, self.eval_dataset = argument_checks.datasets(
            train_dataset, eval_dataset, validation_split, self.backend.TAKES_STRINGS
        )
        self.class_weight = class_weight
        self.data_collator = data_collator
        self.model_init = model_init
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.processing_class = processing_class
        argument_checks.check(self, model, loss, callbacks, optimizers)
        check_loss_weights(loss_weights, loss, compute_loss_func)
        rng.set_seed(self.args.seed)
        set_log_level(self.args.log_level if self.args.should_log else self.args.log_level_replica)
        self._tracked: dict[str, Any] = {}
        self.given_loss, self.given_metrics = resolve_loss(loss), (metrics, weighted_metrics)
        self.given_loss_weights = loss_weights
        self.given_optimizers = optimizers
        self.other_optimizers = {}
        self.position = Position(self.backend)
        self.captured = CapturedValues(self)
        self.traces = Traces(self.backend, self.position, self.captured, lambda: self.state)
        self.adopt(self.call_model_init() if self.model_init is not None else model)
        self.store = open_store(self.args.output_dir)
        self.saver = make_saver(self.store, self.args)
        self.pusher = make_pusher(self.args)
        self.stop_signals = StopSignals(False, None)
        self.state = TrainerState()
        self.control = TrainerControl()
        self.record = RunRecord()
        self.callback_handler = CallbackHandler(
            [
                RecordCallback(),
                *make_trackers(planning.trackers(self.args)),
                *by_argument.callbacks(self.args),
                *(callbacks or []),
                *make_display(self.args),
            ],
            self._callback_context,
        )
        self.fire("on_init_end")

    def adopt(self, model: Any) -> None:
        """Bind a model; its compiled loss and metrics are used unless others were passed."""
        self.alike = False
        overridden = getattr(self.compute_loss, "__func__", None) is not TrainerBase.compute_loss
        self.bound = BoundModel(
            model,
            self.args,
            self.backend,
            loss=self.given_loss,
            loss_weights=self.given_loss_weights,
            metrics=self.given_metrics,
            has_loss_func=self.compute_loss_func is not None,
            compute_loss=argument_checks.adapt_compute_loss(self.compute_loss),
            tracked=self._tracked,
            custom_compute_loss=overridden,
        )
        self.eval_steps = EvalSteps(
            self.bound, self.args, self.backend, self.preprocess_logits_for_metrics, self.traces
        )
        placement.check_steps(self.backend, self.bound.overridden)
        warn_about_unused(self, self.bound.overridden, overridden)
        if self.args.predict_with_generate:
            check_generates(model, self.args)
        names = building.input_names(model) if self.args.remove_unused_columns else None
        self._columns = None if names is None else ColumnFilter(names, self.args.label_names)

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
                path or an address names one. The default is ``args.resume_from_checkpoint``.
            ignore_keys_for_eval: ``ignore_keys`` of the evaluations in this call.

        Returns:
            Updates done, mean loss, and metrics.

        Raises:
            NonFiniteError: The loss or gradient became NaN or infinite (``on_nonfinite="raise"``).
            CheckpointError: The checkpoint is missing, damaged, or from another model; or one
                could not be written (``on_save_error="raise"``).
            OutOfMemoryError: A micro-batch does not fit into memory.
            FolderInUseError: Another run is writing to ``output_dir``.
            TrainingInterrupted: SIGTERM or SIGUSR1 was received and a checkpoint was saved; if
                uncaught, the program exits with 143 or 138. SIGINT raises ``KeyboardInterrupt``.
                After ``max_time`` the call returns, and ``interruption`` is ``"max_time"``.
            ConfigurationError, DataError: See the message.
        """
        return session.run_session(self, resume_from_checkpoint, ignore_keys_for_eval)

    train = fit

    # --- evaluation and prediction --------------------------------------------------------------

    @concise
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, Any]:
        """Evaluate, log the result and return it.

        Where the model holds an earlier update's weights, the log has its number, ``weights_step``.

        Args:
            eval_dataset: Data to use instead of ``self.eval_dataset``, or the name of one of its
                sets. A dict of named data sets is evaluated one by one (``eval_{name}_{metric}``).
            ignore_keys: Outputs that ``compute_metrics`` does not receive, for a model that
                returns a dict; they stay on the device.
            metric_key_prefix: Prefix of every metric's name, joined by an underscore.
        """
        data = evaluation_set(self.eval_dataset, eval_dataset)
        if is_named_datasets(data):
            results = Results()
            # Passed only if set: a subclass may override `evaluate` without this argument.
            own: dict[str, Any] = {} if ignore_keys is None else {"ignore_keys": ignore_keys}
            for key, one in data.items():
                results |= self.evaluate(one, metric_key_prefix=f"{metric_key_prefix}_{key}", **own)
            return results
        loss_only = self.args.prediction_loss_only or self.compute_metrics is None
        loader = self.get_eval_dataloader(eval_dataset)
        self.fire("on_evaluate_begin", prefix=metric_key_prefix)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = self._evaluate(loader, metric_key_prefix, not loss_only, False, ignore_keys)
        output.metrics.update(memory, epoch=self.state.epoch)
        step = held_step(self)
        elsewhere = {} if step in (None, self.state.global_step) else {"weights_step": step}
        with self.uploading():
            self.log(output.metrics | elsewhere)
            self.fire("on_evaluate", metrics=output.metrics)
        return Results(output.metrics)

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
        self.fire("on_predict_begin", prefix=metric_key_prefix)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = self._evaluate(loader, metric_key_prefix, True, True, ignore_keys)
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
        """Evaluate batches without logging; the only event fired is ``on_prediction_step``.

        Args:
            dataloader: The result of ``get_eval_dataloader``, or any iterable of batches.
            prediction_loss_only: Whether to discard outputs; the default is
                ``args.prediction_loss_only``.
            ignore_keys: Outputs to leave out, of a model that returns a dict.
            metric_key_prefix: Put before every metric's name.
        """
        default, given = self.args.prediction_loss_only, prediction_loss_only
        keep = not (default if given is None else given)
        return self._evaluate(dataloader, metric_key_prefix, keep, keep, ignore_keys)

    def _evaluate(
        self,
        dataloader: Any,
        prefix: str,
        gather: bool,
        keep_outputs: bool = False,
        ignore_keys: Sequence[str] | None = None,
    ) -> EvalLoopOutput:
        """Evaluate a data set with the current steps of the model."""
        if self.bound.is_outdated and not self.is_in_train:
            self.adopt(self.model)
        options = (prefix, gather, keep_outputs, ignore_keys)
        if self.is_in_train:
            return evaluation.evaluate(self, self.eval_steps, dataloader, *options)
        self.callback_handler.tell("phase", "evaluating")
        try:
            return evaluation.evaluate(self, self.eval_steps, dataloader, *options)
        finally:
            self.callback_handler.tell("idle")

    # --- before a run ---------------------------------------------------------------------------

    @concise
    def plan(
        self,
        device: Any,
        count: int = 1,
        *,
        batch: Sequence[int] = (),
        quick: bool = False,
        **changes: Any,
    ) -> Plan:
        """Whether this run fits on devices that are not here, and how fast it could be.

        The step is compiled for them and not run, by JAX: in a process of its own where the
        backend is another one. Model, data and output folder stay as they are.

        Args:
            device: A name ("h100", "v5e"; an unknown one raises an error with the list), the path
                of a YAML file with a device's figures, or a ``DeviceSpec``.
            count: Number of devices.
            batch: Batch sizes of a device: the first is planned, the others are compared.
            quick: Whether to compile this run alone: no alternatives, no largest batch.
            **changes: Fields of ``TrainingArguments`` to change, such as ``fsdp=True``.

        Returns:
            The plan: ``print`` shows it, ``to_dict`` has every figure.

        Raises:
            ConfigurationError: An argument is invalid, or the run cannot be planned.
        """
        return planning.plan(self, device, count, batch, quick, changes)

    # --- search ---------------------------------------------------------------------------------

    @concise
    def find_learning_rate(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 1.0,
        num_steps: int = 100,
        *,
        smoothing: float = 0.9,
        divergence: float = 4.0,
    ) -> lr_finder.LearningRateTest:
        """Train some updates with exponentially rising learning rates, and undo them.

        This is the range test of Smith (2017, "Cyclical Learning Rates for Training Neural
        Networks"). The suggestion is the rate at which the smoothed loss falls most steeply over
        the logarithm of the rate, before its minimum, as in fastai and Lightning. Afterwards the
        model and the global random state are as before, bit for bit; a user's optimizer is
        copied, not used. Data with a random generator of their own have advanced by the batches
        of the test, as by any other reading of them. No callback is called.

        Args:
            min_lr: The first rate.
            max_lr: The last rate.
            num_steps: Updates from the first to the last.
            smoothing: Factor of the exponential moving average of the losses.
            divergence: The test ends when a loss is this many times the lowest one.

        Returns:
            Rates, losses and the suggestion; ``plot()`` draws them.

        Raises:
            ConfigurationError: An argument is invalid, or the run cannot be tested, for example
                because its data are an iterator that can be read only once.
        """
        return lr_finder.find_learning_rate(self, min_lr, max_lr, num_steps, smoothing, divergence)

    @concise
    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | Sequence[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        *,
        n_jobs: int = 1,
        **options: Any,
    ) -> search.BestRun | list[search.BestRun]:
        """Search for the best hyperparameters (requires the extra ``optuna``).

        Each trial starts with a new model and writes to ``{output_dir}/run-{number}``.

        Args:
            hp_space: Maps an Optuna trial to arguments and values (``trial.suggest_float`` and so
                on); names that are not arguments are for ``model_init(trial)``.
            compute_objective: Maps the results of an evaluation to the objective, or to one per
                direction; the default is the loss, or the sum of the other metrics.
            n_trials: Total number of trials of the study; a resumed study runs the remaining ones.
            direction: "minimize", "maximize", or a list of these.
            backend: "optuna" or None.
            hp_name: Maps a trial to its ``run_name``.
            n_jobs: Number of processes. The others run the program again up to this call, and
                share the device. The study is then stored in ``{output_dir}/study.journal``.
            **options: ``sampler``, ``pruner``, ``storage``, ``study_name``, ``load_if_exists``
                (to resume a study) and ``timeout`` (seconds), as in Optuna.

        Returns:
            The best run; for several directions the Pareto front.

        Raises:
            ConfigurationError: ``model_init`` or ``eval_dataset`` is missing, or an option is
                invalid.
        """
        return search.search(
            self,
            search.settings(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, n_jobs, options
            ),
        )
