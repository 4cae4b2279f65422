"""How TrainingArguments are made: by position, from subclasses, with settings kbtrain has not."""

import abc
import copy
import dataclasses
import enum
import json
import pickle

import numpy as np
import pytest
from paths import ROOT

from kbtrain import ArgumentParser, TrainingArguments
from kbtrain.config.inactive_settings import NEUTRAL, is_inactive
from kbtrain.config.migration import DROPPED, RENAMED
from kbtrain.errors import ConfigurationError, FrozenArgumentsError

NAMES = ROOT / "docs" / "reference" / "names.json"
DEFAULTS_THERE = json.loads(NAMES.read_text(encoding="utf-8"))["sections"]["arguments"]


class HubStrategy(str, enum.Enum):  # noqa: UP042 - the kind of enum Transformers uses
    EVERY_SAVE = "every_save"


@dataclasses.dataclass
class Plain(TrainingArguments):
    beam_width: int = 4
    learning_rate: float = 1e-3  # another default


@dataclasses.dataclass(frozen=True)
class Frozen(TrainingArguments):
    beam_width: int = 4


@dataclasses.dataclass(kw_only=True)
class Required(TrainingArguments):
    beam_width: int


@dataclasses.dataclass
class WithBase(Plain, abc.ABC):
    depth: int = dataclasses.field(default=2, kw_only=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfFrozen(Frozen):
    depth: int = 2


@dataclasses.dataclass(slots=True)
class WithSlots(TrainingArguments):
    beam_width: int = 4


@dataclasses.dataclass
class Decides(TrainingArguments):
    fast: bool = False

    def __post_init__(self):
        if self.fast:
            self.bf16 = True
        super().__post_init__()
        self.logging_steps = self.eval_steps or 10.0


# --- by position ---------------------------------------------------------------------------------


def test_the_output_directory_may_be_given_by_position(tmp_path):
    assert TrainingArguments("out").output_dir == "out"
    assert TrainingArguments(tmp_path, seed=1) == TrainingArguments(output_dir=tmp_path, seed=1)
    assert Frozen("out", 3).beam_width == 3


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (("out", 8), {}, "output_dir by position and all other arguments by name.*'out', 8"),
        (
            ("out",),
            {"output_dir": "b"},
            "both by position and by name.*'out'; output_dir='b'",
        ),
        ((3,), {}, "`output_dir` must be a path"),
    ],
)
def test_what_is_wrong_with_values_by_position(args, kwargs, said):
    with pytest.raises(ConfigurationError, match=said):
        TrainingArguments(*args, **kwargs)


# --- subclasses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Plain, Frozen, Required, WithBase, WithSlots, OfFrozen])
def test_a_subclass_is_a_dataclass_frozen_or_not(cls):
    args = cls(output_dir="out", beam_width=2, seed=1)
    assert (args.output_dir, args.beam_width, args.seed) == ("out", 2, 1)
    assert cls.from_json_string(args.to_json_string()) == args
    assert args.replace(seed=2).beam_width == 2
    assert len({args, cls(output_dir="out", beam_width=2, seed=1)}) == 1
    assert dataclasses.asdict(args)["beam_width"] == 2
    with pytest.raises(ConfigurationError, match="Did you mean beam_width"):
        cls(output_dir="out", beam_width=1, beam_widht=2)
    for duplicate in (copy.copy, copy.deepcopy, dataclasses.replace, reloaded):
        assert duplicate(args) == args
        with pytest.raises(dataclasses.FrozenInstanceError):
            duplicate(args).seed = 3


def reloaded(args):
    return pickle.loads(pickle.dumps(args))


def test_another_default_in_a_subclass_is_checked_like_the_field():
    assert Plain().learning_rate == 1e-3
    with pytest.raises(ConfigurationError, match="`learning_rate` must be a finite number"):
        Plain(learning_rate="fast")


