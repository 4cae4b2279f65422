"""kbtrain: the Hugging Face ``Trainer`` on Keras 3, over PyTorch, TensorFlow or JAX.

    >>> from kbtrain import Trainer, TrainingArguments  # doctest: +SKIP

Names are imported when they are first used, so ``import kbtrain`` loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbtrain.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from kbtrain.callbacks import TrainerCallback as TrainerCallback
    from kbtrain.data import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
    from kbtrain.data import DataCollatorForPacking as DataCollatorForPacking
    from kbtrain.data import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
    from kbtrain.data import (
        DataCollatorForTokenClassification as DataCollatorForTokenClassification,
    )
    from kbtrain.data import DataCollatorWithPadding as DataCollatorWithPadding
    from kbtrain.data import default_collate as default_collate
    from kbtrain.data import default_data_collator as default_data_collator
    from kbtrain.errors import CheckpointDamagedError as CheckpointDamagedError
    from kbtrain.errors import CheckpointError as CheckpointError
    from kbtrain.errors import CheckpointFormatError as CheckpointFormatError
    from kbtrain.errors import CheckpointMismatchError as CheckpointMismatchError
    from kbtrain.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from kbtrain.errors import CheckpointUnreadableError as CheckpointUnreadableError
    from kbtrain.errors import ConfigurationError as ConfigurationError
    from kbtrain.errors import DataError as DataError
    from kbtrain.errors import FolderInUseError as FolderInUseError
    from kbtrain.errors import FrozenArgumentsError as FrozenArgumentsError
    from kbtrain.errors import KbtrainError as KbtrainError
    from kbtrain.errors import NonFiniteError as NonFiniteError
    from kbtrain.errors import OutputError as OutputError
    from kbtrain.errors import TrainingInterrupted as TrainingInterrupted
    from kbtrain.evaluation import EvalLoopOutput as EvalLoopOutput
    from kbtrain.evaluation import EvalPrediction as EvalPrediction
    from kbtrain.evaluation import PredictionOutput as PredictionOutput
    from kbtrain.fitting import TrainOutput as TrainOutput
    from kbtrain.parser import ArgumentParser as ArgumentParser
    from kbtrain.parser import HfArgumentParser as HfArgumentParser
    from kbtrain.progress import PrinterCallback as PrinterCallback
    from kbtrain.progress import ProgressCallback as ProgressCallback
    from kbtrain.rng import set_seed as set_seed
    from kbtrain.state import TrainerControl as TrainerControl
    from kbtrain.state import TrainerState as TrainerState
    from kbtrain.trainer import Trainer as Trainer
    from kbtrain.training_args import TrainingArguments as TrainingArguments
    from kbtrain.warm_start import LoadReport as LoadReport
    from kbtrain.warm_start import load_weights as load_weights

_HOMES = {
    "callbacks": ("EarlyStoppingCallback", "TrainerCallback"),
    "data": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForPacking",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorWithPadding",
        "default_collate",
        "default_data_collator",
    ),
    "errors": (
        "CheckpointDamagedError",
        "CheckpointError",
        "CheckpointFormatError",
        "CheckpointMismatchError",
        "CheckpointNotFoundError",
        "CheckpointUnreadableError",
        "ConfigurationError",
        "DataError",
        "FolderInUseError",
        "FrozenArgumentsError",
        "KbtrainError",
        "NonFiniteError",
        "OutputError",
        "TrainingInterrupted",
    ),
    "evaluation": ("EvalLoopOutput", "EvalPrediction", "PredictionOutput"),
    "fitting": ("TrainOutput",),
    "parser": ("ArgumentParser", "HfArgumentParser"),
    "progress": ("PrinterCallback", "ProgressCallback"),
    "rng": ("set_seed",),
    "state": ("TrainerControl", "TrainerState"),
    "trainer": ("Trainer",),
    "training_args": ("TrainingArguments",),
    "warm_start": ("LoadReport", "load_weights"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        if name.startswith("_"):
            raise AttributeError(f"module 'kbtrain' has no attribute {name!r}")
        reason = importlib.import_module("kbtrain.import_hints").import_hint(name)
        if reason:
            # An AttributeError's text is lost where a name is imported from a module.
            raise ImportError(f"kbtrain has no {name!r}. {reason}")
        raise AttributeError(f"module 'kbtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kbtrain.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
