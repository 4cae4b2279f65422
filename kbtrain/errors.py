"""The errors that kbtrain raises for problems a user can fix.

Every message says what happened, what was expected and what to do. Each class also derives from the
matching built-in exception, so ``except ValueError`` and the like work.
"""

from __future__ import annotations

import dataclasses
import errno
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

    # Keras rewrites exceptions raised inside a layer's call unless they have this attribute.
    _keras_call_info_injected = True


class ConfigurationError(KbtrainError, ValueError):
    """An invalid argument, or an invalid combination of arguments."""


class FrozenArgumentsError(ConfigurationError, dataclasses.FrozenInstanceError):
    """An attempt to modify ``TrainingArguments``, which are immutable."""


class DataError(KbtrainError, ValueError):
    """Data of a type, shape or length that cannot be trained on."""


class CheckpointError(KbtrainError, RuntimeError):
    """A problem with a checkpoint; base class of the more specific errors."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The requested checkpoint does not exist."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered."""


class CheckpointUnreadableError(CheckpointError):
    """A checkpoint that cannot be read now, for example after an I/O error; it may be intact."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint of a newer kbtrain, or another program's folder with such a name."""


class FolderInUseError(CheckpointError):
    """Another run is writing checkpoints to the same folder."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """An intact checkpoint of a different model, optimizer or run."""


class OutputError(KbtrainError, OSError):
    """An output file (results, a model, a model card) could not be written."""


class HubError(KbtrainError, OSError):
    """A push to the Hub, or a download from it, failed."""


class OutOfMemoryError(KbtrainError, MemoryError):
    """A micro-batch of the training, or a batch of an evaluation, did not fit into memory.

    Attributes:
        in_training: Whether it happened in a training step.
    """

    def __init__(self, message: str, in_training: bool = False) -> None:
        super().__init__(message)
        self.in_training = in_training


class DistributedError(KbtrainError, RuntimeError):
    """One of several processes failed, hangs, or does something else than the others."""


class NonFiniteError(KbtrainError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; the weights were not updated."""


class TrainingInterrupted(SystemExit):
    """A signal (SIGTERM, SIGUSR1) stopped ``fit`` after a step, and a checkpoint was saved.

    It derives from ``SystemExit``, so that a script that does not handle it exits with code 128 +
    signal number, rather than continue as if training were complete.

    Attributes:
        signal: The signal.
        step: Updates done.
        checkpoint: The newest checkpoint; None if there is none.
        code: The exit code: 143 for SIGTERM, 138 for SIGUSR1.
    """

    def __init__(self, signal: signal.Signals, step: int, checkpoint: Path | None) -> None:
        super().__init__(128 + signal)
        self.signal = signal
        self.step = step
        self.checkpoint = checkpoint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.signal, self.step, self.checkpoint)

    def __str__(self) -> str:
        return f"{self.signal.name} at step {self.step}; newest checkpoint: {self.checkpoint}."


def is_storage_error(error: BaseException) -> bool:
    """Whether a save failed because of the disk: its space, permissions or hardware."""
    return isinstance(error, CheckpointDamagedError) or (
        isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError)
    )


def is_lasting(error: BaseException) -> bool:
    """Whether a folder could not be written to for a reason that does not pass by itself.

    A full disk or an error of the hardware or the network may pass.
    """
    cause = error.__cause__
    kinds = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError)
    numbers = (errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG)
    return isinstance(cause, kinds) or (isinstance(cause, OSError) and cause.errno in numbers)


def concise(function: Callable[P, R]) -> Callable[P, R]:
    """Remove the internal frames, often a framework's, from kbtrain's errors in ``function``.

    The cause of an error (an exception in user code) keeps its frames.
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
                raise  # raised inside the function, not by a wrong call of it
            raise _wrong_call(function, kwargs, error) from None

    return wrapped


RENAMED = {
    "model_path": "resume_from_checkpoint",
}
"""Parameters of methods in Transformers, present or past, that have a different name here."""

_OF_TRAINER = "The data belongs to the Trainer: Trainer(model, args, train_dataset=(x, y))."
_OF_CALL = "Data with labels is one argument: evaluate((x, y)), predict(x)."

KERAS = {
    "batch_size": "Write per_device_train_batch_size=... and per_device_eval_batch_size=... in "
    "TrainingArguments.",
    "callbacks": "Write Trainer(callbacks=[...]).",
    "class_weight": "Write Trainer(class_weight={...}).",
    "epochs": "Write num_train_epochs=... in TrainingArguments.",
    "initial_epoch": "fit(resume_from_checkpoint=...) continues where a run stopped.",
    "return_dict": "The result is always a dict.",
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
"""Parameters of Keras' ``fit``, ``evaluate`` and ``predict``: what to use instead."""


def _wrong_call(
    function: Callable[..., Any], given: Iterable[str], error: TypeError
) -> ConfigurationError:
    """The error for a call with wrong arguments, with a hint and the accepted names."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    renamed = [n for n in given if n in RENAMED and n not in known and RENAMED[n] in known]
    hint = f" Write {RENAMED[renamed[0]]}=... for {renamed[0]}." if renamed else ""
    for name in [n for n in given if n in KERAS and n not in known][:1]:
        hint = f" {_OF_CALL if name in 'xy' and 'eval_dataset' in known else KERAS[name]}"
    return ConfigurationError(f"{error}.{hint} It takes: {', '.join(known)}.")


EAGER = (
    "The step runs eagerly, which is slow: its Python code reads values of tensors%s, as `if` and "
    "float() do, so it cannot be compiled. Use keras.ops.where or keras.ops.cond instead."
)
"""The warning for a step that cannot be compiled; takes the result of ``user_line``."""


def causes(error: BaseException) -> list[BaseException]:
    """The chain of errors that led to ``error``, which comes last."""
    found = [error]
    while (earlier := found[0].__cause__ or found[0].__context__) is not None:
        if earlier in found:
            break
        found.insert(0, earlier)
    return found


def user_line(error: BaseException) -> str:
    """Where in user code an error was raised, such as `` (model.py:12)``; may be empty."""
    own = str(Path(__file__).parent)
    for cause in causes(error):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if "site-packages" not in frame.filename and not frame.filename.startswith((own, "<")):
                return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def is_user_file(filename: str) -> bool:
    """Whether a file is user code: not an installed package, kbtrain or the standard library."""
    own = str(Path(__file__).parent)
    return bool(filename) and not (
        "site-packages" in filename or filename.startswith((own, "<", _STANDARD_LIBRARY))
    )


_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def place_of(frame: types.FrameType | None) -> str:
    """The innermost line of user code at or above a frame, as `` in model.py:12``."""
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return f" in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class ConcreteValueNeeded(TypeError):
    """Python code needs the value of a tensor while a step is traced; the step can run eagerly.

    Not a user error: the backends catch it.
    """

    _keras_call_info_injected = True  # or Keras adds the arguments of each layer to the message


def first_lines(error: BaseException, lines: int = 4) -> str:
    """The first lines of an error's message, joined and without Keras' escape codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return " ".join([line.strip() for line in text if line.strip()][:lines])
