"""``TrainingArguments``: every setting of a run, as one immutable value."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any, Self

from kbtrain.config.fields import Fields
from kbtrain.config.process_properties import ProcessProperties
from kbtrain.config.serialization import Serializable
from kbtrain.config.validation import (
    SYNONYMS,
    check_consistency,
    derived_values,
    normalise,
    resolve_steps,
)


@dataclass(kw_only=True)
class TrainingArguments(ProcessProperties, Serializable, Fields):
    """The settings of a run: immutable, comparable and serializable as JSON.

    Names, defaults and meanings are those of ``transformers.TrainingArguments`` 5.x where the same
    setting exists; a name of 4.x raises an error that gives the new one. ``output_dir`` may be
    given by position, all other arguments are keywords. Values are checked on construction and
    stored in one normal form, so that equal settings compare equal; ``replace`` makes a changed
    copy. Construction touches no device, file or environment variable, except that a leading ``~``
    in a path is expanded to the home directory.

    A *step* is one update of the weights, never a micro-batch. Fields in steps also accept a ratio
    of all steps, above 0 and below 1.

    The fields are declared in ``kbtrain.config.fields``; ``python -m kbtrain args`` lists them.

    Raises:
        ConfigurationError: A name is unknown, a value has the wrong type or range, or two values
            contradict each other. The message names the field, the value and the remedy.

    Example:
        >>> args = TrainingArguments(learning_rate=3e-4, warmup_steps=0.1, max_steps=24)
        >>> args.get_warmup_steps(24)
        3
        >>> args.replace(learning_rate=1e-3).learning_rate
        0.001
        >>> TrainingArguments.from_dict(args.to_dict()) == args
        True

    Reference:
        `transformers.TrainingArguments
        <https://huggingface.co/docs/transformers/main_classes/trainer>`_
    """

<<<<<<< HEAD
=======
    # The annotations are the types that are stored and read; the constructor accepts more, as the
    # help texts say (paths, JSON strings, NumPy scalars, None for "the default").

    # Length and batches
    output_dir: str = _option(
        None,
        lambda value: kinds.path("trainer_output" if value is None else value),
        "Directory for checkpoints, state and metrics; created when first written to. A leading ~ "
        "is expanded; None means 'trainer_output'.",
        by_position=True,
    )
    num_train_epochs: float = _option(
        3.0,
        kinds.real(),
        "Passes over the training data, in epochs; a fraction ends within an epoch. Ignored when "
        "max_steps is set.",
    )
    max_steps: int = _option(
        -1,
        kinds.whole(1, or_exactly=-1),
        "Length of the run in update steps, instead of num_train_epochs; the data is repeated as "
        "often as needed. -1 means not set.",
    )
    steps_per_epoch: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Update steps that make an epoch; the next one goes on where it ended, and the data is "
        "read again as often as needed. None makes each pass over the data an epoch, and data "
        "without a length then needs max_steps.",
    )
    per_device_train_batch_size: int = _option(
        8,
        kinds.whole(1),
        "Training examples per device and micro-batch. An update sees this times devices times "
        "gradient_accumulation_steps examples.",
    )
    per_device_eval_batch_size: int = _option(
        8, kinds.whole(1), "Examples per device and batch in evaluation and prediction."
    )
    gradient_accumulation_steps: int = _option(
        1, kinds.whole(1), "Micro-batches whose gradients are combined into one update step."
    )
    auto_find_batch_size: bool = _option(
        False,
        kinds.flag,
        "When an update does not fit into memory, start again from the initial state with smaller "
        "micro-batches and more of them, so that an update has the same examples.",
    )

    # Optimizer
    optim: str = _option(
        "adamw",
        kinds.alias(kinds.text, _ADAMW),
        "Name of the optimizer, looked up among the installed ones. The reference's adamw_torch, "
        "adamw_torch_fused, adamw_torch_xla and adamw_torch_npu_fused mean adamw.",
    )
    optim_args: Options = _option(
        None,
        kinds.key_values,
        "More keyword arguments for the optimizer: a dict, a JSON object, or 'key=value,key=value' "
        "whose values are read as bool, number or text.",
        command_line=Mapping[str, Any],
    )
    optim_target_modules: Names | None = _option(
        None,
        kinds.optional(kinds.patterns),
        "Regular expressions, searched for in the paths of variables, for those that a low-rank "
        "optimizer (galore_adamw, apollo_adamw) projects; 'all-linear' or None for its default: "
        "all matrices apart from embeddings.",
        command_line=Sequence[str] | None,
    )
    learning_rate: float = _option(
        5e-5, kinds.real(0.0), "Peak learning rate, after warmup; per update step."
    )
    weight_decay: float = _option(
        0.0,
        kinds.real(0.0),
        "Decoupled weight decay, multiplied by the learning rate at each step; not applied to "
        "biases and normalisation layers.",
    )
    adam_beta1: float = _option(
        0.9, kinds.real(0.0, below=1.0), "Adam's decay rate of the mean of the gradients."
    )
    adam_beta2: float = _option(
        0.999, kinds.real(0.0, below=1.0), "Adam's decay rate of the mean of the squared gradients."
    )
    adam_epsilon: float = _option(
        1e-8, kinds.real(above=0.0), "Adam's term added to the denominator, against division by 0."
    )
    max_grad_norm: float = _option(
        1.0,
        kinds.real(0.0),
        "Largest global L2 norm of the gradients; longer ones are scaled down to it. 0 turns "
        "clipping off, the norm is still logged.",
    )
    ema: Options | None = _option(
        None,
        kinds.average,
        "Evaluate, export and choose the best of an exponential moving average of the weights: its "
        "decay (0.999), True, or a dict of options ('decay', 'warmup'). None for none. Training "
        "goes on from the weights themselves.",
        command_line=dict[str, Any] | float | bool | None,
    )
    parameter_groups: ListOfOptions = _option(
        None,
        kinds.list_of_options,
        "Other learning rates, decays or optimizers for some variables, the first match wins: a "
        "list of {'match': regular expression for the variable's path or type of layer, "
        "'lr_multiplier': ..., 'weight_decay': ..., 'optimizer': ...}.",
        command_line=Sequence[Mapping[str, Any]],
    )

    # Schedule
    lr_scheduler_type: str = _option(
        "linear",
        kinds.text,
        "Name of the learning rate schedule, looked up among the installed ones.",
    )
    lr_scheduler_kwargs: Options = _option(
        None,
        kinds.options,
        "More keyword arguments for the schedule: a dict or a JSON object in a string.",
        command_line=Mapping[str, Any],
    )
    warmup_steps: float = _option(
        0,
        kinds.steps,
        "Update steps of warmup from 0 to learning_rate; below 1 a ratio of all steps, rounded up.",
    )

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] = _option(
        "steps",
        kinds.choice("no", "steps", "epoch"),
        "When to log: never ('no'), every logging_steps ('steps') or after each epoch ('epoch').",
    )
    logging_steps: float = _option(
        500, kinds.steps, "Update steps between two logs; below 1 a ratio of all steps, rounded up."
    )
    logging_first_step: bool = _option(False, kinds.flag, "Also log the first update step.")
    disable_tqdm: bool | None = _option(
        None,
        kinds.optional(kinds.flag),
        "Show no progress bar, but the logs as lines on stderr. None shows a bar on a terminal and "
        "in a notebook, lines elsewhere, and nothing if log_level is above 'warning'.",
    )
    report_to: Names = _option(
        "none",
        kinds.trackers,
        "Trackers that receive the logs: names out of 'csv', 'json', 'mlflow', 'tensorboard', "
        "'trackio', 'wandb' and those that packages add, 'all' for the installed ones, or 'none'.",
        command_line=Sequence[str],
    )
    run_name: str | None = _option(
        None, kinds.optional(kinds.text), "Name of the run for trackers. None means unnamed."
    )
    project: str | None = _option(
        None,
        kinds.optional(kinds.text),
        "Project (MLflow: experiment) of the run for trackers. None means the tracker's own "
        "setting.",
    )

    log_level: Literal["passive", "debug", "info", "warning", "error", "critical"] = _option(
        "passive",
        kinds.choice("passive", "debug", "info", "warning", "error", "critical"),
        "What the logger 'kbtrain' lets through; 'passive' leaves it as the program has set it.",
    )
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = _option(
        "no",
        kinds.tokens_seen,
        "Count the tokens of the training: 'all' elements of the input, those that are "
        "'non_padding', or 'no'. Each log then has them, and the speed so far with its parts "
        "(data, compute, host). True means 'all', False 'no'.",
        command_line=Literal["no", "all", "non_padding"] | bool,
    )
    skip_memory_metrics: bool = _option(
        True,
        kinds.flag,
        "Leave memory out of the metrics of training, evaluation and prediction.",
    )

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] = _option(
        "no",
        kinds.choice("no", "steps", "epoch"),
        "When to evaluate: never ('no'), every eval_steps ('steps') or after each epoch ('epoch').",
    )
    eval_steps: float | None = _option(
        None,
        kinds.optional(kinds.steps),
        "Update steps between two evaluations; below 1 a ratio of all steps, rounded up. None "
        "means logging_steps (filled in when eval_strategy='steps').",
    )
    eval_delay: float = _option(
        0.0,
        kinds.real(0.0),
        "How long to wait before the first evaluation, in the unit of eval_strategy: update steps "
        "or epochs.",
    )
    eval_on_start: bool = _option(
        False, kinds.flag, "Evaluate before the first update step as well."
    )
    prediction_loss_only: bool = _option(
        False, kinds.flag, "Evaluate the loss alone: keep no predictions, compute no metrics."
    )
    include_for_metrics: Names = _option(
        (),
        kinds.names("inputs", "loss"),
        "What compute_metrics receives besides predictions and labels: a list of 'inputs', 'loss'.",
        command_line=Sequence[str],
    )
    batch_eval_metrics: bool = _option(
        False,
        kinds.flag,
        "Call compute_metrics(prediction, compute_result) for each batch, so that nothing is "
        "gathered; compute_result is True for the last one, whose result counts.",
    )
    eval_do_concat_batches: bool = _option(
        True,
        kinds.flag,
        "Put predictions and labels of all batches together; False keeps a list with those of "
        "each batch.",
    )
    eval_accumulation_steps: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Batches whose outputs may wait on the device before they are copied to the host. None "
        "means as many as run in one call: outputs of at most 4 MiB, or of one batch.",
    )
    eval_max_steps: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Batches of an evaluation set that are evaluated at most, the first ones. None means all; "
        "a prediction always has all.",
    )
    label_names: Names | None = _option(
        None,
        kinds.optional(kinds.keys),
        "Keys of a batch (a dict) that hold labels: several become a dict of labels. None means "
        "'labels', 'label' or 'label_ids', unless the model has an input of that name; an empty "
        "list that there are none, nor sample weights: all keys are inputs.",
        command_line=Sequence[str] | None,
    )
    predict_with_generate: bool = _option(
        False,
        kinds.flag,
        "What compute_metrics and predict get as predictions: what the model's method generate "
        "makes of each batch's inputs (True), or its outputs (False). The loss is that of the "
        "outputs in both cases.",
    )
    generation_max_length: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Argument max_length of the model's generate: tokens of prompt and answer together. None "
        "leaves it to the model.",
    )
    generation_kwargs: Options = _option(
        None,
        kinds.options,
        "More keyword arguments for the model's generate: a dict or a JSON object in a string.",
        command_line=Mapping[str, Any],
    )

    eval_minutes: float | None = _option(
        None,
        kinds.optional(kinds.real(above=0.0)),
        "Minutes between two evaluations, besides those of eval_strategy. None for no clock.",
    )

    # Checkpoints
    save_minutes: float | None = _option(
        None,
        kinds.optional(kinds.real(above=0.0)),
        "Minutes between two checkpoints, besides those of save_strategy. None for no clock.",
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = _option(
        "steps",
        kinds.choice("no", "steps", "epoch", "best"),
        "When to save a checkpoint: never ('no'), every save_steps ('steps'), after each epoch "
        "('epoch') or when an evaluation improved metric_for_best_model ('best').",
    )
    save_steps: float = _option(
        500,
        kinds.steps,
        "Update steps between two checkpoints; below 1 a ratio of all steps, rounded up.",
    )
    save_total_limit: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Most checkpoints to keep; older ones are deleted, the best one is not. None keeps all.",
    )
    save_only_model: bool = _option(
        False,
        kinds.flag,
        "Save the weights without optimizer, data position and random state; such a checkpoint "
        "cannot be resumed exactly.",
    )
    save_async: bool = _option(
        True,
        kinds.flag,
        "Write checkpoints in the background: training waits only while the state is copied to "
        "host memory (which is needed twice over). A save is waited for all the same where a "
        "callback listens to on_save, which is called once the checkpoint is complete.",
    )
    on_save_error: Literal["warn", "raise"] = _option(
        "warn",
        kinds.choice("warn", "raise"),
        "What to do when a checkpoint cannot be written (disk full, no permission, ...): go on "
        "and warn ('warn') or stop ('raise').",
    )
    enable_jit_checkpoint: bool = _option(
        True,
        kinds.flag,
        "On SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) finish the step, save (unless save_strategy='no') "
        "and leave with exit code 143, 138 or 130; a second SIGINT stops at once.",
    )
    max_time: float | None = _option(
        None,
        kinds.optional(kinds.duration),
        "Longest time of one call of fit, in seconds or as 'HH:MM:SS': before it is over the run "
        "saves (unless save_strategy='no') and fit returns. None means no limit.",
        command_line=float | str | None,
    )
    load_best_model_at_end: bool = _option(
        False,
        kinds.flag,
        "Load the weights with the best metric_for_best_model when training ends.",
    )
    metric_for_best_model: str | None = _option(
        None,
        kinds.optional(kinds.text),
        "Metric that decides which checkpoint is best, with or without the prefix 'eval_'. None "
        "means 'loss' where one is needed.",
    )
    greater_is_better: bool | None = _option(
        None,
        kinds.optional(kinds.flag),
        "Whether a higher metric_for_best_model is better. None means yes, unless the name ends "
        "in 'loss'.",
    )
    resume_from_checkpoint: PathOrTrue | None = _option(
        None,
        _resume,
        "Where training goes on: True for the newest intact checkpoint of output_dir, 'auto' for "
        "that or a fresh start if there is none, a path for that checkpoint, None for a fresh "
        "start.",
        command_line=bool | str | None,
    )
    ignore_data_skip: bool = _option(
        False,
        kinds.flag,
        "On resuming, begin the data anew instead of at the position where the run had stopped.",
    )
    restore_callback_states_from_checkpoint: bool = _option(
        True, kinds.flag, "On resuming, give callbacks the state they had at the checkpoint."
    )

    # Several processes or devices: what is right for one on one is accepted
    average_tokens_across_devices: bool = _option(
        True, kinds.flag, "Divide by the labels of all devices: with one device always so."
    )
    log_on_each_node: bool = _option(
        True, kinds.flag, "Log once on each machine: with one machine always so."
    )
    log_level_replica: Literal["passive", "debug", "info", "warning", "error", "critical"] = (
        _option(
            "warning",
            kinds.choice("passive", "debug", "info", "warning", "error", "critical"),
            "The log_level of all processes but the first: with one process of no effect.",
        )
    )
    save_on_each_node: bool = _option(
        False, kinds.flag, "Save once on each machine: with one machine always so."
    )
    parallelism_config: Nothing = _option(
        None,
        kinds.nothing,
        "Sizes of the dimensions of a mesh of devices; to come.",
        command_line=type(None),
    )
    fsdp: Nothing = _option(
        None,
        kinds.nothing,
        "Weights that are spread over devices; to come.",
        command_line=type(None),
    )

    # Switches of a script, which the Trainer does not look at
    do_train: bool = _option(False, kinds.flag, "For scripts: whether to train.")
    do_eval: bool = _option(
        False, kinds.flag, "For scripts: whether to evaluate; True if eval_strategy is not 'no'."
    )
    do_predict: bool = _option(False, kinds.flag, "For scripts: whether to predict.")

    # Data and seeds
    seed: int = _option(42, kinds.whole(0, kinds.MAX_SEED), "Seed of everything random in the run.")
    full_determinism: bool = _option(
        False,
        kinds.flag,
        "Use kernels that give the same result each time only; slower on GPUs, where some "
        "operations then raise an error. Holds during fit, evaluate and predict.",
    )
    data_seed: int | None = _option(
        None,
        kinds.optional(kinds.whole(0, kinds.MAX_SEED)),
        "Seed of the order of the training data. None means seed.",
    )
    dataloader_drop_last: bool = _option(
        False, kinds.flag, "Leave out the last batch of an epoch when it is not full."
    )
    remove_unused_columns: bool = _option(
        True,
        kinds.flag,
        "Leave out columns of a data set that a functional model does not take, after a "
        "data_collator has seen them.",
    )
    dataloader_num_workers: int = _option(
        0,
        kinds.whole(0),
        "Worker processes that make batches of data sets with __getitem__, or with a collator "
        "(extra 'grain'); 0 makes them in the training process. Arrays need none.",
    )
    dataloader_prefetch_factor: int | None = _option(
        None,
        kinds.optional(kinds.whole(1)),
        "Batches that each worker keeps ready; None means 2. Without workers, batches that a "
        "thread makes ahead; None means none (slow arrays are read ahead in any case). What such a "
        "thread draws from global random generators is not repeated by a resumed run.",
    )
    dataloader_pin_memory: bool = _option(
        True,
        kinds.flag,
        "Copy batches to a GPU from page-locked memory, so that the host does not wait (PyTorch; "
        "the other backends see to it themselves).",
    )
    dataloader_persistent_workers: bool = _option(
        False, kinds.flag, "Keep the worker processes of the training data from epoch to epoch."
    )
    dataloader_multiprocessing_context: Literal["spawn"] | None = _option(
        None,
        kinds.optional(kinds.choice("spawn")),
        "How worker processes are started: 'spawn' always, because a fork of a process with the "
        "threads of a framework can hang.",
    )
    train_sampling_strategy: Literal[
        "random", "sequential", "group_by_length", "batch_rebalance"
    ] = _option(
        "random",
        kinds.choice("random", "sequential", "group_by_length", "batch_rebalance"),
        "Order of the training data: shuffled anew each epoch ('random'), as given ('sequential'), "
        "shuffled with samples of similar length together ('group_by_length'), or shuffled with "
        "micro-batches of different sizes and about equal cost ('batch_rebalance').",
    )
    length_column_name: str = _option(
        "length",
        kinds.text,
        "Column that holds the length of each sample, in elements, for the sampling strategies "
        "that look at it. Without it the length of 'input_ids' counts.",
    )

    # Numerics and execution
    bf16: bool = _option(
        False, kinds.flag, "Compute in bfloat16 and keep the weights in float32 (mixed precision)."
    )
    fp16: bool = _option(
        False,
        kinds.flag,
        "Compute in float16 and keep the weights in float32, with a loss scale that adapts: an "
        "update whose gradients overflow is left out and the scale halved. Prefer bf16 where the "
        "device has it.",
    )
    bf16_full_eval: bool = _option(
        False,
        kinds.flag,
        "Evaluate and predict in bfloat16 outside of training, whatever it was trained in.",
    )
    fp16_full_eval: bool = _option(
        False,
        kinds.flag,
        "Evaluate and predict in float16 outside of training, whatever it was trained in.",
    )
    neftune_noise_alpha: float | None = _option(
        None,
        kinds.optional(kinds.real(above=0.0)),
        "Size of the noise (NEFTune) that is added to the outputs of Embedding layers in training: "
        "uniform within alpha / sqrt(length * width). None for none.",
    )
    label_smoothing_factor: float = _option(
        0.0,
        kinds.real(0.0, below=1.0),
        "Share of the uniform distribution in the labels of a cross-entropy over classes.",
    )
    on_nonfinite: Literal["raise", "skip", "ignore"] = _option(
        "raise",
        kinds.choice("raise", "skip", "ignore"),
        "What to do when loss or gradients are NaN or infinite: stop with an error before the "
        "weights are touched ('raise'), leave that update out ('skip') or apply it ('ignore').",
    )
    debug: Names = _option(
        (),
        kinds.debug_options,
        "['underflow_overflow'] names the first layer, or else the gradients, that were not finite "
        "in the update at which on_nonfinite='raise' stops. It is run again for that.",
        command_line=Sequence[str],
    )
    gradient_checkpointing: FlagOrNone = _option(
        None,
        kinds.optional(kinds.flag),
        "Save memory in training: run layers again in the backward pass in place of remembering "
        "what they computed. The numbers stay the same.",
        command_line=bool | None,
    )
    gradient_checkpointing_kwargs: Options | None = _option(
        None,
        kinds.optional(kinds.options),
        "Which layers gradient_checkpointing is for: 'layer_names', a list, or 'every_n_layers'. "
        "None means all of the outermost ones.",
        command_line=Mapping[str, Any] | None,
    )
    activation_checkpointing: FlagOrNone = _option(
        None,
        kinds.optional(kinds.flag),
        "Another name of gradient_checkpointing.",
        command_line=bool | None,
    )
    activation_checkpointing_kwargs: Options | None = _option(
        None,
        kinds.optional(kinds.options),
        "Another name of gradient_checkpointing_kwargs.",
        command_line=Mapping[str, Any] | None,
    )
    jit_compile: FlagOrAuto = _option(
        "auto",
        kinds.choice("auto", True, False),
        "Compile the training step: True, False, or 'auto' for what suits the backend.",
        command_line=bool | Literal["auto"],
    )
    steps_per_execution: CountOrAuto = _option(
        "auto",
        kinds.either("auto", kinds.whole(1)),
        "Updates that one call of the compiled step runs: at most this many, or 'auto' for as many "
        "as take a tenth of a second. Fewer where something is due or a callback listens to each "
        "step. The numbers do not depend on it.",
        command_line=int | Literal["auto"],
    )
    tf32: bool | None = _option(
        None,
        kinds.optional(kinds.flag),
        "Let products of float32 be computed in TensorFloat-32 on GPUs that have it: True, False, "
        "or None for the backend's own setting. Holds during fit, evaluate and predict.",
    )
    use_cpu: bool = _option(
        False, kinds.flag, "Use the CPU even where an accelerator is available."
    )
    devices: str | None = _option(
        None,
        kinds.device_names,
        "The device to use: 'cpu', 'gpu', 'gpu:1', 'tpu:0' or the number of a GPU. None means the "
        "backend's first. Several, as in 'gpu:0,gpu:1', divide each batch among them (JAX).",
    )

>>>>>>> df3d048 (JAX: one process trains on several devices, with the numbers of one)
    def settle(self) -> None:
        """Store every field in its normal form, derive missing values, check consistency.

        Raises:
            ConfigurationError: A value is invalid, or two contradict each other.
        """
        # object.__setattr__ because a subclass may be a frozen dataclass.
        for field in dataclasses.fields(self):
            # A subclass may redeclare a field with another default: its converter still applies.
            known = Fields.__dataclass_fields__.get(field.name, field)
            object.__setattr__(self, field.name, normalise(known, getattr(self, field.name)))
        for name, value in derived_values(self).items():
            object.__setattr__(self, name, value)
        check_consistency(self)

    @property
    def train_batch_size(self) -> int:
<<<<<<< HEAD
        """Training examples per micro-batch in this process, which uses one device."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Evaluation examples per batch in this process, which uses one device."""
        return self.per_device_eval_batch_size

    @property
    def chosen_device(self) -> str | None:
        """The device set by ``use_cpu`` or ``devices``; None leaves it to the backend."""
        return "cpu" if self.use_cpu else self.devices
