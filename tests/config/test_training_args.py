"""TrainingArguments: values, checks, names, JSON, steps. Expected numbers are literals."""

import copy
import dataclasses
import doctest
import enum
import inspect
import json
import os
import re
import subprocess
import sys
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain import Trainer
from kbtrain.config import training_args, validation
from kbtrain.config.argument_parser import ArgumentParser
from kbtrain.config.migration import DROPPED, NOT_YET, RENAMED
from kbtrain.config.training_args import TrainingArguments, resolve_steps
from kbtrain.config.validation import check_saves_follow_evaluations
from kbtrain.errors import ConfigurationError

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}

# Name -> (default as declared, value as stored). Adding a line is a decision.
FROZEN = {
    "output_dir": (None, "trainer_output"),
    "num_train_epochs": (3.0, 3.0),
    "max_steps": (-1, -1),
    "per_device_train_batch_size": (8, 8),
    "per_device_eval_batch_size": (8, 8),
    "gradient_accumulation_steps": (1, 1),
    "auto_find_batch_size": (False, False),
    "optim": ("adamw", "adamw"),
    "optim_args": (None, {}),
    "optim_target_modules": (None, None),
    "learning_rate": (5e-5, 5e-5),
    "weight_decay": (0.0, 0.0),
    "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8),
    "max_grad_norm": (1.0, 1.0),
    "parameter_groups": (None, []),
    "lr_scheduler_type": ("linear", "linear"),
    "lr_scheduler_kwargs": (None, {}),
    "warmup_steps": (0, 0),
    "logging_strategy": ("steps", "steps"),
    "logging_steps": (500, 500),
    "logging_first_step": (False, False),
    "disable_tqdm": (None, None),
    "report_to": ("none", []),
    "run_name": (None, None),
    "project": (None, None),
    "log_level": ("passive", "passive"),
    "include_num_input_tokens_seen": ("no", "no"),
    "skip_memory_metrics": (True, True),
    "eval_minutes": (None, None),
    "save_minutes": (None, None),
    "eval_strategy": ("no", "no"),
    "eval_steps": (None, None),
    "eval_delay": (0.0, 0.0),
    "eval_on_start": (False, False),
    "prediction_loss_only": (False, False),
    "include_for_metrics": ((), []),
    "batch_eval_metrics": (False, False),
    "predict_with_generate": (False, False),
    "generation_max_length": (None, None),
    "generation_kwargs": (None, {}),
    "eval_do_concat_batches": (True, True),
    "eval_accumulation_steps": (None, None),
    "eval_max_steps": (None, None),
    "label_names": (None, None),
    "save_strategy": ("steps", "steps"),
    "save_steps": (500, 500),
    "save_total_limit": (None, None),
    "save_only_model": (False, False),
    "save_async": (True, True),
    "on_save_error": ("warn", "warn"),
    "enable_jit_checkpoint": (True, True),
    "max_time": (None, None),
    "load_best_model_at_end": (False, False),
    "metric_for_best_model": (None, None),
    "greater_is_better": (None, None),
    "resume_from_checkpoint": (None, None),
    "ignore_data_skip": (False, False),
    "restore_callback_states_from_checkpoint": (True, True),
    "seed": (42, 42),
    "data_seed": (None, None),
    "dataloader_drop_last": (False, False),
    "remove_unused_columns": (True, True),
    "steps_per_epoch": (None, None),
    "dataloader_num_workers": (0, 0),
    "dataloader_prefetch_factor": (None, None),
    "dataloader_persistent_workers": (False, False),
    "dataloader_multiprocessing_context": (None, None),
    "train_sampling_strategy": ("random", "random"),
    "length_column_name": ("length", "length"),
    "bf16": (False, False),
    "fp16": (False, False),
    "label_smoothing_factor": (0.0, 0.0),
    "on_nonfinite": ("raise", "raise"),
    "jit_compile": ("auto", "auto"),
    "steps_per_execution": ("auto", "auto"),
    "use_cpu": (False, False),
    "devices": (None, None),
    "debug": ((), []),
    "gradient_checkpointing": (None, False),
    "gradient_checkpointing_kwargs": (None, {}),
    "activation_checkpointing": (None, False),
    "activation_checkpointing_kwargs": (None, {}),
    "ema": (None, None),
    "neftune_noise_alpha": (None, None),
    "bf16_full_eval": (False, False),
    "fp16_full_eval": (False, False),
    "tf32": (None, None),
    "full_determinism": (False, False),
    "dataloader_pin_memory": (True, True),
    "average_tokens_across_devices": (True, True),
    "log_on_each_node": (True, True),
    "log_level_replica": ("warning", "warning"),
    "save_on_each_node": (False, False),
    "parallelism_config": (None, None),
    "fsdp": (None, None),
    "do_train": (False, False),
    "do_eval": (False, False),
    "do_predict": (False, False),
}

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


