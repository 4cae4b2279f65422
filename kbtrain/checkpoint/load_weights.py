"""Loads weights into a model from a checkpoint or a file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from kbtrain.checkpoint import (
    CheckpointStore,
    RestorePlan,
    frozen_base,
    keras_weights,
    name_variables,
    plan_restore,
    validated_json,
)
from kbtrain.checkpoint.formats import adapters, safetensors_file
from kbtrain.checkpoint.keras_layout import keras_layout
from kbtrain.checkpoint.run_state import model_variables
from kbtrain.checkpoint.storage.faults import exists, is_damage, is_folder, unreadable
from kbtrain.checkpoint.storage.format import ARRAYS_FORMAT
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    concise,
    first_lines,
)
from kbtrain.model.build import check_model
from kbtrain.model.lora import enable_lora, lora_of, note_trained
from kbtrain.model.variables import refresh_derived_values
from kbtrain.utils.files.addresses import scheme_of

logger = logging.getLogger("kbtrain")


@dataclass(frozen=True)
class LoadReport:
    """The result of ``load_weights``.

    Attributes:
        loaded: Variables that were assigned a value.
        missing: Variables of the model without a value in the file; they are unchanged.
        unexpected: Values in the file without a variable in the model.
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
    """Load weights from a file into a model, without optimizer state or data position.

    Args:
        model: A built model.
        source: A checkpoint, the folder of a run (its newest intact checkpoint is used), or the
            address of either; a ``.weights.h5``, ``.keras`` or ``.safetensors`` file; the last with
            the names that ``kbtrain.export`` gives the arrays.
        strict: Whether names and shapes must match exactly. If False, matching values are loaded,
            and the report, which is logged as a warning, lists the rest.

    Returns:
        What was loaded and what was not.

    Raises:
        ConfigurationError: The model is not built.
        CheckpointNotFoundError: There is no such file or checkpoint.
        CheckpointDamagedError: The file is damaged, or declares more data than it holds.
        CheckpointUnreadableError: The file cannot be read now.
        CheckpointMismatchError: The weights do not fit the model (``strict``), or none of them do;
            or LoRA adapters were trained with another ``alpha``. The model is unchanged.

    Example:
        >>> import keras
        >>> body = [keras.Input((4,)), keras.layers.Dense(3, name="body")]
        >>> keras.Sequential(body, name="sequential").save_weights("old.weights.h5")
        >>> new = keras.Sequential([*body, keras.layers.Dense(2, name="head")], name="sequential")
        >>> load_weights(new, "old.weights.h5", strict=False).missing
        ('layers/dense_1/vars/0', 'layers/dense_1/vars/1')
    """
    check_model(model)
    if not model.built:
        raise ConfigurationError(
            f"The model {model.name!r} has no variables yet. Build it first: call it on a batch, "
            "or give it a keras.Input as its first layer."
        )
    path = _here(source)
    named = name_variables(model_variables(model))
    if is_folder(path):
        checkpoint = CheckpointStore(path).resolve(path)
        assert checkpoint is not None  # resolving a path returns a checkpoint or raises
        saved = {**checkpoint.arrays.get("model", {}), **checkpoint.arrays.get("evaluation", {})}
        saved = frozen_base.completed_from(saved, checkpoint, model)
        plan = plan_restore(named, saved, strict=strict)
    else:
        plan = _plan_from_file(model, path, named, strict)
    plan.apply()
    if plan.frozen:  # the source is of adapters: what it holds of the base is not the pretrained
        note_trained(model, [variable for variable, _ in plan.values])
    refresh_derived_values(model)
    loaded = tuple(name for name in plan.names if name not in plan.frozen)
    report = LoadReport(loaded, plan.missing, plan.unexpected, plan.different)
    if report.missing or report.unexpected or report.different:
        logger.warning("%s: %s.", path, report)
    return report


