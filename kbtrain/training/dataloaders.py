"""Creates loaders from a user's data set and the arguments."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import (
    ArraySource,
    BatchLoader,
    Collate,
    ColumnFilter,
    DataCollatorWithPadding,
    DataLoader,
    FixedEpochs,
    Loader,
    ModelInputs,
    StreamLoader,
    as_source,
    default_collate,
)
from kbtrain.data.batch import LABEL_KEYS
from kbtrain.data.sources.interop import yields_batches
from kbtrain.data.sources.stream import check_sample
from kbtrain.data.tree import has_array, is_sparse_matrix
from kbtrain.data.workers import WorkerLoader
from kbtrain.errors import ConfigurationError

logger = logging.getLogger("kbtrain")


def make_loader(
    dataset: Any,
    args: TrainingArguments,
    collate: Collate | None,
    name: str,
    train: bool,
    columns: ColumnFilter | None = None,
    inputs: ModelInputs | None = None,
) -> Loader:
    """Batches of ``dataset`` for training (shuffled if asked for) or evaluation (in order).

    Args:
        dataset: Anything that ``kbtrain.data.as_source`` accepts, or a source of batches: a
            ``tf.data.Dataset``, a ``keras.utils.PyDataset``, a torch ``DataLoader``, a batched
            Grain data set. Batches are used unchanged, as are the items of any other iterable
            whose shapes fit the model's inputs.
        args: Batch sizes, sampling strategy, seeds, the ``dataloader_`` arguments.
        collate: A user's collator, or None.
        name: The argument that the data was passed as, for error messages.
        train: Whether the loader is for training.
        columns: Drops columns that the model does not take.
        inputs: The inputs of the model; by default nothing is known about them.

    Raises:
        DataError: The type of the data is not supported.
    """
    inputs = ModelInputs() if inputs is None else inputs
    if yields_batches(dataset):
        return _as_they_come(dataset, collate, name, columns, inputs)
    source = as_source(dataset, name=name, label_names=inputs.label_keys)
    shared: dict[str, Any] = {
        "collate": collate,
        "columns": columns,
        "read_ahead": _read_ahead(args),
        "label_names": inputs.label_keys,
    }
    if not train:
        loader = DataLoader(
            source,
            args.total_eval_batch_size,
            drop_last=args.dataloader_drop_last,
            **shared,
        )
    else:
        loader = DataLoader(
            source,
            args.total_train_batch_size,
            strategy=args.train_sampling_strategy,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
            accumulation=args.gradient_accumulation_steps,
            length_column=args.length_column_name,
            **shared,
        )
    if source.sized:
        loader.look = functools.partial(check_sample, inputs=inputs, name=name)
        return _with_workers(loader, args, train and args.dataloader_persistent_workers)
    if args.dataloader_num_workers:
        logger.warning(
            "%s can only be read sequentially, so worker processes cannot share it: "
            "dataloader_num_workers=%d has no effect.",
            name,
            args.dataloader_num_workers,
        )
    # A default collator says nothing about the data.
    has_collator = collate is not None and not getattr(collate, "is_default", False)
    return StreamLoader(loader, inputs, columns, samples=has_collator)


def _as_they_come(
    dataset: Any,
    collate: Collate | None,
    name: str,
    columns: ColumnFilter | None,
    inputs: ModelInputs,
) -> Loader:
    """A loader for data that consists of batches."""
    if isinstance(dataset, Loader):
        return dataset
    if collate is not None:
        raise ConfigurationError(
            f"{name} yields batches, to which data_collator cannot be applied. Pass samples or "
            "leave out data_collator (a torch DataLoader has its samples as `.dataset`). "
            f"Received: {type(dataset).__name__}"
        )
    logger.info(
        "%s (%s) yields batches: it determines their size, order and number. Batch sizes, "
        "train_sampling_strategy and the dataloader_ arguments have no effect.",
        name,
        type(dataset).__name__,
    )
    return BatchLoader(dataset, name, columns, inputs.label_keys)


def in_epochs(loader: Loader, args: TrainingArguments) -> Loader:
    """The loader, with epochs of ``steps_per_epoch`` updates if that is set."""
    if args.steps_per_epoch is None:
        return loader
    return FixedEpochs(loader, args.steps_per_epoch * args.gradient_accumulation_steps)


def warn_of_inexact_resume(loader: Loader) -> None:
    """Warn at the start of a run if a resumed run may see other data."""
    caveat = getattr(loader, "resume_caveat", None)
    if caveat is not None:
        logger.warning(
            "%s: a run resumed in the middle may not see the same data as an uninterrupted one: "
            "%s. The model, the optimizer and everything else resume exactly.",
            getattr(loader, "name", "The training data"),
            caveat,
        )


def _read_ahead(args: TrainingArguments) -> int | None:
    return None if args.dataloader_num_workers else args.dataloader_prefetch_factor


def _with_workers(loader: DataLoader, args: TrainingArguments, persistent: bool) -> Loader:
    """The loader, or worker processes that create its batches."""
    if args.dataloader_num_workers == 0 or loader.vectorised:
        return loader  # batches of arrays are read faster than they can be sent between processes
    ahead = args.dataloader_prefetch_factor or 2
    return WorkerLoader(loader, args.dataloader_num_workers, ahead, persistent)


def is_named_datasets(data: Any) -> bool:
    """Whether ``data`` is a dict of several data sets, not one data set of columns."""
    if not isinstance(data, Mapping) or not data or any(key in data for key in LABEL_KEYS):
        return False
    # A datasets.Dataset has a shape, too; only arrays can be converted to one.
    return not all(
        has_array(value) or is_sparse_matrix(value) or _is_plain_list(value)
        for value in data.values()
    )


def evaluation_set(datasets: Any, given: Any) -> Any:
    """The data to evaluate.

    Args:
        datasets: ``Trainer.eval_dataset``.
        given: Data, the name of one of several ``datasets``, or None for all of them.

    Raises:
        ConfigurationError: There is no evaluation set, or none of that name.
    """
    if given is None and datasets is None:
        raise ConfigurationError("evaluate() needs an eval_dataset. Received: None.")
    if not isinstance(given, str):
        return datasets if given is None else given
    if not is_named_datasets(datasets):
        raise ConfigurationError(
            f"evaluate({given!r}) requires an eval_dataset that is a dict of several data sets. "
            f"Received: {type(datasets).__name__}. Pass the data itself, or no argument."
        )
    if given not in datasets:
        raise ConfigurationError(
            f"There is no evaluation set {given!r}. Available: {', '.join(map(repr, datasets))}."
        )
    return datasets[given]


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], Mapping | tuple)


def padding_collator(processing: Any, dataset: Any) -> Collate | None:
    """The default collator of a data set: one that pads, if the padding value is known.

    None if there is no ``pad_token_id``, or if the data consists of arrays or batches.
    """
    if getattr(processing, "pad_token_id", None) is None:
        return None
    arrays = isinstance(dataset, Mapping | tuple | ArraySource) or has_array(dataset)
    if arrays or yields_batches(dataset):
        return None
    return _PadTokens(processing)


class _PadTokens(DataCollatorWithPadding):
    """Pads token data and stacks any other."""

    is_default = True  # a default, so the data need not consist of samples

    def __call__(self, samples: Sequence[Any]) -> Any:
        sample = samples[0]
        if isinstance(sample, Mapping) and "input_ids" in sample:
            return super().__call__(samples)
        return default_collate(samples, self._label_keys)
