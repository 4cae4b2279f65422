"""Checkpoints: complete or absent, verified when read, independent of the backend.

``CheckpointStore`` keeps the checkpoints of a run; ``name_variables``, ``capture`` and ``restore``
turn Keras variables into named arrays and back. docs/checkpoint-format.md describes the files. Code
that needs Keras is imported on first use, so that checkpoints can be listed and verified without
loading a framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbtrain.checkpoint.storage.array_writer import write_arrays
from kbtrain.checkpoint.storage.folder_reader import Checkpoint
from kbtrain.checkpoint.storage.format import read_arrays
from kbtrain.checkpoint.storage.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.utils.files.filesystem import FileEntry

if TYPE_CHECKING:
    from kbtrain.checkpoint.variables import RestorePlan, capture, plan_restore, restore
    from kbtrain.model.variable_names import name_optimizer_variables, name_variables

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Checkpoint",
    "CheckpointStore",
    "FileEntry",
    "Manifest",
    "RestorePlan",
    "capture",
    "name_optimizer_variables",
    "name_variables",
    "plan_restore",
    "read_arrays",
    "restore",
    "write_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kbtrain.checkpoint import variables
    from kbtrain.model import variable_names

    return getattr(variable_names if name.startswith("name_") else variables, name)
