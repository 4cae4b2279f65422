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
    """Check that the devices named in the arguments exist.

    Raises:
        ConfigurationError: One does not, or the backend cannot train on several in one process.
    """
    device = args.chosen_device
    if device is None:
        return
    names = [name if ":" in name else f"{name}:0" for name in device.split(",")]
    if len(names) > 1 and not backend.HAS_MESHES:
        raise ConfigurationError(
            f"On the backend {backend.name} a process trains on one device; on jax it can use "
            f"several. Received: devices={args.devices!r}. Name one of them."
        )
    there = backend.devices()
    if missing := [name for name in names if name not in there]:
        raise ConfigurationError(
            f"There is no such device on the backend {backend.name}: {', '.join(missing)}. "
            f"Received: devices={args.devices!r}. Available devices: {', '.join(there)}."
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
