"""Which arguments changed between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kbtrain.config.fields import Fields
from kbtrain.config.fields.option import HARMLESS, NEW_VALUE

BATCH_SIZE = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"


def compare_arguments(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    micro_batches: tuple[int, int] | None = None,
) -> list[str]:
    """List the changed arguments that make the resumed run differ from the interrupted one.

    Args:
        saved: The checkpoint's arguments, from JSON; an older version may lack some.
        current: The arguments of this run; a subclass may have more fields.
        micro_batches: Samples of a micro-batch over all processes, before and now; by default they
            are computed from the arguments as for one process.

    Returns:
        A sentence for each such argument: its two values and the consequence. Another number of
        processes, which is no argument, has one, too.
    """
    consequences = {f.name: f.metadata["on_resume"] for f in dataclasses.fields(Fields)}
    current = json.loads(json.dumps(current))
    messages = []
    before, now = micro_batches or (_micro_batch(saved), _micro_batch(current))
    if before and now:  # where the batch size stays what it was over all devices, nothing changes
        of_batches = consequences[BATCH_SIZE]
        if before == now:
            consequences[BATCH_SIZE] = consequences["split_batches"] = HARMLESS
        elif all(saved.get(n) == current.get(n) for n in (BATCH_SIZE, "split_batches")):
            if saved.get("devices") != current.get("devices"):
                consequences["devices"] += f", and {of_batches}"
            else:
                messages += _other_processes(saved, current, before, now)
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
    if devices is None or arguments.get("split_batches"):
        return size
    return size * len(devices.split(","))


def _other_processes(
    saved: Mapping[str, Any], current: Mapping[str, Any], before: int, now: int
) -> list[str]:
    """What another number of processes means; nothing if an update has as many samples still."""
    numbers = [current.get(BATCH_SIZE), current.get(ACCUMULATION), saved.get(ACCUMULATION)]
    size, steps, steps_before = [n if isinstance(n, int) else 0 for n in numbers]
    if min(size, steps, steps_before) < 1:
        return []
    if current.get("split_batches") or before % size or now % size:
        return []  # the sizes are those of a loader of the user's
    devices, wanted = now // size, before * steps_before
    if wanted == now * steps:
        return []
    choices = []
    if wanted % (devices * steps) == 0:
        choices.append(f"{BATCH_SIZE}={wanted // (devices * steps)}")
    if wanted % now == 0:
        choices.append(f"{ACCUMULATION}={wanted // now}")
    if wanted % steps == 0:
        choices.append(f"split_batches=True with {BATCH_SIZE}={wanted // steps}")
    return [
        f"the number of processes has changed. An update had {wanted} samples and has "
        f"{now * steps} now, so an epoch has another number of steps. To go on with the updates of "
        f"before set {', or '.join(choices)} (which suits any number of processes)."
    ]
