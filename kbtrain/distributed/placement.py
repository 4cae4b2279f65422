"""Where and how a call of ``fit`` or ``evaluate`` is executed: device, precision, determinism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.utils import float64


def check(backend: Backend, args: TrainingArguments) -> None:
    """Make sure that the device of the arguments exists.

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
            f"devices={args.devices!r}. This process has: {', '.join(there)}."
        )


@contextlib.contextmanager
def settings(backend: Backend, args: TrainingArguments, model: keras.Model) -> Iterator[None]:
    """Inside, ``devices``, ``tf32`` and ``full_determinism`` hold; afterwards what held before.

    And a model in float64 computes in it.
    """
    with (
        float64.kept(model),
        backend.device_scope(args.chosen_device),
        backend.numerics(args.tf32, args.full_determinism),
    ):
        yield
