"""Which arguments changed between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kbtrain.config.fields import Fields
from kbtrain.config.fields.option import HARMLESS, NEW_VALUE

BATCH_SIZE = "per_device_train_batch_size"


def compare_arguments(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the changed arguments that make the resumed run differ from the interrupted one.

    Args:
        saved: The checkpoint's arguments, from JSON; an older version may lack some.
        current: The arguments of this run; a subclass may have more fields.

    Returns:
        A sentence for each such argument: its two values and the consequence.
    """
    consequences = {f.name: f.metadata["on_resume"] for f in dataclasses.fields(Fields)}
    current = json.loads(json.dumps(current))
    messages = []
    before, now = _micro_batch(saved), _micro_batch(current)
    if before and now:  # where the batch size stays what it was over all devices, nothing changes
        of_batches = consequences[BATCH_SIZE]
        consequences[BATCH_SIZE] = HARMLESS if before == now else of_batches
        if before != now and saved[BATCH_SIZE] == current[BATCH_SIZE]:
            consequences["devices"] += f", and {of_batches}"
    for name, value in current.items():
        # The meaning of a subclass's own field is unknown here.
        consequence = consequences.get(name, NEW_VALUE)
        if consequence != HARMLESS and name in saved and saved[name] != value:
            messages.append(f"{name} was {saved[name]!r} and is {value!r} now: {consequence}.")
    return messages


def _micro_batch(arguments: Mapping[str, Any]) -> int | None:
    """Samples in a micro-batch over all devices; None if the arguments do not tell."""
    size, devices = arguments.get(BATCH_SIZE), arguments.get("devices")
    if not isinstance(size, int) or not isinstance(devices, str | None):
        return None
    return size * (1 if devices is None else len(devices.split(",")))
