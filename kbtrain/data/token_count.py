"""Counts the tokens a model has been trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kbtrain.data import LabelNames, unpack
from kbtrain.data.tree import leaves_with_paths
from kbtrain.errors import DataError

NAMES = ("input_ids", "token_ids", "tokens")
"""Names of token inputs; without one of them, the only integer input is counted."""

MASKS = ("attention_mask", "padding_mask")
"""Inputs that mark the positions that are not padding."""


def count_tokens(
    chunks: Iterable[Mapping[str, Any]],
    updates: int,
    mode: str,
    label_names: LabelNames = None,
    padding: int = 0,
) -> int:
    """Tokens in the inputs of a block.

    Args:
        chunks: ``Block.chunks``: batches with the updates along the first axis.
        updates: Updates in the block; entries after them are padding.
        mode: "all" counts every element of the input, "non_padding" those where the mask is not 0,
            or, without a mask, the elements other than ``padding``.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        padding: The padding token.

    Raises:
        DataError: There is no integer input, or there are several and none has a known name.
    """
    total = 0
    for chunk in chunks:
        for batch in chunk.values():
            x = unpack(batch, label_names).x
            counted = _tokens(x)
            if mode == "non_padding":
                masks = [x[name] for name in MASKS if isinstance(x, Mapping) and name in x]
                counted = np.asarray(masks[0]) != 0 if masks else counted != padding
                total += int(np.count_nonzero(counted[:updates]))
            else:
                total += counted[:updates].size
    return total


def _tokens(x: Any) -> np.ndarray:
    if isinstance(x, Mapping):
        for name in NAMES:
            if name in x:
                return np.asarray(x[name])
    leaves = list(leaves_with_paths(x))
    whole = [(path, a) for path, a in leaves if np.issubdtype(np.asarray(a).dtype, np.integer)]
    whole = [(path, a) for path, a in whole if not any(name in path for name in MASKS)]
    if len(whole) != 1:
        kinds = ", ".join(f"{path or 'x'} ({np.asarray(a).dtype})" for path, a in leaves)
        raise DataError(
            "include_num_input_tokens_seen needs an input of tokens: one named "
            f"{', '.join(NAMES)}, or a single integer input. The inputs are: {kinds}. "
            "Set include_num_input_tokens_seen='no'."
        )
    return np.asarray(whole[0][1])
