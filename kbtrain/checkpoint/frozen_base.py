"""Variables that a checkpoint leaves out because they never change: the frozen base of LoRA.

In their place it has a document with their names, shapes and checksums. A resumed run must have the
same values in them: its script builds the model with the same pretrained weights. One that does
change during a run, because a callback assigns to it, is saved from then on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kbtrain import backends
from kbtrain.checkpoint import Checkpoint, validated_json
from kbtrain.errors import CheckpointMismatchError
from kbtrain.model.lora import Lora, lora_of, note_trained
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")

DOCUMENT = "frozen_base"

_WORDS = 4096  # of 8 bytes, in a sum of a fingerprint


@dataclass(frozen=True)
class FrozenArray:
    """What is known about an array that is not in a checkpoint.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype.
        checksum: SHA-256 of its bytes.
        fingerprint: Of the same bytes, several times as fast; shows whether they changed.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: str
    fingerprint: bytes = field(default=b"", compare=False, repr=False)

    @classmethod
    def of(cls, variable: keras.Variable) -> FrozenArray:
        """Read the current value of a variable; if it is divided, all processes must do so."""
        backend = backends.load()
        divided = _is_divided(variable)
        whole = backend.whole_value(variable) if divided else backend.host_view(variable.value)
        value = np.ascontiguousarray(whole)
        digest = hashlib.sha256(_bytes_of(value).data).hexdigest()
        shape = tuple(map(int, variable.shape))
        return cls(shape, value.dtype.name, digest, _fingerprint(value))


@dataclass(frozen=True)
class ExpectedArray:
    """An array that is not in a checkpoint, to be compared with the variable of a model.

    Attributes:
        saved: What the checkpoint says about it.
        lora: What is known about the model's adapters and frozen variables.
    """

    saved: FrozenArray
    lora: Lora | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.saved.shape

    def is_value_of(self, variable: keras.Variable) -> bool:
        """Whether a variable has this value. Other processes than the first get theirs from it."""
        return bool(current().rank) or self.saved == _now(self.lora, variable)


def _is_divided(variable: keras.Variable) -> bool:
    return backends.load().owned_blocks(variable) is not None


def _bytes_of(value: np.ndarray) -> np.ndarray:
    found: np.ndarray = value.reshape(-1).view(np.uint8)
    return found


def _fingerprint(value: np.ndarray) -> bytes:
    """Sums over pieces of an array's bytes, hashed."""
    raw = _bytes_of(np.ascontiguousarray(value))
    whole = raw.size - raw.size % (8 * _WORDS)
    sums = raw[:whole].view(np.uint64).reshape(-1, _WORDS).sum(axis=1, dtype=np.uint64)
    return hashlib.sha256(sums.tobytes() + raw[whole:].tobytes()).digest()


def _is_unchanged(known: FrozenArray, variable: keras.Variable) -> bool:
    """Whether a variable has its value of the start of the run; of a divided one, that is taken."""
    if _is_divided(variable):
        return True
    return known.fingerprint == _fingerprint(backends.load().host_view(variable.value))


def _now(lora: Lora | None, variable: keras.Variable) -> FrozenArray:
    """What a variable is now: as at the start of the run, where it has not changed since."""
    known: FrozenArray | None = None if lora is None else lora.checksums.get(id(variable))
    if known is not None and _is_unchanged(known, variable):
        return known
    return FrozenArray.of(variable)


def read(model: keras.Model) -> None:
    """Compute the checksums of the frozen base, at the start of a run.

    Afterwards it may be divided among processes, none of which has all of it.
    """
    if (lora := lora_of(model)) is not None:
        lora.checksums = {id(v): FrozenArray.of(v) for v in lora.base}


def read_blocks(model: keras.Model) -> None:
    """Read this process's blocks of what has been divided, once all values are there."""
    if (lora := lora_of(model)) is not None:
        lora.blocks = {id(v): _of_blocks(v) for v in lora.base if _is_divided(v)}


def _of_blocks(variable: keras.Variable) -> list[bytes]:
    backend = backends.load()
    owned = backend.owned_blocks(variable)
    blocks = [] if owned is None else owned.blocks
    return [_fingerprint(backend.host_view(values)) for _, values in blocks]


def _warn_of_lost_changes(lora: Lora) -> None:
    """Warn of divided variables that have changed: processes may not agree on that, so each does.

    They are not saved, because all processes would have to save them.
    """
    for variable in lora.base:
        known = lora.blocks.get(id(variable))
        if known is not None and known != (now := _of_blocks(variable)):
            lora.blocks[id(variable)] = now
            logger.warning(
                "The frozen variable %s was changed during training. It is divided among "
                "processes, so checkpoints do not hold it, and a resumed run has its former value. "
                "Set variable.trainable = True before fit, to have it saved.",
                variable.path,
            )


