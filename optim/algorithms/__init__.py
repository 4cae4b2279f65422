"""The optimizers, one file an algorithm."""

from __future__ import annotations

import importlib
import pkgutil

import keras


def optimizer_classes() -> dict[str, type[keras.optimizers.Optimizer]]:
    """The optimizers of the modules in this folder, all of which are imported.

    Returns:
        Name of a class -> the class, for every one that is registered for serialization.
    """
    found: dict[str, type[keras.optimizers.Optimizer]] = {}
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if not isinstance(value, type) or value.__module__ != module.__name__:
                continue
            is_optimizer = issubclass(value, keras.optimizers.Optimizer)
            if is_optimizer and keras.saving.get_registered_object(f"optim>{name}") is value:
                found[name] = value
    return found
