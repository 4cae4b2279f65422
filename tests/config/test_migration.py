"""Names that do not exist: renamed, dropped, still to come, misspelt."""

import inspect
import re

import pytest
from helpers_arguments import FIELDS, refusal

from kbtrain import Trainer
from kbtrain.config.migration import DROPPED, NOT_YET, RENAMED

# The 114 fields of transformers 5.23.0's TrainingArguments.
REFERENCE_NAMES = re.findall(
    r"\w+",
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
    average_tokens_across_devices max_grad_norm label_smoothing_factor bf16 fp16
    bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
    liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps
    auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
    hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed
    use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    """,
)


def test_every_name_of_the_reference_is_a_field_or_explained_once():
    assert len(set(REFERENCE_NAMES)) == 114
    places = [FIELDS, RENAMED, DROPPED, NOT_YET]
    for name in REFERENCE_NAMES:
        assert sum(name in place for place in places) == 1, name
    for name in {**RENAMED, **DROPPED, **NOT_YET}:
        assert sum(name in place for place in places) == 1, name


def test_what_an_explanation_tells_to_write_exists():
    parameters = inspect.signature(Trainer.__init__).parameters
    for text in {**RENAMED, **DROPPED, **NOT_YET}.values():
        for name in re.findall(r"\b(\w+)=", text):
            assert name in {*FIELDS, *parameters}, text


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("warmup_ratio", 0.1, "warmup_steps=0.1"),
        ("no_cuda", True, "use_cpu=True"),
        ("evaluation_strategy", "epoch", "eval_strategy='epoch'"),
        ("include_inputs_for_metrics", True, "include_for_metrics=['inputs']"),
        ("per_gpu_train_batch_size", 4, "per_device_train_batch_size=4"),
        ("per_gpu_eval_batch_size", 4, "per_device_eval_batch_size=4"),
        ("group_by_length", True, "train_sampling_strategy='group_by_length'"),
        ("torch_compile", True, "jit_compile=True"),
        ("logging_nan_inf_filter", 1, "on_nonfinite"),
        ("epochs", 3, "num_train_epochs=3"),
    ],
)
def test_a_renamed_argument_says_the_new_name_and_the_translated_value(name, value, answer):
    message = refusal(**{name: value})
    assert f"`{name}`" in message
    assert f"{name}={value!r}" in message
    assert answer in message


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_every_renamed_argument_is_explained(name):
    received = f"<{name.upper()}>" if name.endswith("token") else 1
    said = f"`{name}` has another name or form here. Received: {name}={received}."
    assert said in refusal(**{name: 1})


@pytest.mark.parametrize("name", sorted(n for n in DROPPED if not n.endswith("token")))
def test_every_dropped_argument_says_why_and_what_instead(name):
    message = refusal(**{name: "x"})
    assert f"`{name}` does not exist here. Received: {name}='x'." in message
    assert message.endswith(DROPPED[name])


def test_every_argument_to_come_says_so(monkeypatch):
    monkeypatch.setitem(NOT_YET, "of_tomorrow", "Until then do without.")  # there may be no other
    for name in NOT_YET:
        message = refusal(**{name: 1})
        assert f"`{name}` is not available in this version. Received: {name}=1." in message


@pytest.mark.parametrize("name", ["hf_token", "push_to_hub_token"])
def test_a_secret_is_not_repeated(name):
    message = refusal(**{name: "hf_secret"})
    assert "hf_secret" not in message
    assert f"<{name.upper()}>" in message


def test_a_misspelt_name_gets_the_closest_one_and_a_strange_name_gets_the_list():
    assert "Did you mean learning_rate" in refusal(lerning_rate=0.1)
    strange = refusal(zzz=1)
    assert all(name in strange for name in FIELDS)


def test_all_unknown_names_are_reported_at_once():
    message = refusal(no_cuda=True, torch_compile=True, zzz=1)
    assert [name in message for name in ("`no_cuda`", "`torch_compile`", "`zzz`")] == [True] * 3
