"""TrainingArguments: fields, defaults, values, copies, steps. Expected numbers are literals."""

import copy
import dataclasses
import inspect
import os
import subprocess
import sys
import typing

import pytest
from helpers_arguments import FIELDS, best
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.config.argument_parser import ArgumentParser
from kbtrain.config.training_args import TrainingArguments
from kbtrain.config.validation import resolve_steps
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.core

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
    "profile": (False, False),
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
    "cuda_graphs": ("auto", "auto"),
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
    "split_batches": (False, False),
    "log_on_each_node": (True, True),
    "log_level_replica": ("warning", "warning"),
    "save_on_each_node": (False, False),
    "fsdp": (None, None),
    "fsdp_config": (None, None),
    "parallelism_config": (None, None),
    "ddp_backend": (None, None),
    "ddp_timeout": (1800, 1800),
    "ddp_bucket_cap_mb": (None, None),
    "push_to_hub": (False, False),
    "hub_model_id": (None, None),
    "hub_strategy": ("every_save", "every_save"),
    "hub_token": (None, None),
    "hub_private_repo": (None, None),
    "hub_always_push": (False, False),
    "hub_revision": (None, None),
    "do_train": (False, False),
    "do_eval": (False, False),
    "do_predict": (False, False),
}


# --- names, defaults, help -----------------------------------------------------------------------


def test_the_list_of_fields_and_defaults_is_frozen():
    assert {name: field.default for name, field in FIELDS.items()} == {
        name: declared for name, (declared, _) in FROZEN.items()
    }
    assert TrainingArguments().to_dict() == {name: stored for name, (_, stored) in FROZEN.items()}


def test_every_field_has_a_help_text_a_converter_and_a_place_in_the_class_docstring():
    documented = " ".join(TrainingArguments.__doc__.split())
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 20, name
        assert field.metadata["help"].endswith("."), name
        assert callable(field.metadata["converter"]), name
        written = f"{name} (default {field.default!r}): {field.metadata['help']}"
        assert " ".join(written.split()) in documented


def test_signature_names_every_field_and_type_hints_resolve():
    parameters = inspect.signature(TrainingArguments).parameters
    assert list(parameters) == list(FIELDS)
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["output_dir"]
    keywords = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert by_position + keywords == list(FIELDS)
    hints = typing.get_type_hints(TrainingArguments)
    assert hints["save_total_limit"] == int | None


def test_importing_and_building_loads_no_framework():
    program = (
        "import sys; from kbtrain.config.training_args import TrainingArguments as Arguments;"
        "Arguments();"
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
