"""Variables that a checkpoint leaves out because they never change: the frozen base of LoRA.

In their place it has a document with their names, shapes and checksums. A resumed run must have the
same values in them: its script builds the model with the same pretrained weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kbtrain import backends
from kbtrain.checkpoint import Checkpoint, validated_json
from kbtrain.model.lora import lora_of
from kbtrain.utils.processes import current

DOCUMENT = "frozen_base"


@dataclass(frozen=True)
class FrozenArray:
    """What is known about an array that is not in a checkpoint.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype.
        checksum: SHA-256 of its bytes.
        known: The current values of a model's variables, by their ``id``, where they are known.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str
    known: Mapping[int, FrozenArray] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, variable: keras.Variable) -> FrozenArray:
        """Read the current value of a variable; if it is divided, all processes must do so."""
        backend = backends.load()
        divided = backend.owned_blocks(variable) is not None
        whole = backend.whole_value(variable) if divided else backend.host_view(variable.value)
        value = np.ascontiguousarray(whole)
        digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).hexdigest()
        return cls(tuple(map(int, variable.shape)), value.dtype.name, digest)

    def is_value_of(self, variable: keras.Variable) -> bool:
        """Whether a variable has this value. Other processes than the first get theirs from it."""
        if current().rank:
            return True
        return self == (self.known.get(id(variable)) or FrozenArray.of(variable))


def read(model: keras.Model) -> None:
    """Compute the checksums of the frozen base, at the start of a run: it will not change.

    Afterwards it may be divided among processes, none of which has all of it.
    """
    if (lora := lora_of(model)) is not None:
        lora.checksums = {id(v): FrozenArray.of(v) for v in lora.base}


def left_out(model: keras.Model, named: Mapping[str, keras.Variable]) -> set[str]:
    """The names of the variables that a checkpoint of this model leaves out."""
    lora = lora_of(model)
    frozen = set() if lora is None else {id(v) for v in lora.base}
    return {name for name, variable in named.items() if id(variable) in frozen}


def document(model: keras.Model, named: Mapping[str, keras.Variable]) -> dict[str, Any] | None:
    """What a checkpoint says about the adapters, and about the variables that it leaves out.

    Returns:
        JSON values; None if it leaves out nothing.
    """
    names, lora = left_out(model, named), lora_of(model)
    if lora is None or not names:
        return None
    arrays = {}
    for name in sorted(names):
        array = lora.checksums.get(id(named[name])) or FrozenArray.of(named[name])
        arrays[name] = [list(array.shape), array.dtype, array.checksum]
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "patterns": list(lora.patterns),
        "train": list(lora.train),
        "arrays": arrays,
    }


def arrays_of(document: Any, model: keras.Model) -> dict[str, FrozenArray]:
    """The arrays that a document describes, to be compared with the variables of a model.

    Raises:
        KeyError, TypeError, ValueError: kbtrain did not write it.
    """
    lora, found = lora_of(model), dict[str, FrozenArray]()
    known = {} if lora is None else lora.checksums
    for name, (shape, dtype, checksum) in document["arrays"].items():
        found[name] = FrozenArray(tuple(map(int, shape)), str(dtype), str(checksum), known)
    return found


def in_checkpoint(checkpoint: Checkpoint, model: keras.Model) -> dict[str, FrozenArray]:
    """The arrays that a checkpoint leaves out, to be compared with the variables of a model.

    Raises:
        CheckpointDamagedError: The document is inconsistent.
    """
    if DOCUMENT not in checkpoint.documents:
        return {}
    found = validated_json.mapping(checkpoint, DOCUMENT)
    return validated_json.attempt(checkpoint, DOCUMENT, lambda: arrays_of(found, model))
