"""``kbtrain env``: versions, backend and devices for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from kbtrain.cli.parser import command_parser

PACKAGES = (
    *("kbtrain", "keras", "torch", "tensorflow", "jax", "jaxlib", "numpy", "h5py", "ml_dtypes"),
    *("rich", "jsonargparse", "optuna", "tensorboardX", "wandb", "mlflow", "trackio", "comet_ml"),
    *("swanlab", "grain"),
)
"""Distributions whose versions are printed; nothing but Keras and its backend is imported."""


def run(words: Sequence[str]) -> int:
    """Print one ``name: value`` per line, to be pasted into a bug report."""
    command_parser("env", "Print versions, backend and devices, for a bug report.").parse_args(
        words
    )
    for name, value in describe_environment().items():
        print(f"{name}: {value}")
    return 0


def describe_environment() -> dict[str, str]:
    """System, versions, backend and device; a backend that fails is reported, not raised."""
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu cores": str(os.cpu_count()),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    try:
        from kbtrain import backends

        backend = backends.load()
        found["backend"] = backend.name
        found["device"] = backend.device_info()
        if stats := backend.memory_stats():
            found["device memory"] = ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in stats.items())
    except Exception as error:
        found["backend"] = f"failed: {type(error).__name__}: {error}"
    return found