def refusal(**arguments):
    """The message with which TrainingArguments refuses `arguments`."""
    with pytest.raises(ConfigurationError) as caught:
        TrainingArguments(**arguments)
    return str(caught.value)


# --- names, defaults, help -----------------------------------------------------------------------


def test_the_list_of_fields_and_defaults_is_frozen():
    assert {name: field.default for name, field in FIELDS.items()} == {
        name: declared for name, (declared, _) in FROZEN.items()
    }
    assert TrainingArguments().to_dict() == {name: stored for name, (_, stored) in FROZEN.items()}


def test_every_field_has_a_help_text_a_kind_and_a_place_in_the_class_docstring():
    documented = set(re.findall(r"`(\w+)`", TrainingArguments.__doc__))
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 20, name
        assert field.metadata["help"].endswith("."), name
        assert callable(field.metadata["kind"]), name
    assert set(FIELDS) - documented == set()


def test_signature_names_every_field_and_type_hints_resolve():
    parameters = inspect.signature(TrainingArguments).parameters
    assert list(parameters) == list(FIELDS)
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["output_dir"]
    keywords = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert by_position + keywords == list(FIELDS)
    hints = typing.get_type_hints(TrainingArguments)
    assert hints["save_total_limit"] == int | None


@pytest.mark.parametrize("module", [training_args, validation])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_importing_and_building_loads_no_framework():
    program = (
        "import sys; from kbtrain.training_args import TrainingArguments; TrainingArguments();"
        "print([m for m in ('keras', 'torch', 'tensorflow', 'jax', 'optim') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_building_reads_no_environment_variable_and_no_file(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError(f"looked outside: {args}")

    with monkeypatch.context() as watched:
        watched.setattr(type(os.environ), "__getitem__", fail)
        for name in ("stat", "mkdir", "listdir", "scandir"):
            watched.setattr(os, name, fail)
        watched.setattr("builtins.open", fail)
        args = TrainingArguments(output_dir="runs/x", resume_from_checkpoint="auto", bf16=True)
    assert args.output_dir == "runs/x"


# --- one value at a time -------------------------------------------------------------------------

FLAGS = [n for n, f in FIELDS.items() if f.type in ("bool", "bool | None", "FlagOrNone")]

REFUSED = [
    ("save_async", 1),
    *(("debug", value) for value in ("tpu_metrics_debug", "loud", 1)),
    ("gradient_checkpointing_kwargs", "every"),
    ("activation_checkpointing_kwargs", [1]),
    *(("ema", value) for value in (1.0, -0.1, "0.9", [0.9])),
    ("neftune_noise_alpha", 0),
    *(("devices", value) for value in ([0, 1], "", "gpu:", -1, True, [], "gpu:1,2")),
    *(("fsdp", value) for value in (True, "full_shard", ["full_shard"], 0)),
    ("parallelism_config", {"tp_size": 2}),
    ("log_level_replica", "loud"),
    ("on_save_error", "ignore"),
    ("enable_jit_checkpoint", "yes"),
    *(("max_time", value) for value in (0, -1, True, "", "90", "1:60:00", "1:00", "0:00:00", [])),
    ("eval_accumulation_steps", 0),
    ("eval_max_steps", -1),
    *(("label_names", value) for value in ("", ["a", 1], {"a": 1})),
    ("output_dir", ""),
    ("output_dir", 3),
    ("num_train_epochs", 0),
    ("num_train_epochs", -1.0),
    ("num_train_epochs", True),
    ("num_train_epochs", float("nan")),
    ("num_train_epochs", float("inf")),
    ("num_train_epochs", None),
    ("max_steps", 0),
    ("max_steps", -2),
    ("max_steps", 10.0),
    ("max_steps", True),
    ("max_steps", "10"),
    ("per_device_train_batch_size", 0),
    ("per_device_train_batch_size", True),
    ("per_device_train_batch_size", 8.0),
    ("per_device_train_batch_size", np.bool_(True)),
    ("per_device_eval_batch_size", -8),
    ("gradient_accumulation_steps", 0),
    ("gradient_accumulation_steps", None),
    ("optim", ""),
    ("optim", None),
    ("optim_args", "beta"),
    ("optim_args", "a=1,=2"),
    ("optim_args", "a="),
    ("optim_args", "a=1,a=2"),
    ("optim_args", "a=nan"),
    ("optim_args", {"a": np.zeros(2)}),
    ("optim_args", {"a": {1: 2}}),
    ("optim_args", {1: "a"}),
    ("optim_args", [("a", 1)]),
    ("optim_target_modules", []),
    ("optim_target_modules", 3),
    ("optim_target_modules", ["ffn", "("]),
    ("learning_rate", "3e-4"),
    ("learning_rate", -1e-3),
    ("learning_rate", float("nan")),
    ("learning_rate", True),
    ("learning_rate", 10**400),
    ("learning_rate", [1e-3]),
    ("weight_decay", -0.1),
    ("adam_beta1", 1.0),
    ("adam_beta1", -0.1),
    ("adam_beta2", 1),
    ("adam_epsilon", 0.0),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", None),
    ("parameter_groups", {"match": "a"}),
    ("parameter_groups", ["a"]),
    ("parameter_groups", "match=a"),
    ("parameter_groups", [{"match": int}]),
    ("predict_with_generate", 1),
    ("generation_max_length", 0),
    ("generation_kwargs", "num_beams=2"),
    ("lr_scheduler_type", 1),
    ("lr_scheduler_kwargs", "num_cycles=2"),
    ("lr_scheduler_kwargs", "{'a': 1}"),
    ("lr_scheduler_kwargs", "[1]"),
    ("lr_scheduler_kwargs", '{"a": NaN}'),
    ("lr_scheduler_kwargs", 0.5),
    ("warmup_steps", -1),
    ("warmup_steps", 10.5),
    ("warmup_steps", "0.1"),
    ("warmup_steps", True),
    ("logging_strategy", "best"),
    ("logging_strategy", False),
    ("logging_steps", 0),
    ("logging_steps", -5),
    ("logging_steps", 1.5),
    ("report_to", ["none", "json"]),
    ("report_to", ["json", ""]),
    ("report_to", ["json", None]),
    ("report_to", 1),
    ("project", ""),
    ("log_level", "loud"),
    ("include_num_input_tokens_seen", 1),
    ("include_num_input_tokens_seen", "some"),
    ("skip_memory_metrics", 0),
    ("eval_minutes", 0),
    ("save_minutes", -1.0),
    ("report_to", [["json"]]),
    ("run_name", ""),
    ("run_name", 7),
    ("eval_strategy", "always"),
    ("eval_strategy", "best"),
    ("eval_steps", 2.5),
    ("eval_steps", -0.5),
    ("eval_delay", -1),
    ("include_for_metrics", ["labels"]),
    ("include_for_metrics", 1),
    ("save_strategy", "Steps"),
    ("save_strategy", None),
    ("save_steps", 0),
    ("save_steps", 100.25),
    ("save_total_limit", 0),
    ("save_total_limit", -1),
    ("metric_for_best_model", ""),
    ("resume_from_checkpoint", ""),
    ("resume_from_checkpoint", 1),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 4.2),
    ("seed", None),
    ("data_seed", -1),
    ("dataloader_num_workers", -1),
    ("steps_per_epoch", 0),
    ("dataloader_num_workers", True),
    ("dataloader_prefetch_factor", 0),
    ("dataloader_multiprocessing_context", "fork"),
    ("train_sampling_strategy", "sorted"),
    ("length_column_name", ""),
    ("on_nonfinite", "warn"),
    ("on_nonfinite", False),
    ("jit_compile", 1),
    ("steps_per_execution", 0),
    ("label_smoothing_factor", 1.0),
    ("fp16", 1),
    ("steps_per_execution", 1.5),
    ("steps_per_execution", True),
    ("steps_per_execution", "all"),
    ("jit_compile", "true"),
    ("jit_compile", None),
    *((name, 1) for name in FLAGS),
    *((name, "true") for name in FLAGS),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda item: repr(item)[:30])
