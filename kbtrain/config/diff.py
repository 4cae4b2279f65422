"""Arguments that were changed between a checkpoint and the run that is resumed from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_NEW = (
    "the rest of the run uses the new value, except for a learning rate that answers to a metric, "
    "which goes on where it was"
)
_ORDER = "the rest of the data comes in another order"
_LENGTH = "an epoch has another number of steps"
_EVALUATION = "evaluations are computed in another precision than those before"
_ROUNDING = "the same numbers are computed with other roundings from here on"
_BEST = "the best value so far, which new ones are compared with, was measured by the old one"

CONSEQUENCES = {
    **dict.fromkeys(
        [
            *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay"),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "ema"),
            *("parameter_groups", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
            *("neftune_noise_alpha", "label_smoothing_factor", "label_names"),
        ],
        _NEW,
    ),
    "remove_unused_columns": "the model may get other columns of the data",
    "per_device_train_batch_size": "the position in the data is converted by samples",
    "gradient_accumulation_steps": _LENGTH,
    "steps_per_epoch": _LENGTH,
    "dataloader_drop_last": _LENGTH,
    "num_train_epochs": "schedules by the length of the run go on along the new one",
    "max_steps": "schedules by the length of the run go on along the new one",
    "seed": "the random numbers of the run are restored, but the data order may differ",
    "data_seed": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_num_workers": "random augmentation draws other numbers with workers than without",
    "logging_steps": "logs come at other steps",
    "logging_strategy": "logs come at other steps",
    "eval_steps": "evaluations come at other steps",
    "eval_strategy": "evaluations come at other steps",
    "eval_delay": "evaluations come at other steps",
    "save_steps": "checkpoints come at other steps",
    "save_strategy": "checkpoints come at other steps",
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "bf16": _ROUNDING,
    "fp16": _ROUNDING,
    "jit_compile": _ROUNDING,
    "use_cpu": _ROUNDING,
    "devices": _ROUNDING,
    "tf32": _ROUNDING,
    "full_determinism": _ROUNDING,
    "gradient_checkpointing": _ROUNDING,
    "gradient_checkpointing_kwargs": _ROUNDING,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "on_nonfinite": "an update that is not finite is dealt with in the new way",
}
"""What a resumed run does otherwise for a changed argument."""

HARMLESS = frozenset(
    [
        *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "log_level"),
        *("logging_first_step", "include_num_input_tokens_seen", "skip_memory_metrics"),
        *("per_device_eval_batch_size", "prediction_loss_only", "include_for_metrics"),
        *("batch_eval_metrics", "eval_do_concat_batches", "eval_accumulation_steps"),
        *("eval_on_start", "eval_max_steps", "eval_minutes", "predict_with_generate"),
        *("generation_max_length", "generation_kwargs", "save_minutes", "save_total_limit"),
        *("save_only_model", "save_async", "on_save_error", "enable_jit_checkpoint", "max_time"),
        *("load_best_model_at_end", "resume_from_checkpoint", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "dataloader_prefetch_factor"),
        *("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        *("steps_per_execution", "auto_find_batch_size", "dataloader_pin_memory", "debug"),
        *("do_train", "do_eval", "do_predict"),
        # With one process on one device there is only one way.
        *("average_tokens_across_devices", "log_on_each_node", "log_level_replica"),
        *("save_on_each_node", "parallelism_config", "fsdp"),
        # Named once, under their other names.
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
    ]
)
"""Arguments that do not touch the training of a resumed run, or that say how to resume."""


def compare_arguments(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Say which changed arguments make the resumed run differ from the interrupted one.

    Args:
        saved: The arguments of the checkpoint, from JSON; one of an older version lacks some.
        current: Those of this run; a subclass may have more fields, whose meaning is unknown here.
    """
    current = json.loads(json.dumps(current))
    return [
        f"{name} was {saved[name]!r} and is {value!r} now: {CONSEQUENCES.get(name, _NEW)}."
        for name, value in current.items()
        if name in saved and saved[name] != value and name not in HARMLESS
    ]
