"""``Trainer``: what a user calls and may override. The work is done in the other rooms."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kbtrain import backends, building, persistence, registry, rng
from kbtrain.args_validation import check_saves_follow_evaluations
from kbtrain.callbacks import CallbackHandler, ProgressCallback, TrainerCallback, metric_value
from kbtrain.checkpoint import Checkpoint, CheckpointStore
from kbtrain.checkpoint.disk import checkpoint_name
from kbtrain.data import Loader, as_loader, unpack
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.evaluation import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    run_evaluation,
    speed,
)
from kbtrain.forward import ForwardPass, default_loss, items_counter
from kbtrain.loaders import is_named_datasets, make_loader
from kbtrain.loop import train_loop
from kbtrain.loss import resolve_loss
from kbtrain.metrics import CompiledMetrics, ListedMetrics, MetricSet
from kbtrain.run import Batches, Run
from kbtrain.state import TrainerControl, TrainerState, make_plan, steps_until_due
from kbtrain.step import make_eval_step, make_train_step
from kbtrain.trackers import make_trackers
from kbtrain.training_args import TrainingArguments, resolve_steps

logger = logging.getLogger("kbtrain")


class TrainOutput(NamedTuple):
    """Result of ``Trainer.fit``.

    Attributes:
        global_step: Updates done.
        training_loss: Mean loss over all updates of the run, also those before a resume.
        metrics: ``train_loss`` and the speed of this call.
    """

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """Trains and evaluates a Keras model, the same on PyTorch, TensorFlow and JAX.

    Args:
        model: A ``keras.Model``. A compiled one brings its loss, metrics and optimizer, as far as
            none is given here.
        args: ``TrainingArguments``; the default writes to ``tmp_trainer``.
        data_collator: Makes a batch of a list of samples; the default stacks them.
        train_dataset: Arrays ``(x, y)`` or ``(x, y, sample_weight)``, a dict of arrays (with the
            key "labels"), an object with ``__len__`` and ``__getitem__``, or an iterable of
            samples (with ``max_steps``).
        eval_dataset: The same, or a dict of several named ones.
        model_init: A function that returns the model; each ``fit`` begins with a new one.
        loss: Name of a Keras loss, ``keras.losses.Loss``, function ``(y_true, y_pred)``, or a dict
            or list of these for several outputs.
        metrics: Names or ``keras.metrics.Metric`` objects, updated on the device.
        compute_loss_func: ``(outputs, labels) -> loss``: a scalar mean, per-element losses, or
            ``(sum, count)``, optionally with a dict of values to log. With an argument
            ``num_items_in_batch`` it divides by that itself.
        compute_metrics: ``(EvalPrediction) -> dict``, once per evaluation, on the host.
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
        model_init: Callable[[], keras.Model] | None = None,
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
        self._given_loss, self._given_metrics = resolve_loss(loss), metrics
        self._given_optimizer, self._given_schedule = optimizers
        self.optimizer: keras.optimizers.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.model: keras.Model
        self._adopt(model if model is not None else self._call_model_init())
        self.store = CheckpointStore(self.args.output_dir)
        self.state = TrainerState()
        self.control = TrainerControl()
        self.is_in_train = False
        self.callback_handler = CallbackHandler(
            [
                *make_trackers(tuple(self.args.report_to)),
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
        if optimizers[0] is None:
            registry.find(registry.OPTIMIZERS, args.optim, "optim")
        registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")

    def _call_model_init(self) -> keras.Model:
        assert self.model_init is not None
        return building.check_model(self.model_init())

    def _adopt(self, model: keras.Model) -> None:
        """Take a model, and what it was compiled with where nothing was given instead."""
        self.model = building.check_model(model)
        compiled = bool(getattr(model, "compiled", False))
        if self.args.bf16:
            building.use_bfloat16(model)
        self.loss, self._loss_weights = self._given_loss, None
        if self.loss is None and self.compute_loss_func is None and compiled:
            self.loss = resolve_loss(model.loss)
            self._loss_weights = (model.get_compile_config() or {}).get("loss_weights")
        self.metrics: MetricSet | None = None
        if self._given_metrics is not None:
            self.metrics = ListedMetrics(self._given_metrics)
        elif compiled and self._given_loss is None:
            self.metrics = CompiledMetrics(model)
        self._forward: ForwardPass | None = None
        self._eval_steps: dict[Any, Callable[[Any], dict[str, Any]]] = {}
        self._created_optimizer = False

    def _callback_context(self) -> dict[str, Any]:
        return {
            "trainer": self,
            "model": self.model,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "train_dataloader": getattr(self, "_train_dataloader", None),
            "eval_dataloader": getattr(self, "_eval_dataloader", None),
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
            self._loss_weights,
            self.compute_loss_func,
        )
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """The training batches; may return any iterable of batches."""
        if self.train_dataset is None:
            raise ConfigurationError("fit() needs a train_dataset. Received: None.")
        return make_loader(
            self.train_dataset, self.args, self.data_collator, "train_dataset", train=True
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation set, in order; may return any iterable of batches."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ConfigurationError("evaluate() needs an eval_dataset. Received: None.")
        return make_loader(data, self.args, self.data_collator, "eval_dataset", train=False)

    def create_scheduler(self, num_training_steps: int) -> Any:
        """The learning-rate schedule for a run of ``num_training_steps`` updates."""
        args = self.args
        factory = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
        offered = {
            "learning_rate": args.learning_rate,
            "num_warmup_steps": args.get_warmup_steps(num_training_steps),
            "num_training_steps": num_training_steps,
        }
        own = dict(args.lr_scheduler_kwargs or {})
        return registry.call_with_known(factory, offered, own, "lr_scheduler_kwargs")

    def create_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer of ``args.optim``, with ``self.lr_scheduler``; norms and biases not decayed."""
        args = self.args
        factory = registry.find(registry.OPTIMIZERS, args.optim, "optim")
        offered = {
            "learning_rate": self.lr_scheduler,
            "weight_decay": args.weight_decay,
            "beta_1": args.adam_beta1,
            "beta_2": args.adam_beta2,
            "epsilon": args.adam_epsilon,
        }
        own = dict(args.optim_args or {})
        optimizer = registry.call_with_known(factory, offered, own, "optim_args")
        building.exclude_from_decay(optimizer, self.model)
        return optimizer

    # --- training -------------------------------------------------------------------------------

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
            CheckpointError: The checkpoint is missing, damaged, or of another model.
            ConfigurationError, DataError: See the message.
        """
        resume = resume_from_checkpoint
        if resume is None:
            resume = self.args.resume_from_checkpoint
        self.is_in_train = True
        try:
            self.store.clean_leftovers()
            checkpoint = self.store.resolve(resume)
            with self.backend.device_scope(self.args.use_cpu):
                return self._fit(checkpoint)
        finally:
            self.is_in_train = False
            self.callback_handler.close()

    train = fit

    def _fit(self, checkpoint: Checkpoint | None) -> TrainOutput:
        run = self._prepare(checkpoint)
        self.control.new_training()
        self.fire("on_train_begin")
        if self.args.eval_on_start and checkpoint is None:
            self.evaluate_in_training(run)
        run.started = time.perf_counter()
        train_loop(self, run)
        run.read()
        seconds = time.perf_counter() - run.started
        done = self.state.global_step - run.first_step
        loss = run.progress.loss_sum / max(self.state.global_step - run.progress.skipped, 1)
        metrics = speed("train", seconds, run.samples, done) | {"train_loss": loss}
        self.log(metrics)
        if self.args.load_best_model_at_end:
            self._load_best()
        self.fire("on_train_end")
        return TrainOutput(self.state.global_step, loss, metrics)

    def _prepare(self, checkpoint: Checkpoint | None) -> Run:
        """Everything between the arguments and the first update."""
        args = self.args
        if self.model_init is not None:
            rng.set_seed(args.seed)
            self._adopt(self._call_model_init())
        loader = self._train_dataloader = as_loader(self.get_train_dataloader())
        if not loader.sized and args.max_steps <= 0:
            raise ConfigurationError(
                "The training data has no length, so the number of steps cannot be counted: "
                f"set max_steps. Received: max_steps={args.max_steps}."
            )
        accumulation = args.gradient_accumulation_steps
        plan = make_plan(
            len(loader) if loader.sized else None,
            accumulation,
            args.num_train_epochs,
            args.max_steps,
        )
        batches = Batches(loader)
        first = batches.peek()
        if first is None:
            raise ConfigurationError("The training data has no batches; see dataloader_drop_last.")
        self._build(first)
        if not self.model.trainable_variables:
            raise ConfigurationError(
                f"The model {self.model.name!r} has no trainable variables: there is nothing to "
                "train. Set `trainable = True` on the layers that should learn."
            )
        if self.metrics is not None:
            self.metrics.reset()
        optimizer = self._build_optimizer(plan.max_steps)
        self.state = TrainerState(
            max_steps=plan.max_steps,
            num_train_epochs=plan.num_epochs,
            logging_steps=resolve_steps(args.logging_steps, plan.max_steps),
            eval_steps=resolve_steps(args.eval_steps or 0, plan.max_steps),
            save_steps=resolve_steps(args.save_steps, plan.max_steps),
            train_batch_size=loader.batch_size,
        )
        if args.load_best_model_at_end and args.save_strategy == args.eval_strategy == "steps":
            check_saves_follow_evaluations(self.state.save_steps, self.state.eval_steps)
        progress = persistence.Progress(batch_size=loader.batch_size)
        if checkpoint is not None:
            progress = self._restore(checkpoint, optimizer)
            progress.move_to(loader.batch_size)
        halted = keras.Variable(0, dtype="int32", trainable=False, name="halted")
        step = make_train_step(
            self.backend,
            self._forward,
            items_counter(self.compute_loss_func),
            optimizer,
            self.model.trainable_variables,
            self.metrics,
            args.max_grad_norm,
            args.on_nonfinite,
            halted,
        )
        variables = [*self._step_variables(), *optimizer.variables, halted]
        self.backend.place(variables, args.use_cpu)
        return Run(
            backend=self.backend,
            plan=plan,
            batches=batches,
            accumulation=accumulation,
            step=self.backend.compile_steps(step, _unique(variables), args.jit_compile),
            state=self.state,
            progress=progress,
            on_nonfinite=args.on_nonfinite,
            last_checkpoint=lambda: self.store.list()[-1][1] if self.store.list() else None,
            limit=self._steps_until_due,
            first_step=self.state.global_step,
        )

    def _build(self, batch: Any) -> None:
        """Create the variables of the model and the metrics from the shapes of a batch."""
        if self._forward is not None:
            return
        building.build_model(self.model, batch)
        self._forward = ForwardPass(self.model, self.compute_loss, self.loss)
        if self.metrics is not None:
            building.build_metrics(self.metrics, self._forward, batch)

    def _steps_until_due(self) -> int:
        if self.callback_handler.need_every_step():
            return 1
        return steps_until_due(self.args, self.state)

    def _step_variables(self) -> list[keras.Variable]:
        metrics = [] if self.metrics is None else self.metrics.variables
        return [*self.model.variables, *metrics, rng.global_seed_variable()]

    def _build_optimizer(self, max_steps: int) -> keras.optimizers.Optimizer:
        """A new optimizer for each ``fit``; one that the user gave is kept with its state."""
        if self.optimizer is None or self._created_optimizer:
            self.optimizer = self._given_optimizer
            if self.optimizer is None and getattr(self.model, "compiled", False):
                self.optimizer = self.model.optimizer
            self.lr_scheduler = self._given_schedule
            if self.optimizer is None:
                if self.lr_scheduler is None:
                    self.lr_scheduler = self.create_scheduler(max_steps)
                self.optimizer = self.create_optimizer()
                self._created_optimizer = True
            elif self.lr_scheduler is not None:
                self.optimizer.learning_rate = self.lr_scheduler
        if not self.optimizer.built:
            self.optimizer.build(self.model.trainable_variables)
        return self.optimizer

    def _restore(self, checkpoint: Checkpoint, optimizer: Any) -> persistence.Progress:
        """Put everything back to where the checkpoint was taken."""
        metrics = [] if self.metrics is None else self.metrics.variables
        progress = persistence.restore_run(self.backend, self.model, optimizer, metrics, checkpoint)
        for change in persistence.compare_arguments(
            checkpoint.documents["training_args"], self.args.to_dict()
        ):
            logger.warning("Resuming with another setting: %s", change)
        saved = TrainerState.from_dict(checkpoint.documents["trainer_state"])
        for name in (
            "epoch",
            "global_step",
            "log_history",
            "best_metric",
            "best_global_step",
            "best_model_checkpoint",
            "stateful_callbacks",
        ):
            setattr(self.state, name, getattr(saved, name))
        if self.args.restore_callback_states_from_checkpoint:
            self.callback_handler.load_state(saved.stateful_callbacks)
        if self.args.ignore_data_skip:
            progress.batch = 0
        logger.info("Resuming from %s at step %d.", checkpoint.path, self.state.global_step)
        return progress

    # --- evaluation and prediction --------------------------------------------------------------

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
        output = self._evaluation_loop(
            self.get_eval_dataloader(eval_dataset), metric_key_prefix, gather=not loss_only
        )
        self.log(output.metrics)
        self.fire("on_evaluate", metrics=output.metrics)
        return output.metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """The model's outputs for ``test_dataset``, in its order, with metrics if it has labels.

        Args:
            test_dataset: Data as for evaluation; labels may be missing.
            metric_key_prefix: Put before every metric's name.
        """
        output = self._evaluation_loop(
            make_loader(test_dataset, self.args, self.data_collator, "test_dataset", train=False),
            metric_key_prefix,
            gather=True,
            keep_outputs=True,
        )
        self.fire("on_predict", metrics=output.metrics)
        return PredictionOutput(output.predictions, output.label_ids, output.metrics)

    def _evaluation_loop(
        self, dataloader: Any, prefix: str, gather: bool, keep_outputs: bool = False
    ) -> EvalLoopOutput:
        with self.backend.device_scope(self.args.use_cpu):
            loader: Loader = as_loader(dataloader)
            batches = Batches(loader)
            first = batches.peek()
            if first is None:
                raise DataError("The evaluation data has no samples.")
            self._build(first)
            self._eval_dataloader = dataloader
            with_loss = not keep_outputs or unpack(first).y is not None
            saved = [] if self.metrics is None else persistence.copies(self.metrics.variables)
            output = run_evaluation(
                backend=self.backend,
                step=self._eval_step(with_loss, gather),
                batches=batches,
                metrics=self.metrics if with_loss else None,
                compute_metrics=self.compute_metrics,
                include=self.args.include_for_metrics,
                keep_outputs=keep_outputs,
                prefix=prefix,
                on_batch=lambda: self.fire("on_prediction_step"),
            )
            if self.metrics is not None and self.is_in_train:
                persistence.put_back(self.metrics.variables, saved)
            return output

    def _eval_step(self, with_loss: bool, gather: bool) -> Callable[[Any], dict[str, Any]]:
        """Compiled once for each of the four forms."""
        key = (with_loss, gather)
        if key not in self._eval_steps:
            assert self._forward is not None
            step = make_eval_step(
                self._forward if with_loss else self._forward.predict,
                self.model.variables,
                self.metrics if with_loss else None,
                self._select_outputs if gather else None,
            )
            variables = _unique(self._step_variables())
            self.backend.place(variables, self.args.use_cpu)
            self._eval_steps[key] = self.backend.compile_step(
                step, variables, self.args.jit_compile
            )
        return self._eval_steps[key]

    def _select_outputs(self, outputs: Any, batch: Any) -> dict[str, Any]:
        """What of an evaluation batch goes to the host."""
        parts = unpack(batch)
        if self.preprocess_logits_for_metrics is not None:
            outputs = self.preprocess_logits_for_metrics(outputs, parts.y)
        selected = {"outputs": outputs}
        if parts.y is not None:
            selected["labels"] = parts.y
        if "inputs" in self.args.include_for_metrics:
            selected["inputs"] = parts.x
        return selected

    def evaluate_in_training(self, run: Run) -> None:
        """Evaluate, then see whether it is the best so far."""
        metrics = self.evaluate()
        name = self.args.metric_for_best_model
        if name is None:
            return
        value = metric_value(metrics, name)
        best = self.state.best_metric
        if best is None:
            best = -math.inf if self.args.greater_is_better else math.inf
        better = value > best if self.args.greater_is_better else value < best
        if better:
            self.state.best_metric = value
            self.state.best_global_step = self.state.global_step
        if self.args.save_strategy == "best":
            self.control.should_save = better

    # --- saving ---------------------------------------------------------------------------------

    def save_checkpoint(self, run: Run) -> None:
        """Write ``checkpoint-{step}`` and delete what ``save_total_limit`` leaves no room for."""
        state, args = self.state, self.args
        path = self._checkpoint_path(state.global_step)
        if state.best_global_step is not None and args.metric_for_best_model:
            best = self._checkpoint_path(state.best_global_step)
            if best == path or best.exists():
                state.best_model_checkpoint = str(best)
        state.stateful_callbacks = self.callback_handler.state()
        arrays = {"model": persistence.gather_model(self.model)}
        documents = {"trainer_state": state.to_dict(), "training_args": args.to_dict()}
        if not args.save_only_model:
            metrics = [] if self.metrics is None else self.metrics.variables
            more, documents_more = persistence.gather_training(
                self.backend, self.model, self.optimizer, metrics, run.progress
            )
            arrays |= more
            documents |= documents_more
        self.store.save(state.global_step, arrays, documents, persistence.environment(self.backend))
        if args.save_total_limit is not None:
            best_path = state.best_model_checkpoint
            self.store.rotate(args.save_total_limit, [Path(best_path)] if best_path else [])
        self.fire("on_save")

    def _checkpoint_path(self, step: int) -> Path:
        return self.store.directory / checkpoint_name(step)

    def _load_best(self) -> None:
        """Put the weights of the best checkpoint into the model."""
        path = self.state.best_model_checkpoint
        if path is None or not Path(path).exists():
            logger.warning(
                "load_best_model_at_end: the best step %s has no checkpoint; the model keeps its "
                "last weights.",
                self.state.best_global_step,
            )
            return
        persistence.restore_model(self.model, self.store.load(Path(path)))
        logger.info(
            "Loaded the best model: %s (%s = %s).",
            path,
            self.args.metric_for_best_model,
            self.state.best_metric,
        )
        if self.args.save_total_limit == 1:
            self.store.delete([item for item in self.store.list() if item[1] != Path(path)])

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
        persistence.save_keras_file(self.model, target)
        return target

    def save_state(self) -> Path:
        """Write ``trainer_state.json`` into the output directory."""
        path = Path(self.args.output_dir) / "trainer_state.json"
        persistence.save_json(path, self.state.to_dict())
        return path

    # --- logging and callbacks ------------------------------------------------------------------

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add an entry to ``state.log_history`` and tell the callbacks."""
        entry = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self.fire("on_log", logs=entry)

    def log_window(self, run: Run) -> None:
        """Log the means since the last log."""
        logs = run.take_window()
        if not logs:
            return
        if self.metrics is not None:
            logs |= self.metrics.result()
            self.metrics.reset()
        self.log(logs)

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

    def get_decay_parameter_names(self) -> list[str]:
        """Paths of the trainable variables that weight decay applies to."""
        return building.decay_parameter_names(self.model)

    def get_num_trainable_parameters(self) -> int:
        """Number of trainable scalars in the model."""
        return sum(math.prod(v.shape) for v in self.model.trainable_variables)

    def num_examples(self, dataloader: Any) -> int | None:
        """Samples in an epoch of ``dataloader``; None if it does not know."""
        return as_loader(dataloader).num_examples


def _unique(variables: Sequence[keras.Variable]) -> list[keras.Variable]:
    return list({id(v): v for v in variables}.values())