def test_a_refused_value_is_named_with_its_field(name, value):
    message = refusal(**{name: value})
    assert f"`{name}`" in message
    assert f"{name}={repr(value)[:200]}" in message


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("00:00:30", 30.0), ("1:02:03", 3723.0), ("100:00:00", 360_000.0), ("2-01:00:00", 176_400.0),
     (90, 90.0), (0.5, 0.5)],
)  # fmt: skip
def test_max_time_is_kept_in_seconds(given, seconds):
    assert TrainingArguments(max_time=given).max_time == seconds


def test_the_hint_about_numbers_is_for_numbers():
    assert "written as text" not in refusal(eval_strategy="3")
    assert "written as text" not in refusal(learning_rate="small")


def test_a_large_value_does_not_drown_the_message():
    assert len(refusal(learning_rate=[0.5] * 10**5)) < 1000
    assert len(refusal(no_cuda=[0.5] * 10**5)) < 1000


def test_every_field_refuses_something():
    assert set(FIELDS) - {name for name, _ in REFUSED} == set()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"learning_rate": "3e-4"}, "3.0e-4"),
        ({"eval_strategy": False}, "write 'no' with quotes"),
        ({"max_grad_norm": None}, "0 turns clipping off"),
        ({"max_steps": 0}, "at least 1, or -1"),
        ({"save_steps": 0}, "save_strategy='no'"),
        ({"num_train_epochs": 0}, "max_steps > 0"),
    ],
)
def test_messages_say_what_to_do(arguments, remedy):
    assert remedy in refusal(**arguments)


