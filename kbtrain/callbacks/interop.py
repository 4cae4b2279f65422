"""Advice for callbacks of Keras and Transformers: what to use with kbtrain instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

_EVENTS_OF_KERAS = (
    "derive from kbtrain.TrainerCallback, whose events get (args, state, control, **kwargs): "
    "on_epoch_end has state.epoch and kwargs['model'], on_step_end is called after each update, "
    "on_log has kwargs['logs'], on_evaluate kwargs['metrics']; to stop, set "
    "control.should_training_stop."
)


def advice(callback: Any) -> str | None:
    """What to use in kbtrain instead of a callback of Keras or Transformers.

    Args:
        callback: Anything that was passed as a callback, an object or a class.

    Returns:
        One or more sentences; None if it belongs to neither library.
    """
    cls = callback if isinstance(callback, type) else type(callback)
    if issubclass(cls, keras.callbacks.Callback):
        return _of_keras(callback, cls)
    if any(c.__name__ == "TrainerCallback" and _is_transformers(c) for c in cls.__mro__):
        return _of_transformers(callback, cls)
    return None


def _of_keras(callback: Any, cls: type) -> str:
    known = next((c.__name__ for c in cls.__mro__ if c.__name__ in _OF_KERAS), None)
    own = not cls.__module__.startswith("keras.")
    if known is None or (own and known == "CallbackList"):
        return f"It is a callback of Keras: {_EVENTS_OF_KERAS}"
    text = f"It is a callback of Keras: {_OF_KERAS[known](callback)}."
    return f"{text} For what {cls.__name__} adds to {known}, {_EVENTS_OF_KERAS}" if own else text


def _get(callback: Any, name: str, default: Any) -> Any:
    """A setting of a Keras callback; the default if a class was passed."""
    value = default if isinstance(callback, type) else getattr(callback, name, default)
    return default if value is None else value


def _metric(callback: Any) -> str:
    """The monitored metric as ``TrainingArguments``, from Keras' ``monitor`` and ``mode``."""
    monitor = str(_get(callback, "monitor", "val_loss"))
    mode = _get(callback, "mode", "auto")
    direction = {"min": ", greater_is_better=False", "max": ", greater_is_better=True"}
    name = monitor.removeprefix("val_")
    return f"metric_for_best_model={name!r}{direction.get(str(mode), '')}"


def _early_stopping(callback: Any) -> str:
    patience = max(int(_get(callback, "patience", 0)), 1)
    threshold = abs(float(_get(callback, "min_delta", 0.0)))
    more = f", early_stopping_threshold={threshold:g}" if threshold else ""
    best = ", load_best_model_at_end=True, save_strategy='epoch'"
    return (
        f"write kbtrain.EarlyStoppingCallback(early_stopping_patience={patience}{more}), and in "
        f"TrainingArguments eval_strategy='epoch', {_metric(callback)}"
        f"{best if _get(callback, 'restore_best_weights', False) else ''}; give an eval_dataset"
    )


def _model_checkpoint(callback: Any) -> str:
    if _get(callback, "save_best_only", False):
        when = f"save_strategy='best', eval_strategy='epoch', {_metric(callback)}"
    else:
        every = _get(callback, "save_freq", "epoch")
        when = f"save_strategy='steps', save_steps={every}"
        when = "save_strategy='epoch'" if every == "epoch" else when
    return (
        f"write {when} in TrainingArguments: checkpoints go to output_dir, save_total_limit keeps "
        "the newest; trainer.save_model(path) writes a .keras file"
    )


def _plateau(callback: Any) -> str:
    # As in Keras: an improvement is an absolute difference, patience counts evaluations.
    options = {
        "factor": _get(callback, "factor", 0.1),
        "patience": _get(callback, "patience", 10),
        "threshold": abs(float(_get(callback, "min_delta", 1e-4))),
        "threshold_mode": "abs",
        "cooldown": _get(callback, "cooldown", 0),
        "min_lr": _get(callback, "min_lr", 0.0),
    }
    return (
        "write lr_scheduler_type='reduce_lr_on_plateau', eval_strategy='epoch', "
        f"{_metric(callback)}, lr_scheduler_kwargs={options} in TrainingArguments"
    )