def test_what_a_subclass_sets_after_the_checks_is_checked_as_well():
    args = Decides(fast=True, eval_strategy="steps", eval_steps=7)
    assert (args.bf16, args.logging_steps) == (True, 7)
    assert type(Decides().logging_steps) is int
    assert Decides(fast=True).replace(seed=1).bf16 is True
    with pytest.raises(ConfigurationError, match="bf16=True, fp16=True"):
        Decides(fast=True, fp16=True)


def test_an_annotation_in_a_class_that_is_no_dataclass_is_explained():
    class Forgot(TrainingArguments):
        beam_width: int = 4

    with pytest.raises(ConfigurationError, match="@dataclasses.dataclass above class Forgot"):
        Forgot(beam_width=3)


def test_an_init_of_ones_own():
    class Own(TrainingArguments):
        def __init__(self, beam_width, **kwargs):
            super().__init__(**kwargs)
            self.beam_width = beam_width

    assert (Own(3, seed=1).beam_width, Own(3, seed=1).seed) == (3, 1)


# --- changes -------------------------------------------------------------------------------------


def test_a_change_says_how_to_make_a_changed_copy():
    args = TrainingArguments()
    with pytest.raises(FrozenArgumentsError, match=r"Received: seed=1.*args.replace\(seed=...\)"):
        args.seed = 1
    with pytest.raises(FrozenArgumentsError, match="del seed"):
        del args.seed
    with pytest.raises(FrozenArgumentsError, match="strange=1"):
        args.strange = 1


# --- what was given ------------------------------------------------------------------------------


def test_what_was_given_is_known_even_if_it_is_the_default():
    args = TrainingArguments("out", max_grad_norm=1.0, eval_strategy="no")
    given = {"output_dir", "max_grad_norm", "eval_strategy"}
    fields = {field.name for field in dataclasses.fields(args)}
    assert {name for name in fields if args.is_set(name)} == given
    assert {name for name in fields if TrainingArguments().is_set(name)} == set()
    with pytest.raises(ConfigurationError, match="Did you mean max_grad_norm"):
        args.is_set("max_grad_nrom")


@pytest.mark.parametrize(
    "again",
    [
        lambda args: args.replace(seed=42),
        copy.copy,
        copy.deepcopy,
        reloaded,
        lambda _: TrainingArguments.from_dict({"max_grad_norm": 1.0, "seed": 42}),
        lambda _: TrainingArguments.from_json_string('{"max_grad_norm": 1.0, "seed": 42}'),
        lambda _: TrainingArguments.from_yaml_string("max_grad_norm: 1.0\nseed: 42"),
        lambda _: ArgumentParser(TrainingArguments).parse_dict({"max_grad_norm": 1.0, "seed": 42})[
            0
        ],
        lambda _: ArgumentParser(TrainingArguments).parse_args(
            ["--max_grad_norm", "1.0", "--seed", "42"]
        )[0],
    ],
)
def test_what_was_given_survives(again):
    args = again(TrainingArguments(max_grad_norm=1.0, seed=42))
    assert [args.is_set(name) for name in ("max_grad_norm", "seed", "bf16")] == [True, True, False]


def test_of_a_copy_with_all_fields_the_values_decide():
    args = TrainingArguments(max_grad_norm=0.5, seed=42)
    for other in (dataclasses.replace(args), TrainingArguments.from_dict(args.to_dict())):
        assert other.is_set("max_grad_norm")
        assert not other.is_set("seed")
    assert Plain().is_set("learning_rate")
    assert not Plain().is_set("beam_width")
    assert Plain(beam_width=4).is_set("beam_width")


# --- settings of Transformers that are not here --------------------------------------------------


