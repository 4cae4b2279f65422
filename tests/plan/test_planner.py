"""What a plan compiles, what it finds in the results, and what it advises."""

import json

import keras
import pytest
from helpers_plan import GIB, made_up, make_trainer

from kbtrain.errors import ConfigurationError, OutOfMemoryError
from kbtrain.plan import planner
from kbtrain.plan.devices import device_from
from kbtrain.plan.plan import Plan
from kbtrain.plan.planner import plan_run
from kbtrain.plan.run_backend import run_backend

B = "per_device_train_batch_size"


def device(gib, **figures):
    return device_from(
        {
            "memory_bytes": gib * GIB,
            "reserve": 0,
            "peak_flops": {"bfloat16": 2e12, "float32": 1e12},
            "bandwidth": 1e12,
            "link_bandwidth": GIB,
            "linked_devices": 8,
        }
        | figures,
        "own.yaml",
    )


@pytest.fixture
def compiled(monkeypatch):
    asked = []

    def compile_program(trainer, *, device, count, changes, backend):
        asked.append(dict(changes))
        return made_up(trainer, device=device, count=count, changes=changes)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    return asked


def named(plan):
    return {case.name: case for case in plan.alternatives}


def test_a_run_that_fits(compiled, tmp_path):
    plan = plan_run(make_trainer(tmp_path), device(40), 4)
    assert plan.fits
    assert plan.spare_bytes == (40 - 10 - 16) * GIB
    assert plan.run.roofline.bound_by == "compute"
    assert plan.run.roofline.dtype == "float32"
    assert plan.run.roofline.seconds == 8.0
    assert plan.run.roofline.samples_per_second == 4.0
    assert plan.run.roofline.mfu == 1.0
    assert (plan.largest.batch_size, plan.largest.too_large) == (15, 16)


def test_each_alternative_is_one_change(compiled, tmp_path):
    found = named(plan_run(make_trainer(tmp_path), device(40), 4))
    assert {name: dict(case.changes) for name, case in found.items()} == {
        "gradient checkpointing": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
        "8-bit optimizer": {"optim": "adamw_8bit"},
        "fsdp": {"fsdp": True},
        "accumulation": {B: 4, "gradient_accumulation_steps": 2},
    }
    peaks = {name: case.facts.peak_bytes / GIB for name, case in found.items()}
    assert peaks == {
        "gradient checkpointing": 14,
        "bf16": 18,
        "8-bit optimizer": 21,
        "fsdp": 18.5,
        "accumulation": 18,
    }
    assert found["bf16"].roofline.seconds == 4.0  # at the peak of bfloat16
    assert found["gradient checkpointing"].roofline.seconds == 12.0
    assert found["gradient checkpointing"].roofline.mfu == pytest.approx(2 / 3)


def test_what_the_run_has_is_no_alternative(compiled, tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, gradient_checkpointing=True, optim="lion")
    found = named(plan_run(trainer, device(80), 1, batch=[7]))
    assert {n: dict(c.changes) for n, c in found.items()} == {
        "8-bit optimizer": {"optim": "lion_8bit"}
    }


