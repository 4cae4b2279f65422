"""Device, precision and determinism of a call of ``fit`` or ``evaluate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.utils import float64


def check(backend: Backend, args: TrainingArguments) -> None:
    """Check that the device named in the arguments exists.

    Raises:
        ConfigurationError: It does not.
    """
    device = args.chosen_device
    if device is None:
        return
    name = device if ":" in device else f"{device}:0"
    if name not in (there := backend.devices()):
        raise ConfigurationError(
            f"There is no such device on the backend {backend.name}. Received: "
            f"devices={args.devices!r}. Available devices: {', '.join(there)}."
        )


@contextlib.contextmanager
def settings(backend: Backend, args: TrainingArguments, model: keras.Model) -> Iterator[None]:
    """Context that applies ``devices``, ``tf32`` and ``full_determinism``, then restores them.

    It also enables float64 for a model in that precision.
    """
    with (
        float64.kept(model),
        backend.device_scope(args.chosen_device),
        backend.numerics(args.tf32, args.full_determinism),
    ):
        yield
