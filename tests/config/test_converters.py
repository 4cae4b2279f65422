"""One value at a time: what each field refuses, and the form a value is stored in."""

import enum
import os

import numpy as np
import pytest
from helpers_arguments import FIELDS, refusal

from kbtrain.config.training_args import TrainingArguments

pytestmark = pytest.mark.core

FLAGS = [n for n, f in FIELDS.items() if f.type in ("bool", "bool | None", "FlagOrNone")]


REFUSED = [
    ("save_async", 1),
    *(("debug", value) for value in ("tpu_metrics_debug", "loud", 1)),
    ("gradient_checkpointing_kwargs", "every"),
    ("activation_checkpointing_kwargs", [1]),
    *(("ema", value) for value in (1.0, -0.1, "0.9", [0.9])),
    ("neftune_noise_alpha", 0),
    *(("devices", value) for value in ([0, 0], "", "gpu:", -1, True, [], "gpu:1,2")),
    *(("fsdp", value) for value in ("offload", "hybrid_shard", ["full_shard", "shard_grad_op"], 0)),
    *(("fsdp_config", value) for value in ({"limit_all_gathers": True}, {"min_num_params": -1})),
    *(("fsdp_config", {"layouts": value}) for value in ([], {"a": "fsdp"}, {"a": ["model"]})),
    ("fsdp_config", {"layouts": {"a": ["fsdp", "fsdp"]}}),
    *(("parallelism_config", value) for value in ({"cp_size": 2}, {"model": 2}, {"data": 0}, "x")),
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
    assert "remove the quotes" in refusal(learning_rate="3e-4")
    assert "remove the quotes" not in refusal(eval_strategy="3")
    assert "remove the quotes" not in refusal(learning_rate="small")


def test_a_large_value_does_not_drown_the_message():
    assert len(refusal(learning_rate=[0.5] * 10**5)) < 1000
    assert len(refusal(no_cuda=[0.5] * 10**5)) < 1000


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_an_object_of_no_known_type(name):
    assert f"`{name}` must be " in refusal(**{name: object()})


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"learning_rate": "3e-4"}, "3.0e-4"),
        ({"eval_strategy": False}, "quote it, 'no'"),
        ({"max_grad_norm": None}, "0 turns clipping off"),
        ({"max_steps": 0}, "at least 1, or -1"),
        ({"save_steps": 0}, "save_strategy='no'"),
        ({"num_train_epochs": 0}, "max_steps > 0"),
    ],
)
def test_messages_say_what_to_do(arguments, remedy):
    assert remedy in refusal(**arguments)


class Interval(str, enum.Enum):  # noqa: UP042 - the kind of enum Transformers uses
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
        ("debug", "collectives underflow_overflow", ("underflow_overflow", "collectives")),
        ("ema", 0.99, {"decay": 0.99}),
        ("ema", True, {}),
        ("ema", False, None),
        ("ema", {"decay": 0.9, "warmup": False}, {"decay": 0.9, "warmup": False}),
        ("devices", [0], "gpu:0"),
        ("devices", "cuda:1", "gpu:1"),
        ("devices", ["cpu"], "cpu"),
        ("fsdp", False, None),
        ("fsdp", "", None),
        ("fsdp", True, "full_shard"),
        ("fsdp", "full_shard auto_wrap", "full_shard"),
        ("fsdp", ["shard_grad_op"], "shard_grad_op"),
        ("fsdp_config", {"min_num_params": 0, "xla": False}, {"min_num_params": 0}),
        ("fsdp_config", {"xla_fsdp_v2": False}, None),
        ("fsdp_config", {"layouts": {"a": [None, "tensor"]}}, {"layouts": {"a": (None, "tensor")}}),
        ("parallelism_config", None, None),
        ("parallelism_config", {"tp_size": 2, "dp_shard_size": 4}, {"fsdp": 4, "tensor": 2}),
        ("parallelism_config", '{"data": 2}', {"data": 2}),
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
