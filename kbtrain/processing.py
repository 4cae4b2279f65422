"""``processing_class``: the tokenizer or processor that belongs to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbtrain.checkpoint.manifest import check_other_files
from kbtrain.checkpoint.store import CheckpointStore
from kbtrain.data import ArraySource, Collate, DataCollatorWithPadding, default_collate
from kbtrain.data.foreign import yields_batches
from kbtrain.data.structure import has_array
from kbtrain.errors import CheckpointError, ConfigurationError

_SAVE = ("save_pretrained", "save_to_preset")


def check_processing_class(processing: Any) -> None:
    """Make sure that it can be saved with a model.

    Raises:
        ConfigurationError: It has no method for that.
    """
    if processing is None or any(callable(getattr(processing, name, None)) for name in _SAVE):
        return
    raise ConfigurationError(
        "processing_class is saved with the model, so it needs a method save_pretrained(folder) "
        "(tokenizers and processors of transformers) or save_to_preset(folder) (KerasHub). "
        f"Received: {type(processing).__name__}."
    )


def save(processing: Any, folder: Path) -> None:
    """Write it into ``folder`` by its own method; None writes nothing."""
    if processing is not None:
        name = next(name for name in _SAVE if hasattr(processing, name))
        getattr(processing, name)(str(folder))


def files_of(
    processing: Any, store: CheckpointStore, step: int, documents: Iterable[str]
) -> dict[str, bytes]:
    """What its own method writes, for a checkpoint.

    In the calling thread, and not where checkpoints are written in the background: a tokenizer may
    not be saved while it is at work.

    Args:
        processing: The tokenizer or processor.
        store: Where the checkpoint is going to be.
        step: Its step.
        documents: Names of the documents in it.

    Returns:
        Path in the folder -> content.

    Raises:
        CheckpointError: It could not be saved, or writes what a checkpoint has already.
    """
    try:
        with store.temporary_folder(step) as folder:
            save(processing, folder)
            found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        check_other_files(files, documents)
    except Exception as error:  # a method of the user's own may do anything
        raise CheckpointError(
            f"processing_class ({type(processing).__name__}) could not be saved for "
            f"{store.path(step)}: {type(error).__name__}: {error}"
        ) from error
    return files


def padding_collator(processing: Any, dataset: Any) -> Collate | None:
    """The collator of a data set that was given none: padding, if there is something to pad with.

    None where there is no ``pad_token_id``, or the data is arrays or batches already.
    """
    if getattr(processing, "pad_token_id", None) is None:
        return None
    arrays = isinstance(dataset, Mapping | tuple | ArraySource) or has_array(dataset)
    if arrays or yields_batches(dataset):
        return None
    return _PadTokens(processing)


class _PadTokens(DataCollatorWithPadding):
    """Pads token data and stacks any other."""

    is_default = True  # nobody asked for it: the data need not be samples

    def __call__(self, samples: Sequence[Any]) -> Any:
        sample = samples[0]
        if isinstance(sample, Mapping) and "input_ids" in sample:
            return super().__call__(samples)
        return default_collate(samples, self._label_keys)
