"""``Trainer``: what a user calls and may override. The work is done in the other rooms."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from kbtrain import (
    actions,
    backends,
    building,
    fitting,
    metric_schedule,
    persistence,
    registry,
    reports,
    rng,
    search,
    timed,
)
from kbtrain.bound_model import BoundModel
from kbtrain.callback_handler import CallbackHandler
from kbtrain.callbacks import ProgressCallback, TrainerCallback
from kbtrain.checkpoint import CheckpointStore
from kbtrain.data import ColumnFilter, Loader, as_loader
from kbtrain.errors import ConfigurationError, concise
from kbtrain.evaluation import EvalPrediction, PredictionOutput, evaluation_loop
from kbtrain.evaluation_weights import swapped_in
from kbtrain.fitting import TrainOutput
from kbtrain.forward import default_loss
from kbtrain.gathering import check_batchwise
from kbtrain.generation import check_generates
from kbtrain.interruption import Watch
from kbtrain.loaders import is_named_datasets, make_loader
from kbtrain.loss import as_float, resolve_loss
from kbtrain.memory import measured
from kbtrain.saving import Saver
from kbtrain.state import TrainerControl, TrainerState
from kbtrain.trackers import make_trackers
from kbtrain.trainer_renames import KnownParameters
from kbtrain.training_args import TrainingArguments
from kbtrain.verbosity import set_log_level

logger = logging.getLogger("kbtrain")


class Trainer(KnownParameters):
    """Trains and evaluates a Keras model, the same on PyTorch, TensorFlow and JAX.

    Args:
        model: A ``keras.Model``. A compiled one brings its loss, metrics and optimizer, as far as
            none is given here.
        args: ``TrainingArguments``; the default writes to ``tmp_trainer``.
        data_collator: Makes a batch of a list of samples; the default stacks them.
        train_dataset: Arrays ``(x, y)`` or ``(x, y, sample_weight)``, a dict of arrays (with the
            key "labels"), an object with ``__len__`` and ``__getitem__``, an iterable of samples
            (with ``max_steps``), or something that yields batches: a torch ``DataLoader``, a
            ``tf.data.Dataset``, a ``keras.utils.PyDataset``, a batched Grain data set.
        eval_dataset: The same, or a dict of several named ones.
        model_init: A function that returns the model; each ``fit`` begins with a new one. If
            it takes ``trial``, it gets that of ``hyperparameter_search`` (None outside of one).
        loss: Name of a Keras loss, ``keras.losses.Loss``, function ``(y_true, y_pred)``, or a dict
            or list of these for several outputs.
        metrics: Names or ``keras.metrics.Metric`` objects, updated on the device.
        compute_loss_func: ``(outputs, labels) -> loss``: a scalar mean, per-element losses, or
            ``(sum, count)``, optionally with a dict of values to log. With an argument
            ``num_items_in_batch`` it divides by that itself.
        compute_metrics: ``(EvalPrediction) -> dict``, once per evaluation, on the host; with
            ``batch_eval_metrics`` ``(EvalPrediction, compute_result) -> dict``, once per batch.
        callbacks: ``TrainerCallback`` objects or classes.
        optimizers: ``(keras optimizer, learning-rate schedule)``, either may be None.
        preprocess_logits_for_metrics: ``(outputs, labels) -> outputs``, on the device, before they
            are copied to the host (an argmax, say).

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
        model_init: Callable[..., keras.Model] | None = None,
        *,
        loss: Any = None,
        metrics: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        self.backend = backends.load()
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.data_collator = data_collator
        self.model_init = model_init
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self._check(model, loss, optimizers)
        rng.set_seed(self.args.seed)
        set_log_level(self.args.log_level)
        self._tracked: dict[str, Any] = {}
        self._given_loss, self._given_metrics = resolve_loss(loss), metrics
        self.given_optimizers = optimizers
        self.optimizer: keras.optimizers.Optimizer | None = None
        # Whether the model holds the weights in training, which may differ from those to evaluate.
        self.training_weights = False
        self.lr_scheduler: Any = None
        self.train_dataloader: Loader | None = None
        self.eval_dataloader: Loader | None = None
        self.bound: BoundModel
        self.trial: Any = None  # of a hyperparameter search
        self.adopt(self.call_model_init() if self.model_init is not None else model)
        self.store = CheckpointStore(self.args.output_dir)
        self.saver = Saver(self.store)
        self.watch = Watch(False, None)
        self.interruption: str | None = None
        self.state = TrainerState()
        self.control = TrainerControl()
        self.is_in_train = False
        self.callback_handler = CallbackHandler(
            [
                *make_trackers(tuple(self.args.report_to)),
                *timed.callbacks(self.args),
                *(callbacks or []),
                ProgressCallback(self.args.disable_tqdm),
            ],
            self._callback_context,
        )
        self.fire("on_init_end")

    def _check(self, model: Any, loss: Any, optimizers: Any) -> None:
        """Everything that can be known to be wrong before anything is run."""
        args = self.args
        if not isinstance(args, TrainingArguments):
            raise ConfigurationError(
                f"args must be a TrainingArguments. Received: {type(args).__name__}."
            )
        if (model is None) == (self.model_init is None):
            given = "both" if model is not None else "neither"
            raise ConfigurationError(f"Pass either model or model_init. Received: {given}.")
        if not isinstance(optimizers, tuple) or len(optimizers) != 2:
            raise ConfigurationError(
                f"optimizers must be a pair (optimizer, schedule). Received: {optimizers!r}."
            )
        if self.model_init is not None and any(item is not None for item in optimizers):
            raise ConfigurationError(
                "optimizers cannot be given together with model_init: each new model needs a new "
                "optimizer. Override create_optimizer instead."
            )
        if optimizers[0] is not None and not isinstance(optimizers[0], keras.optimizers.Optimizer):
            raise ConfigurationError(
                "optimizers[0] must be a keras.optimizers.Optimizer. "
                f"Received: {type(optimizers[0]).__name__}."
            )
        if loss is not None and self.compute_loss_func is not None:
            raise ConfigurationError("Pass either loss or compute_loss_func, not both.")
        if args.eval_strategy != "no" and self.eval_dataset is None:
            raise ConfigurationError(
                f"eval_strategy={args.eval_strategy!r} needs an eval_dataset. Received: None."
            )
        if args.batch_eval_metrics:
            check_batchwise(self.compute_metrics)
        if args.predict_with_generate and self.preprocess_logits_for_metrics is not None:
            raise ConfigurationError(
                "preprocess_logits_for_metrics is for the model's outputs, and with "
                "predict_with_generate=True compute_metrics gets what was generated instead. Do "
                "in compute_metrics what it did."
            )
        if args.eval_minutes is not None and self.eval_dataset is None:
            raise ConfigurationError(
                f"eval_minutes={args.eval_minutes} needs an eval_dataset. Received: None."
            )
        if optimizers[0] is None:
            registry.find(registry.OPTIMIZERS, args.optim, "optim")
        registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")

    def adopt(self, model: Any) -> None:
        """Take a model, with what it was compiled with where nothing was given instead."""
        self.bound = BoundModel(
            model,
            self.args,
            self.backend,
            loss=self._given_loss,
            metrics=self._given_metrics,
            has_loss_func=self.compute_loss_func is not None,
            compute_loss=self.compute_loss,
            preprocess=self.preprocess_logits_for_metrics,
            tracked=self._tracked,
        )
        if self.args.predict_with_generate:
            check_generates(model, self.args)
        names = building.input_names(model) if self.args.remove_unused_columns else None
        self._columns = None if names is None else ColumnFilter(names, self.args.label_names)

    @property
    def model(self) -> keras.Model:
        """The model in training."""
        return self.bound.model

    @property
    def loss(self) -> Any:
        """The loss in use: the one that was given, or the compiled model's."""
        return self.bound.loss

    def _callback_context(self) -> dict[str, Any]:
        return {
            "trainer": self,
            "model": self.model,
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
        loss, outputs = default_loss(
            model,
            inputs,
            num_items_in_batch,
            self.loss,
            self.bound.loss_weights,
            self.compute_loss_func,
            self.args.label_names,
        )
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """The training batches; may return any iterable of batches."""
        if self.train_dataset is None:
            raise ConfigurationError("fit() needs a train_dataset. Received: None.")
        return self._make_loader(self.train_dataset, "train_dataset", train=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation set, in order; may return any iterable of batches."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ConfigurationError("evaluate() needs an eval_dataset. Received: None.")
        return self._make_loader(data, "eval_dataset", train=False)

    def _make_loader(self, data: Any, name: str, train: bool) -> Loader:
        return make_loader(data, self.args, self.data_collator, name, train, self._columns)

    def create_scheduler(self, num_training_steps: int) -> Any:
        """The learning-rate schedule for a run of ``num_training_steps`` updates."""
        args = self.args
        factory = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
        offered: dict[str, Any] = {
            "learning_rate": args.learning_rate,
            "num_warmup_steps": args.get_warmup_steps(num_training_steps),
            "num_training_steps": num_training_steps,
        }
        if hasattr(factory, "on_metric"):
            offered["mode"] = "max" if args.greater_is_better else "min"
        if args.warmup_steps and "num_warmup_steps" not in inspect.signature(factory).parameters:
            logger.warning(
                "lr_scheduler_type=%r has no warmup: warmup_steps=%s has no effect.",
                args.lr_scheduler_type,
                args.warmup_steps,
            )
        own = dict(args.lr_scheduler_kwargs or {})
        return registry.call_with_known(factory, offered, own, "lr_scheduler_kwargs")

    def create_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer of ``args.optim``; it does not decay norms and biases."""
        args = self.args
        factory = registry.find(registry.OPTIMIZERS, args.optim, "optim")
        offered = {
            "learning_rate": metric_schedule.learning_rate_argument(self.lr_scheduler),
            "weight_decay": args.weight_decay,
        }
        if registry.takes(factory, "beta_1"):  # RMSprop's or Adagrad's epsilon is another
            offered |= {
                "beta_1": args.adam_beta1,
                "beta_2": args.adam_beta2,
                "epsilon": args.adam_epsilon,
            }
        own = dict(args.optim_args or {})
        optimizer = registry.call_with_known(factory, offered, own, "optim_args")
        building.check_optimizer(optimizer, args.optim)
        building.exclude_from_decay(optimizer, self.model)
        return optimizer

    # --- training -------------------------------------------------------------------------------

    @concise
    def fit(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True continues from the newest intact checkpoint of
                ``output_dir`` (an error if there is none), ``"auto"`` does so if there is one, a
                path names one. The default is ``args.resume_from_checkpoint``.

        Returns:
            Updates done, mean loss, and metrics.

        Raises:
            NonFiniteError: The loss or gradient became NaN or infinite (``on_nonfinite="raise"``).
            CheckpointError: The checkpoint is missing, damaged, or of another model; or one could
                not be written (``on_save_error="raise"``).
            FolderInUseError: Another run is writing to ``output_dir``.
            TrainingInterrupted: SIGTERM or SIGUSR1 came; a checkpoint was saved. It ends a program
                that does not catch it, with exit code 143 or 138. After SIGINT it is
                ``KeyboardInterrupt``. After ``max_time`` the call returns, and ``interruption``
                is ``"max_time"``.
            ConfigurationError, DataError: See the message.
        """
        resume = resume_from_checkpoint
        if resume is None:
            resume = self.args.resume_from_checkpoint
        args = self.args
        self.is_in_train, self.interruption = True, None
        self.watch = Watch(args.enable_jit_checkpoint, args.max_time)
        try:
            with self.watch, self.saver.running(args.save_strategy != "no", args.on_save_error):
                checkpoint = self.store.resolve(resume)
                with self.backend.device_scope(args.use_cpu):
                    output = fitting.fit(self, checkpoint)
            newest = actions.last_checkpoint(self) if self.watch.received else None
            self.watch.raise_received(self.state.global_step, newest)
            return output
        finally:
            self.is_in_train = False
            self.callback_handler.close()

    train = fit

    def call_model_init(self) -> keras.Model:
        """A new model from ``model_init``, which gets the trial if it asks for one."""
        assert self.model_init is not None
        if search.takes_trial(self.model_init):
            return self.model_init(self.trial)
        return self.model_init()

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
        """Train with several hyperparameters and say which were best (extra ``optuna``).

        Each trial begins with a new model and writes to ``{output_dir}/run-{number}``.

        Args:
            hp_space: From an Optuna trial to arguments and their values (``trial.suggest_float``
                and so on); names that are no arguments are for ``model_init(trial)``.
            compute_objective: From the results of an evaluation to the value that is optimized, or
                one for each direction; the default is the loss, or the sum of the other metrics.
            n_trials: Trials the study has in the end; a resumed study runs those that are missing.
            direction: "minimize", "maximize", or a list of these.
            backend: "optuna" or None.
            hp_name: From a trial to its ``run_name``.
            n_jobs: Processes. All but this one run the program anew up to this call, and share the
                device with it. The study is then kept in ``{output_dir}/study.journal``.
            **options: ``sampler``, ``pruner``, ``storage``, ``study_name``, ``load_if_exists``
                (to resume a study) and ``timeout`` (seconds), as in Optuna.

        Returns:
            The best run; for several directions those that no other one beats in all.

        Raises:
            ConfigurationError: There is no ``model_init`` or ``eval_dataset``, or see the message.
        """
        return search.search(
            self,
            search.settings(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, n_jobs, options
            ),
        )

    # --- evaluation and prediction --------------------------------------------------------------

    @concise
    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, Any]:
        """Evaluate, log the result and return it.

        Args:
            eval_dataset: Data to use instead of ``self.eval_dataset``; a dict of named data sets
                is evaluated one by one (names become ``eval_{name}_{metric}``).
            metric_key_prefix: Put before every name.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if is_named_datasets(data):
            results: dict[str, Any] = {}
            for name, one in data.items():
                results |= self.evaluate(one, f"{metric_key_prefix}_{name}")
            return results
        loss_only = self.args.prediction_loss_only or self.compute_metrics is None
        loader = self.get_eval_dataloader(eval_dataset)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = evaluation_loop(self, loader, metric_key_prefix, gather=not loss_only)
        output.metrics.update(memory)
        self.log(output.metrics)
        self.fire("on_evaluate", metrics=output.metrics)
        return output.metrics

    @concise
    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """The model's outputs for ``test_dataset``, in its order, with metrics if it has labels.

        Args:
            test_dataset: Data as for evaluation; labels may be missing.
            metric_key_prefix: Put before every metric's name.
        """
        loader = self._make_loader(test_dataset, "test_dataset", train=False)
        with measured(self.backend, metric_key_prefix, self.args.skip_memory_metrics) as memory:
            output = evaluation_loop(
                self, loader, metric_key_prefix, gather=True, keep_outputs=True
            )
        output.metrics.update(memory)
        self.fire("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    # --- saving ---------------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Save the model for use without kbtrain.

        Args:
            output_dir: A folder, which gets ``model.keras`` and ``training_args.json``, or a path
                that ends in ``.keras``. The default is ``args.output_dir``.

        Returns:
            The path of the ``.keras`` file.
        """
        target = Path(self.args.output_dir if output_dir is None else output_dir).expanduser()
        if target.suffix != ".keras":
            target.mkdir(parents=True, exist_ok=True)
            self.args.to_json_file(target / "training_args.json")
            target = target / "model.keras"
        with swapped_in(self.optimizer if self.training_weights else None):
            persistence.save_keras_file(self.model, target)
        return target

    def save_state(self) -> Path:
        """Write ``trainer_state.json`` into the output directory."""
        path = Path(self.args.output_dir) / "trainer_state.json"
        persistence.save_json(path, self.state.to_dict())
        return path

    # --- reports --------------------------------------------------------------------------------

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Metrics as people read them: MB, h:mm:ss, four decimals."""
        return reports.metrics_format(metrics)

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print a table of metrics under the title ``split`` ("train", "eval", "test")."""
        if self.is_world_process_zero():
            print(reports.metrics_table(split, metrics))

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> Path:
        """Write ``{split}_results.json``, and add to ``all_results.json`` if ``combined``."""
        return reports.save_metrics(Path(self.args.output_dir), split, metrics, combined)

    def create_model_card(
        self,
        model_name: str | None = None,
        license: str | None = None,
        language: str | None = None,
        tags: Sequence[str] = (),
    ) -> Path:
        """Write ``README.md`` about the run (results, loss plot, settings, versions)."""
        return reports.create_model_card(self, model_name, license, language, tags)

    # --- logging and callbacks ------------------------------------------------------------------

    def track(self, name: str, value: Any) -> None:
        """Log the mean of ``value`` over the updates; call it where the loss is computed.

        Args:
            name: The name in the logs (with ``eval_`` before it in evaluations).
            value: A tensor, of which the mean is taken.
        """
        self._tracked[name] = keras.ops.mean(as_float(value))

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add an entry to ``state.log_history`` and tell the callbacks."""
        entry = {**logs, "epoch": self.state.epoch}
        self.state.remember(entry)
        self.fire("on_log", logs=entry)

    def fire(self, event: str, **kwargs: Any) -> None:
        """Call ``event`` of all callbacks."""
        self.control = self.callback_handler.fire(
            event, self.args, self.state, self.control, **kwargs
        )

    def add_callback(self, callback: Any) -> None:
        """Add a callback object or class."""
        self.callback_handler.add(callback)

    def pop_callback(self, callback: Any) -> TrainerCallback | None:
        """Remove a callback (object or class) and return it; None if it is not there."""
        return self.callback_handler.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback (object or class)."""
        self.callback_handler.pop(callback)

    # --- questions ------------------------------------------------------------------------------

    def is_world_process_zero(self) -> bool:
        """Whether this process is the first of all, which writes what is written once."""
        return self.state.is_world_process_zero

    is_local_process_zero = is_world_process_zero

    def get_decay_parameter_names(self) -> list[str]:
        """Paths of the trainable variables that weight decay applies to."""
        return building.decay_parameter_names(self.model)

    def get_num_trainable_parameters(self) -> int:
        """Number of trainable scalars in the model."""
        return sum(math.prod(v.shape) for v in self.model.trainable_variables)

    def num_examples(self, dataloader: Any) -> int | None:
        """Samples in an epoch of ``dataloader``; None if it does not know."""
        return as_loader(dataloader).num_examples
