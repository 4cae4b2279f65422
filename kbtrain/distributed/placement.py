"""Devices, processes, precision and determinism of a call of ``fit`` or ``evaluate``."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import keras

from kbtrain import distributed
from kbtrain.backends import collective_check
from kbtrain.backends.protocol import Backend
from kbtrain.config.training_args import TrainingArguments
from kbtrain.distributed import host
from kbtrain.distributed.agreement import CollectiveSequence
from kbtrain.distributed.layouts import StateLayout, state_layout
from kbtrain.errors import ConfigurationError
from kbtrain.utils import float64
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

WHOLE_SHARE = 0.05
"""Share of the weights that may stay whole under ``fsdp`` without a warning."""


def check(backend: Backend, args: TrainingArguments) -> None:
    """Check that the devices named in the arguments exist.

    Raises:
        ConfigurationError: One does not, or the backend cannot train on several in one process.
    """
    _check_division(backend, args)
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


def _check_division(backend: Backend, args: TrainingArguments) -> None:
    """Check that the backend can divide state as the arguments say."""
    if backend.HAS_MESHES:
        state_layout(args)
        return
    refuse_division(backend.name, args)
    if args.fsdp is not None and current().size == 1:
        logger.warning("fsdp=%r has no effect: there is one process.", args.fsdp)


def refuse_division(name: str, args: TrainingArguments) -> None:
    """Check that nothing is to be divided that a backend without meshes cannot divide.

    Args:
        name: The name of the backend.
        args: The arguments.

    Raises:
        ConfigurationError: The arguments divide weights.
    """
    asked = [
        f"{field}={value!r}"
        for field in ("fsdp", "fsdp_config", "parallelism_config")
        if (value := getattr(args, field)) is not None and value != "shard_grad_op"
    ]
    if asked:
        raise ConfigurationError(
            f"On the backend {name} every process has all weights (torch's fully_shard "
            "would divide nothing of a Keras layer), and fsdp='shard_grad_op' divides gradients "
            "and the optimizer's state by whole variables. The backend jax divides weights, too. "
            f"Received: {', '.join(asked)}."
        )


def _layout(backend: Backend, args: TrainingArguments) -> StateLayout | None:
    return state_layout(args) if backend.HAS_MESHES else None


@contextlib.contextmanager
def initializing(backend: Backend, args: TrainingArguments) -> Iterator[None]:
    """Context in which ``model_init`` makes a model whose state is divided from the start."""
    if (layout := _layout(backend, args)) is None:
        yield
        return
    with backend.device_scope(args.chosen_device, layout), backend.initializing():
        yield


def divide(backend: Backend, args: TrainingArguments, model: keras.Model) -> None:
    """Divide the variables of a model among the devices, before anything is made after them.

    Slots of an optimizer follow the layout of their variable and are never whole on one device.

    Raises:
        ConfigurationError: A layout does not fit.
    """
    if (layout := _layout(backend, args)) is not None:
        layout.check(model.variables)
        _warn_of_whole(layout, model)
        backend.copy_from_first(model.variables)
        backend.place(model.variables, args.chosen_device)


def _warn_of_whole(layout: StateLayout, model: keras.Model) -> None:
    """Warn if much of a model cannot be divided along ``fsdp``."""
    parts = layout.sizes["fsdp"]
    if parts == 1 or not layout.weights:
        return
    weights = model.trainable_variables
    sizes = {
        v.path: math.prod(v.shape)
        for v, axes in zip(weights, layout.axes_of(weights), strict=True)
        if "fsdp" not in axes
    }
    total = sum(math.prod(v.shape) for v in weights)
    if (whole := sum(sizes.values())) > WHOLE_SHARE * total:
        largest = max(sizes, key=lambda path: sizes[path])
        logger.warning(
            "fsdp leaves %.0f %% of the weights whole on every device: no dimension of theirs is "
            "a multiple of %d, or they are small. The largest is %s. A smaller 'fsdp' in "
            "parallelism_config, beside a larger 'data', divides more of them.",
            100 * whole / total,
            parts,
            largest,
        )


@contextlib.contextmanager
def settings(backend: Backend, args: TrainingArguments, model: keras.Model) -> Iterator[None]:
    """Context that applies ``devices``, ``tf32``, ``cuda_graphs`` and such, then restores them.

    It also enables float64 for a model in that precision.
    """
    with (
        float64.kept(model),
        backend.device_scope(args.chosen_device, _layout(backend, args)),
        backend.numerics(args.tf32, args.full_determinism),
        backend.cuda_graphs(args.cuda_graphs),
        _exchange_settings(backend, args),
        _comparing_collectives(backend, args),
    ):
        yield


def _exchange_settings(
    backend: Backend, args: TrainingArguments
) -> contextlib.AbstractContextManager[None]:
    if current().size == 1:
        return contextlib.nullcontext()
    distributed.set_timeout(args.ddp_timeout)
    return backend.exchange_settings(args.ddp_backend, args.ddp_timeout, args.ddp_bucket_cap_mb)


def _comparing_collectives(
    backend: Backend, args: TrainingArguments
) -> contextlib.AbstractContextManager[None]:
    """Context of ``debug="collectives"``. The arguments of the processes may still differ here."""
    if collective_check.is_observed():  # an evaluation inside fit
        return contextlib.nullcontext()
    asked = "collectives" in args.debug
    if asked and current().size == 1:
        logger.warning("debug='collectives' has no effect: there is one process.")
    if not host.any_of(backend, {"debug": asked})["debug"]:
        return contextlib.nullcontext()
    peers = distributed.get_peers()
    if peers is None or current().size == 1:
        return contextlib.nullcontext()
    sequence = CollectiveSequence(current(), peers.exchange, distributed.place)
    return collective_check.observed_by(sequence.compare)


def check_processes(backend: Backend, args: TrainingArguments) -> None:
    """Check that several processes can do what the arguments ask for.

    Raises:
        ConfigurationError: They cannot.
    """
    size = current().size
    if size == 1:
        return
    with backend.device_scope(args.chosen_device), _exchange_settings(backend, args):
        pass
    if args.auto_find_batch_size:
        raise ConfigurationError(
            "auto_find_batch_size=True starts again where memory ends, which one of several "
            f"processes cannot do alone. Received: {size} processes. Find the size with one "
            "process, and set per_device_train_batch_size."
        )
    if not args.average_tokens_across_devices:
        raise ConfigurationError(
            "With several processes the loss is always divided by the labels of all of them, so "
            "that it is that of one process. Received: average_tokens_across_devices=False. "
            "Remove it."
        )
    if args.save_on_each_node and args.fsdp is not None:
        raise ConfigurationError(
            "With fsdp each process writes its part of a checkpoint into one folder, which every "
            "machine must see. Received: save_on_each_node=True. Remove it, and put output_dir on "
            "storage that all machines share."
        )
    batch = args.total_train_batch_size
    if batch * args.gradient_accumulation_steps < size:
        raise ConfigurationError(
            f"The {batch * args.gradient_accumulation_steps} samples of an update cannot be shared "
            f"by {size} processes. Increase per_device_train_batch_size, or start fewer processes."
        )
    if batch < size:
        logger.warning(
            "Batches of %d samples leave %d of %d processes without any. Increase "
            "per_device_train_batch_size and lower gradient_accumulation_steps.",
            batch,
            size - batch,
            size,
        )


def check_steps(backend: Backend, overridden: Any) -> None:
    """Check that a model does not bring its own steps where each process sees its rows only.

    Args:
        backend: The backend in use.
        overridden: Whether the model overrides ``train_step``, ``test_step``, ``predict_step``.

    Raises:
        ConfigurationError: It does.
    """
    steps = ("train_step", "test_step", "predict_step")
    found = [name for name in steps if getattr(overridden, name)]
    if backend.shards() > 1 and found:
        raise ConfigurationError(
            f"The model's own {' and '.join(found)} would train each of the "
            f"{backend.shards()} processes by itself: gradients and metrics are not added up in "
            "it. Override compute_loss of the Trainer instead, use one process, or the backend jax."
        )
