"""Names that ``TrainingArguments`` does not have: the replacement, or why there is none.

Users bring names from ``transformers`` 4.x and 5.x, Keras and Lightning. Each has an explanation;
``tests/config/test_migration.py`` checks that every name of Transformers 5.x is covered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from kbtrain.config.converters import shown

# Other name -> what to write. "{value}" is the repr of the value given under that name.
RENAMED: dict[str, str] = {
    # transformers 4.x
    "adafactor": "Write optim='adafactor' (for True).",
    "evaluate_during_training": "Write eval_strategy='steps' (for True) or eval_strategy='no'.",
    "evaluation_strategy": "Write eval_strategy={value}.",
    "fp16_backend": "Drop it; there is one implementation of mixed precision. Write bf16=True.",
    "fp16_opt_level": "Drop it; there is one implementation of mixed precision. Write bf16=True.",
    "group_by_length": "Write train_sampling_strategy='group_by_length' (for True).",
    "half_precision_backend": "Drop it; there is one implementation of mixed precision. "
    "Write bf16=True.",
    "include_inputs_for_metrics": "Write include_for_metrics=['inputs'] for True.",
    "include_tokens_per_second": "Write include_num_input_tokens_seen='all', which also logs the "
    "rate.",
    "jit_mode_eval": "Write jit_compile=True, which covers training and evaluation.",
    "no_cuda": "Write use_cpu={value}.",
    "per_gpu_eval_batch_size": "Write per_device_eval_batch_size={value}.",
    "per_gpu_train_batch_size": "Write per_device_train_batch_size={value}.",
    "torch_compile": "Write jit_compile={value}, which works on every backend.",
    "torchdynamo": "Write jit_compile=True, which works on every backend.",
    "use_mps_device": "The backend chooses the device. Remove it, or write use_cpu=True to use the "
    "CPU.",
    "warmup_ratio": "Write warmup_steps={value}: below 1 it is a ratio of all steps.",
    "push_to_hub_model_id": "Write hub_model_id={value}, with the organization: 'owner/name'.",
    "push_to_hub_organization": "Write hub_model_id='owner/name', with the organization as owner.",
    "push_to_hub_token": "Write hub_token=...",
    # Seq2SeqTrainingArguments
    "generation_config": "Write generation_kwargs={{'max_length': 64}}: the keyword arguments of "
    "the model's generate.",
    "generation_num_beams": "Write generation_kwargs={{'num_beams': {value}}} if the model's "
    "generate accepts it; the sampler of a KerasHub model is set by its compile method.",
    # settings whose behaviour differs here
    "logging_nan_inf_filter": "NaN is never hidden in the logs. on_nonfinite sets what happens "
    "instead: 'raise' (default) stops before the weights are changed, 'skip' skips the update, "
    "'ignore' applies it. Choose one.",
    "sortish_sampler": "Write train_sampling_strategy='group_by_length' for True.",
    # Keras
    "batch_size": "Write per_device_train_batch_size={value} (and per_device_eval_batch_size).",
    "beta_1": "Write adam_beta1={value}.",
    "beta_2": "Write adam_beta2={value}.",
    "class_weight": "It is an argument of the Trainer: Trainer(class_weight={value}).",
    "validation_split": "It is an argument of the Trainer: Trainer(validation_split={value}).",
    "epochs": "Write num_train_epochs={value}.",
    "epsilon": "Write adam_epsilon={value}.",
    "global_clipnorm": "Write max_grad_norm={value}.",
    "lr": "Write learning_rate={value}.",
    "optimizer": "Write optim='adamw' (a name), or pass an optimizer as Trainer(optimizers=...).",
    "shuffle": "Write train_sampling_strategy='random' (for True) or 'sequential' (for False).",
    "verbose": "Write disable_tqdm=True for 0, disable_tqdm=False for 1.",
    "clipnorm": "Write max_grad_norm={value} for the global norm of all gradients, or "
    "optim_args={{'clipnorm': {value}}} for the norm of each one.",
    "clipvalue": "Write optim_args={{'clipvalue': {value}}}.",
    "momentum": "Write optim_args={{'momentum': {value}}}.",
    "use_ema": "Write ema=True.",
    "ema_momentum": "Write ema={value}.",
    "initial_epoch": "Write resume_from_checkpoint='auto': a checkpoint stores the position.",
    "validation_batch_size": "Write per_device_eval_batch_size={value}.",
    "validation_freq": "Write eval_strategy='epoch', or eval_strategy='steps' with eval_steps.",
    "validation_steps": "Write eval_max_steps={value}.",
    "workers": "Write dataloader_num_workers={value}.",
    "use_multiprocessing": "Write dataloader_num_workers=2 (for True).",
    "max_queue_size": "Write dataloader_prefetch_factor={value}.",
    "run_eagerly": "Write jit_compile=False (for True).",
    "auto_scale_loss": "Write fp16=True, which scales the loss.",
    # Lightning
    "max_epochs": "Write num_train_epochs={value}.",
    "gradient_clip_val": "Write max_grad_norm={value}.",
    "accumulate_grad_batches": "Write gradient_accumulation_steps={value}.",
    "precision": "Write bf16=True or fp16=True for mixed precision.",
    "mixed_precision": "Write bf16=True or fp16=True.",
    "log_dir": "Write output_dir={value}; report_to chooses the trackers, which write there.",
    "betas": "Write adam_beta1 and adam_beta2.",
    "eps": "Write adam_epsilon={value}.",
    "early_stopping_patience": "Use Trainer(callbacks=[EarlyStoppingCallback({value})]).",
    # arguments of the Trainer
    **dict.fromkeys(
        [
            *("model", "train_dataset", "eval_dataset", "data_collator", "processing_class"),
            *("tokenizer", "model_init", "loss", "metrics", "compute_loss_func", "callbacks"),
            *("compute_metrics", "optimizers", "loss_weights", "weighted_metrics"),
        ],
        "It is an argument of the Trainer. Use Trainer(model, args, ...).",
    ),
    "x": "It is part of the data. Use Trainer(train_dataset=(x, y)).",
    "y": "It is part of the data. Use Trainer(train_dataset=(x, y)).",
    "validation_data": "It is an argument of the Trainer. Use Trainer(eval_dataset={value}).",
    "sample_weight": "It is part of the data. Use Trainer(train_dataset=(x, y, sample_weight)).",
}

_DDP = "It belongs to torch's DistributedDataParallel, which kbtrain does not use. Remove it."
_COMPILER = "It is a setting of torch.compile. Use jit_compile, which works on every backend."
_LAUNCHER = "The launcher says it, by variables of the environment. Remove it."
_LIGER = "It patches PyTorch classes of transformers models. Remove it."
_TRACKIO = "It belongs to Hugging Face Spaces. Remove it; report_to selects the trackers."
_ACCELERATE = "It belongs to Accelerate, which kbtrain does not use. Remove it; "

# Fields of Transformers (5.x, then 4.x) that do not exist here -> why, and what to use.
DROPPED: dict[str, str] = {
    "accelerator_config": _ACCELERATE
    + "gradient_accumulation_steps and dataloader_drop_last are fields of their own.",
    "dataloader_in_order": "The order of the data always depends only on the seed and the epoch. "
    "Remove it; train_sampling_strategy selects the order.",
    "ddp_broadcast_buffers": "The state of layers is the same in all processes, since statistics "
    "are those of the whole batch. Remove it; True and False are accepted.",
    "ddp_find_unused_parameters": "A variable that the loss does not depend on has a zero gradient "
    "in all processes. Remove it; True and False are accepted.",
    "ddp_static_graph": "A step is captured once for each shape. Remove it; True and False are "
    "accepted.",
    "deepspeed": "DeepSpeed supports PyTorch models only. Remove it; to save memory, use "
    "bf16=True and gradient_accumulation_steps.",
    "eval_use_gather_object": "Predictions are arrays (or nested structures of arrays). Remove it.",
    "liger_kernel_config": _LIGER,
    "local_rank": _LAUNCHER,
    "torch_compile_backend": _COMPILER,
    "torch_compile_mode": _COMPILER,
    "torch_empty_cache_steps": "It empties the cache of one backend's memory allocator. Remove "
    "it; a callback can do that in on_step_end.",
    "trackio_bucket_id": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "use_cache": "It is a setting of transformers models. Remove it, or set it on the model.",
    "use_liger_kernel": _LIGER,
    # removed since 4.x
    "dispatch_batches": _ACCELERATE + "every process reads whole batches and takes its rows.",
    "fsdp_min_num_params": "Write fsdp_config={'min_num_params': n}.",
    "fsdp_transformer_layer_cls_to_wrap": "Variables are divided by their shape, not by layer. "
    "Remove it; fsdp_config={'layouts': ...} names variables.",
    "logging_dir": "There is no separate directory for logs. Remove it; a run is written to "
    "output_dir, and report_to selects the trackers.",
    "mp_parameters": "It belongs to SageMaker. Remove it.",
    "overwrite_output_dir": "kbtrain never empties output_dir. Choose a new output_dir, or resume "
    "with resume_from_checkpoint.",
    "past_index": "It carried state between batches for models of 2019. Remove it.",
    "ray_scope": "It belongs to hyperparameter search with Ray. Remove it.",
    "save_safetensors": "Checkpoints are HDF5 and JSON on every backend. Remove it.",
    "tpu_metrics_debug": "It belongs to PyTorch/XLA. Remove it.",
    "tpu_num_cores": "The backend finds its devices. Remove it.",
    "use_ipex": "It belongs to an extension of PyTorch. Remove it.",
    "use_legacy_prediction_loop": "There is one loop for evaluation and prediction. Remove it.",
    "xpu_backend": _DDP,
}


# Fields that Transformers has as well, where a value may have to be another one here.
OTHER_MEANING: dict[str, str] = {
    "optim_target_modules": "Regular expressions over variable paths, for `galore_adamw` and "
    "`apollo_adamw`.",
    "activation_checkpointing_kwargs": "`layer_names` or `every_n_layers`; torch's options "
    "are refused.",
    "gradient_checkpointing_kwargs": "`layer_names` or `every_n_layers`; torch's options are "
    "refused.",
    "dataloader_num_workers": "Worker processes through Grain, for map-style data sets; "
    "arrays need none.",
    "save_total_limit": "Means what it says; the best checkpoint is kept besides.",
    "fsdp": "True, 'full_shard' or 'shard_grad_op' on JAX, 'shard_grad_op' elsewhere; no "
    "offload. 'auto_wrap' changes nothing.",
    "fsdp_config": "`min_num_params`, and kbtrain's own `layouts`; defaults of the others are "
    "accepted.",
    "parallelism_config": "The mesh of all devices on JAX: data, fsdp and tensor. "
    "Accelerate's names are taken, but not cp_size and sp_size.",
    "ddp_backend": "Checked: it must name what the device calls for.",
}

# Fields of Transformers that are planned -> what to do until then.
NOT_YET: dict[str, str] = {}


# Properties and methods of Transformers' TrainingArguments that do not exist here, and why.
MEMBERS: dict[str, str] = {
    "device": "The backend has it: `trainer.backend.device_info()`.",
    "n_gpu": "Arguments are plain values and access no device.",
    "parallel_mode": "Arguments are plain values and access no device.",
    "place_model_on_device": "The backend places variables.",
    "set_training": "Arguments are frozen: `args.replace(...)`.",
    "set_evaluate": "Arguments are frozen: `args.replace(...)`.",
    "set_testing": "Arguments are frozen: `args.replace(...)`.",
    "set_save": "Arguments are frozen: `args.replace(...)`.",
    "set_logging": "Arguments are frozen: `args.replace(...)`.",
    "set_push_to_hub": "Arguments are frozen: `args.replace(push_to_hub=True, hub_model_id=...)`.",
    "set_optimizer": "Arguments are frozen: `args.replace(...)`.",
    "set_lr_scheduler": "Arguments are frozen: `args.replace(...)`.",
    "set_dataloader": "Arguments are frozen: `args.replace(...)`.",
}


def reason(name: str, value: Any) -> str:
    """The replacement of a known setting, or why there is none; empty for unknown names.

    Args:
        name: A name that is not a field.
        value: The value given under that name.
    """
    if name in RENAMED:
        return RENAMED[name].format(value=shown(value))
    return DROPPED.get(name) or NOT_YET.get(name, "")


def rewritten(name: str, value: Any, source: str) -> tuple[str, str] | None:
    """The argument to write in place of one with another name, where that needs no decision.

    Args:
        name: The other name.
        value: Its value; None if that is not known.
        source: The value as it is written in a program.

    Returns:
        The name of a field and its value, as written; None if a person has to decide.
    """
    found = _TO_WRITE.match(RENAMED.get(name, ""))
    if found is None:
        return None
    field, new, for_true = found.groups()
    if new == "{value}":
        return field, source
    # The other form of a flag: for another value than True the explanation does not hold.
    return (field, new) if value is True or not for_true and value is not None else None


_TO_WRITE = re.compile(r"Write (\w+)=(\{value\}|'\w+'|\['\w+'\]|True)(?: ?(\(?for True\)?))?[.,: ]")


def mentioned(text: str) -> list[str]:
    """The names that an explanation says to write, as in ``Write eval_strategy='steps'``."""
    return list(dict.fromkeys(re.findall(r"\b(\w+)=", text)))


def explain_unknown(
    name: str,
    value: Any,
    known: Sequence[str],
    received: str | None = None,
    others: Sequence[str] = (),
) -> str:
    """Explain to a user that an argument does not exist.

    Args:
        name: The unknown name.
        value: The value given under that name.
        known: The names that exist.
        received: What to say of the value; by default that it was received.
        others: Names to suggest where none that exists is close.

    Returns:
        What happened and what to write instead.
    """
    # An error message must not leak a secret into a log.
    written = f"<{name.upper()}>" if name.endswith("token") else shown(value)
    received = f" Received: {name}={written}." if received is None else received
    for table, said in (
        (RENAMED, "has another name or form here"),
        (DROPPED, "does not exist here"),
        (NOT_YET, "is not available in this version"),
    ):
        if name in table:
            return f"`{name}` {said}.{received} {reason(name, value)}"
    close = (
        difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        or [field for field in known if len(name) > 3 and name in field][:8]
        or difflib.get_close_matches(name, others, n=3, cutoff=0.6)
    )
    meant = f"Did you mean {' or '.join(close)}?" if close else f"It has: {', '.join(known)}."
    return f"TrainingArguments has no argument `{name}`.{received} {meant}"
