"""What kbtrain knows of Keras' own callbacks: needs, requirements, state, and advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kbtrain.errors import ConfigurationError
from kbtrain.utils.layers import innermost_optimizer

K = keras.callbacks

BATCH_METHODS = {
    "train": (
        ("on_train_batch_begin", "on_batch_begin"),
        ("on_train_batch_end", "on_batch_end"),
    ),
    "test": (("on_test_batch_begin",), ("on_test_batch_end",)),
    "predict": (("on_predict_batch_begin",), ("on_predict_batch_end",)),
}
"""The methods of the begin and the end of a batch, by the kind of pass."""


def _writes_batches(callback: Any) -> bool:
    traces = getattr(callback, "_should_trace", True)
    return callback.update_freq != "epoch" or callback.write_steps_per_second or traces


_IDLE: dict[type, Callable[[Any], bool]] = {
    K.ModelCheckpoint: lambda callback: callback.save_freq == "epoch",
    K.TensorBoard: lambda callback: not _writes_batches(callback),
    K.TerminateOnNaN: lambda callback: True,  # the run looks at the loss of every update anyhow
}
"""Classes whose batch methods do nothing with some settings."""


def needs_batches(callback: Any, kind: str, end: bool) -> bool:
    """Whether a callback does something at the begin or end of a batch.

    Args:
        callback: A callback of Keras.
        kind: "train", "test" or "predict".
        end: Whether the end of the batch is meant.
    """
    for name in BATCH_METHODS[kind][end]:
        if name in vars(callback):
            return True
        own = getattr(type(callback), name)
        if own is getattr(K.Callback, name):
            continue
        for cls, is_idle in _IDLE.items():
            if own is getattr(cls, name) and isinstance(callback, cls) and is_idle(callback):
                break
        else:
            return True
    return False


def writes_files(callback: Any) -> bool:
    """Whether it writes files or sends results, which only process 0 should do."""
    return isinstance(callback, (K.ModelCheckpoint, K.CSVLogger, K.TensorBoard, K.RemoteMonitor))


def decides_alike(callback: Any) -> bool:
    """Whether all it does follows from the results, which are the same on all processes."""
    user_code = (K.LambdaCallback, K.LearningRateScheduler)
    return type(callback).__module__.startswith("keras.") and not isinstance(callback, user_code)


def sets_learning_rate(callback: Any) -> bool:
    """Whether it assigns the optimizer's learning rate."""
    return isinstance(callback, (K.LearningRateScheduler, K.ReduceLROnPlateau))


def check_settings(callback: Any, trainer: Any) -> None:
    """Check that the run gives a callback what it needs.

    Raises:
        ConfigurationError: It does not; the message says what to set.
    """
    name, args = type(callback).__name__, trainer.args
    if sets_learning_rate(callback) and not has_settable_rate(trainer.optimizer):
        raise ConfigurationError(
            f"keras.callbacks.{name} sets the learning rate of the optimizer, which must be a "
            "number: as in Keras, a schedule cannot be combined with it. Set "
            "lr_scheduler_type='constant' (without warmup), or leave the callback out. Received: "
            f"lr_scheduler_type={args.lr_scheduler_type!r}, a learning rate of type "
            f"{type(trainer.optimizer.learning_rate).__name__}."
        )
    monitor = getattr(callback, "monitor", None)
    needed = not isinstance(callback, K.ModelCheckpoint) or callback.save_best_only
    watches = isinstance(callback, (K.EarlyStopping, K.ReduceLROnPlateau, K.ModelCheckpoint))
    if watches and needed and str(monitor).startswith("val_") and args.eval_strategy == "no":
        raise ConfigurationError(
            f"keras.callbacks.{name} monitors {monitor!r}, and this run evaluates nothing: set "
            "eval_strategy='epoch' in TrainingArguments and give an eval_dataset, or monitor a "
            f"metric of the training. Received: eval_strategy={args.eval_strategy!r}."
        )
    optimizer = innermost_optimizer(trainer.optimizer)
    if isinstance(callback, K.SwapEMAWeights) and not getattr(optimizer, "use_ema", False):
        raise ConfigurationError(
            "keras.callbacks.SwapEMAWeights needs an optimizer of Keras with use_ema=True. "
            f"Received: {type(optimizer).__name__}. With ema=0.999 in TrainingArguments, "
            "evaluations and exports use an average without a callback."
        )


def has_settable_rate(optimizer: Any) -> bool:
    """Whether the learning rate of an optimizer is a number, not a schedule."""
    return isinstance(getattr(optimizer, "learning_rate", None), keras.Variable)


def set_direction(callback: Any, trainer: Any) -> None:
    """Tell a callback whether its metric should rise or fall.

    Keras looks for the metric in the compiled model; metrics may have been passed to the Trainer.
    """
    if getattr(callback, "mode", None) != "auto" or not hasattr(callback, "monitor_op"):
        return
    name = str(callback.monitor).removeprefix("val_")
    if callback.monitor_op is not None or name == "loss":
        return
    args = trainer.args
    best = args.metric_for_best_model
    if best is not None and best.removeprefix("eval_") == name:
        if args.greater_is_better is not None:
            callback.mode = "max" if args.greater_is_better else "min"
        return
    for metric in getattr(trainer.bound.metrics, "objects", list)():
        direction = getattr(metric, "_direction", None)
        if metric.name == name and direction is not None:
            callback.mode = "max" if direction == "up" else "min"


# --- state ----------------------------------------------------------------------------------------

_STATE: dict[type, tuple[str, ...]] = {
    K.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch"),
    K.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    K.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen"),
    K.History: ("epoch", "history"),
    K.TensorBoard: ("_global_train_batch", "_global_test_batch"),
}
_STATELESS = (
    K.CSVLogger,
    K.LambdaCallback,
    K.LearningRateScheduler,
    K.RemoteMonitor,
    K.SwapEMAWeights,
    K.TerminateOnNaN,
)
_OF_BASE = {"validation_data", "_model", "params"}


def state_of(callback: Any) -> dict[str, Any] | None:
    """The state of a callback, as JSON values; None if it cannot be told."""
    if all(callable(getattr(callback, name, None)) for name in ("state", "load_state")):
        return {"own": callback.state()}
    for cls, names in _STATE.items():
        if isinstance(callback, cls):
            return {name: _plain(getattr(callback, name)) for name in names}
    known = isinstance(callback, _STATELESS)
    return {} if known or not set(vars(callback)) - _OF_BASE else None


def keeps_best_weights(callback: Any) -> bool:
    """Whether it holds the best weights in memory, which its state does not."""
    return isinstance(callback, K.EarlyStopping) and callback.restore_best_weights


def load_state(callback: Any, state: dict[str, Any] | None, weights: Any = None) -> bool:
    """Inverse of ``state_of``, after ``on_train_begin``, which resets a callback.

    Args:
        callback: A callback of Keras.
        state: The saved state, or None if there is none.
        weights: The best weights, for a callback that holds them.

    Returns:
        Whether the callback continues; if not, it was left as it is.
    """
    if state is not None and "own" in state:
        callback.load_state(state["own"])
        return True
    own = state_of(callback)
    if own == {}:
        return True
    if own is None or state is None or (keeps_best_weights(callback) and weights is None):
        return False
    for name in own:
        if name in state:
            setattr(callback, name, state[name])
    if weights is not None:
        callback.best_weights = weights
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return np.asarray(keras.ops.convert_to_numpy(value)).tolist()
