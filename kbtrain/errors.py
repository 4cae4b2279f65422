"""The errors kbtrain raises for mistakes a user can mend.

Every message says what happened, what was expected and what to do. Each class also derives from the
built-in exception that fits, so ``except ValueError`` and friends keep working.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import signal
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class KbtrainError(Exception):
    """Base class of every error that kbtrain raises on purpose."""

    # Keras rewrites what is raised inside a layer's call, unless it bears this mark.
    _keras_call_info_injected = True


class ConfigurationError(KbtrainError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class FrozenArgumentsError(ConfigurationError, dataclasses.FrozenInstanceError):
    """An attempt to change ``TrainingArguments`` that have been made."""


class DataError(KbtrainError, ValueError):
    """Data of a kind, shape or length that cannot be trained on."""


class CheckpointError(KbtrainError, RuntimeError):
    """Something is wrong with a checkpoint; the subclasses say what."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint where one was asked for."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered."""


class CheckpointUnreadableError(CheckpointError):
    """Checkpoints that the system does not let be read now: nothing says that they are damaged."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint of a newer kbtrain, or another program's folder with a checkpoint's name."""


class FolderInUseError(CheckpointError):
    """Another run is writing checkpoints to the same folder."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """An intact checkpoint of another model, optimizer or run."""


class OutputError(KbtrainError, OSError):
    """A file with results, a model or a model card could not be written."""


class OutOfMemoryError(KbtrainError, MemoryError):
    """A micro-batch of the training, or a batch of an evaluation, did not fit into memory.

    Attributes:
        in_training: Whether it was an update.
    """

    def __init__(self, message: str, in_training: bool = False) -> None:
        super().__init__(message)
        self.in_training = in_training


class NonFiniteError(KbtrainError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; the weights were left as they were."""


class TrainingInterrupted(SystemExit):
    """A signal (SIGTERM, SIGUSR1) stopped ``fit`` after a step, and a checkpoint was saved.

    It derives from ``SystemExit``, so that a script which does nothing about it ends here, with
    128 + the signal's number as exit code, rather than go on as if training were done.

    Attributes:
        signal: The signal.
        step: Updates done.
        checkpoint: The newest checkpoint; None if there is none.
        code: The exit code: 143 after SIGTERM, 138 after SIGUSR1.
    """

    def __init__(self, signal: signal.Signals, step: int, checkpoint: Path | None) -> None:
        super().__init__(128 + signal)
        self.signal = signal
        self.step = step
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"{self.signal.name} at step {self.step}; newest checkpoint: {self.checkpoint}."


def is_storage_error(error: BaseException) -> bool:
    """Whether a failed save is the disk's fault: more room or other rights might mend it."""
    return isinstance(error, CheckpointDamagedError) or (
        isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError)
    )


def concise(function: Callable[P, R]) -> Callable[P, R]:
    """Let kbtrain's errors leave ``function`` without the frames inside, often a framework's.

    The cause of an error (an exception of the user's own code) stays with its frames.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KbtrainError as error:
            raise error.with_traceback(None) from error.__cause__
        except TypeError as error:
            frame = error.__traceback__
            if frame is None or frame.tb_next is not None:
                raise  # it came out of the function, not from the attempt to call it
            raise _wrong_call(function, kwargs, error) from None

    return wrapped


RENAMED = {
    "model_path": "resume_from_checkpoint",
}
"""Parameters of methods in the reference, now or once, that have another name."""

_OF_TRAINER = "The data belongs to the Trainer: Trainer(model, args, train_dataset=(x, y))."
_OF_CALL = "Data with labels is one argument: evaluate((x, y)), predict(x)."

KERAS = {
    "batch_size": "Write per_device_train_batch_size=... and per_device_eval_batch_size=... in "
    "TrainingArguments.",
    "callbacks": "Write Trainer(callbacks=[...]).",
    "class_weight": "Write Trainer(class_weight={...}).",
    "epochs": "Write num_train_epochs=... in TrainingArguments.",
    "initial_epoch": "fit(resume_from_checkpoint=...) goes on where a run ended.",
    "return_dict": "The result is a dict always.",
    "sample_weight": "It is the third part of the data: (x, y, sample_weight).",
    "shuffle": "Write train_sampling_strategy='random' or 'sequential' in TrainingArguments.",
    "steps": "Write eval_max_steps=... in TrainingArguments.",
    "steps_per_epoch": "It is a field of TrainingArguments.",
    "validation_batch_size": "Write per_device_eval_batch_size=... in TrainingArguments.",
    "validation_data": "Write Trainer(eval_dataset=(x, y)), and eval_strategy='epoch' in "
    "TrainingArguments.",
    "validation_freq": "Write eval_strategy='steps' and eval_steps=... in TrainingArguments.",
    "validation_split": "Write Trainer(validation_split=...), and eval_strategy='epoch' in "
    "TrainingArguments.",
    "validation_steps": "Write eval_max_steps=... in TrainingArguments.",
    "verbose": "Write disable_tqdm=True or False in TrainingArguments.",
    "x": _OF_TRAINER,
    "y": _OF_TRAINER,
}
"""Parameters of Keras' ``fit``, ``evaluate`` and ``predict``: where they are here."""


def _wrong_call(
    function: Callable[..., Any], given: Iterable[str], error: TypeError
) -> ConfigurationError:
    """Say what a method takes, to who called it with something else."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    renamed = [n for n in given if n in RENAMED and n not in known and RENAMED[n] in known]
    hint = f" Write {RENAMED[renamed[0]]}=... for {renamed[0]}." if renamed else ""
    for name in [n for n in given if n in KERAS and n not in known][:1]:
        hint = f" {_OF_CALL if name in 'xy' and 'eval_dataset' in known else KERAS[name]}"
    return ConfigurationError(f"{error}.{hint} It takes: {', '.join(known)}.")


EAGER = (
    "The step runs eagerly, which is slow: its Python looks at values of tensors%s, as `if` and "
    "float() do, and cannot be compiled. keras.ops.where and keras.ops.cond can be."
)
"""What to log about a step that only Python can run; takes the result of ``user_line``."""


def causes(error: BaseException) -> list[BaseException]:
    """The errors that led to ``error``, the first one first, itself last."""
    found = [error]
    while (earlier := found[0].__cause__ or found[0].__context__) is not None:
        if earlier in found:
            break
        found.insert(0, earlier)
    return found


def user_line(error: BaseException) -> str:
    """Where in a user's own code an error came up, such as `` (model.py:12)``; may be empty."""
    own = str(Path(__file__).parent)
    for cause in causes(error):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if "site-packages" not in frame.filename and not frame.filename.startswith((own, "<")):
                return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def is_user_file(filename: str) -> bool:
    """Whether a file has code of the user's: none of an installed package, or of ours."""
    own = str(Path(__file__).parent)
    return bool(filename) and not (
        "site-packages" in filename or filename.startswith((own, "<", _STANDARD_LIBRARY))
    )


_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def place_of(frame: types.FrameType | None) -> str:
    """Where in a user's own code a frame is, or who called it, as `` in model.py:12``."""
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return f" in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class ConcreteValueNeeded(TypeError):
    """Python wants a number that a traced step only has on the device; it can run eagerly.

    Not an error of the user's: the backends catch it.
    """

    _keras_call_info_injected = True  # Keras would put the arguments of each layer around it


def first_lines(error: BaseException, lines: int = 4) -> str:
    """The beginning of an error's message, in one line and without Keras' bold type."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return " ".join([line.strip() for line in text if line.strip()][:lines])
