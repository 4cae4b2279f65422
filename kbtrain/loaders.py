"""From a user's data set and the arguments to a loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbtrain.data import Collate, DataLoader, Loader, as_source
from kbtrain.data.batch import LABEL_KEYS
from kbtrain.errors import ConfigurationError
from kbtrain.training_args import TrainingArguments


def make_loader(
    dataset: Any, args: TrainingArguments, collate: Collate | None, name: str, train: bool
) -> Loader:
    """Batches of ``dataset`` for training (shuffled if asked for) or evaluation (in order).

    Args:
        dataset: Anything ``kbtrain.data.as_source`` takes.
        args: Batch sizes, sampling strategy, seeds, ``dataloader_drop_last``.
        collate: A user's collator, or None.
        name: The argument the data came from, to name it in errors.
        train: For training.

    Raises:
        ConfigurationError: Training data without a length, and no ``max_steps``.
        DataError: The data is of no kind that is known.
    """
    source = as_source(dataset, name=name)
    if not train:
        return DataLoader(source, args.eval_batch_size, collate=collate)
    if not source.sized and args.max_steps <= 0:
        raise ConfigurationError(
            f"{name} has no length, so the number of steps cannot be counted: set max_steps. "
            f"Received: {type(dataset).__name__}, max_steps={args.max_steps}."
        )
    return DataLoader(
        source,
        args.train_batch_size,
        strategy=args.train_sampling_strategy,
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
        collate=collate,
        accumulation=args.gradient_accumulation_steps,
        length_column=args.length_column_name,
    )


def is_named_datasets(data: Any) -> bool:
    """Whether ``data`` is a dict of several data sets rather than one data set of columns."""
    if not isinstance(data, Mapping) or not data or any(key in data for key in LABEL_KEYS):
        return False
    return not all(hasattr(value, "shape") or _is_plain_list(value) for value in data.values())


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], Mapping | tuple)
