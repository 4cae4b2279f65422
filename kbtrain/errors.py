"""The errors kbtrain raises for mistakes a user can mend.

Every message says what happened, what was expected and what to do. Each class also derives from the
built-in exception that fits, so ``except ValueError`` and friends keep working.
"""


class KbtrainError(Exception):
    """Base class of every error that kbtrain raises on purpose."""

    # Keras rewrites what is raised inside a layer's call, unless it bears this mark.
    _keras_call_info_injected = True


class ConfigurationError(KbtrainError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class DataError(KbtrainError, ValueError):
    """Data of a kind, shape or length that cannot be trained on."""


class CheckpointError(KbtrainError, RuntimeError):
    """Something is wrong with a checkpoint; the subclasses say what."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint where one was asked for."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint whose files are missing, truncated or altered."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """An intact checkpoint of another model, optimizer or run."""


class NonFiniteError(KbtrainError, FloatingPointError):
    """The loss or the gradient became NaN or infinite; the weights were left as they were."""