=======
        """Training examples per micro-batch on all devices of this process."""
        return self.per_device_train_batch_size * self.device_count

    @property
    def eval_batch_size(self) -> int:
        """Evaluation examples per batch on all devices of this process."""
        return self.per_device_eval_batch_size * self.device_count

    @property
    def device_count(self) -> int:
        """Number of devices that this process drives."""
        return 1 if self.chosen_device is None else len(self.chosen_device.split(","))

    @property
    def chosen_device(self) -> str | None:
        """The device of `use_cpu` or `devices`, several with commas; None: the backend's."""
        return "cpu" if self.use_cpu and self.devices is None else self.devices
>>>>>>> df3d048 (JAX: one process trains on several devices, with the numbers of one)

    @property
    def full_eval_policy(self) -> str | None:
        """Dtype policy of evaluations outside of training; None means the training policy."""
        if self.bf16_full_eval:
            return "mixed_bfloat16"
        return "mixed_float16" if self.fp16_full_eval else None

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Number of warmup steps in a run of the given length.

        Args:
            num_training_steps: Total number of update steps.

        Returns:
            ``warmup_steps``; if that is a ratio, this share of ``num_training_steps``, rounded up.

        Raises:
            ConfigurationError: ``warmup_steps`` is a ratio and ``num_training_steps`` is below 1.
        """
        return resolve_steps(self.warmup_steps, num_training_steps)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new object.

        Derived values (``eval_steps``, ``metric_for_best_model``) keep their value, except that a
        new ``metric_for_best_model`` derives ``greater_is_better`` again.

        Args:
            **changes: Fields and their new values.

        Raises:
            ConfigurationError: As for a new object.
        """
        given = self.__dict__.get("_given", frozenset()) | changes.keys()
        if "metric_for_best_model" in changes:
            # The direction belongs to the metric: "loss" -> "accuracy" must not keep "lower".
            changes.setdefault("greater_is_better", None)
        for one, other in [*SYNONYMS, *(pair[::-1] for pair in SYNONYMS)]:
            if one in changes:
                changes.setdefault(other, None)
        changed = dataclasses.replace(self, **changes)
        changed._seal(given & changed.__dataclass_fields__.keys())
        return changed

    def to_sanitized_dict(self) -> dict[str, bool | int | float | str]:
        """``to_dict`` for trackers: with batch sizes, and everything but scalars as strings."""
        values = self.to_dict()
        values["train_batch_size"] = self.train_batch_size
        values["eval_batch_size"] = self.eval_batch_size
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in values.items()
        }


def _described_fields() -> str:
    """The ``Args:`` section of the docstring, from the help text of each field."""
    lines = []
    for field in dataclasses.fields(Fields):
        described = f"{field.name} (default {field.default!r}): {field.metadata['help']}"
        lines.append(textwrap.fill(described, 96, subsequent_indent="    "))
    return textwrap.indent("Args:\n" + textwrap.indent("\n".join(lines), "    "), "    ")


if TrainingArguments.__doc__ is not None:  # there is none under `python -OO`
    TrainingArguments.__doc__ = TrainingArguments.__doc__.replace(
        "    Raises:", f"{_described_fields()}\n\n    Raises:", 1
    )
