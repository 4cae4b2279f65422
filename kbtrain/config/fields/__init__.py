"""The fields of ``TrainingArguments``: one table in five parts, by topic.

A field states its default, converter, meaning and what its change means for a resumed run in one
place. To add one, add it here; nothing else lists the fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbtrain.config.fields.execution import ExecutionFields
from kbtrain.config.fields.hub import HubFields
from kbtrain.config.fields.output import OutputFields
from kbtrain.config.fields.processes import ProcessFields
from kbtrain.config.fields.training import TrainingFields


# A dataclass takes the fields of its last base first.
@dataclass(kw_only=True)
class Fields(ProcessFields, ExecutionFields, HubFields, OutputFields, TrainingFields):
    """All fields of ``TrainingArguments``."""
