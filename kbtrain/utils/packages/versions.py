"""The versions of what a run used."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any


def environment(backend: str) -> dict[str, Any]:
    """Backend and versions, for a checkpoint's manifest and for bug reports; do not change it."""
    versions = {"python": platform.python_version()}
    for name in ("kbtrain", "keras", "numpy", "h5py", backend):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return {"backend": backend, "versions": versions}
