"""Checkpoints: complete or absent, verified when read, independent of the backend.

``CheckpointStore`` keeps the checkpoints of a run; ``name_variables``, ``capture`` and ``restore``
turn Keras variables into named arrays and back. The files are described in
docs/checkpoint-format.md.
"""

from kbtrain.checkpoint.disk import FileEntry
from kbtrain.checkpoint.format import read_arrays, write_arrays
from kbtrain.checkpoint.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from kbtrain.checkpoint.store import Checkpoint, CheckpointStore
from kbtrain.checkpoint.variables import (
    RestorePlan,
    capture,
    name_optimizer_variables,
    name_variables,
    plan_restore,
    restore,
)

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
