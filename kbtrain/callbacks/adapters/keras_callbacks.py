"""Callbacks of Keras in a run of the Trainer. docs/callbacks.md has the mapping of their events."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from kbtrain.callbacks.adapters import keras_facts as facts
from kbtrain.callbacks.adapters.epoch_results import EpochResults
from kbtrain.callbacks.base import TrainerCallback
from kbtrain.errors import ConfigurationError, KbtrainError, first_lines
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

K = keras.callbacks

_NOT_RESULTS = re.compile(
    r"(runtime|(samples|steps|tokens)_per_second|mem_(cpu|gpu)_.*|model_preparation_time)$"
)
_MISSING = object()


class KerasCallbacks(TrainerCallback):
    """Calls all callbacks of Keras of a run, in their order, at Keras' moments, with Keras' logs.

    Args:
        callbacks: Objects of ``keras.callbacks.Callback``.
    """

    runs_user_code = True

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self.callbacks: list[Any] = []
        self._epoch = 0
        self._results = EpochResults()
        self._validation: dict[str, Any] = {}
        self._epoch_logs: dict[str, Any] = {}
        self._prefix, self._pass, self._batch = "eval", "", 0
        self._best_steps: dict[int, int] = {}
        self._saved: dict[str, Any] | None = None
        for callback in callbacks:
            self.add(callback)

    def __repr__(self) -> str:
        return f"KerasCallbacks({self.callbacks})"

    def add(self, callback: Any) -> None:
        """Add a callback of Keras."""
        self.callbacks.append(callback)
        self._listen()

    def remove(self, callback: Any) -> None:
        """Remove one."""
        self.callbacks.remove(callback)
        self._listen()

    def _listen(self) -> None:
        """Listen to the events of updates and batches only where a callback needs them."""
        events = {
            "on_step_begin": self._needed("train", False),
            "on_step_end": self._needed("train", True),
            "on_prediction_step_begin": self._needed("test", False)
            + self._needed("predict", False),
            "on_prediction_step": self._needed("test", True) + self._needed("predict", True),
        }
        for event, needed in events.items():
            vars(self).pop(event, None)
            if needed:
                setattr(self, event, getattr(self, f"_{event}"))

    def _needed(self, kind: str, end: bool) -> list[Any]:
        return [c for c in self.callbacks if facts.needs_batches(c, kind, end)]

    @property
    def decides_alike(self) -> bool:  # type: ignore[override]
        """Whether no callback runs code of the user."""
        return all(map(facts.decides_alike, self.callbacks))

    # --- calling ---------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        arguments: tuple[Any, ...],
        kwargs: dict[str, Any],
        control: Any,
        callbacks: Iterable[Any] | None = None,
    ) -> None:
        """Call a method of the callbacks; pass on a request to stop."""
        trainer = kwargs["trainer"]
        model = trainer.model
        for callback in self.callbacks if callbacks is None else callbacks:
            if facts.writes_files(callback) and current().rank != 0:
                continue
            if callback._model is not model:
                callback.set_params({"verbose": 0, "epochs": None, "steps": None})
                with _translated(callback, "set_model"):
                    callback.set_model(model)
            with _optimizer_of(model, trainer.optimizer), _translated(callback, method):
                getattr(callback, method)(*arguments)
            if getattr(model, "stop_training", False) and not control.should_training_stop:
                control.should_training_stop = trainer.is_in_train
                if getattr(control, "stop_reason", "") is None:
                    control.stop_reason = _reason(callback)

    def _logs(self, trainer: Any) -> dict[str, Any]:
        """Loss and metrics of the epoch so far."""
        run = trainer.current_run
        run.read()
        return self._results.result(trainer.bound.metrics)

    # --- training --------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the callbacks need, connect them to the run, and restore their state."""
        trainer = kwargs["trainer"]
        run, model = trainer.current_run, trainer.model
        self._results = run.epoch_results = EpochResults(run.newest_only)
        self._validation, self._epoch_logs, self._epoch = {}, {}, run.progress.epoch
        run.ends_at_nonfinite = any(isinstance(c, K.TerminateOnNaN) for c in self.callbacks)
        model.stop_training = False
        plan = run.plan
        params = {
            "verbose": 0 if args.disable_tqdm else 1,
            "epochs": plan.num_epochs if plan.num_epochs < 2**31 else None,
            "steps": plan.steps_per_epoch or None,
        }
        for callback in self.callbacks:
            facts.check_settings(callback, trainer)
            facts.set_direction(callback, trainer)
            # It must not take an epoch for the last one: checkpoints hold the weights in training.
            swaps = isinstance(callback, K.SwapEMAWeights)
            callback.set_params(params | {"epochs": -1} if swaps else params)
            if not facts.writes_files(callback) or current().rank == 0:
                with _optimizer_of(model, trainer.optimizer), _translated(callback, "set_model"):
                    callback.set_model(model)
        resumed, self._saved, self._best_steps = self._saved, None, {}
        appending = [c for c in self.callbacks if isinstance(c, K.CSVLogger) and not c.append]
        if state.global_step:
            for callback in appending:  # keep the rows of the interrupted run
                callback.append = True
        self._call("on_train_begin", (), kwargs, control)
        if state.global_step:
            self._restore(trainer, resumed or {})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an epoch, or continue with the restored one."""
        progress = kwargs["trainer"].current_run.progress
        self._epoch = progress.epoch
        if progress.batch == 0:
            self._results.reset(kwargs["trainer"].bound.metrics)
            self._validation = {}
        self._call("on_epoch_begin", (self._epoch,), kwargs, control)

    def on_epoch_results(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the results of the training and of the evaluation of the epoch."""
        trainer = kwargs["trainer"]
        logs = self._logs(trainer) | {f"val_{n}": v for n, v in self._validation.items()}
        for callback in self.callbacks:
            self._check_monitor(callback, logs)
        self._epoch_logs = dict(logs)
        try:
            self._call("on_epoch_end", (self._epoch, logs), kwargs, control)
        finally:
            swapping = [c for c in self.callbacks if isinstance(c, K.SwapEMAWeights)]
            self._call("on_epoch_begin", (self._epoch,), kwargs, control, swapping)
        for index, callback in enumerate(self.callbacks):
            if facts.keeps_best_weights(callback) and callback.best_epoch == self._epoch:
                self._best_steps[index] = state.global_step

    def _check_monitor(self, callback: Any, logs: dict[str, Any]) -> None:
        watches = isinstance(callback, (K.EarlyStopping, K.ReduceLROnPlateau))
        best = isinstance(callback, K.ModelCheckpoint) and callback.save_best_only
        monitor = getattr(callback, "monitor", None)
        if not (watches or best) or monitor in logs or not logs:
            return
        known = [n for n in logs if n.startswith("val_")]
        if str(monitor).startswith("val_") and not known:
            return  # no evaluation in this epoch: Keras warns
        if str(monitor).startswith("learning_rate"):
            return
        raise ConfigurationError(
            f"keras.callbacks.{type(callback).__name__} monitors {monitor!r}, which is not among "
            f"the results of an epoch: {', '.join(logs)}. Name one of these, or add the metric."
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the results of the last epoch."""
        self._call("on_train_end", (dict(self._epoch_logs),), kwargs, control)
        for index, callback in enumerate(self.callbacks):
            if facts.keeps_best_weights(callback) and callback.best_weights is not None:
                self._note_restored(kwargs["trainer"], callback, self._best_steps.get(index))

    def _note_restored(self, trainer: Any, callback: Any, step: int | None) -> None:
        place = f"epoch {callback.best_epoch + 1}" if step is None else f"update {step}"
        trainer.weights_note = (
            f"the best by {callback.monitor}, of {place}, restored by {type(callback).__name__}"
        )
        # It restores weights in training; averages are what is evaluated.
        averages = trainer.args.ema is not None or getattr(trainer.optimizer, "use_ema", False)
        trainer.weights_step = None if averages else step

    def _update(self, kwargs: dict[str, Any]) -> int:
        """Index of the newest update in its epoch."""
        trainer = kwargs["trainer"]
        run = trainer.current_run
        return -(-int(run.progress.batch) // int(run.accumulation))

    def _on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        needed = self._needed("train", False)
        self._call("on_train_batch_begin", (self._update(kwargs), {}), kwargs, control, needed)

    def _on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = self._logs(kwargs["trainer"])
        needed = self._needed("train", True)
        index = self._update(kwargs) - 1
        self._call("on_train_batch_end", (index, logs), kwargs, control, needed)

    # --- evaluation ------------------------------------------------------------------------------

    def _evaluating(self) -> list[Any]:
        # The Trainer itself evaluates with the averages of the optimizer.
        return [c for c in self.callbacks if not isinstance(c, K.SwapEMAWeights)]

    def on_evaluate_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an evaluation."""
        self._prefix, self._pass, self._batch = kwargs["prefix"], "test", 0
        self._call("on_test_begin", (), kwargs, control, self._evaluating())

    def on_predict_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a prediction."""
        self._prefix, self._pass, self._batch = kwargs["prefix"], "predict", 0
        self._call("on_predict_begin", (), kwargs, control, self._evaluating())

    def _on_prediction_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pass:
            needed = self._needed(self._pass, False)
            method = f"on_{self._pass}_batch_begin"
            self._call(method, (self._batch, {}), kwargs, control, needed)

    def _on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch += kwargs["batches"]
        if self._pass and (needed := self._needed(self._pass, True)):
            logs = dict(kwargs["metrics"])
            method = f"on_{self._pass}_batch_end"
            self._call(method, (self._batch - 1, logs), kwargs, control, needed)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End an evaluation; its results are those of the epoch."""
        self._pass = ""
        results = _results(kwargs["metrics"], f"{self._prefix}_")
        if kwargs["trainer"].is_in_train:
            self._validation |= _results(kwargs["metrics"], "eval_")
        self._call("on_test_end", (results,), kwargs, control, self._evaluating())

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a prediction."""
        self._pass = ""
        results = _results(kwargs["metrics"], f"{self._prefix}_")
        self._call("on_predict_end", (results,), kwargs, control, self._evaluating())

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The states of the callbacks, and the results of an unfinished epoch."""
        return {
            "callbacks": [[type(c).__name__, facts.state_of(c)] for c in self.callbacks],
            "epoch": self._epoch,
            "results": self._results.state(),
            "validation": dict(self._validation),
            "best_steps": {str(index): step for index, step in self._best_steps.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Remember a state; ``on_train_begin`` resets the callbacks before it is restored."""
        self._saved = dict(state)

    def _restore(self, trainer: Any, saved: dict[str, Any]) -> None:
        states: dict[str, list[Any]] = {}
        for name, state in saved.get("callbacks", ()):
            states.setdefault(name, []).append(state)
        restarted = []
        for index, callback in enumerate(self.callbacks):
            remaining = states.get(type(callback).__name__)
            state = remaining.pop(0) if remaining else None
            if facts.load_state(callback, state):
                continue
            if state is not None and facts.keeps_best_weights(callback):
                step = saved["best_steps"].get(str(index))
                weights = None if step is None else trainer.weights_of_checkpoint(step)
                if weights is not None:
                    facts.load_state(callback, state, weights)
                    self._best_steps[index] = step
                    continue
            restarted.append(type(callback).__name__)
        if restarted:
            logger.warning(
                "The checkpoints do not hold what these callbacks of Keras remember, so they start "
                "anew: %s. (The best weights of an EarlyStopping are found if there is a "
                "checkpoint of that epoch. A callback of your own is resumed exactly with the "
                "methods state(), which returns JSON values, and load_state(state).)",
                ", ".join(restarted),
            )
        if "results" in saved:
            self._epoch = int(saved["epoch"])
            self._validation = dict(saved["validation"])
            self._results.load_state(saved["results"], trainer.bound.metrics)


def _results(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The loss and metrics among the results of an evaluation, without their prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not _NOT_RESULTS.search(name)
    }


def _reason(callback: Any) -> str:
    if isinstance(callback, K.EarlyStopping):
        epochs = "1 epoch" if callback.wait == 1 else f"{callback.wait} epochs"
        return f"early stopping: no better {callback.monitor} for {epochs}"
    return f"{type(callback).__name__} asked to stop"


@contextlib.contextmanager
def _optimizer_of(model: Any, optimizer: Any) -> Iterator[None]:
    """Context in which ``model.optimizer`` is that of the run; the model may not be compiled."""
    before = vars(model).get("optimizer", _MISSING)
    if optimizer is None or before is optimizer:
        yield
        return
    model.optimizer = optimizer
    try:
        yield
    finally:
        vars(model).pop("optimizer", None)
        if before is not _MISSING:
            model.optimizer = before


@contextlib.contextmanager
def _translated(callback: Any, method: str) -> Iterator[None]:
    """Context in which what Keras' own callbacks say to a user is an error of kbtrain."""
    try:
        yield
    except KbtrainError:
        raise
    except Exception as error:
        name = type(callback).__name__
        if "LearningRateSchedule" in str(error) and isinstance(error, TypeError):
            raise ConfigurationError(
                f"{name}.{method} assigned the learning rate of the optimizer, which follows a "
                "schedule. Set lr_scheduler_type='constant' (without warmup) to assign it."
            ) from error
        of_keras = type(callback).__module__.startswith("keras.")
        said = isinstance(error, ValueError | TypeError | KeyError)
        if of_keras and said and not isinstance(callback, K.LambdaCallback):
            raise ConfigurationError(
                f"keras.callbacks.{name}.{method}: {first_lines(error)}"
            ) from error
        error.add_note(f"Raised in {name}.{method}.")
        raise
