"""The command line of dataclasses: options, files, overrides, mistakes."""

import argparse
import dataclasses
import enum
import importlib
import json
import re
import sys
import types
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain import ArgumentParser, TrainingArguments
from kbtrain.config import argument_parser
from kbtrain.config import yaml as yaml_text
from kbtrain.errors import ConfigurationError


class Pooling(enum.Enum):
    MEAN = "mean"
    MAX = "max"


@dataclasses.dataclass
class ModelArguments:
    name: str
    width: int = dataclasses.field(default=64, metadata={"help": "Hidden units, 100% of them."})
    pooling: Pooling = Pooling.MEAN
    other: Pooling | None = None
    layers: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    table: dict[str, int] | None = None
    folder: Path = Path("x")
    bias: bool = True
    title: str | None = dataclasses.field(default=None, metadata={"aliases": ["-t"]})


def parse(line, *types):
    return ArgumentParser(*(types or (TrainingArguments,))).parse_args(line.split())


def refusal(capsys, line, *types):
    """What is printed for a command line that is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(line, *types)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


@pytest.mark.core
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--learning_rate 3e-4", {"learning_rate": 3e-4}),
        ("--learning-rate=3e-4", {"learning_rate": 3e-4}),
        ("--max_steps 7 --warmup-steps 0.1", {"max_steps": 7, "warmup_steps": 0.1}),
        ("--bf16", {"bf16": True}),
        ("--bf16 false --use_cpu true", {"bf16": False, "use_cpu": True}),
        ("--jit_compile", {"jit_compile": True}),
        ("--jit_compile auto", {"jit_compile": "auto"}),
        ("--jit_compile false", {"jit_compile": False}),
        ("--resume_from_checkpoint", {"resume_from_checkpoint": True}),
        ("--resume-from-checkpoint auto", {"resume_from_checkpoint": "auto"}),
        ("--report_to json", {"report_to": ["json"]}),
        ("--include_for_metrics inputs loss", {"include_for_metrics": ["inputs", "loss"]}),
        ("--optim_args beta_1=0.5,x=y", {"optim_args": {"beta_1": 0.5, "x": "y"}}),
        ('--lr_scheduler_kwargs {"a":{"b":[1]}}', {"lr_scheduler_kwargs": {"a": {"b": [1]}}}),
        ("--save_total_limit null", {"save_total_limit": None}),
        ("--run_name 2024", {"run_name": "2024"}),
        ("--output_dir 7", {"output_dir": "7"}),
        ("--bf16=0 --use-cpu 1", {"bf16": False, "use_cpu": True}),
        ("--no_remove_unused_columns", {"remove_unused_columns": False}),
        ("--no-save-async --seed 1", {"save_async": False, "seed": 1}),
        ("--resume_from_checkpoint True", {"resume_from_checkpoint": True}),
        ("--include_num_input_tokens_seen true", {"include_num_input_tokens_seen": "all"}),
        ("--max_time 90", {"max_time": 90.0}),
    ],
)
def test_options_become_fields(line, expected):
    (args,) = parse(line)
    assert args == TrainingArguments(**expected)
    assert {name: args.to_dict()[name] for name in expected} == expected


def test_both_spellings_exist_for_every_field():
    for field in dataclasses.fields(TrainingArguments):
        options = argument_parser._Field(field, str).options()
        assert f"--{field.name}" in options
        assert f"--{field.name.replace('_', '-')}" in options


@pytest.mark.core
def test_what_follows_from_other_fields_follows_from_the_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("eval_strategy: steps\nlogging_steps: 100\n")
    (args,) = parse(f"--config {file} --logging_steps 50")
    assert args.eval_steps == 50


def test_dataclasses_of_ones_own_beside_the_training_arguments():
    line = (
        '--name a --width 3 --pooling max --other mean --layers 4 5 --table {"k":1} '
        "--folder /y --bias false -t T --seed 9"
    )
    model, args = parse(line, ModelArguments, TrainingArguments)
    assert model == ModelArguments(
        "a", 3, Pooling.MAX, Pooling.MEAN, [4, 5], {"k": 1}, Path("/y"), False, "T"
    )
    assert args == TrainingArguments(seed=9)
    assert ArgumentParser((ModelArguments, TrainingArguments)).types == (
        ModelArguments,
        TrainingArguments,
    )


def test_defaults_are_those_of_the_dataclass():
    (model,) = parse("--name a", ModelArguments)
    assert model == ModelArguments("a")
    assert parse("")[0] == TrainingArguments()


@pytest.mark.core
def test_files_and_overrides_in_their_order(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("name: q\nlearning_rate: 3e-4\neval_strategy: no\npooling: max\nwidth: 1\n")
    second.write_text(json.dumps({"width": 2, "seed": 5, "layers": [7]}))
    model, args = parse(
        f"--seed 6 --config {first} --config {second}", ModelArguments, TrainingArguments
    )
    assert model == ModelArguments("q", 2, Pooling.MAX, layers=[7])
    assert args == TrainingArguments(learning_rate=3e-4, seed=6)


def test_mappings_and_files_without_a_command_line(tmp_path):
    both = ArgumentParser(ModelArguments, TrainingArguments)
    values = {"name": "n", "pooling": "max", "other": Pooling.MAX, "seed": 3}
    expected = (
        ModelArguments("n", pooling=Pooling.MAX, other=Pooling.MAX),
        TrainingArguments(seed=3),
    )
    assert both.parse_dict(values) == expected
    assert both.parse_dict(values | {"stranger": 1}, allow_extra_keys=True) == expected
    file = tmp_path / "x.json"
    file.write_text(json.dumps(values | {"other": "max"}))
    assert both.parse_json_file(file) == expected
    assert both.parse_yaml_file(_renamed(file, "x.yaml")) == expected
    with pytest.raises(ConfigurationError, match="no argument `stranger`"):
        both.parse_dict(values | {"stranger": 1})
    with pytest.raises(ConfigurationError, match="width"):
        both.parse_dict(values | {"width": "wide"})
    with pytest.raises(ConfigurationError, match="name"):
        both.parse_dict({})


def _renamed(path, name):
    return path.rename(path.with_name(name))


def test_the_words_of_the_process_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "4"])
    (args,) = ArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    assert args.seed == 4


@pytest.mark.core
@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("--max_time 01:30:00", {"max_time": "01:30:00"}),
        ("--ema 0.99", {"ema": 0.99}),
        ("--ema", {"ema": True}),
        ('--ema {"decay":0.9}', {"ema": {"decay": 0.9}}),
        ('--parameter_groups [{"match":"a"}]', {"parameter_groups": [{"match": "a"}]}),
        (
            '--parameter_groups {"match":"a"} {"match":"b"}',
            {"parameter_groups": [{"match": "a"}, {"match": "b"}]},
        ),
    ],
)
def test_an_option_takes_what_the_argument_takes(line, given):
    assert parse(line) == (TrainingArguments(**given),)


@pytest.mark.core
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--no_bf16", "no_bf16"),
        ("--bf16 maybe", "maybe"),
        ("--max_time soon", "HH:MM:SS"),
        ("--evaluation_strategy epoch", "Write eval_strategy='epoch'"),
        ("--warmup-ratio=0.1", "Write warmup_steps="),
        ("--no_cuda", "Write use_cpu"),
        ("--push_to_hub_token abc", "<PUSH_TO_HUB_TOKEN>"),
        ("--learnin_rate 3", "Did you mean learning_rate"),
        ("--learning_rate fast", "learning_rate"),
        ("--learning_rate -1", "at least 0"),
        ("--max_steps 2.5", "max_steps"),
        ("--save_strategy sometimes", "sometimes"),
        ("--save_strategy best", "eval_strategy='no'"),
        ("--seed", "expected one argument"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("settings.yaml --seed 1", "--config settings.yaml"),
        ("--seed 1 more", "more"),
    ],
)
def test_a_mistake_is_explained_without_a_stack_trace(capsys, line, said):
    printed = refusal(capsys, line)
    assert said in printed
    assert "abc" not in printed
    assert len(printed.splitlines()) < 8


def test_a_required_field_that_is_missing_is_named(capsys):
    assert "Pass --name" in refusal(capsys, "--width 3", ModelArguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("width: wide", "width"),
        ("widht: 3", "Did you mean width"),
        ("width: 3\nwidth: 4", "duplicate key"),
        ("- 1", "mapping"),
        ("a: [", "not YAML"),
        ("3: 4", "mapping"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_or_the_field(capsys, tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert said in refusal(capsys, f"--name a --config {file}", ModelArguments)


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[1]", "JSON object")])
def test_a_broken_json_file_is_named(capsys, tmp_path, text, said):
    file = tmp_path / "bad.json"
    file.write_text(text)
    printed = refusal(capsys, f"--config {file}")
    assert said in printed
    assert "bad.json" in printed


def test_help_has_types_defaults_and_texts(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", ModelArguments, TrainingArguments)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    # Python 3.13 names the value once.
    assert re.search("--learning_rate( LEARNING_RATE)?, --learning-rate LEARNING_RATE", text)
    assert "Hidden units, 100% of them. (type: int, default: 64)" in text
    for field in dataclasses.fields(TrainingArguments):
        assert field.metadata["help"].split()[0] in text


def test_two_fields_of_one_name_are_refused():
    @dataclasses.dataclass
    class Clash:
        seed: int = 0

    with pytest.raises(ConfigurationError, match="'seed' of Clash.* a field of TrainingArguments"):
        ArgumentParser(TrainingArguments, Clash)
    with pytest.raises(ConfigurationError, match="dataclasses"):
        ArgumentParser(int)
    with pytest.raises(ConfigurationError, match="at least one"):
        ArgumentParser()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kbtrain\[cli\]'"):
        parse("--seed 3")
    with pytest.raises(ConfigurationError, match=r"pip install 'kbtrain\[cli\]'"):
        TrainingArguments().to_yaml_string()


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("'true'", "true"),
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5", -2.5),
        ("10", 10),
        ("010", 10),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("null", None),
        ("", None),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = yaml_text.loads(f"key: {text}", "text")["key"]
    assert read == value
    assert type(read) is type(value)


def test_yaml_round_trip(tmp_path):
    args = TrainingArguments(
        output_dir="a: b", eval_strategy="no", learning_rate=1e-7, optim_args={"x": [1, "no"]}
    )
    args.to_yaml_file(tmp_path / "a.yaml")
    assert TrainingArguments.from_yaml_file(tmp_path / "a.yaml") == args
    with pytest.raises(ConfigurationError, match="warmup_steps"):
        TrainingArguments.from_yaml_string("warmup_ratio: 0.1")


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=6), st.one_of(SCALARS, st.lists(SCALARS, max_size=3))))
def test_what_is_written_reads_back(values):
    assert yaml_text.loads(yaml_text.dumps(values), "text") == values


# --- parsers that go by annotations --------------------------------------------------------------


class ByAnnotation(argparse.ArgumentParser):
    """The rules of transformers' HfArgumentParser, which CI does not install."""

    def __init__(self, cls):
        super().__init__()
        self.cls = cls
        for field in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls)[field.name]
            members = typing.get_args(hint)
            if typing.get_origin(hint) in (typing.Union, types.UnionType):
                assert len(members) == 2
                assert members[1] is type(None)
                hint = hint if bool in members else members[0]
            options = {**dict(field.metadata), "default": field.default}
            if typing.get_origin(hint) is typing.Literal:
                options |= {"choices": typing.get_args(hint)}
            elif hint is bool or hint == bool | None:
                options |= {"type": json.loads}
                if hint is bool:
                    options |= {"nargs": "?", "const": True}
            elif typing.get_origin(hint) is list:
                options |= {"type": typing.get_args(hint)[0], "nargs": "+"}
                del options["default"]
            else:
                options |= {"type": hint}
            self.add_argument(f"--{field.name}", **options)

    def parse_args_into_dataclasses(self, words, **_):
        return (self.cls(**vars(self.parse_args(words))),)


