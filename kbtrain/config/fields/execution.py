"""Fields about how a run is executed: processes, data loading, seeds and numerics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kbtrain.config import converters, sharding
from kbtrain.config.construction import Immutable
from kbtrain.config.field_types import (
    CountOrAuto,
    FlagOrAuto,
    FlagOrNone,
    Names,
    Options,
)
from kbtrain.config.fields.option import (
    DATA_ORDER,
    EPOCH_LENGTH,
    EVALUATION_PRECISION,
    HARMLESS,
    NEW_VALUE,
    ROUNDING,
    option,
)


@dataclass(kw_only=True)
class ExecutionFields(Immutable):
    """Processes, scripts, data loading, seeds, numerics and devices."""

    # Several processes or devices: values that suit one process on one device are accepted
    average_tokens_across_devices: bool = option(
        True,
        converters.flag,
        "Divide the loss by the labels of all devices; no effect with one device.",
        on_resume=HARMLESS,
    )
    split_batches: bool = option(
        False,
        converters.flag,
        "per_device_train_batch_size and per_device_eval_batch_size are those of all devices "
        "together, which share each batch, so that a run has the same batches on any number of "
        "them.",
        on_resume="the position in the data is converted by samples",
    )
    log_on_each_node: bool = option(
        True,
        converters.flag,
        "Log once on each machine; no effect with one machine.",
        on_resume=HARMLESS,
    )
    log_level_replica: Literal["passive", "debug", "info", "warning", "error", "critical"] = option(
        "warning",
        converters.choice("passive", "debug", "info", "warning", "error", "critical"),
        "The log_level of all processes except the first; no effect with one process.",
        on_resume=HARMLESS,
    )
    save_on_each_node: bool = option(
        False,
        converters.flag,
        "Save once on each machine; no effect with one machine.",
        on_resume=HARMLESS,
    )
    fsdp: Literal["full_shard", "shard_grad_op"] | None = option(
        None,
        sharding.fsdp,
        "Divide the state among the devices: weights, gradients and the optimizer's state (True or "
        "'full_shard', JAX), or all but the weights ('shard_grad_op'). None: each has all of it.",
        command_line=bool | str | None,
        on_resume=ROUNDING,
    )
    fsdp_config: Options | None = option(
        None,
        converters.optional(sharding.fsdp_config),
        "Which variables are divided: 'min_num_params', elements from which one is (1024), and "
        "'layouts', from a pattern of paths to the axis of the mesh for each dimension, as in "
        "{'mlp/kernel': [None, 'tensor']}.",
        command_line=Mapping[str, Any] | None,
        on_resume=ROUNDING,
    )
    parallelism_config: Options | None = option(
        None,
        sharding.parallelism_config,
        "The mesh of all devices, as in {'data': 2, 'fsdp': 2, 'tensor': 2} (JAX): batches are "
        "divided along data and fsdp, state along fsdp and tensor.",
        command_line=Mapping[str, Any] | None,
        on_resume=ROUNDING,
    )

    # Flags for scripts, which the Trainer ignores
    do_train: bool = option(
        False,
        converters.flag,
        "For scripts: whether to train.",
        on_resume=HARMLESS,
    )
    do_eval: bool = option(
        False,
        converters.flag,
        "For scripts: whether to evaluate; True if eval_strategy is not 'no'.",
        on_resume=HARMLESS,
    )
    do_predict: bool = option(
        False,
        converters.flag,
        "For scripts: whether to predict.",
        on_resume=HARMLESS,
    )

    # Data and seeds
    seed: int = option(
        42,
        converters.whole(0, converters.MAX_SEED),
        "Seed of all random numbers in the run.",
        on_resume="the random state is restored, but the data order may differ",
    )
    full_determinism: bool = option(
        False,
        converters.flag,
        "Use deterministic kernels only; slower on GPUs, where some operations then raise an "
        "error. Applies during fit, evaluate and predict.",
        on_resume=ROUNDING,
    )
    data_seed: int | None = option(
        None,
        converters.optional(converters.whole(0, converters.MAX_SEED)),
        "Seed of the order of the training data. None means seed.",
        on_resume=DATA_ORDER,
    )
    dataloader_drop_last: bool = option(
        False,
        converters.flag,
        "Drop the last batch of an epoch if it is incomplete.",
        on_resume=EPOCH_LENGTH,
    )
    remove_unused_columns: bool = option(
        True,
        converters.flag,
        "Remove columns of a data set that a functional model has no input for, after the "
        "data_collator has been applied.",
        on_resume="the model may get other columns of the data",
    )
    dataloader_num_workers: int = option(
        0,
        converters.whole(0),
        "Worker processes that load batches of data sets with __getitem__, or with a collator "
        "(extra 'grain'); 0 loads them in the training process. Arrays need none.",
        on_resume="random augmentation draws other numbers with workers than without",
    )
    dataloader_prefetch_factor: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Batches that each worker prefetches; None means 2. Without workers, batches that a thread "
        "prefetches; None means none (slow arrays are prefetched in any case). Random numbers that "
        "such a thread draws from global generators are not reproduced by a resumed run.",
        on_resume=HARMLESS,
    )
    dataloader_pin_memory: bool = option(
        True,
        converters.flag,
        "Copy batches to a GPU from pinned memory, so that the host does not wait (PyTorch; the "
        "other backends do so themselves).",
        on_resume=HARMLESS,
    )
    dataloader_persistent_workers: bool = option(
        False,
        converters.flag,
        "Keep the worker processes of the training data alive between epochs.",
        on_resume=HARMLESS,
    )
    dataloader_multiprocessing_context: Literal["spawn"] | None = option(
        None,
        converters.optional(converters.choice("spawn")),
        "How worker processes are started: always 'spawn', because forking a process with the "
        "threads of a framework can deadlock.",
        on_resume=HARMLESS,
    )
    train_sampling_strategy: Literal[
        "random", "sequential", "group_by_length", "batch_rebalance"
    ] = option(
        "random",
        converters.choice("random", "sequential", "group_by_length", "batch_rebalance"),
        "Order of the training data: reshuffled each epoch ('random'), as given ('sequential'), "
        "shuffled with samples of similar length grouped ('group_by_length'), or shuffled with "
        "micro-batches of different sizes and about equal cost ('batch_rebalance').",
        on_resume=DATA_ORDER,
    )
    length_column_name: str = option(
        "length",
        converters.text,
        "Column with the length of each sample, in elements, for the length-based sampling "
        "strategies. Without it, the length of 'input_ids' is used.",
        on_resume=DATA_ORDER,
    )

    # Numerics and execution
    bf16: bool = option(
        False,
        converters.flag,
        "Compute in bfloat16 and keep the weights in float32 (mixed precision).",
        on_resume=ROUNDING,
    )
    fp16: bool = option(
        False,
        converters.flag,
        "Compute in float16 and keep the weights in float32, with dynamic loss scaling: an update "
        "whose gradients overflow is skipped and the scale is halved. Prefer bf16 where the device "
        "supports it.",
        on_resume=ROUNDING,
    )
    bf16_full_eval: bool = option(
        False,
        converters.flag,
        "Evaluate and predict in bfloat16 outside of training, whatever the training precision.",
        on_resume=EVALUATION_PRECISION,
    )
    fp16_full_eval: bool = option(
        False,
        converters.flag,
        "Evaluate and predict in float16 outside of training, whatever the training precision.",
        on_resume=EVALUATION_PRECISION,
    )
    neftune_noise_alpha: float | None = option(
        None,
        converters.optional(converters.real(above=0.0)),
        "Magnitude of the NEFTune noise that is added to the outputs of Embedding layers in "
        "training: uniform within alpha / sqrt(length * width). None means no noise.",
        on_resume=NEW_VALUE,
    )
    label_smoothing_factor: float = option(
        0.0,
        converters.real(0.0, below=1.0),
        "Weight of the uniform distribution in the labels of a categorical cross-entropy.",
        on_resume=NEW_VALUE,
    )
    on_nonfinite: Literal["raise", "skip", "ignore"] = option(
        "raise",
        converters.choice("raise", "skip", "ignore"),
        "What to do when the loss or gradients are NaN or infinite: raise an error before the "
        "weights are changed ('raise'), skip the update ('skip') or apply it ('ignore').",
        on_resume="an update that is not finite is dealt with in the new way",
    )
    debug: Names = option(
        (),
        converters.debug_options,
        "['underflow_overflow'] reports the first layer, or else the gradients, with non-finite "
        "values in the update at which on_nonfinite='raise' stops, by running that update again. "
        "['collectives'] compares what several processes are about to exchange, before each "
        "exchange: slow, and an error names the first difference.",
        command_line=Sequence[str],
        on_resume=HARMLESS,
    )
    gradient_checkpointing: FlagOrNone = option(
        None,
        converters.optional(converters.flag),
        "Save memory in training: recompute layers in the backward pass instead of storing their "
        "activations. The results are the same.",
        command_line=bool | None,
        on_resume=ROUNDING,
    )
    gradient_checkpointing_kwargs: Options | None = option(
        None,
        converters.optional(converters.options),
        "Which layers gradient_checkpointing applies to: 'layer_names', a list, or "
        "'every_n_layers'. None means all top-level layers.",
        command_line=Mapping[str, Any] | None,
        on_resume=ROUNDING,
    )
    activation_checkpointing: FlagOrNone = option(
        None,
        converters.optional(converters.flag),
        "Alias of gradient_checkpointing.",
        command_line=bool | None,
        on_resume=HARMLESS,
    )
    activation_checkpointing_kwargs: Options | None = option(
        None,
        converters.optional(converters.options),
        "Alias of gradient_checkpointing_kwargs.",
        command_line=Mapping[str, Any] | None,
        on_resume=HARMLESS,
    )
    jit_compile: FlagOrAuto = option(
        "auto",
        converters.choice("auto", True, False),
        "Compile the training step: True, False, or 'auto' for the best choice on the backend.",
        command_line=bool | Literal["auto"],
        on_resume=ROUNDING,
    )
    cuda_graphs: FlagOrAuto = option(
        "auto",
        converters.choice("auto", True, False),
        "On PyTorch and a GPU of NVIDIA's, run a captured step as a CUDA graph: 'auto' where the "
        "step is suitable, its memory fits and it computes the same; True the same, with a warning "
        "where there is none; False never.",
        command_line=bool | Literal["auto"],
        on_resume=HARMLESS,
    )
    steps_per_execution: CountOrAuto = option(
        "auto",
        converters.either("auto", converters.whole(1)),
        "Maximum number of updates per call of the compiled step, or 'auto' for as many as take a "
        "tenth of a second. A call runs fewer if an action is due or a callback listens to each "
        "step. The results do not depend on it.",
        command_line=int | Literal["auto"],
        on_resume=HARMLESS,
    )
    tf32: bool | None = option(
        None,
        converters.optional(converters.flag),
        "Compute float32 matrix products in TensorFloat-32 on GPUs that support it: True, False, "
        "or None for the framework's own setting: on such a GPU convolutions use it by default, "
        "and products do on TensorFlow and JAX, not on PyTorch. Applies during fit, evaluate and "
        "predict.",
        on_resume=ROUNDING,
    )
    use_cpu: bool = option(
        False,
        converters.flag,
        "Use the CPU even if an accelerator is available.",
        on_resume=ROUNDING,
    )
    devices: str | None = option(
        None,
        converters.device_names,
        "The device to use: 'cpu', 'gpu', 'gpu:1', 'tpu:0' or the index of a GPU. None means the "
        "backend's default. Several, as in 'gpu:0,gpu:1', divide each batch among them (JAX).",
        on_resume=ROUNDING,
    )