def _ready(text: str) -> Callable[[Any], str]:
    return lambda callback: text


_OF_KERAS: dict[str, Callable[[Any], str]] = {
    "EarlyStopping": _early_stopping,
    "ModelCheckpoint": _model_checkpoint,
    "OrbaxCheckpoint": _model_checkpoint,
    "ReduceLROnPlateau": _plateau,
    "TensorBoard": _ready(
        "write report_to='tensorboard' in TrainingArguments (logs go to a folder in output_dir)"
    ),
    "CSVLogger": _ready("write report_to='csv' in TrainingArguments"),
    "LearningRateScheduler": _ready(
        "write lr_scheduler_type=... in TrainingArguments, or pass the Trainer "
        "optimizers=(optimizer, schedule) with a keras.optimizers.schedules.LearningRateSchedule"
    ),
    "BackupAndRestore": _ready(
        "write save_strategy='epoch' (or 'steps') and resume_from_checkpoint='auto' in "
        "TrainingArguments: a run that is started again continues exactly where it stopped"
    ),
    "TerminateOnNaN": _ready(
        "leave it out: on_nonfinite='raise' in TrainingArguments, the default, stops before a NaN "
        "reaches the weights"
    ),
    "SwapEMAWeights": _ready(
        "leave it out: with ema=0.999 in TrainingArguments, or an optimizer with use_ema=True, "
        "evaluations and exports use the average"
    ),
    "ProgbarLogger": _ready("write disable_tqdm=False in TrainingArguments"),
    "History": _ready("read trainer.state.log_history after fit"),
    "RemoteMonitor": _ready(
        "derive from kbtrain.TrainerCallback and send kwargs['logs'] in on_log"
    ),
    "LambdaCallback": _ready(_EVENTS_OF_KERAS.removesuffix(".")),
    "CallbackList": _ready("pass the callbacks themselves, in a list"),
}
"""Keras class -> function from an object (or the class) to advice."""

_TRACKERS = {
    "ClearMLCallback": None,
    "CodeCarbonCallback": None,
    "CometCallback": None,
    "DVCLiveCallback": None,
    "MLflowCallback": "mlflow",
    "NeptuneCallback": None,
    "SwanLabCallback": None,
    "TensorBoardCallback": "tensorboard",
    "TrackioCallback": "trackio",
    "WandbCallback": "wandb",
}


def _is_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _of_transformers(callback: Any, cls: type) -> str:
    name = next(c.__name__ for c in cls.__mro__ if _is_transformers(c))
    if not _is_transformers(cls):
        return (
            f"It derives from {name} of Transformers. Derive it from "
            f"kbtrain.{name if name in _SAME else 'TrainerCallback'}: the events and their "
            "arguments have the same names."
        )
    if name in _SAME:
        given = ""
        if name == "EarlyStoppingCallback":
            given = (
                f"early_stopping_patience={_get(callback, 'early_stopping_patience', 1)}, "
                f"early_stopping_threshold={_get(callback, 'early_stopping_threshold', 0.0)}"
            )
        return f"It is a callback of Transformers: write kbtrain.{name}({given})."
    if tracker := _TRACKERS.get(name):
        return (
            f"It is a callback of Transformers: write report_to={tracker!r} in TrainingArguments."
        )
    if name in _TRACKERS:
        return (
            "It is a callback of Transformers for a service without a tracker in kbtrain: a "
            "package can register one under the entry points kbtrain.trackers, or a "
            "kbtrain.TrainerCallback can send kwargs['logs'] in on_log."
        )
    return (
        "It is a callback of Transformers for its own training loop. Leave it out, or derive one "
        "from kbtrain.TrainerCallback: the events and their arguments have the same names."
    )


_SAME = ("EarlyStoppingCallback", "PrinterCallback", "ProgressCallback")
"""Callbacks with the same name in kbtrain."""
