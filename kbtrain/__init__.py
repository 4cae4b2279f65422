"""kbtrain: the Hugging Face ``Trainer`` on Keras 3, over PyTorch, TensorFlow or JAX.

    >>> from kbtrain import Trainer, TrainingArguments  # doctest: +SKIP

Names are imported on first use, so ``import kbtrain`` loads no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kbtrain import moved
from kbtrain.utils.packages import tensorflow_start

if TYPE_CHECKING:
    from kbtrain.callbacks.base import EarlyStoppingCallback as EarlyStoppingCallback
    from kbtrain.callbacks.base import TrainerCallback as TrainerCallback
    from kbtrain.callbacks.library.finetuning import FinetuningCallback as FinetuningCallback
    from kbtrain.callbacks.library.gradient_noise import GradientNoiseScale as GradientNoiseScale
    from kbtrain.callbacks.library.histograms import HistogramCallback as HistogramCallback
    from kbtrain.callbacks.library.profiler import ProfilerCallback as ProfilerCallback
    from kbtrain.callbacks.library.samples import SampleCallback as SampleCallback
    from kbtrain.callbacks.library.system_metrics import (
        SystemMetricsCallback as SystemMetricsCallback,
    )
    from kbtrain.callbacks.library.throughput import ThroughputCallback as ThroughputCallback
    from kbtrain.callbacks.library.weight_averaging import WeightAveraging as WeightAveraging
    from kbtrain.callbacks.state import TrainerControl as TrainerControl
    from kbtrain.callbacks.state import TrainerState as TrainerState
    from kbtrain.checkpoint.export import export as export
    from kbtrain.checkpoint.formats.adapters import save_adapters as save_adapters
    from kbtrain.checkpoint.load_weights import LoadReport as LoadReport
    from kbtrain.checkpoint.load_weights import load_adapters as load_adapters
    from kbtrain.checkpoint.load_weights import load_weights as load_weights
    from kbtrain.config.argument_parser import ArgumentParser as ArgumentParser
    from kbtrain.config.argument_parser import HfArgumentParser as HfArgumentParser
    from kbtrain.config.training_args import TrainingArguments as TrainingArguments
    from kbtrain.data import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
    from kbtrain.data import DataCollatorForPacking as DataCollatorForPacking
    from kbtrain.data import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
    from kbtrain.data import (
        DataCollatorForTokenClassification as DataCollatorForTokenClassification,
    )
    from kbtrain.data import DataCollatorWithPadding as DataCollatorWithPadding
    from kbtrain.data import TarShards as TarShards
    from kbtrain.data import default_collate as default_collate
    from kbtrain.data import default_data_collator as default_data_collator
    from kbtrain.display.callbacks import PrinterCallback as PrinterCallback
    from kbtrain.display.callbacks import ProgressCallback as ProgressCallback
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
    from kbtrain.errors import HubError as HubError
    from kbtrain.errors import KbtrainError as KbtrainError
    from kbtrain.errors import NonFiniteError as NonFiniteError
    from kbtrain.errors import OutputError as OutputError
    from kbtrain.errors import TrainingInterrupted as TrainingInterrupted
    from kbtrain.evaluation.gather import EvalPrediction as EvalPrediction
    from kbtrain.evaluation.results import EvalLoopOutput as EvalLoopOutput
    from kbtrain.evaluation.results import PredictionOutput as PredictionOutput
    from kbtrain.model.lora import enable_lora as enable_lora
    from kbtrain.model.lora import merge_lora as merge_lora
    from kbtrain.report.plots import plot_history as plot_history
    from kbtrain.trainer.trainer import Trainer as Trainer
    from kbtrain.training.fit import TrainOutput as TrainOutput
    from kbtrain.utils.rng import set_seed as set_seed

moved.install()
tensorflow_start.quiet()

_HOMES = {
    "callbacks.base": ("EarlyStoppingCallback", "TrainerCallback"),
    "callbacks.library.finetuning": ("FinetuningCallback",),
    "callbacks.library.gradient_noise": ("GradientNoiseScale",),
    "callbacks.library.histograms": ("HistogramCallback",),
    "callbacks.library.samples": ("SampleCallback",),
    "callbacks.library.weight_averaging": ("WeightAveraging",),
    "data": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForPacking",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorWithPadding",
        "TarShards",
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
        "HubError",
        "OutputError",
        "TrainingInterrupted",
    ),
    "evaluation.gather": ("EvalPrediction",),
    "evaluation.results": ("EvalLoopOutput", "PredictionOutput"),
    "report.plots": ("plot_history",),
    "training.fit": ("TrainOutput",),
    "config.argument_parser": ("ArgumentParser", "HfArgumentParser"),
    "callbacks.library.profiler": ("ProfilerCallback",),
    "callbacks.library.system_metrics": ("SystemMetricsCallback",),
    "callbacks.library.throughput": ("ThroughputCallback",),
    "display.callbacks": ("PrinterCallback", "ProgressCallback"),
    "utils.rng": ("set_seed",),
    "callbacks.state": ("TrainerControl", "TrainerState"),
    "trainer.trainer": ("Trainer",),
    "config.training_args": ("TrainingArguments",),
    "checkpoint.export": ("export",),
    "checkpoint.formats.adapters": ("save_adapters",),
    "checkpoint.load_weights": ("LoadReport", "load_adapters", "load_weights"),
    "model.lora": ("enable_lora", "merge_lora"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        if name.startswith("_"):
            raise AttributeError(f"module 'kbtrain' has no attribute {name!r}")
        reason = importlib.import_module("kbtrain.utils.packages.import_hints").import_hint(name)
        if reason:
            # `from kbtrain import name` would replace the message of an AttributeError.
            raise ImportError(f"kbtrain has no {name!r}. {reason}")
        raise AttributeError(f"module 'kbtrain' has no attribute {name!r}")
    # Under a launcher: JAX and TensorFlow must join the other processes before the first tensor.
    importlib.import_module("kbtrain.distributed").initialize(launched_only=True)
    value = getattr(importlib.import_module(f"kbtrain.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
