"""Arguments as a dict and as JSON, there and back."""

import json

import pytest
from helpers_arguments import FIELDS
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.core

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


def test_json_files_are_read_back_exactly(tmp_path):
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
