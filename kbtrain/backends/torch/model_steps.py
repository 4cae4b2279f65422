"""PyTorch: steps that a model brings, called as Keras' trainer for PyTorch calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch


def run_train_step(model: keras.Model, data: Any) -> Any:
    """One update; it calls ``backward`` itself."""
    with torch.enable_grad():
        return model.train_step(data)


def try_train_step(model: keras.Model, data: Any) -> None:
    """Run the step for the variables it creates."""
    with torch.enable_grad():
        model.train_step(data)
    model.zero_grad()


def reversible(
    fn: Callable[[], Any], variables: Sequence[keras.Variable]
) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``; return its result, and ``undo_if(condition)``, which takes its changes back."""
    before = [v.value.detach().clone() for v in variables]
    result = fn()

    def undo_if(condition: Any) -> None:
        if condition.device.type == "cpu" and not condition:
            return
        for variable, old in zip(variables, before, strict=True):
            variable.assign(torch.where(condition, old, variable.value))

    return result, undo_if