class Interval(str, enum.Enum):  # noqa: UP042 - the kind of enum the reference uses
    EPOCH = "epoch"


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("output_dir", os.path.join("~", "runs"), os.path.join(os.path.expanduser("~"), "runs")),
        ("num_train_epochs", 2, 2.0),
        ("learning_rate", np.float64(3e-4), 3e-4),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", 1, 1.0),
        ("per_device_train_batch_size", np.int64(16), 16),
        ("bf16", np.bool_(True), True),
        ("warmup_steps", 100.0, 100),
        ("warmup_steps", np.float32(0.25), 0.25),
        ("warmup_steps", 1.0, 1),
        ("logging_steps", 10.0, 10),
        ("save_steps", 0.2, 0.2),
        ("eval_strategy", Interval.EPOCH, "epoch"),
        ("devices", 1, "gpu:1"),
        ("debug", "", ()),
        ("debug", None, ()),
        ("debug", "underflow_overflow", ("underflow_overflow",)),
        ("ema", 0.99, {"decay": 0.99}),
        ("ema", True, {}),
        ("ema", False, None),
        ("ema", {"decay": 0.9, "warmup": False}, {"decay": 0.9, "warmup": False}),
        ("devices", [0], "gpu:0"),
        ("devices", "cuda:1", "gpu:1"),
        ("devices", ["cpu"], "cpu"),
        ("fsdp", False, None),
        ("fsdp", "", None),
        ("parallelism_config", None, None),
        ("optim", "adamw_torch", "adamw"),
        ("optim", "adamw_torch_fused", "adamw"),
        ("optim", "adamw_torch_xla", "adamw"),
        ("optim", "adamw_torch_npu_fused", "adamw"),
        ("optim", "lion", "lion"),
        ("optim_args", "", {}),
        ("optim_args", "a=1, b=2.5,c=1e-3", {"a": 1, "b": 2.5, "c": 1e-3}),
        ("optim_args", "a=true,b=False,c=x=y", {"a": True, "b": False, "c": "x=y"}),
        ("optim_args", '{"a": [1, 2]}', {"a": (1, 2)}),
        (
            "parameter_groups",
            [{"match": "a", "lr_multiplier": 2}],
            ({"match": "a", "lr_multiplier": 2},),
        ),
        ("parameter_groups", '[{"match": "a"}]', ({"match": "a"},)),
        ("optim_target_modules", "all-linear", ("all-linear",)),
        ("optim_target_modules", ["ffn", "attention"], ("ffn", "attention")),
        ("lr_scheduler_kwargs", '{"num_cycles": 2, "x": null}', {"num_cycles": 2, "x": None}),
        ("lr_scheduler_kwargs", {"power": np.float64(2.0)}, {"power": 2.0}),
        ("report_to", "all", ("all",)),
        ("include_num_input_tokens_seen", True, "all"),
        ("include_num_input_tokens_seen", False, "no"),
        ("report_to", ["all", "json"], ("all",)),
        ("report_to", {"wandb", "csv"}, ("csv", "wandb")),
        ("report_to", ["of_a_package"], ("of_a_package",)),
        ("report_to", "none", ()),
        ("report_to", [], ()),
        ("report_to", None, ()),
        ("report_to", ["none"], ()),
        ("report_to", ["json", "json"], ("json",)),
        ("include_for_metrics", ["loss", "inputs"], ("inputs", "loss")),
        ("include_for_metrics", "loss", ("loss",)),
        ("resume_from_checkpoint", False, None),
        ("resume_from_checkpoint", True, True),
        ("resume_from_checkpoint", "auto", "auto"),
        ("data_seed", np.uint8(7), 7),
        ("jit_compile", np.bool_(False), False),
    ],
    # Sorted: pytest-xdist wants the same names in every process, and sets have no order.
    ids=lambda item: str(sorted(item)) if isinstance(item, set) else str(item),
)
def test_values_are_stored_in_one_normal_form(name, given, stored):
    value = getattr(TrainingArguments(**{name: given}), name)
    assert value == stored
    if not isinstance(stored, dict):
        assert type(value) is type(stored)