def forget(model: keras.Model) -> None:
    """Forget the checksums at the end of a run, but for variables that are divided since."""
    if (lora := lora_of(model)) is not None:
        divided = {id(v) for v in lora.base if _is_divided(v)}
        lora.checksums = {v: known for v, known in lora.checksums.items() if v in divided}


def note_changes(model: keras.Model) -> dict[int, FrozenArray]:
    """Save from now on what was frozen and has changed since the start of the run.

    The first process decides, because others get their values from it.

    Returns:
        What is known of the rest, by the variables' ``id``.
    """
    lora = lora_of(model)
    if lora is not None:
        _warn_of_lost_changes(lora)
    if lora is None or current().rank:
        return {}
    read = [(v, lora.checksums[id(v)]) for v in lora.base if id(v) in lora.checksums]
    changed = [variable for variable, known in read if not _is_unchanged(known, variable)]
    if changed:
        logger.warning(
            "Frozen variables were changed during training (%s%s). Checkpoints hold them from now "
            "on; earlier ones lack the change.",
            ", ".join(v.path for v in changed[:5]),
            ", ..." if len(changed) > 5 else "",
        )
        note_trained(model, changed)
    return {id(v): known for v, known in read if not any(v is other for other in changed)}


def left_out(model: keras.Model, named: Mapping[str, keras.Variable]) -> set[str]:
    """The names of the variables that a checkpoint of this model leaves out."""
    lora = lora_of(model)
    frozen = set() if lora is None else {id(v) for v in lora.base}
    return {name for name, variable in named.items() if id(variable) in frozen}


def document(
    model: keras.Model,
    named: Mapping[str, keras.Variable],
    known: Mapping[int, FrozenArray] | None = None,
) -> dict[str, Any] | None:
    """What a checkpoint says about the adapters, and about the variables that it leaves out.

    Args:
        model: The model.
        named: Its variables by name.
        known: The result of ``note_changes``, just called.

    Returns:
        JSON values; None if it leaves out nothing.
    """
    names, lora = left_out(model, named), lora_of(model)
    if lora is None or not names:
        return None
    arrays = {}
    for name in sorted(names):
        variable = named[name]
        array = (known or {}).get(id(variable)) or _now(lora, variable)
        arrays[name] = [list(array.shape), array.dtype, array.checksum]
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "patterns": list(lora.patterns),
        "train": list(lora.train),
        # Of all variables, by which automatic names (dense_9, dense_10) are matched.
        "order": list(named),
        "arrays": arrays,
    }


def completed(arrays: Mapping[str, Any], document: Any, model: keras.Model) -> dict[str, Any]:
    """Arrays with those that a document describes, in the order of the variables.

    The latter are ``ExpectedArray``, to be compared with the variables of a model.

    Raises:
        CheckpointMismatchError: The model's adapters have another scale.
        KeyError, TypeError, ValueError: kbtrain did not write it.
    """
    lora, found = lora_of(model), dict(arrays)
    rank, alpha = int(document["rank"]), float(document["alpha"])
    if lora is not None and lora.rank == rank and lora.alpha != alpha:
        raise CheckpointMismatchError(
            f"The adapters were trained with alpha={alpha:g}, and those of the model have "
            f"alpha={lora.alpha:g}, so it would compute something else with them. Nothing was "
            f"changed. Call enable_lora(..., rank={rank}, alpha={alpha:g})."
        )
    for name, (shape, dtype, checksum) in document["arrays"].items():
        saved = FrozenArray(tuple(map(int, shape)), str(dtype), str(checksum))
        found[name] = ExpectedArray(saved, lora)
    places = {str(name): place for place, name in enumerate(document["order"])}
    return {name: found[name] for name in sorted(found, key=lambda n: places.get(n, len(places)))}


def completed_from(
    arrays: Mapping[str, Any], checkpoint: Checkpoint, model: keras.Model
) -> dict[str, Any]:
    """The arrays of a checkpoint with those that it leaves out; see ``completed``.

    Raises:
        CheckpointDamagedError: The document is inconsistent.
        CheckpointMismatchError: The model's adapters have another scale.
    """
    if DOCUMENT not in checkpoint.documents:
        return dict(arrays)
    found = validated_json.mapping(checkpoint, DOCUMENT)
    return validated_json.attempt(checkpoint, DOCUMENT, lambda: completed(arrays, found, model))
