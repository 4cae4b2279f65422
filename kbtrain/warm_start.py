"""Weights from elsewhere into a model: a checkpoint, a ``.weights.h5`` or a ``.keras`` file."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

# As in checkpoint/layout.py: Keras has no public reader of single values.
from keras.src.saving.saving_lib import H5IOStore

from kbtrain.building import take_in_new_values
from kbtrain.checkpoint import CheckpointStore, name_variables, plan_restore, read_arrays
from kbtrain.checkpoint.format import ARRAYS_FORMAT
from kbtrain.checkpoint.layout import keras_layout
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    concise,
    first_lines,
)
from kbtrain.persistence import model_variables

logger = logging.getLogger("kbtrain")

_INNER = "model.weights.h5"  # in a .keras file


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        loaded: Variables that got a value.
        missing: Variables of the model that the file has no value for; they keep theirs.
        unexpected: Values of the file that the model has no variable for.
        different: Values that do not fit their variable, with both shapes.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    different: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} variables loaded"]
        for name in ("missing", "unexpected", "different"):
            if items := getattr(self, name):
                parts.append(
                    f"{len(items)} {name} ({', '.join(items[:5])}"
                    f"{', ...' if len(items) > 5 else ''})"
                )
        return "; ".join(parts)


@concise
def load_weights(
    model: keras.Model, source: str | os.PathLike[str], strict: bool = True
) -> LoadReport:
    """Put weights from a file into a model; optimizer and data position are not touched.

    Args:
        model: A built model.
        source: A checkpoint, the folder of a run (its newest intact checkpoint is used), a
            ``.weights.h5`` or a ``.keras`` file.
        strict: Whether all variables must be there, with their shapes, and nothing else. If not,
            what fits is loaded; the report, which is logged as a warning, names the rest.

    Returns:
        What was loaded and what was not.

    Raises:
        ConfigurationError: The model is not built.
        CheckpointNotFoundError: There is no such file or checkpoint.
        CheckpointDamagedError: It cannot be read.
        CheckpointMismatchError: It does not fit (``strict``), or nothing of it does. Then nothing
            has been changed.

    Example:
        >>> report = load_weights(model, "runs/old", strict=False)  # doctest: +SKIP
        >>> report.missing  # doctest: +SKIP
        ('sequential/head/kernel', 'sequential/head/bias')
    """
    if not model.built:
        raise ConfigurationError(
            f"The model {model.name!r} has no variables yet. Build it first: call it on a batch, "
            "or begin it with a keras.Input."
        )
    path = Path(source)
    named = name_variables(model_variables(model))
    if path.is_dir():
        checkpoint = CheckpointStore(path).resolve(path)
        assert checkpoint is not None  # a path is found or an error
        saved = {**checkpoint.arrays.get("model", {}), **checkpoint.arrays.get("evaluation", {})}
    else:
        named, saved = _read_file(model, path, named)
    plan = plan_restore(named, saved, strict=strict)
    plan.apply()
    take_in_new_values(model)
    report = LoadReport(tuple(plan.names), plan.missing, plan.unexpected, plan.different)
    if report.missing or report.unexpected or report.different:
        logger.warning("%s: %s.", path, report)
    return report


def _read_file(
    model: keras.Model, path: Path, named: dict[str, keras.Variable]
) -> tuple[dict[str, keras.Variable], dict[str, np.ndarray]]:
    """Return variables and arrays of a Keras file under the same keys."""
    if not path.exists():
        raise CheckpointNotFoundError(f"There is no {path}.")
    if not path.name.endswith((".weights.h5", ".keras")):
        raise CheckpointError(
            "Expected a checkpoint's or a run's folder, or a file that ends in .weights.h5 or "
            f".keras. Received: {path}"
        )
    try:
        with _store(path) as store:
            if store.h5_file.attrs.get("format") == ARRAYS_FORMAT:
                return named, read_arrays(path)
            links = keras_layout(model, named).links
            saved = dict(_values(store))
    except CheckpointError:
        raise
    except Exception as error:  # h5py and zipfile raise whatever the damage happens to hit
        raise CheckpointDamagedError(
            f"{path} is not a readable Keras file ({type(error).__name__}: {first_lines(error)})."
        ) from error
    # Keras does not store the states of seed generators: those stay as they are.
    return {place: named[name] for place, name in links.items()}, saved


@contextmanager
def _store(path: Path) -> Iterator[Any]:
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            store = H5IOStore(_INNER, archive=archive, mode="r")
            try:
                yield store
            finally:
                store.close()
        return
    store = H5IOStore(path, mode="r")
    try:
        yield store
    finally:
        store.close()


def _values(store: Any) -> Iterator[tuple[str, np.ndarray]]:
    """All values of a Keras file but those of optimizer and metrics."""
    places: list[str] = []

    def note(place: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and "/vars/" in f"/{place}":
            places.append(place)

    store.h5_file.visititems(note)
    for place in places:
        if place.partition("/")[0] not in ("optimizer", "metrics", "_metrics"):
            folder, _, key = place.rpartition("/vars/") if "/vars/" in place else ("", "", place)
            yield place, store.get(folder)[key.removeprefix("vars/")]
