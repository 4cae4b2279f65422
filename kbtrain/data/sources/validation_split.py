"""``validation_split``: holds out the last part of the training data for evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kbtrain.data.batch import LabelKeys
from kbtrain.data.sources.base import ArraySource
from kbtrain.data.tree import has_array, is_sparse_matrix
from kbtrain.errors import ConfigurationError


def split_for_validation(
    data: Any, fraction: Any, strings: bool = False
) -> tuple[ArraySource, ArraySource]:
    """Split arrays into a first and a last part, like Keras' ``fit(validation_split=...)``.

    Args:
        data: ``(x, y)``, ``(x, y, sample_weight)``, a dict of arrays, or one array. Nothing is
            copied, and files on disk are not read.
        fraction: Fraction of the last part, above 0 and below 1.
        strings: Whether models may take strings and ragged tensors.

    Returns:
        The part to train on and the part to evaluate.

    Raises:
        ConfigurationError: The fraction is invalid, one part would be empty, or the data is not
            arrays.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ConfigurationError(
            "validation_split must be a fraction of the training data, above 0 and below 1. "
            f"Received: validation_split={fraction!r}."
        )
    if not (
        isinstance(data, (tuple, Mapping, ArraySource)) or has_array(data) or is_sparse_matrix(data)
    ):
        raise ConfigurationError(
            "validation_split is for arrays, as in Keras. Pass the evaluation data as eval_dataset "
            "(data sets of Hugging Face have train_test_split(), a tf.data.Dataset has take(n) and "
            f"skip(n)). Received: train_dataset of type {type(data).__name__}."
        )
    source = (
        data
        if isinstance(data, ArraySource)
        else ArraySource(data, label_names=LabelKeys((), strings=strings))
    )
    size = len(source)
    cut = math.floor(size * (1.0 - fraction))
    if cut in (0, size):
        raise ConfigurationError(
            f"validation_split={fraction} of {size} samples leaves none to "
            f"{'train on' if cut == 0 else 'evaluate'}. Choose another fraction."
        )
    return source.part(0, cut, source.name), source.part(cut, size, "eval_dataset")
