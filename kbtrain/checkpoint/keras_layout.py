"""The paths at which Keras looks for a model's values in a ``.weights.h5`` file.

A checkpoint stores a variable once, under its path; the HDF5 paths that ``model.load_weights``
reads are hard links to the same data. Keras itself supplies these paths: its save traversal runs
with a store that only records where everything would go.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kbtrain.utils.fallback import report

logger = logging.getLogger("kbtrain")


@dataclass(frozen=True)
class KerasLayout:
    """The paths inside a ``.weights.h5`` file.

    Attributes:
        links: HDF5 path -> name of the array stored there.
        values: HDF5 path -> data that a layer stores besides its variables.
    """

    links: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


def keras_layout(model: keras.Model, named: Mapping[str, keras.Variable]) -> KerasLayout:
    """Return where Keras stores the variables of a model.

    Args:
        model: A built model.
        named: Array name -> variable, from ``name_variables``.

    Returns:
        The layout; empty, with a warning, if a layer cannot be saved.
    """
    try:
        # No public API gives the layout without writing a file.
        from keras.src.saving.saving_lib import H5IOStore, _save_state

        # `_save_state` requires an H5IOStore.
        recorder: Any = type("_Recorder", (_RecordingStore, H5IOStore), {})()
    except Exception as error:
        report(
            "Finding where Keras stores the values of a model",
            "keras",
            error,
            "load_weights cannot read a checkpoint's model.weights.h5. Resuming is not affected.",
        )
        return KerasLayout()
    try:
        _save_state(model, recorder, None, "", set())
    except Exception as error:  # a layer's own save_own_variables may do anything
        logger.warning(
            "model.weights.h5 will not be readable by load_weights: a layer cannot be saved (%s: "
            "%s). Resuming is not affected.",
            type(error).__name__,
            error,
        )
        return KerasLayout()
    names = {id(variable): name for name, variable in named.items()}
    links, values = {}, {}
    for place, value in recorder.found.items():
        if not isinstance(value, keras.Variable):
            values[place] = np.array(keras.ops.convert_to_numpy(value))
        elif id(value) in names:  # variables of the optimizer and of metrics are not saved here
            links[place] = names[id(value)]
    return KerasLayout(links, values)


class _RecordingStore:
    """A store that records what would be written and where, and writes nothing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._place = ""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> _RecordingStore:
        self._place = f"{path}/vars/".removeprefix("/")
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        self.found[self._place + key] = value

    def __getitem__(self, key: str) -> Any:
        return self.found[self._place + key]

    def __delitem__(self, key: str) -> None:
        del self.found[self._place + key]

    def __contains__(self, key: str) -> bool:
        return self._place + key in self.found

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        here = [place for place in self.found if place.startswith(self._place)]
        return [place.removeprefix(self._place) for place in here]
