"""Module paths of release 0.1, which keep working for one release with a `DeprecationWarning`.

``import optim.adamw`` and ``from optim.optimizer import Optimizer`` work once this package is
imported, which both statements do first. Files written by 0.1 do not need the old paths: Keras
finds a class by its registered name (``optim>AdamW``).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

_ALGORITHMS = (
    *("adafactor", "adagrad", "adam", "adamw", "adan", "ademamix", "apollo", "ema", "galore"),
    *("grokadamw", "lamb", "lion", "low_rank", "muon", "nadam", "radam", "rmsprop"),
    *("schedule_free", "sgd", "soap", "stable_adamw"),
)

MOVED = {
    **{name: f"algorithms.{name}" for name in _ALGORITHMS},
    "adamw_8bit": "algorithms.eight_bit",
    "ademamix_8bit": "algorithms.eight_bit",
    "lion_8bit": "algorithms.eight_bit",
    "rmsprop_8bit": "algorithms.eight_bit",
    "averaging": "core.averaging",
    "checks": "core.checks",
    "codes": "kernels.eight_bit_codes",
    "common": "core.arguments",
    "cosine": "schedules.cosine",
    "decay": "core.weight_decay",
    "eight_bit": "core.eight_bit",
    "evaluation_weights": "core.evaluation_weights",
    "feed_metric": "schedules.keras_callback",
    "grouped": "core.grouping",
    "metric_schedule": "schedules.metric_driven",
    "moments": "core.moments",
    "optimizer": "core.optimizer",
    "order": "kernels.inplace_order",
    "parameter_groups": "core.parameter_groups",
    "plateau": "schedules.plateau",
    "plotting": "schedules.plotting",
    "precision": "core.precision",
    "refusals": "unsupported",
    "rules": "core.rule",
    "warmup_stable_decay": "schedules.warmup_stable_decay",
    "kernels.jax_order": "kernels.jax.inplace_order",
    "kernels.tensorflow_order": "kernels.tensorflow.inplace_order",
    "kernels.torch_adafactor": "kernels.torch.adafactor",
    "kernels.torch_calls": "kernels.torch.codegen",
    "kernels.torch_eight_bit": "kernels.torch.eight_bit",
    "kernels.torch_elementwise": "kernels.torch.elementwise",
    "kernels.torch_operation": "kernels.torch.custom_op",
    "kernels.torch_pieces": "kernels.torch.tiles",
}
"""Old module -> where its contents are now, both without the ``optim.`` in front.

``optim.schedules`` was a module and is a package: it exports the classes that the module had.
"""


class MovedModule(ModuleType):
    """Stands at the old path of a module and takes its attributes from the new one.

    Args:
        old: The old module path.
        new: The new one.
    """

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to `{new}`.")
        self._new = new

    def __getattr__(self, name: str) -> Any:
        # Tools that go through `sys.modules` ask every module for such names.
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(self._new), name)
        warnings.warn(
            f"{self.__name__} has moved to {self._new}, and the old path will be removed in the "
            f"next release. What is public is imported from optim itself.",
            DeprecationWarning,
            stacklevel=2,
        )
        return value


def register_moved() -> None:
    """Make the old module paths importable; nothing is imported for it."""
    package = sys.modules["optim"]
    for old, new in MOVED.items():
        module = MovedModule(f"optim.{old}", f"optim.{new}")
        sys.modules[module.__name__] = module
        if "." not in old:  # otherwise the import system finds it in `sys.modules`
            setattr(package, old, module)
