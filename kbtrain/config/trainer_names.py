"""Names of the Transformers Trainer that ``Trainer`` lacks, and what to use instead."""

from __future__ import annotations

from kbtrain.errors import KERAS

PARAMETERS: dict[str, str] = {
    "tokenizer": "Write processing_class=..., its name since version 5.",
    "optimizer_cls_and_kwargs": "Register the class under the entry points kbtrain.optimizers and "
    "write optim=..., optim_args=..., or override create_optimizer.",
    "optimizer": "Write optimizers=(optimizer, schedule), of which either may be None.",
    "tb_writer": "Write report_to=['tensorboard'] in TrainingArguments.",
    # Keras
    **dict.fromkeys(("x", "y"), "Write train_dataset=(x, y)."),
    "validation_data": "Write eval_dataset=..., and eval_strategy='epoch' in TrainingArguments.",
    "sample_weight": "Write train_dataset=(x, y, sample_weight).",
    "dataset": "Write train_dataset=...",
    "collate_fn": "Write data_collator=...",
    "peft_config": "Call model.enable_lora(rank) of a KerasHub backbone, or of a layer, before.",
}
PARAMETERS |= {name: text for name, text in KERAS.items() if name not in PARAMETERS}
"""Parameters of the constructor in Transformers, also in 4.x, and those Keras users may try."""

MEMBERS: dict[str, str] = {
    "training_step": "The step is compiled as a whole. Override compute_loss.",
    "prediction_step": "The step is compiled as a whole. Use preprocess_logits_for_metrics.",
    "compute_loss_context_manager": "Mixed precision is a dtype policy.",
    "autocast_smart_context_manager": "Mixed precision is a dtype policy.",
    "get_batch_samples": "The loader groups micro-batches; override get_train_dataloader.",
    "set_initial_training_values": "The plan of a run follows from the arguments and the data.",
    "get_tp_size": "Layouts belong to keras.distribution.",
    "get_cp_size": "Layouts belong to keras.distribution.",
    "get_sp_size": "Layouts belong to keras.distribution.",
    "create_optimizer_and_scheduler": "Override create_scheduler and create_optimizer, which are "
    "called in this order.",
    "get_optimizer_cls_and_kwargs": "Optimizers are found by entry point; override "
    "create_optimizer.",
    "get_optimizer_group": "A Keras optimizer has no parameter groups to look up.",
    "store_flos": "The estimate 6 x tokens x parameters holds for transformers only.",
    "floating_point_ops": "The estimate 6 x tokens x parameters holds for transformers only.",
    "init_hf_repo": "The repository is created when fit begins, or by push_to_hub.",
    "create_accelerator_and_postprocess": "It belongs to Accelerate.",
    "loss_is_scaled_for_ga": "Accumulation is exact whatever the model: losses are (sum, count).",
    "model_wrapped": "Nothing wraps the model: `model`.",
    "label_smoother": "See label_smoothing_factor.",
    "accelerator": "It belongs to Accelerate.",
    "end": "Trackers are closed at the end of every fit.",
}
"""Methods and attributes of Transformers that are missing here, and why."""

OLD_MEMBERS = {"tokenizer": "Write processing_class, its name since version 5."}
"""The same for members that only Transformers 4 had."""
