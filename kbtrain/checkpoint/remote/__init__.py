"""Runs whose files are at an address (``s3://bucket/run``): uploaded complete or absent.

``files`` has the operations on files there, each tried again after an error. ``transfer`` copies
one checkpoint in either direction. ``store`` is the ``CheckpointStore`` of such a run.
"""

from __future__ import annotations

from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.utils.files.addresses import scheme_of


def open_store(output_dir: str) -> CheckpointStore:
    """The store of a run.

    Args:
        output_dir: A folder, or an address of a file system of fsspec.

    Raises:
        ConfigurationError: fsspec, or its package for this address, is missing.
    """
    if scheme_of(output_dir) is None:
        return CheckpointStore(output_dir)
    from kbtrain.checkpoint.remote.store import RemoteStore

    return RemoteStore(output_dir)