def test_parsed_options_have_pythons_own_types():
    parsed = TrainingArguments(optim_args="a=1,b=2.0,c=true,d=text").optim_args
    assert [type(parsed[key]) for key in "abcd"] == [int, float, bool, str]


def test_paths_may_be_pathlike(tmp_path):
    args = TrainingArguments(output_dir=tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert args.output_dir == str(tmp_path)
    assert args.resume_from_checkpoint == str(tmp_path / "checkpoint-1")
    assert list(tmp_path.iterdir()) == []


# --- several fields ------------------------------------------------------------------------------


def test_max_steps_makes_epochs_irrelevant():
    assert TrainingArguments(max_steps=5, num_train_epochs=0).max_steps == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_strategy": "best"},
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "save_strategy": "no"},
        {"load_best_model_at_end": True, "save_strategy": "best"},
        {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "steps"},
        {"eval_strategy": "steps", "eval_steps": 0},
        {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
    ],
    ids=str,
)
def test_strategies_that_contradict_each_other(arguments):
    message = refusal(**arguments)
    assert "eval_" in message
    assert "Received: " in message


def test_persistent_workers_need_workers():
    assert "dataloader_num_workers=0" in refusal(dataloader_persistent_workers=True)
    TrainingArguments(dataloader_persistent_workers=True, dataloader_num_workers=1)


