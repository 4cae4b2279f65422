"""Data: sources of samples, their order, collation, and loaders with a resumable position.

This package uses only NumPy and the standard library. Keras is not imported, and every backend gets
the same batches in the same order.
"""

from __future__ import annotations

from kbtrain.data.batch import (
    Batch,
    LabelKeys,
    LabelNames,
    batch_size,
    concatenate,
    count_samples,
    counting_leaf,
    label_keys,
    signature,
    stack,
    to_batch,
    unpack,
)
from kbtrain.data.batch_loader import BatchLoader, as_loader
from kbtrain.data.blocks import Batches, Block, micro_batches
from kbtrain.data.class_weight import check_class_weight, weighted
from kbtrain.data.collators.default import Collate, default_collate, default_data_collator
from kbtrain.data.collators.language_modeling import DataCollatorForLanguageModeling
from kbtrain.data.collators.packing import DataCollatorForPacking
from kbtrain.data.collators.sequence import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)
from kbtrain.data.fixed_epochs import FixedEpochs
from kbtrain.data.loader import DataLoader, Loader
from kbtrain.data.sampling.sampler import epoch_order
from kbtrain.data.sources.base import (
    ArraySource,
    IterableSource,
    MapSource,
    Source,
    UnsizedDataError,
)
from kbtrain.data.sources.column_filter import ColumnFilter
from kbtrain.data.sources.infer import as_source
from kbtrain.data.sources.stream import ModelInputs, StreamLoader
from kbtrain.data.sources.tar_shards import TarShards
from kbtrain.data.sources.validation_split import split_for_validation
from kbtrain.data.tree import map_structure, to_numpy, with_none, without_none

__all__ = [
    "ArraySource",
    "Batch",
    "BatchLoader",
    "Batches",
    "Block",
    "Collate",
    "ColumnFilter",
    "DataCollatorForLanguageModeling",
    "DataCollatorForPacking",
    "DataCollatorForSeq2Seq",
    "DataCollatorForTokenClassification",
    "DataCollatorWithPadding",
    "DataLoader",
    "FixedEpochs",
    "IterableSource",
    "LabelKeys",
    "LabelNames",
    "Loader",
    "MapSource",
    "ModelInputs",
    "Source",
    "StreamLoader",
    "TarShards",
    "UnsizedDataError",
    "as_loader",
    "as_source",
    "batch_size",
    "check_class_weight",
    "concatenate",
    "count_samples",
    "counting_leaf",
    "default_collate",
    "default_data_collator",
    "epoch_order",
    "label_keys",
    "map_structure",
    "micro_batches",
    "signature",
    "split_for_validation",
    "stack",
    "to_batch",
    "to_numpy",
    "unpack",
    "weighted",
    "with_none",
    "without_none",
]
