"""Which layers and variables of a model are trainable, as part of a checkpoint.

A callback may freeze or unfreeze layers during a run. A resumed run starts with the flags of its
script, and the callback may not fire again, so the checkpoint stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from kbtrain.utils.layers import walk_layers

Flags = list[tuple[str, bool]]


@dataclass(frozen=True)
class TrainableFlags:
    """The flags of a model.

    Attributes:
        layers: Path and flag of each layer, outer ones first.
        variables: Path and flag of each variable.
    """

    layers: Flags
    variables: Flags

    @classmethod
    def of(cls, model: keras.Model) -> TrainableFlags:
        """Read the current flags."""
        layers = [(str(x.path), bool(x.trainable)) for x in walk_layers(model)]
        return cls(layers, [(v.path, bool(v.trainable)) for v in model.variables])

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> TrainableFlags:
        """The inverse of ``to_document``."""
        layers, variables = (
            [(str(path), bool(flag)) for path, flag in document[part]]
            for part in ("layers", "variables")
        )
        return cls(layers, variables)

    def to_document(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "layers": [list(x) for x in self.layers],
            "variables": list(map(list, self.variables)),
        }

    def apply(self, model: keras.Model) -> None:
        """Apply these flags to a model of the same architecture.

        Raises:
            ValueError: The model has other layers or variables.
        """
        layers, variables = list(walk_layers(model)), model.variables
        if len(layers) != len(self.layers) or len(variables) != len(self.variables):
            raise ValueError(
                f"{len(self.layers)} layers and {len(self.variables)} variables are known, and the "
                f"model has {len(layers)} and {len(variables)}"
            )
        # Setting a layer's flag also sets those of its sublayers. A layer shared by two parents is
        # correct only after the second pass.
        for _ in range(2):
            for layer, (_, flag) in zip(layers, self.layers, strict=True):
                if layer.trainable != flag:
                    layer.trainable = flag
        for variable, (_, flag) in zip(variables, self.variables, strict=True):
            if variable.trainable != flag:
                variable.trainable = flag
