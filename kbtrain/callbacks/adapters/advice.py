"""Advice for callbacks of Keras and Transformers: what to use with kbtrain instead."""

from __future__ import annotations

from typing import Any

import keras


def usable(cls: type) -> str | None:
    """Whose callbacks a class belongs to, "keras" or "transformers", if kbtrain calls them.

    Args:
        cls: The class of a callback.

    Returns:
        None for other classes, and for those with nothing to do in a run of kbtrain.
    """
    if issubclass(cls, keras.callbacks.Callback):
        refused = any(c.__name__ in _REFUSED_OF_KERAS and _is_keras(c) for c in cls.__mro__)
        return None if refused else "keras"
    theirs = [c.__name__ for c in cls.__mro__ if _is_transformers(c)]
    if "TrainerCallback" not in theirs:
        return None
    used = {"TrainerCallback", "ExportableState", *_USED_OF_TRANSFORMERS}
    return "transformers" if set(theirs) <= used else None


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
    known = next(c.__name__ for c in cls.__mro__ if c.__name__ in _REFUSED_OF_KERAS)
    return f"It is a callback of Keras: {_REFUSED_OF_KERAS[known]}."


def _is_keras(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "keras"


def _get(callback: Any, name: str, default: Any) -> Any:
    """A setting of a callback; the default if a class was passed."""
    value = default if isinstance(callback, type) else getattr(callback, name, default)
    return default if value is None else value


_REFUSED_OF_KERAS = {
    "OrbaxCheckpoint": (
        "write save_strategy='epoch' (or 'steps') in TrainingArguments: checkpoints go to "
        "output_dir, save_total_limit keeps the newest"
    ),
    "BackupAndRestore": (
        "write save_strategy='epoch' (or 'steps') and resume_from_checkpoint='auto' in "
        "TrainingArguments: a run that is started again continues exactly where it stopped"
    ),
    "ProgbarLogger": "write disable_tqdm=False in TrainingArguments",
    "CallbackList": "pass the callbacks themselves, in a list",
}
"""Callbacks of Keras for what the Trainer does itself, and what to write instead."""

_TRACKERS = {
    "ClearMLCallback": None,
    "CodeCarbonCallback": None,
    "CometCallback": "comet_ml",
    "DVCLiveCallback": None,
    "MLflowCallback": "mlflow",
    "NeptuneCallback": None,
    "SwanLabCallback": "swanlab",
    "TensorBoardCallback": "tensorboard",
    "TrackioCallback": "trackio",
    "WandbCallback": "wandb",
}


def _is_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _of_transformers(callback: Any, cls: type) -> str:
    used = {"TrainerCallback", "ExportableState", *_USED_OF_TRANSFORMERS}
    name = next(c.__name__ for c in cls.__mro__ if _is_transformers(c) and c.__name__ not in used)
    subject = "It is" if _is_transformers(cls) else f"It derives from {name},"
    if name in ("ProgressCallback", "NotebookProgressCallback"):
        return f"{subject} a callback of Transformers: write disable_tqdm=False instead."
    if tracker := _TRACKERS.get(name):
        return (
            f"{subject} a callback of Transformers: write report_to={tracker!r} in "
            "TrainingArguments."
        )
    if name in _TRACKERS:
        return (
            f"{subject} a callback of Transformers for a service without a tracker in kbtrain: a "
            "package can register one under the entry points kbtrain.trackers, or a "
            "kbtrain.TrainerCallback can send kwargs['logs'] in on_log."
        )
    return (
        f"{subject} a callback of Transformers for its own training loop. Leave it out, or derive "
        "one from kbtrain.TrainerCallback: the events and their arguments have the same names."
    )


_USED_OF_TRANSFORMERS = ("EarlyStoppingCallback", "PrinterCallback")
"""Callbacks of Transformers that need nothing but the events."""
