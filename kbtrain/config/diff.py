"""Which arguments changed between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kbtrain.config.fields import Fields
from kbtrain.config.fields.option import HARMLESS, NEW_VALUE


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
    for name, value in current.items():
        # The meaning of a subclass's own field is unknown here.
        consequence = consequences.get(name, NEW_VALUE)
        if consequence != HARMLESS and name in saved and saved[name] != value:
            messages.append(f"{name} was {saved[name]!r} and is {value!r} now: {consequence}.")
    return messages
