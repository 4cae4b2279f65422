"""Names of the reference's Trainer that ``Trainer`` does not have: what to write instead."""

from __future__ import annotations

import inspect
from typing import Any, Self

from kbtrain.errors import ConfigurationError

PARAMETERS: dict[str, str] = {
    "tokenizer": "Write processing_class=..., its name since version 5.",
    "optimizer_cls_and_kwargs": "Register the class under the entry points kbtrain.optimizers and "
    "write optim=..., optim_args=..., or override create_optimizer.",
    "optimizer": "Write optimizers=(optimizer, schedule), of which either may be None.",
    "prediction_loss_only": "It is a field of TrainingArguments.",
    "tb_writer": "Write report_to=['tensorboard'] in TrainingArguments.",
}
"""Parameters of the constructor: the reference's own, and what users of 4.x and Keras may try."""


class KnownParameters:
    """Explains the reference's parameters before ``__init__`` would fail on them with a TypeError.

    A subclass of the Trainer may well take one of these names itself.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse what ``__init__`` does not take and a user of the reference would give."""
        strangers = [n for n in kwargs if n in PARAMETERS]
        taken = inspect.signature(cls.__init__).parameters if strangers else {}
        for name in strangers:
            if name not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
                raise ConfigurationError(
                    f"{cls.__name__} has no parameter {name!r}. {PARAMETERS[name]}"
                )
        return super().__new__(cls)
