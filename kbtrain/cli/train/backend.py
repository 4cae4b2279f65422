"""The backend that a file of settings asks for, which Keras reads when it is imported."""

from __future__ import annotations

import importlib.util
import os
import sys

from kbtrain.cli.train.settings import Settings


def choose_backend(settings: Settings) -> None:
    """Set the backend of this process.

    Raises:
        ConfigurationError: It is not installed, or Keras runs on another one already.
    """
    wanted = settings.get("backend")
    if wanted is None:
        return
    if importlib.util.find_spec(wanted) is None:
        raise settings.error(
            ("backend",), f"{wanted} is not installed: pip install 'kbtrain[{wanted}]'."
        )
    if "keras" in sys.modules:
        from kbtrain import backends

        if (running := backends.load().name) != wanted:
            raise settings.error(("backend",), f"this process runs Keras on {running} already.")
    before = os.environ.get("KERAS_BACKEND", wanted)
    if before != wanted:
        where = settings.where(("backend",))
        print(f"backend {wanted}, from {where}; not KERAS_BACKEND={before}", file=sys.stderr)
    os.environ["KERAS_BACKEND"] = wanted
