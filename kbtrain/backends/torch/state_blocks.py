"""PyTorch: variables whose values are divided among several processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import keras
import numpy as np
import torch

from kbtrain.backends.torch.device import host_view
from kbtrain.errors import ConfigurationError


def check_model(model: keras.Model) -> None:
    """Check that the variables hold what the model computes with.

    Raises:
        ConfigurationError: ``fully_shard`` has replaced parameters, which changes nothing of the
            variables that Keras' layers use.
    """
    if "torch.distributed.tensor" not in sys.modules:  # it takes a while to import
        return
    from torch.distributed.tensor import DTensor

    divided = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if divided is not None:
        raise ConfigurationError(
            f"The parameter {divided!r} of the model is a DTensor, as torch's fully_shard makes "
            "them. Keras' layers go on with their whole variables, so it would be neither divided "
            "nor trained right. Pass the model as it was, and fsdp='shard_grad_op' to divide "
            "gradients and the optimizer's state, or use the backend jax."
        )


def whole_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable on the host, where it is whole."""
    return np.array(host_view(variable.value))


def checksums(variables: Sequence[keras.Variable]) -> list[int | None]:
    """A number for each variable, the sum of its bits as integers."""
    if not variables:
        return []
    found: list[int | None] = torch.stack([_sum_of_bits(v.value) for v in variables]).tolist()
    return found


def _sum_of_bits(value: torch.Tensor) -> torch.Tensor:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().contiguous().reshape(-1).view(bits).sum(dtype=torch.int64)