def _here(source: str | os.PathLike[str]) -> Path:
    """A local path; what is at an address is downloaded."""
    if scheme_of(source) is None:
        return Path(source)
    from kbtrain.checkpoint.remote.store import staged

    return Path(staged(os.fspath(source)))


@concise
def load_adapters(model: keras.Model, path: str | os.PathLike[str]) -> LoadReport:
    """Load adapters into a model that holds the pretrained weights they were trained on.

    Args:
        model: A built model; without adapters, it gets those of the file by ``enable_lora``.
        path: A file of ``save_adapters``, a checkpoint of a run with ``enable_lora``, or the folder
            of such a run.

    Returns:
        What was loaded.

    Raises:
        CheckpointMismatchError: They belong to another model, to other pretrained weights, or to
            adapters of another ``alpha``; the model's weights are unchanged.
        CheckpointError: The file is missing, damaged, or holds no adapters.
        ConfigurationError: The model is not built, or lacks the adapted layers.
    """
    path = _here(path)
    if is_folder(path):
        checkpoint = CheckpointStore(path).resolve(path)
        assert checkpoint is not None  # resolving a path returns a checkpoint or raises
        path, about = checkpoint.path, checkpoint.documents.get(frozen_base.DOCUMENT)
        if about is not None:
            about = validated_json.mapping(checkpoint, frozen_base.DOCUMENT)
    else:
        about = adapters.parse(*adapters.read(path), path)[1]
    if about is None:
        raise ConfigurationError(
            f"{path} holds no LoRA adapters. Received a file of another kind: load it with "
            "kbtrain.load_weights."
        )
    if lora_of(model) is None:
        try:
            rank, alpha = int(about["rank"]), float(about["alpha"])
            patterns, train = ([str(p) for p in about[key]] for key in ("patterns", "train"))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointDamagedError(
                f"{path} is not as kbtrain wrote it: {adapters.ABOUT} lacks {error}."
            ) from error
        enable_lora(model, rank, patterns, alpha=alpha, train=train)
    return load_weights(model, path)


def _plan_from_file(
    model: keras.Model, path: Path, named: dict[str, keras.Variable], strict: bool
) -> RestorePlan:
    """Read the matching values from a Keras file; shapes are compared before anything is read."""
    if not exists(path):
        raise CheckpointNotFoundError(f"There is no {path}.")
    if not path.name.endswith((".weights.h5", ".keras", safetensors_file.SUFFIX)):
        raise CheckpointError(
            "Expected a checkpoint's or a run's folder, or a file that ends in .weights.h5, .keras "
            f"or .safetensors. Received: {path}"
        )
    if path.suffix == safetensors_file.SUFFIX:
        return plan_restore(named, _named_arrays(model, path), strict=strict)
    try:
        with keras_weights.opened(path) as file:
            if file.attrs.get("format") == ARRAYS_FORMAT:
                return plan_restore(named, _named_arrays(model, path), strict=strict)
            # Keras does not store the states of seed generators: those stay unchanged.
            links = keras_layout(model, named).links
            variables = {path: named[name] for path, name in links.items()}
            return plan_restore(variables, keras_weights.values(file), strict=strict)
    except CheckpointError:
        raise
    except MemoryError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # h5py and zipfile raise all kinds of errors for damaged files
        if isinstance(error, OSError) and not is_damage(error):
            raise unreadable(path, error) from error
        raise CheckpointDamagedError(
            f"{path} is not a readable Keras file ({type(error).__name__}: {first_lines(error)})."
        ) from error


def _named_arrays(model: keras.Model, path: Path) -> dict[str, Any]:
    """The arrays of a file by their own names; of a file of adapters, the frozen base as well."""
    arrays, about = adapters.parse(*adapters.read(path), path)
    if about is None:
        return dict(arrays)
    try:
        return frozen_base.completed(arrays, about, model)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(
            f"{path} is not as kbtrain wrote it: {adapters.ABOUT} ({first_lines(error)})."
        ) from error