def best(save_steps, eval_steps, **more):
    return {
        **{"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
        **{"save_steps": save_steps, "eval_steps": eval_steps, **more},
    }


@pytest.mark.parametrize(
    ("save_steps", "eval_steps"),
    [(100, 60), (50, 100), (10**10 + 1, 10**10), (0.25, 0.1), (0.1, 0.2), (100, 0.1)],
)
def test_saves_must_fall_on_evaluations(save_steps, eval_steps):
    message = refusal(**best(save_steps, eval_steps))
    assert f"save_steps={save_steps}" in message
    assert f"eval_steps={eval_steps}" in message
    assert "save_strategy='best'" in message


@pytest.mark.parametrize(("save_steps", "eval_steps"), [(100, 50), (7, 7), (0.3, 0.1), (0.6, 0.2)])
def test_saves_that_fall_on_evaluations(save_steps, eval_steps):
    args = TrainingArguments(**best(save_steps, eval_steps))
    assert (args.save_steps, args.eval_steps) == (save_steps, eval_steps)


def test_ratios_are_compared_as_steps_once_the_steps_are_known():
    # ceil(0.2 * 24) = 5 is no multiple of ceil(0.1 * 24) = 3, although 0.2 is one of 0.1.
    assert "save_steps=5, eval_steps=3" in refusal(**best(0.2, 0.1, max_steps=24))
    assert TrainingArguments(**best(0.2, 0.1, max_steps=20)).max_steps == 20
    # 60 steps are a tenth of 600, so a count and a ratio can fit, but only when that is known.
    assert TrainingArguments(**best(120, 0.1, max_steps=600)).save_steps == 120
    with pytest.raises(ConfigurationError, match="save_steps=5, eval_steps=3"):
        check_saves_follow_evaluations(5, 3)


def test_two_names_of_one_setting():
    args = TrainingArguments(gradient_checkpointing=True)
    assert args.activation_checkpointing is True
    assert args.replace(activation_checkpointing=False).gradient_checkpointing is False
    assert args.replace(seed=1).gradient_checkpointing is True
    given = TrainingArguments(activation_checkpointing_kwargs={"every_n_layers": 2})
    assert given.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    message = refusal(gradient_checkpointing=True, activation_checkpointing=False)
    assert "two names of one setting" in message


def test_do_eval_follows_the_strategy_and_two_devices_contradict():
    assert TrainingArguments(eval_strategy="epoch").do_eval is True
    assert TrainingArguments(do_eval=True).do_eval is True
    assert TrainingArguments(use_cpu=True, devices="cpu:0").chosen_device == "cpu"
    assert TrainingArguments(devices="gpu:1").chosen_device == "gpu:1"
    assert "two different devices" in refusal(use_cpu=True, devices="gpu")


def test_eval_steps_follow_logging_steps_when_they_are_needed():
    assert TrainingArguments(eval_strategy="steps", logging_steps=20).eval_steps == 20
    assert TrainingArguments(eval_strategy="steps", logging_steps=20, eval_steps=5).eval_steps == 5
    assert TrainingArguments(eval_strategy="epoch", logging_steps=20).eval_steps is None


@pytest.mark.parametrize(
    ("arguments", "metric", "greater"),
    [
        ({}, None, None),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "loss", False),
        (best(10, 10), "loss", False),
        (best(10, 10, metric_for_best_model="accuracy"), "accuracy", True),
        (best(10, 10, metric_for_best_model="eval_loss"), "eval_loss", False),
        (best(10, 10, metric_for_best_model="loss_ratio"), "loss_ratio", True),
        (best(10, 10, metric_for_best_model="wer", greater_is_better=False), "wer", False),
        ({"metric_for_best_model": "f1"}, "f1", True),
    ],
    ids=str,
)
def test_the_best_metric_and_its_direction_are_derived(arguments, metric, greater):
    args = TrainingArguments(**arguments)
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is greater


# --- names that do not exist ---------------------------------------------------------------------


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
    assert f"`{name}` has another name or form here. Received: {name}=1." in refusal(**{name: 1})


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


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
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


# --- values --------------------------------------------------------------------------------------


def test_equal_settings_compare_equal_and_hash_alike():
    one = TrainingArguments(
        optim="adamw_torch", optim_args="a=1", report_to="json", warmup_steps=5.0
    )
    other = TrainingArguments(optim_args={"a": 1}, report_to=["json"], warmup_steps=5)
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, TrainingArguments()}) == 2
    assert one != other.replace(seed=1)
    assert repr(one) == repr(other)


def test_fields_cannot_be_assigned_or_deleted():
    args = TrainingArguments()
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        del args.seed
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.unknown = 1


def test_containers_are_copied_on_the_way_in():
    given = {"betas": [0.9, 0.99], "nested": {"a": 1}}
    included = ["inputs"]
    args = TrainingArguments(optim_args=given, include_for_metrics=included)
    given["betas"].append(1)
    given["nested"]["a"] = 2
    included.append("loss")
    assert args.optim_args == {"betas": (0.9, 0.99), "nested": {"a": 1}}
    assert args.include_for_metrics == ("inputs",)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(a=2),
        lambda d: d.__setitem__("a", 2),
        lambda d: d.__delitem__("a"),
        lambda d: d.__ior__({"a": 2}),
        lambda d: d.pop("a"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
        lambda d: d.setdefault("b", 2),
        lambda d: d["nested"].update(a=2),
    ],
)
def test_stored_options_cannot_be_changed(change):
    args = TrainingArguments(optim_args={"a": 1, "nested": {}})
    with pytest.raises(TypeError, match=r"args\.replace"):
        change(args.optim_args)
    assert args.optim_args == {"a": 1, "nested": {}}


