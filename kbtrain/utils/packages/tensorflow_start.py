"""Keeps TensorFlow from filling the screen with messages about its own start.

They say that it has no GPU, which instructions its CPU kernels use, and that a library was
registered twice. ``TF_CPP_MIN_LOG_LEVEL`` silences some of them; those that it logs before its log
is set up go to stderr in any case, so that its import is read here and they are left out.

A user who sets ``TF_CPP_MIN_LOG_LEVEL`` gets what it asks for. Where TensorFlow has been imported
before kbtrain (``import keras`` does so on that backend) it is too late for all of this.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

LEVEL = "TF_CPP_MIN_LOG_LEVEL"

_MESSAGES = re.compile(
    rb"^(?:[IW]\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d \d\d:\d\d:[^ ]+ [IW] "
    rb"|WARNING: All log messages before absl|To enable the following instructions:).*\n?",
    re.MULTILINE,
)


def quiet() -> None:
    """Silence the messages, if TensorFlow is not imported and the user has no wish of their own."""
    chosen = os.environ.get(LEVEL)
    if chosen == "1" and "jax" in sys.modules:
        chosen = None  # JAX has set it
    if "tensorflow" in sys.modules or chosen is not None:
        return
    # Without a GPU the errors are about not having found one, too.
    os.environ[LEVEL] = "2" if Path("/dev/nvidia0").exists() else "3"
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds TensorFlow as the others do, with a loader that reads stderr meanwhile."""

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tensorflow" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Quiet(spec.loader)
        return spec


class _Quiet(Loader):
    """Another loader, whose module is executed while stderr is filtered.

    Args:
        loader: That loader.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        with filtered_stderr():
            self._loader.exec_module(module)


@contextlib.contextmanager
def filtered_stderr() -> Iterator[None]:
    """Context after which what was written to stderr in it appears, without those messages."""
    try:
        kept, own = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115
    except OSError:  # no stderr, or no place to keep it
        yield
        return
    with kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            kept.seek(0)
            if rest := _MESSAGES.sub(b"", kept.read()):
                with contextlib.suppress(OSError):
                    os.write(2, rest)