def test_every_default_of_transformers_is_accepted():
    there = dict(DEFAULTS_THERE)
    assert len(there) == 114
    for name, value in there.items():
        TrainingArguments(**{name: value})
    # Some of its defaults differ from those here (optim, project, ...): that is the user's say.
    args = TrainingArguments(**there)
    assert args == TrainingArguments(
        **{n: v for n, v in there.items() if n in args.__dataclass_fields__}
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("push_to_hub", False),
        ("hub_model_id", None),
        ("hub_model_id", ""),
        ("torch_compile", False),
        ("ddp_find_unused_parameters", False),
        ("ddp_broadcast_buffers", True),
        ("ddp_static_graph", True),
        ("deepspeed", None),
        ("deepspeed", ""),
        ("fsdp", ""),
        ("fsdp", []),
        ("fsdp_config", {}),
        ("local_rank", 0),
        ("group_by_length", False),
        ("no_cuda", False),
        ("warmup_ratio", 0.0),
        ("overwrite_output_dir", False),
        ("logging_dir", None),
        ("sortish_sampler", False),
        ("generation_config", None),
        ("epochs", None),
        ("evaluation_strategy", "no"),
        ("hub_strategy", HubStrategy.EVERY_SAVE),
        ("push_to_hub", np.bool_(False)),
        ("hub_token", "<HUB_TOKEN>"),
    ],
)
def test_an_inactive_value_is_accepted(name, value):
    assert TrainingArguments(**{name: value}) == TrainingArguments()
    assert TrainingArguments(seed=1).replace(**{name: value}) == TrainingArguments(seed=1)
    assert ArgumentParser(TrainingArguments).parse_dict({name: value}) == (TrainingArguments(),)


@pytest.mark.parametrize("name", sorted({**DROPPED, **RENAMED}))
def test_a_value_that_asks_for_something_is_refused(name):
    for value in ("yes", 7, 7.5, ["a"], {"a": 1}):
        assert not is_inactive(name, value)
        with pytest.raises(ConfigurationError, match=f"`{name}`"):
            TrainingArguments(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("push_to_hub_organization", "ada"),
        ("local_rank", 1),
        ("dataloader_in_order", False),
        ("torch_compile", True),
        ("shuffle", False),
        ("save_safetensors", True),
        ("warmup_ratio", 0.1),
    ],
)
def test_near_misses_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}`"):
        TrainingArguments(**{name: value})


@pytest.mark.parametrize(
    "line",
    ["--push_to_hub false", "--local-rank=-1 ", "--local_rank 0", "--hub_model_id=",
     "--ddp_static_graph True", "--group_by_length=False --deepspeed="],
)  # fmt: skip
def test_the_command_line_accepts_an_inactive_value(line):
    (args,) = ArgumentParser(TrainingArguments).parse_args([*line.split(), "--seed", "1"])
    assert args == TrainingArguments(seed=1)


@pytest.mark.parametrize("line", ["--use_cache", "--use_cache --seed 1", "--local_rank 1"])
def test_the_command_line_refuses_any_other_value(line, capsys):
    with pytest.raises(SystemExit):
        ArgumentParser(TrainingArguments).parse_args(line.split())
    assert f"`{line[2:].split()[0]}` does not exist here" in capsys.readouterr().err


def test_a_script_may_look_at_such_a_setting():
    args = TrainingArguments()
    assert {name: getattr(args, name) for name in NEUTRAL} == NEUTRAL
    assert all(is_inactive(name, value) for name, value in NEUTRAL.items())
    there = {n: v for n, v in DEFAULTS_THERE.items() if n in NEUTRAL}
    assert len(there) == 17
    assert there == {name: NEUTRAL[name] for name in there}
    with pytest.raises(AttributeError, match="Write train_sampling_strategy"):
        _ = args.group_by_length
    with pytest.raises(AttributeError, match=r"device_info\(\)"):
        _ = args.device
    with pytest.raises(AttributeError, match="args.replace"):
        args.set_evaluate(strategy="steps")
    with pytest.raises(AttributeError, match="has no attribute 'zzz'"):
        _ = args.zzz
