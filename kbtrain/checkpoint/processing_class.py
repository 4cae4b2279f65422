"""``processing_class``: the tokenizer or processor that belongs to a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kbtrain.checkpoint.storage.manifest import check_other_files
from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.errors import CheckpointError, ConfigurationError

_SAVE = ("save_pretrained", "save_to_preset")


def check_processing_class(processing: Any) -> None:
    """Check that the processing class can be saved with a model.

    Raises:
        ConfigurationError: It has no method for saving.
    """
    if processing is None or any(callable(getattr(processing, name, None)) for name in _SAVE):
        return
    raise ConfigurationError(
        "processing_class is saved with the model, so it needs a method save_pretrained(folder) "
        "(tokenizers and processors of Transformers) or save_to_preset(folder) (KerasHub). "
        f"Received: {type(processing).__name__}."
    )


def save_processing_class(processing: Any, folder: Path) -> None:
    """Write it into ``folder`` with its own method; None writes nothing."""
    if processing is not None:
        name = next(name for name in _SAVE if hasattr(processing, name))
        getattr(processing, name)(str(folder))


def check_resumed(processing: Any, folder: Path) -> None:
    """Let the processing class refuse a checkpoint, with its own ``check_resumed(folder)``."""
    if (check := getattr(processing, "check_resumed", None)) is not None:
        check(folder)


def files_of(
    processing: Any, store: CheckpointStore, step: int, documents: Iterable[str]
) -> dict[str, bytes]:
    """The files that its own method writes, for a checkpoint.

    This runs in the calling thread, not in the one that writes checkpoints, because a tokenizer
    must not be saved while it is in use.

    Args:
        processing: The tokenizer or processor.
        store: Where the checkpoint will be written.
        step: Step of the checkpoint.
        documents: Names of the checkpoint's documents.

    Returns:
        Path in the folder -> content.

    Raises:
        CheckpointError: It could not be saved, or writes a file that the checkpoint itself uses.
    """
    try:
        with store.temporary_folder(step) as folder:
            save_processing_class(processing, folder)
            found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        check_other_files(files, documents)
    except Exception as error:  # user code may raise anything
        raise CheckpointError(
            f"processing_class ({type(processing).__name__}) could not be saved for "
            f"{store.path(step)}: {type(error).__name__}: {error}"
        ) from error
    return files
