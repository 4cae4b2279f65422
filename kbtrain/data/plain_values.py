"""Converts numbers and arrays of any library to plain Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kbtrain.data.tree import as_array
from kbtrain.errors import ConfigurationError


def plain_values(values: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Convert results to JSON types; tensors and arrays of one element become numbers.

    Args:
        values: The results by name.
        source: The beginning of error messages, such as "compute_metrics returned".

    Raises:
        ConfigurationError: ``values`` is not a dict, or a value is neither numeric nor text.

    Example:
        >>> plain_values({"f1": np.float32(0.5), "matrix": np.eye(2, dtype=int)}, "this is")
        {'f1': 0.5, 'matrix': [[1, 0], [0, 1]]}
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{source} something other than a dict from names to numbers. "
            f"Received: {type(values).__name__}."
        )
    return {str(name): _plain_value(name, value, source) for name, value in values.items()}


def _plain_value(name: Any, value: Any, source: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain_value(f"{name}[{k!r}]", v, source) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(f"{name}[{i}]", v, source) for i, v in enumerate(value)]
    if hasattr(type(value), "__array__"):
        array = as_array(value, str(name))  # in its own precision: metrics are often float64
        if array.dtype.kind in "biuf":
            return array.item() if array.size == 1 else array.tolist()
    raise ConfigurationError(
        f"{source} a value that is not a number under the name {name!r}. "
        f"Received: {type(value).__name__}."
    )