def test_containers_are_copied_on_the_way_out():
    args = TrainingArguments(optim_args={"a": [1], "n": {"b": 1}}, include_for_metrics=["loss"])
    before = args.to_json_string()
    out = args.to_dict()
    assert type(out["optim_args"]) is dict
    assert type(out["optim_args"]["n"]) is dict
    out["optim_args"]["a"].append(2)
    out["optim_args"]["n"]["b"] = 2
    out["include_for_metrics"].append("inputs")
    assert args.to_json_string() == before


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_are_equal(duplicate):
    args = TrainingArguments(**best(20, 10), optim_args={"a": {"b": [1]}})
    assert duplicate(args) == args
    assert duplicate(args).optim_args == {"a": {"b": (1,)}}
    assert hash(duplicate(args)) == hash(args)


def test_replace_checks_and_leaves_the_original_alone():
    args = TrainingArguments(learning_rate=0.1)
    assert args.replace(learning_rate=0.2, optim_args="a=1") == TrainingArguments(
        learning_rate=0.2, optim_args={"a": 1}
    )
    assert args.learning_rate == 0.1
    with pytest.raises(ConfigurationError, match="learning_rate=-1"):
        args.replace(learning_rate=-1)
    with pytest.raises(ConfigurationError, match="warmup_steps=0.1"):
        args.replace(warmup_ratio=0.1)


def test_what_was_chosen_is_known_and_survives_copies():
    default, chosen = TrainingArguments(), TrainingArguments(max_grad_norm=1.0)
    assert default == chosen
    assert not default.is_set("max_grad_norm")
    assert chosen.is_set("max_grad_norm")
    assert not chosen.is_set("learning_rate")
    for copied in (chosen.replace(seed=1), copy.copy(chosen), copy.deepcopy(chosen)):
        assert copied.is_set("max_grad_norm")
        assert not copied.is_set("learning_rate")
    assert default.replace(max_grad_norm=1.0).is_set("max_grad_norm")
    # A document has every field, so there a default is what nobody chose.
    document = default.replace(learning_rate=1e-3).to_json_string()
    read = TrainingArguments.from_json_string(document)
    assert read.is_set("learning_rate")
    assert not read.is_set("max_grad_norm")
    assert TrainingArguments.from_dict({"max_grad_norm": 1.0}).is_set("max_grad_norm")
    (parsed,) = ArgumentParser(TrainingArguments).parse_args(["--max_grad_norm", "1.0"])
    assert parsed.is_set("max_grad_norm")
    assert not parsed.is_set("learning_rate")
    with pytest.raises(ConfigurationError, match="max_grad_norm"):
        chosen.is_set("max_grad_nrm")


def test_replacing_the_best_metric_derives_its_direction_anew():
    args = TrainingArguments(**best(10, 10))
    assert args.greater_is_better is False
    assert args.replace(metric_for_best_model="accuracy").greater_is_better is True
    wer = args.replace(metric_for_best_model="wer", greater_is_better=False)
    assert wer.greater_is_better is False


# --- dict and JSON -------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
numbers = st.floats(0, 1e6, allow_subnormal=True)
steps = st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True, exclude_max=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "Infinity" not in json.dumps(value))

