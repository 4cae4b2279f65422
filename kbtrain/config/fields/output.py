"""Fields about what a run reports and keeps: logs, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kbtrain.config import converters
from kbtrain.config.construction import Immutable
from kbtrain.config.field_types import (
    Names,
    Options,
    PathOrTrue,
)
from kbtrain.config.fields.option import (
    BEST_METRIC,
    EVALUATION_STEPS,
    HARMLESS,
    LOG_STEPS,
    NEW_VALUE,
    SAVE_STEPS,
    option,
)


def _resume(value: Any) -> str | Literal[True] | None:
    """True, a path (such as "auto") or None; False means None."""
    if value is None or value is False:
        return None
    if value is True or value == "True":  # a string, from a command line
        return True
    try:
        return converters.path(value)
    except converters.InvalidValue:
        raise converters.InvalidValue("True, 'auto', a path that is not empty, or None") from None


@dataclass(kw_only=True)
class OutputFields(Immutable):
    """Logging, evaluation and checkpoints."""

    # Logging
    logging_strategy: Literal["no", "steps", "epoch"] = option(
        "steps",
        converters.choice("no", "steps", "epoch"),
        "When to log: never ('no'), every logging_steps ('steps') or after each epoch ('epoch').",
        on_resume=LOG_STEPS,
    )
    logging_steps: float = option(
        500,
        converters.steps,
        "Update steps between two logs; below 1, a ratio of all steps, rounded up.",
        on_resume=LOG_STEPS,
    )
    logging_first_step: bool = option(
        False,
        converters.flag,
        "Also log the first update step.",
        on_resume=HARMLESS,
    )
    disable_tqdm: bool | None = option(
        None,
        converters.optional(converters.flag),
        "Print the logs as lines on stderr instead of a progress bar. None shows a bar on a "
        "terminal and in a notebook, lines elsewhere, and nothing if log_level is above 'warning'.",
        on_resume=HARMLESS,
    )
    report_to: Names = option(
        "none",
        converters.trackers,
        "Trackers that receive the logs: names from 'comet_ml', 'csv', 'html', 'json', 'mlflow', "
        "'swanlab', 'tensorboard', 'trackio', 'wandb' and those that other packages add, 'all' "
        "installed ones, or 'none'.",
        command_line=Sequence[str],
        on_resume=HARMLESS,
    )
    run_name: str | None = option(
        None,
        converters.optional(converters.text),
        "Name of the run for trackers. None means unnamed.",
        on_resume=HARMLESS,
    )
    project: str | None = option(
        None,
        converters.optional(converters.text),
        "Project (MLflow: experiment) of the run for trackers. None means the tracker's own "
        "setting.",
        on_resume=HARMLESS,
    )

    log_level: Literal["passive", "debug", "info", "warning", "error", "critical"] = option(
        "passive",
        converters.choice("passive", "debug", "info", "warning", "error", "critical"),
        "Level of the logger 'kbtrain'; 'passive' leaves it as the program has set it.",
        on_resume=HARMLESS,
    )
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = option(
        "no",
        converters.tokens_seen,
        "Count the training tokens: 'all' elements of the input, those that are 'non_padding', or "
        "'no'. Each log then has the count and the average speed, with its breakdown (data, "
        "compute, host). True means 'all', False 'no'.",
        command_line=Literal["no", "all", "non_padding"] | bool,
        on_resume=HARMLESS,
    )
    skip_memory_metrics: bool = option(
        True,
        converters.flag,
        "Do not add memory usage to the metrics of training, evaluation and prediction.",
        on_resume=HARMLESS,
    )

    profile: bool = option(
        False,
        converters.flag,
        "Record updates 11 to 20 of this call of fit with the framework's profiler: a trace in "
        "output_dir/profile, and the ten slowest operations in the log. ProfilerCallback takes "
        "other updates.",
        on_resume=HARMLESS,
    )

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no",
        converters.choice("no", "steps", "epoch"),
        "When to evaluate: never ('no'), every eval_steps ('steps') or after each epoch ('epoch').",
        on_resume=EVALUATION_STEPS,
    )
    eval_steps: float | None = option(
        None,
        converters.optional(converters.steps),
        "Update steps between two evaluations; below 1, a ratio of all steps, rounded up. None "
        "means logging_steps (if eval_strategy='steps').",
        on_resume=EVALUATION_STEPS,
    )
    eval_delay: float = option(
        0.0,
        converters.real(0.0),
        "Delay of the first evaluation, in the unit of eval_strategy: update steps or epochs.",
        on_resume=EVALUATION_STEPS,
    )
    eval_on_start: bool = option(
        False,
        converters.flag,
        "Also evaluate before the first update step.",
        on_resume=HARMLESS,
    )
    prediction_loss_only: bool = option(
        False,
        converters.flag,
        "Evaluate only the loss: keep no predictions, compute no metrics.",
        on_resume=HARMLESS,
    )
    include_for_metrics: Names = option(
        (),
        converters.names("inputs", "loss"),
        "What compute_metrics receives besides predictions and labels: a list of 'inputs', 'loss'.",
        command_line=Sequence[str],
        on_resume=HARMLESS,
    )
    batch_eval_metrics: bool = option(
        False,
        converters.flag,
        "Call compute_metrics(prediction, compute_result) for each batch, so that nothing is "
        "gathered; compute_result is True for the last batch, whose result is used.",
        on_resume=HARMLESS,
    )
    eval_do_concat_batches: bool = option(
        True,
        converters.flag,
        "Concatenate the predictions and labels of all batches; False keeps a list with those of "
        "each batch.",
        on_resume=HARMLESS,
    )
    eval_accumulation_steps: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Maximum number of batches whose outputs stay on the device before they are copied to the "
        "host. None means as many as run in one call: outputs of at most 4 MiB, or of one batch.",
        on_resume=HARMLESS,
    )
    eval_max_steps: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Maximum number of batches to evaluate, from the start of the evaluation set. None means "
        "all; a prediction always uses all.",
        on_resume=HARMLESS,
    )
    label_names: Names | None = option(
        None,
        converters.optional(converters.keys),
        "Keys of a batch (a dict) that hold labels; several become a dict of labels. None means "
        "'labels', 'label' or 'label_ids', unless the model has an input of that name; an empty "
        "list means that all keys are inputs: no labels and no sample weights.",
        command_line=Sequence[str] | None,
        on_resume=NEW_VALUE,
    )
    predict_with_generate: bool = option(
        False,
        converters.flag,
        "Predictions for compute_metrics and predict: the result of the model's generate method "
        "for the inputs of each batch (True), or the model's outputs (False). The loss is computed "
        "from the outputs in both cases.",
        on_resume=HARMLESS,
    )
    generation_max_length: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Argument max_length of the model's generate method: tokens of prompt and answer together. "
        "None leaves it to the model.",
        on_resume=HARMLESS,
    )
    generation_kwargs: Options = option(
        None,
        converters.options,
        "Additional keyword arguments of the model's generate method: a dict or a JSON object as a "
        "string.",
        command_line=Mapping[str, Any],
        on_resume=HARMLESS,
    )

    eval_minutes: float | None = option(
        None,
        converters.optional(converters.real(above=0.0)),
        "Minutes between two evaluations, in addition to eval_strategy. None means no time "
        "trigger.",
        on_resume=HARMLESS,
    )

    # Checkpoints
    save_minutes: float | None = option(
        None,
        converters.optional(converters.real(above=0.0)),
        "Minutes between two checkpoints, in addition to save_strategy. None means no time "
        "trigger.",
        on_resume=HARMLESS,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "steps",
        converters.choice("no", "steps", "epoch", "best"),
        "When to save a checkpoint: never ('no'), every save_steps ('steps'), after each epoch "
        "('epoch') or when an evaluation improved metric_for_best_model ('best').",
        on_resume=SAVE_STEPS,
    )
    save_steps: float = option(
        500,
        converters.steps,
        "Update steps between two checkpoints; below 1, a ratio of all steps, rounded up.",
        on_resume=SAVE_STEPS,
    )
    save_total_limit: int | None = option(
        None,
        converters.optional(converters.whole(1)),
        "Maximum number of checkpoints to keep; older ones are deleted, except the best one. None "
        "keeps all.",
        on_resume=HARMLESS,
    )
    save_only_model: bool = option(
        False,
        converters.flag,
        "Save the weights without optimizer state, data position and random state; such a "
        "checkpoint cannot be resumed exactly.",
        on_resume=HARMLESS,
    )
    save_async: bool = option(
        True,
        converters.flag,
        "Write checkpoints in the background: training waits only while the state is copied to "
        "host memory (which needs room for two copies). If a callback implements on_save, training "
        "waits for the save, since on_save is called once the checkpoint is complete.",
        on_resume=HARMLESS,
    )
    on_save_error: Literal["warn", "raise"] = option(
        "warn",
        converters.choice("warn", "raise"),
        "What to do when a checkpoint cannot be written (disk full, no permission, ...): warn and "
        "continue ('warn') or stop ('raise').",
        on_resume=HARMLESS,
    )
    enable_jit_checkpoint: bool = option(
        True,
        converters.flag,
        "On SIGTERM, SIGUSR1 or SIGINT (Ctrl-C), finish the step, save (unless save_strategy='no') "
        "and exit with code 143, 138 or 130; a second SIGINT stops immediately.",
        on_resume=HARMLESS,
    )
    max_time: float | None = option(
        None,
        converters.optional(converters.duration),
        "Time limit of one call of fit, in seconds or as 'HH:MM:SS': before it is reached, the run "
        "saves (unless save_strategy='no') and fit returns. None means no limit.",
        command_line=float | str | None,
        on_resume=HARMLESS,
    )
    load_best_model_at_end: bool = option(
        False,
        converters.flag,
        "Load the weights with the best metric_for_best_model at the end of training.",
        on_resume=HARMLESS,
    )
    metric_for_best_model: str | None = option(
        None,
        converters.optional(converters.text),
        "Metric that determines the best checkpoint, with or without the prefix 'eval_'. None "
        "means 'loss' where a metric is needed.",
        on_resume=BEST_METRIC,
    )
    greater_is_better: bool | None = option(
        None,
        converters.optional(converters.flag),
        "Whether a higher metric_for_best_model is better. None means yes, unless the name ends in "
        "'loss'.",
        on_resume=BEST_METRIC,
    )
    resume_from_checkpoint: PathOrTrue | None = option(
        None,
        _resume,
        "Checkpoint to resume from: True for the newest intact one in output_dir, 'auto' for the "
        "same or a fresh start if there is none, the path or address of a checkpoint, or None for "
        "a fresh start.",
        command_line=bool | str | None,
        on_resume=HARMLESS,
    )
    ignore_data_skip: bool = option(
        False,
        converters.flag,
        "On resuming, restart the data from its beginning instead of from the saved position.",
        on_resume=HARMLESS,
    )
    restore_callback_states_from_checkpoint: bool = option(
        True,
        converters.flag,
        "On resuming, restore the state of callbacks from the checkpoint.",
        on_resume=HARMLESS,
    )
