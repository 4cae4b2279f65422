"""Fields about the training itself: its length, batches, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kbtrain.config import converters
from kbtrain.config.construction import Immutable
from kbtrain.config.field_types import (
    ListOfOptions,
    Names,
    Options,
)
from kbtrain.config.fields.option import (
    EPOCH_LENGTH,
    HARMLESS,
    NEW_VALUE,
    RUN_LENGTH,
    option,
)

_ADAMW = dict.fromkeys(
    ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"), "adamw"
)


@dataclass(kw_only=True)
class TrainingFields(Immutable):
    """Length of the run, batches, optimizer and learning-rate schedule."""

    # The annotations are the stored types; the constructor accepts more, as the help texts say
    # (paths, JSON strings, NumPy scalars, None for the default).

    # Length and batches
    output_dir: str = option(
        None,
        lambda value: converters.path("trainer_output" if value is None else value),
        "Directory for checkpoints, state and metrics; created on the first write. A leading ~ is "
        "expanded; None means 'trainer_output'. Or an address (s3://bucket/run), where they are "
        "uploaded (requires the extra cloud).",
        by_position=True,
        on_resume=HARMLESS,
    )
    num_train_epochs: float = option(
        3.0,
        converters.real(),
        "Passes over the training data; a fraction ends within an epoch. Ignored when max_steps is "
        "set.",
        on_resume=RUN_LENGTH,
    )
    max_steps: int = option(
        -1,
        converters.whole(1, or_exactly=-1),
        "Length of the run in update steps, instead of num_train_epochs; the data is repeated as "
        "often as necessary. -1 means unset.",
        on_resume=RUN_LENGTH,
    )
    steps_per_epoch: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Update steps per epoch; the next epoch continues in the data where the last one ended, "
        "and the data is repeated as often as necessary. None means that an epoch is a pass over "
        "the data, and data without a length then needs max_steps.",
        on_resume=EPOCH_LENGTH,
    )
    per_device_train_batch_size: int = option(
        8,
        converters.whole(1),
        "Training examples per device and micro-batch. An update processes this number times the "
        "number of devices times gradient_accumulation_steps.",
        on_resume="the position in the data is converted by samples",
    )
    per_device_eval_batch_size: int = option(
        8,
        converters.whole(1),
        "Examples per device and batch in evaluation and prediction.",
        on_resume=HARMLESS,
    )
    gradient_accumulation_steps: int = option(
        1,
        converters.whole(1),
        "Micro-batches whose gradients are combined into one update step.",
        on_resume=EPOCH_LENGTH,
    )
    auto_find_batch_size: bool = option(
        False,
        converters.flag,
        "If an update does not fit into memory, restart from the initial state with smaller and "
        "more micro-batches, so that an update has the same examples.",
        on_resume=HARMLESS,
    )

    # Optimizer
    optim: str = option(
        "adamw",
        converters.alias(converters.text, _ADAMW),
        "Name of an installed optimizer. adamw_torch, adamw_torch_fused, adamw_torch_xla and "
        "adamw_torch_npu_fused of Transformers mean adamw.",
        on_resume=NEW_VALUE,
    )
    optim_args: Options = option(
        None,
        converters.key_values,
        "Additional keyword arguments of the optimizer: a dict, a JSON object, or "
        "'key=value,key=value' with values that are parsed as bool, number or string.",
        command_line=Mapping[str, Any],
        on_resume=NEW_VALUE,
    )
    optim_target_modules: Names | None = option(
        None,
        converters.optional(converters.patterns),
        "Regular expressions that match the paths of the variables which a low-rank optimizer "
        "(galore_adamw, apollo_adamw) projects; 'all-linear' or None for its default: all matrices "
        "except embeddings.",
        command_line=Sequence[str] | None,
        on_resume=NEW_VALUE,
    )
    learning_rate: float = option(
        5e-5,
        converters.real(0.0),
        "Peak learning rate, reached after warmup.",
        on_resume=NEW_VALUE,
    )
    weight_decay: float = option(
        0.0,
        converters.real(0.0),
        "Decoupled weight decay, multiplied by the learning rate at each step; not applied to "
        "biases and normalization layers.",
        on_resume=NEW_VALUE,
    )
    adam_beta1: float = option(
        0.9,
        converters.real(0.0, below=1.0),
        "Adam's decay rate of the first moment (mean of the gradients).",
        on_resume=NEW_VALUE,
    )
    adam_beta2: float = option(
        0.999,
        converters.real(0.0, below=1.0),
        "Adam's decay rate of the second moment (mean of the squared gradients).",
        on_resume=NEW_VALUE,
    )
    adam_epsilon: float = option(
        1e-8,
        converters.real(above=0.0),
        "Adam's term that is added to the denominator for numerical stability.",
        on_resume=NEW_VALUE,
    )
    max_grad_norm: float = option(
        1.0,
        converters.real(0.0),
        "Maximum global L2 norm of the gradients; a larger one is scaled down to it. 0 turns "
        "clipping off; the norm is logged in any case.",
        on_resume=NEW_VALUE,
    )
    ema: Options | None = option(
        None,
        converters.average,
        "Evaluate, export and select the best model with an exponential moving average of the "
        "weights: its decay (0.999), True, or a dict of options ('decay', 'warmup'). None means no "
        "average. Training itself uses the weights without averaging.",
        command_line=dict[str, Any] | float | bool | None,
        on_resume=NEW_VALUE,
    )
    parameter_groups: ListOfOptions = option(
        None,
        converters.list_of_options,
        "Learning rates, decays or optimizers of particular variables; the first match wins. A "
        "list of {'match': regular expression for the variable's path or the type of its layer, "
        "'lr_multiplier': ..., 'weight_decay': ..., 'optimizer': ...}.",
        command_line=Sequence[Mapping[str, Any]],
        on_resume=NEW_VALUE,
    )

    # Schedule
    lr_scheduler_type: str = option(
        "linear",
        converters.text,
        "Name of an installed learning-rate schedule.",
        on_resume=NEW_VALUE,
    )
    lr_scheduler_kwargs: Options = option(
        None,
        converters.options,
        "Additional keyword arguments of the schedule: a dict or a JSON object as a string.",
        command_line=Mapping[str, Any],
        on_resume=NEW_VALUE,
    )
    warmup_steps: float = option(
        0,
        converters.steps,
        "Update steps of warmup from 0 to learning_rate; below 1, a ratio of all steps, rounded "
        "up.",
        on_resume=NEW_VALUE,
    )