some_arguments = st.fixed_dictionaries(
    {},
    optional={
        "output_dir": names.map("runs/{}".format),
        "num_train_epochs": numbers.filter(bool),
        "max_steps": st.integers(1, 2**40),
        "learning_rate": numbers,
        "adam_epsilon": st.floats(0, 1, exclude_min=True, allow_subnormal=True),
        "warmup_steps": steps,
        "logging_steps": steps,
        "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
        "eval_steps": steps,
        "optim_args": st.dictionaries(st.text(), json_values, max_size=3),
        "lr_scheduler_kwargs": st.dictionaries(st.text(), json_values, max_size=3),
        "report_to": st.sampled_from(["none", "all", "json", ["json"], []]),
        "include_for_metrics": st.lists(st.sampled_from(["inputs", "loss"])),
        "metric_for_best_model": names,
        "seed": st.integers(0, 2**32 - 1),
        "jit_compile": st.sampled_from(["auto", True, False]),
        "steps_per_execution": st.sampled_from(["auto", 1, 32]),
        "resume_from_checkpoint": st.sampled_from([None, True, "auto", "checkpoint-5"]),
    },
)


@given(some_arguments)
@settings(max_examples=100, deadline=None)
def test_dict_and_json_round_trips_are_exact(arguments):
    args = TrainingArguments(**arguments)
    again = TrainingArguments.from_json_string(args.to_json_string())
    assert again == args == TrainingArguments.from_dict(args.to_dict())
    assert again.to_dict() == args.to_dict()
    assert repr(again) == repr(args)
    assert hash(again) == hash(args)


def test_json_files(tmp_path):
    args = TrainingArguments(run_name="Übung", learning_rate=0.1 + 0.2)
    args.to_json_file(tmp_path / "args.json")
    assert TrainingArguments.from_json_file(str(tmp_path / "args.json")) == args
    written = (tmp_path / "args.json").read_text(encoding="utf-8")
    assert json.loads(written)["learning_rate"] == 0.30000000000000004
    with pytest.raises(FileNotFoundError):
        TrainingArguments.from_json_file(tmp_path / "missing.json")


@pytest.mark.parametrize("text", ["{", "[1]", "null", '"a"'])
def test_what_is_not_a_json_object_is_refused(text):
    with pytest.raises(ConfigurationError, match="Received"):
        TrainingArguments.from_json_string(text)


def test_from_dict_explains_unknown_keys():
    with pytest.raises(ConfigurationError, match="use_cpu=True"):
        TrainingArguments.from_dict({"no_cuda": True})
    with pytest.raises(ConfigurationError, match="mapping of field names"):
        TrainingArguments.from_dict({1: 2})


def test_sanitized_dict_has_scalars_only_and_the_batch_sizes():
    args = TrainingArguments(per_device_train_batch_size=4, optim_args={"a": 1})
    clean = args.to_sanitized_dict()
    assert set(clean) == set(FIELDS) | {"train_batch_size", "eval_batch_size"}
    assert {type(value) for value in clean.values()} == {bool, int, float, str}
    assert (clean["train_batch_size"], clean["eval_batch_size"]) == (4, 8)
    assert clean["optim_args"] == "{'a': 1}"
    assert clean["run_name"] == "None"


# --- steps ---------------------------------------------------------------------------------------

# warmup_steps, steps of the run -> get_warmup_steps of transformers 5.23.0
WARMUP_GOLDEN = [(0.1, 24, 3), (0.05, 10, 1), (0.5, 5, 3), (5, 100, 5), (1, 10, 1), (0.999, 10, 10)]


@pytest.mark.parametrize(("warmup_steps", "total", "expected"), [*WARMUP_GOLDEN, (0, 10, 0)])
def test_warmup_steps_match_the_reference(warmup_steps, total, expected):
    found = TrainingArguments(warmup_steps=warmup_steps).get_warmup_steps(total)
    assert (found, type(found)) == (expected, int)


@given(st.integers(1, 999), st.integers(1, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_ratio_is_rounded_up_exactly(thousandths, total):
    # Exact in whole numbers: ceil(thousandths * total / 1000), free of float rounding.
    assert resolve_steps(thousandths / 1000, total) == -(-thousandths * total // 1000)


def test_float_noise_adds_no_step():
    assert 0.07 * 100 > 7
    assert resolve_steps(0.07, 100) == 7
    assert resolve_steps(1e-300, 10) == 1


@pytest.mark.parametrize(("value", "total"), [(0.1, 0), (0.1, -1), (-1, 10), (1.5, 10), (True, 10)])
def test_steps_that_cannot_be_resolved(value, total):
    with pytest.raises(ConfigurationError, match=f"value={value}"):
        resolve_steps(value, total)
