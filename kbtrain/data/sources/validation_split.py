"""``validation_split``: the last part of the training data, kept for evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kbtrain.data.sources.base import ArraySource
from kbtrain.data.tree import has_array, is_sparse_matrix
from kbtrain.errors import ConfigurationError


def split_for_validation(data: Any, fraction: Any) -> tuple[ArraySource, ArraySource]:
    """The first and the last part of arrays, as Keras' ``fit(validation_split=...)`` cuts them.

    Args:
        data: ``(x, y)``, ``(x, y, sample_weight)``, a dict of arrays, or one array. Nothing is
            copied, and a file on disk is not read.
        fraction: Share of the last part, above 0 and below 1.

    Returns:
        The part to train on and the part to evaluate.

    Raises:
        ConfigurationError: The fraction is none, leaves nothing, or the data is no arrays.
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
            "validation_split is for arrays, as in Keras. Pass the part to evaluate as "
            "eval_dataset (data sets of Hugging Face have train_test_split(), a tf.data.Dataset "
            f"take(n) and skip(n)). Received: train_dataset of type {type(data).__name__}."
        )
    source = data if isinstance(data, ArraySource) else ArraySource(data, label_names=())
    size = len(source)
    cut = math.floor(size * (1.0 - fraction))
    if cut in (0, size):
        raise ConfigurationError(
            f"validation_split={fraction} of {size} samples leaves none to "
            f"{'train on' if cut == 0 else 'evaluate'}. Choose another fraction."
        )
    return source.part(0, cut, source.name), source.part(cut, size, "eval_dataset")