def transformers_parser(cls):
    """The real one, where transformers is installed."""
    return importlib.import_module("transformers").HfArgumentParser(cls)


PARSERS = [ByAnnotation, pytest.param(transformers_parser, marks=pytest.mark.cross)]


@dataclasses.dataclass
class Extended(TrainingArguments):
    beam_width: int = 4


@pytest.mark.parametrize("parser_class", PARSERS)
def test_a_parser_that_goes_by_annotations(parser_class):
    by_annotation = parser_class(Extended)
    assert "Peak learning rate" in " ".join(by_annotation.format_help().split())
    for line, expected in [
        ("--output_dir out --beam_width 2", {"output_dir": "out", "beam_width": 2}),
        ("--learning_rate 3e-4 --bf16", {"learning_rate": 3e-4, "bf16": True}),
        ("--bf16 false --gradient_checkpointing", {"gradient_checkpointing": True}),
        ("--greater_is_better false --tf32 true", {"greater_is_better": False, "tf32": True}),
        ("--report_to csv json", {"report_to": ["csv", "json"]}),
        ("--label_names a --debug underflow_overflow",
         {"label_names": ["a"], "debug": "underflow_overflow"}),
        ("--optim_args beta_1=0.5", {"optim_args": {"beta_1": 0.5}}),
        ('--lr_scheduler_kwargs {"a":{"b":[1]}}', {"lr_scheduler_kwargs": {"a": {"b": [1]}}}),
        ('--parameter_groups [{"match":"a"}]', {"parameter_groups": [{"match": "a"}]}),
        ('--ema {"decay":0.9}', {"ema": {"decay": 0.9}}),
        ("--jit_compile true --steps_per_execution 4",
         {"jit_compile": True, "steps_per_execution": 4}),
        ("--jit_compile auto --steps_per_execution auto", {}),
        ("--resume_from_checkpoint True", {"resume_from_checkpoint": True}),
        ("--resume_from_checkpoint runs/1", {"resume_from_checkpoint": "runs/1"}),
        ("--warmup_steps 0.1 --logging_steps 10", {"warmup_steps": 0.1, "logging_steps": 10}),
        ("--eval_strategy epoch --max_time 60", {"eval_strategy": "epoch", "max_time": 60.0}),
    ]:  # fmt: skip
        (args,) = by_annotation.parse_args_into_dataclasses(line.split(), look_for_args_file=False)
        assert args == Extended(**expected), line
        assert not args.is_set("max_grad_norm")