def test_an_optimizer_of_one_s_own_is_kept(compiled, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.given_optimizers = (keras.optimizers.SGD(), None)
    assert "8-bit optimizer" not in named(plan_run(trainer, device(40)))


@pytest.mark.parametrize(
    ("memory", "count", "changes"),
    [
        (40, 1, {"bf16": True}),  # it fits; bfloat16 halves the bound
        (20, 1, {"bf16": True}),  # the fastest of those that fit
        (15, 1, {"gradient_checkpointing": True}),  # the only one that fits
        (
            6,
            8,
            {"gradient_checkpointing": True, "bf16": True, "optim": "adamw_8bit", "fsdp": True}
            | {B: 4, "gradient_accumulation_steps": 2},
        ),
    ],
)
def test_the_advice_is_the_fastest_that_fits(compiled, tmp_path, memory, count, changes):
    plan = plan_run(make_trainer(tmp_path), device(memory), count)
    assert dict(plan.advice.changes) == changes
    assert plan.fits == (memory == 40)


def test_the_advice_can_be_pasted(compiled, tmp_path):
    advice = plan_run(make_trainer(tmp_path), device(15)).advice
    assert advice.arguments == "gradient_checkpointing=True"
    assert advice.options == "--gradient_checkpointing"


def test_nothing_helps(compiled, tmp_path):
    plan = plan_run(make_trainer(tmp_path), device(4))
    assert not plan.fits
    assert plan.largest.batch_size == 0
    assert not plan.advice.changes
    assert "larger devices" in plan.advice.why
    assert "Not even a batch of one sample" in str(plan)


def test_batch_sizes_to_compare(compiled, tmp_path):
    plan = plan_run(make_trainer(tmp_path), device(40), batch=[4, 2, 16], quick=True)
    assert [case.facts.samples for case in (plan.run, *plan.batches)] == [4, 2, 16]
    assert [case.fits for case in (plan.run, *plan.batches)] == [True, True, False]
    assert (plan.largest, plan.alternatives) == (None, ())
    assert compiled == [{B: 4}, {B: 2}, {B: 16}]


def test_nothing_is_compiled_twice(compiled, tmp_path):
    same = {"bf16": False, "fsdp": None, B: 8}  # as the arguments say
    plan_run(make_trainer(tmp_path), device(40), batch=[8, 16], changes=same)
    assert len(compiled) == len({json.dumps(each, sort_keys=True) for each in compiled})
    assert compiled[:2] == [{}, {B: 16}]
    assert {B: 8} not in compiled


def test_what_cannot_be_compiled_is_said_in_its_row(compiled, tmp_path, monkeypatch):
    def refuse(trainer, *, changes, **others):
        if changes.get("gradient_checkpointing"):
            raise ConfigurationError("It cannot be computed again.")
        if changes.get("bf16"):
            raise OutOfMemoryError("The compiler says so.")
        return made_up(trainer, changes=changes, **others)

    monkeypatch.setattr(planner, "compile_program", refuse)
    plan = plan_run(make_trainer(tmp_path), device(40))
    assert "gradient checkpointing: It cannot be computed again." in str(plan)
    assert "bf16: does not fit: The compiler says so." in str(plan)


def test_an_error_of_a_compiler_ends_an_alternative_and_the_search_alone(
    compiled, tmp_path, monkeypatch
):
    def fail(trainer, *, changes, **others):
        if changes.get("bf16") or changes.get(B, 8) > 8:
            raise RuntimeError("INTERNAL: the compiler failed.\nat length")
        return made_up(trainer, changes=changes, **others)

    monkeypatch.setattr(planner, "compile_program", fail)
    plan = plan_run(make_trainer(tmp_path), device(40), batch=[8, 16])
    assert "bf16: RuntimeError: INTERNAL: the compiler failed." in str(plan)
    assert plan.batches[0].problem == "RuntimeError: INTERNAL: the compiler failed."
    assert plan.largest.batch_size == 8
    assert any("the largest batch stopped at 16" in note for note in plan.notes)
    assert named(plan)["accumulation"].fits


def test_a_search_that_finds_nothing_out_says_nothing(compiled, tmp_path, monkeypatch):
    def fail(trainer, *, changes, **others):
        if B in changes:
            raise RuntimeError("INTERNAL")
        return made_up(trainer, changes=changes, **others)

    monkeypatch.setattr(planner, "compile_program", fail)
    plan = plan_run(make_trainer(tmp_path), device(20))
    assert not plan.fits
    assert plan.largest is None
    assert "Not even" not in str(plan)


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_a_backend_that_keeps_weights_whole(compiled, tmp_path, name):
    trainer, backend = make_trainer(tmp_path), run_backend(name)
    plan = plan_run(trainer, device(30), 8, backend=backend)
    assert dict(named(plan)["fsdp"].changes) == {"fsdp": "shard_grad_op"}
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in str(plan)
    for changes in ({"fsdp": True}, {"parallelism_config": {"tensor": 2}}):
        with pytest.raises(ConfigurationError, match=f"On the backend {name} every process has"):
            plan_run(trainer, device(30), 8, changes=changes, backend=backend)


@pytest.mark.parametrize(("name", "dtype"), [("torch", "float32"), ("tensorflow", "tensorfloat32")])
def test_products_in_float32_are_those_of_the_run_s_backend(compiled, tmp_path, name, dtype):
    def found(**changes):
        options = {"quick": True, "changes": changes, "backend": run_backend(name)}
        return plan_run(make_trainer(tmp_path), "h100", **options).run.roofline.dtype

    assert found() == dtype
    assert found(tf32=True) == "tensorfloat32"
    assert found(tf32=False) == "float32"


def test_precision_that_the_changes_take_back(compiled, tmp_path):
    trainer = make_trainer(tmp_path, bf16=True)
    plan = plan_run(trainer, "h100", quick=True, changes={"bf16": False, "tf32": False})
    assert plan.run.roofline.dtype == "float32"


def test_a_device_without_bfloat16(compiled, tmp_path):
    old = device(40, peak_flops={"float16": 2e12, "float32": 1e12})
    assert dict(named(plan_run(make_trainer(tmp_path), old))["fp16"].changes) == {"fp16": True}
    plan = plan_run(make_trainer(tmp_path, bf16=True), old, quick=True)
    assert plan.run.roofline.compute_seconds is None
    assert "own has no bfloat16: fp16=True" in " ".join(plan.notes)


def test_what_is_left_out_is_said(compiled, tmp_path):
    trainer = make_trainer(tmp_path)
    assert not any("Evaluation" in note for note in plan_run(trainer, "h100", quick=True).notes)
    trainer.args = trainer.args.replace(eval_strategy="epoch")
    trainer.model = keras.Sequential([keras.Input((None, 4)), keras.layers.Dense(2)])
    notes = " ".join(plan_run(trainer, "h100", quick=True).notes)
    assert "Evaluation is not planned" in notes
    assert "the shapes of the first batch" in notes


def test_the_run_itself_is_refused(tmp_path, monkeypatch):
    def refuse(trainer, **others):
        raise ConfigurationError("It runs in Python.")

    monkeypatch.setattr(planner, "compile_program", refuse)
    with pytest.raises(ConfigurationError, match="It runs in Python"):
        plan_run(make_trainer(tmp_path), device(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is a number of devices"),
        ({"count": 2.5}, "count is a number of devices"),
        ({"batch": [0]}, "batch is a list"),
        ({"batch": "8"}, "batch is a list"),
        ({"changes": {"bf_16": True}}, "bf_16"),
    ],
)
def test_wrong_arguments(compiled, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        plan_run(make_trainer(tmp_path), device(40), **options)


def test_text_html_and_json(compiled, tmp_path):
    plan = plan_run(make_trainer(tmp_path), device(40), 4, batch=[8, 16], notes=["A note."])
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(str(plan).split())
    for part in (
        "Plan of net, 1,000 parameters, on 4 x own",
        "optimizer state 5.00 GiB",
        "It fits, with 14.00 GiB to spare.",
        "The largest batch of a device that fits has 15 samples.",
        "An update (32 samples on 4 devices, 4,096 tokens)",
        "computing in float32 >= 8,000 ms",
        "1 x all-reduce, each device sends 1.1 GB",
        "Bound by compute: no update takes less than 8,000 ms; at most 4 samples/s, 512 tokens/s",
        "batch 16 no 42.00 GiB +62 % 8,000",
        "bf16 yes 18.00 GiB -31 % 4,000 -50 %",
        "TrainingArguments(..., bf16=True)",
        "- A note.",
        "nothing is measured",
    ):
        assert part in text
    page = plan._repr_html_()
    assert "<b>Plan of net on 4 x own</b>" in page
    assert "bf16=True" in page
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert json.dumps(again.to_dict()) == json.dumps(plan.to_dict())
    assert str(again) == str(plan)


def test_memory_beyond_what_jax_takes_by_default(compiled, tmp_path):
    note = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert note in str(plan_run(make_trainer(tmp_path), device(30), quick=True))
    assert note not in str(plan_run(make_trainer(tmp_path), device(80), quick=True))
