"""Optimizer state of which each process keeps the part that belongs to its variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.checkpoint.variables import capture
from kbtrain.errors import ConfigurationError
from kbtrain.optimization.division import Division
from kbtrain.utils.array_blocks import Block, OwnedBlocks
from kbtrain.utils.machine.host_buffers import HostBuffers


def capture_divided(
    division: Division,
    named: Mapping[str, keras.Variable],
    model: Mapping[str, keras.Variable],
    buffers: HostBuffers | None,
    group: str,
    divided_only: bool,
) -> dict[str, Any]:
    """Copy an optimizer's state to the host. All processes call it alike.

    Args:
        division: Which process owns which variable.
        named: Key -> variable of the optimizer of this process, and of state set aside.
        model: Key -> variable of the model.
        buffers: As in ``capture``.
        group: As in ``capture``.
        divided_only: Whether to leave out what is the same on every process.

    Returns:
        Key -> array of what is the same on every process, or ``OwnedBlocks`` of a slot: all of it
        on the process that owns the variable, no block on the others.
    """
    slots = {key: v for key, v in named.items() if key.partition("/")[2] in model}
    rest = {key: v for key, v in named.items() if key not in slots}
    own = capture(slots, buffers, group)
    listed = division.gather([[k, list(x.shape), x.dtype.name] for k, x in own.items()])
    found: dict[str, Any] = capture(rest, buffers, group, divided_only)
    for name, shape, dtype in (entry for part in listed for entry in part):
        blocks = [Block((0,) * len(shape), own[name])] if name in own else []
        found[name] = OwnedBlocks(tuple(shape), DTYPES[dtype], blocks)
    return found


def without_others(
    division: Division | None,
    saved: Mapping[str, Any],
    model: Mapping[str, keras.Variable],
    names: Mapping[str, str],
) -> dict[str, Any]:
    """The saved state without that which other processes keep.

    Args:
        division: Which process owns which variable; None if each keeps all.
        saved: Key in the checkpoint -> array.
        model: Key -> variable of the model.
        names: Key -> key in the checkpoint, for the variables of the model.
    """
    if division is None:
        return dict(saved)
    own = {id(v) for v in model.values()} - {id(v) for v in division.others(list(model.values()))}
    others = {names[key] for key, v in model.items() if key in names and id(v) not in own}
    return {key: array for key, array in saved.items() if key.partition("/")[2] not in others}


def divided_variables(backend: Backend, model: keras.Model) -> list[keras.Variable]:
    """The variables, of which no process has all, that are saved with ``model``."""
    optimizer = getattr(model, "optimizer", None)
    saved = [*model.variables, *(optimizer.variables if optimizer else [])]
    return [v for v in saved if backend.owned_blocks(v) is not None]


def check_whole(backend: Backend, model: keras.Model) -> None:
    """Check that this process has all values of a model.

    Raises:
        ConfigurationError: Some are divided among processes.
    """
    if divided := divided_variables(backend, model):
        raise ConfigurationError(
            f"Variables of the model {model.name!r} are divided among processes "
            f"({divided[0].path}, ...), so none can export it. Export a checkpoint of the run, or "
            "call trainer.save_model() on all processes."
        )
