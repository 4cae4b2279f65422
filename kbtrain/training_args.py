"""The place of `TrainingArguments` in release 0.1, kept for one release.

``from kbtrain import TrainingArguments`` is the way to import it.
"""

from __future__ import annotations

import warnings

from kbtrain.config.training_args import TrainingArguments

__all__ = ["TrainingArguments"]

warnings.warn(
    "kbtrain.training_args will be removed in the next release: "
    "use `from kbtrain import TrainingArguments`.",
    DeprecationWarning,
    stacklevel=2,
)
