"""PyTorch: custom steps of a model, called as by Keras' trainer for PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch


def run_train_step(model: keras.Model, data: Any) -> Any:
    """Run one update; the step calls ``backward`` itself."""
    with torch.enable_grad():
        return model.train_step(data)


def try_train_step(model: keras.Model, data: Any) -> None:
    """Run the step only to create its variables."""
    with torch.enable_grad():
        model.train_step(data)
    model.zero_grad()


def reversible(
    fn: Callable[[], Any], variables: Sequence[keras.Variable]
) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``; return its result and ``undo_if(condition)``, which reverts its changes."""
    before = [v.value.detach().clone() for v in variables]
    result = fn()

    def undo_if(condition: Any) -> None:
        if condition.device.type == "cpu" and not condition:
            return
        for variable, old in zip(variables, before, strict=True):
            variable.assign(torch.where(condition, old, variable.value))

    return result, undo_if
