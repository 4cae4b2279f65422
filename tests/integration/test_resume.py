"""Stop anywhere, go on in a new process: bit for bit the run that was never stopped.

The negative controls take one part out of a checkpoint and show that then the end is another one;
without them the tests above could pass on a run in which that part does not matter.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, train_logs
from helpers_resume import in_new_process, make_trainer, results

from kbtrain import CheckpointMismatchError, Trainer, TrainingArguments
from kbtrain.checkpoint import CheckpointStore
from kbtrain.config.diff import compare_arguments
from kbtrain.config.fields import Fields

STEPS = {"plain": 18, "accumulation": 9, "short group": 6}


def identical(first, second):
    """Names of what is not equal bit for bit."""
    assert first.keys() == second.keys()
    return [
        k
        for k in first
        if first[k].dtype != second[k].dtype or first[k].tobytes() != second[k].tobytes()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(case)``: folder with a checkpoint of every step, and the results at the end."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("whole")
            trainer = make_trainer(case, folder)
            trainer.fit()
            made[case] = folder, results(trainer)
        return made[case]

    return get


def copied(folder, target, step):
    """A run folder with nothing but the checkpoint of one step."""
    shutil.copytree(folder / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return str(target)


# Mid-epoch, an epoch's boundary, and the last step before the end.
STOPS = [
    *[("plain", step) for step in (1, 6, 11)],
    *[("accumulation", step) for step in (3, 7)],
    ("short group", 5),
    ("augmented", 4),
    ("watched", 5),
]


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory):
    """All jobs that resume in another process, in one process: job -> results."""
    folder = tmp_path_factory.mktemp("resumed")
    jobs = {}
    for case, step in STOPS:
        target = copied(whole(case)[0], folder / f"{case}-{step}", step)
        jobs[case, step] = {"case": case, "output_dir": target, "resume": True}
    stopped = str(folder / "stopped")
    first = {"case": "accumulation", "output_dir": stopped, "stop": 4}
    in_new_process(folder / "first", [first])
    jobs["stopped"] = {"case": "accumulation", "output_dir": stopped, "resume": "auto"}
    return dict(zip(jobs, in_new_process(folder / "second", list(jobs.values())), strict=True))


@pytest.mark.parametrize(("case", "step"), STOPS)
def test_resume_in_a_new_process_is_exact(case, step, whole, resumed):
    assert identical(resumed[case, step], whole(case)[1]) == []


@pytest.mark.parametrize("case", STEPS)
def test_the_runs_are_as_long_as_they_are_meant_to_be(case, whole):
    assert json.loads(str(whole(case)[1]["state"]))[2] == STEPS[case]


def test_a_run_that_was_stopped_in_another_process(whole, resumed):
    """The same with a real stop: the first process ends, the second finds its folder."""
    assert identical(resumed["stopped"], whole("accumulation")[1]) == []


@pytest.mark.core
def test_saving_does_not_change_a_run(whole, tmp_path):
    trainer = make_trainer("accumulation", tmp_path, save_strategy="no")
    trainer.fit()
    assert identical(results(trainer), whole("accumulation")[1]) == []


@pytest.mark.core
def test_resume_in_the_same_process_with_a_second_model(whole, tmp_path):
    """Its layers have other automatic names (dense_7 for dense_5)."""
    folder, expected = whole("plain")
    trainer = make_trainer("plain", copied(folder, tmp_path / "run", 8))
    names = {v.path for v in trainer.model.variables}
    assert names.isdisjoint(CheckpointStore(folder).load(folder / "checkpoint-8").arrays["model"])
    trainer.fit(resume_from_checkpoint=True)
    assert identical(results(trainer), expected) == []


def test_a_trainer_can_resume_itself(whole, tmp_path):
    folder, expected = whole("plain")
    trainer = make_trainer("plain", tmp_path)
    trainer.fit()
    trainer.fit(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert identical(results(trainer), expected) == []


def test_evaluation_best_model_and_early_stopping_go_on(whole):
    """The other test says that the resumed run has all this too; here is what it is."""
    _, expected = whole("watched")
    metric, step, _, _, callbacks = json.loads(str(expected["state"]))
    evaluated = [e for e in json.loads(str(expected["log"])) if "eval_loss" in e]
    assert len(evaluated) == 12
    best = min(evaluated, key=lambda e: e["eval_loss"])
    assert (metric, step) == (best["eval_loss"], best["step"])
    (stopping,) = callbacks["EarlyStoppingCallback"]
    assert (stopping["best"], stopping["counter"]) == (best["eval_loss"], 12 - best["step"])


def test_longer_training_after_the_end(tmp_path):
    """A run of one epoch, resumed with two: the constant schedule does not depend on the length."""
    changes = {"lr_scheduler_type": "constant", "num_train_epochs": 1, "warmup_steps": 0}
    make_trainer("plain", tmp_path / "short", **changes).fit()
    changes["num_train_epochs"] = 2
    longer = make_trainer("plain", tmp_path / "short", **changes)
    longer.fit(resume_from_checkpoint=True)
    got = results(longer)
    once = make_trainer("plain", tmp_path / "long", **changes)
    once.fit()
    assert identical(got, results(once)) == []


# --- negative controls ----------------------------------------------------------------------------


def without_optimizer_slots(arrays, documents):
    for name, value in arrays["optimizer"].items():
        if value.dtype.kind == "f":
            arrays["optimizer"][name] = np.zeros_like(value)


def without_update_count(arrays, documents):
    (name,) = [n for n in arrays["optimizer"] if n.endswith("iteration")]
    arrays["optimizer"][name] = np.zeros_like(arrays["optimizer"][name])


def without_dropout_state(arrays, documents):
    (name, _) = [n for n in arrays["model"] if "seed_generator_state" in n]
    fresh = np.zeros_like(arrays["model"][name])
    fresh[..., 0] = 5
    arrays["model"][name] = fresh


def without_noise_state(arrays, documents):
    (_, name) = [n for n in arrays["model"] if "seed_generator_state" in n]
    arrays["model"][name] = np.zeros_like(arrays["model"][name])


def without_global_generator(arrays, documents):
    arrays["rng"]["keras"] = np.zeros_like(arrays["rng"]["keras"])


def without_numpy_state(arrays, documents):
    documents["rng"]["numpy"]["position"] -= 1


def without_python_state(arrays, documents):
    state = arrays["rng"]["python"].copy()
    state[-1] -= 1
    arrays["rng"]["python"] = state


def without_position(arrays, documents):
    documents["progress"] |= {"epoch": 0, "batch": 0}


def without_moving_statistics(arrays, documents):
    for name, value in arrays["model"].items():
        if "moving" in name:
            arrays["model"][name] = np.ones_like(value)


def without_weights(arrays, documents):
    for name, value in arrays["model"].items():
        if name.endswith(("kernel", "bias")):
            arrays["model"][name] = value * np.float32(1.0001)


def intact(arrays, documents):
    """Leaves everything in: what differs below is not the copying."""


CONTROLS = [
    *[
        ("plain", control)
        for control in (
            without_optimizer_slots,
            without_update_count,
            without_dropout_state,
            without_noise_state,
            without_position,
            without_moving_statistics,
            without_weights,
        )
    ],
    *[
        ("augmented", control)
        for control in (without_global_generator, without_numpy_state, without_python_state)
    ],
]


def write_without(control, folder, target):
    """A copy of a checkpoint in which a control has changed something."""
    checkpoint = CheckpointStore(folder).load(folder / "checkpoint-8")
    arrays = {group: dict(values) for group, values in checkpoint.arrays.items()}
    documents = json.loads(json.dumps(dict(checkpoint.documents)))
    control(arrays, documents)
    CheckpointStore(target).save(8, arrays, documents)


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory):
    """What becomes of the run where a part of the checkpoint is lost: control -> results."""
    folder = tmp_path_factory.mktemp("damaged")
    jobs = []
    for case, control in CONTROLS:
        target = folder / control.__name__
        write_without(control, whole(case)[0], target)
        jobs.append({"case": case, "output_dir": str(target), "resume": True})
    found = in_new_process(folder, jobs)
    return {control: got for (_, control), got in zip(CONTROLS, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "control"), CONTROLS)
def test_every_part_of_a_checkpoint_matters(case, control, whole, damaged):
    differing = identical(damaged[control], whole(case)[1])
    assert any(name.startswith("model") for name in differing)


def test_the_controls_own_way_of_copying_is_harmless(whole, tmp_path):
    folder, expected = whole("plain")
    write_without(intact, folder, tmp_path)
    trainer = make_trainer("plain", tmp_path)
    trainer.fit(resume_from_checkpoint=True)
    assert identical(results(trainer), expected) == []


def test_ignore_data_skip_begins_the_epoch_anew(whole, tmp_path):
    folder, expected = whole("plain")
    trainer = make_trainer("plain", copied(folder, tmp_path / "run", 8), ignore_data_skip=True)
    trainer.fit(resume_from_checkpoint=True)
    assert any(name.startswith("model") for name in identical(results(trainer), expected))


@pytest.mark.core
def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path, caplog):
    folder, expected = whole("plain")
    for step in (7, 8):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    broken = tmp_path / "checkpoint-8" / "model.weights.h5"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    trainer = make_trainer("plain", tmp_path)
    trainer.fit(resume_from_checkpoint="auto")
    assert "checkpoint-8" in caplog.text
    assert identical(results(trainer), expected) == []


# --- another run than the saved one ---------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_run_goes_on_along_the_longer_schedule(tmp_path, schedule):
    """No step at a rate of zero in between, no jump back into the warmup."""

    def run(steps):
        x, y = make_data(16)
        args = arguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, learning_rate=0.1,
            lr_scheduler_type=schedule, warmup_steps=2, save_strategy="steps", save_steps=100,
        )  # fmt: skip
        trainer = Trainer(linear_model(), args, train_dataset=(x, y), loss="mse")
        trainer.fit(resume_from_checkpoint="auto")
        return train_logs(trainer, "learning_rate")

    def rate(count, total):
        done = (count - 2) / (total - 2)
        fall = 1 - done if schedule == "linear" else (1 + np.cos(np.pi * done)) / 2
        return 0.1 * (count / 2 if count < 2 else fall)

    assert len(run(5)) == 5
    rates = run(12)
    expected = [rate(n, 5) for n in range(5)] + [rate(n, 12) for n in range(5, 12)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert min(rates[1:]) > 0


def resumed_with(tmp_path, samples, **changes):
    """Stop after 3 of 4 steps an epoch, go on with other settings."""

    def make(count, callbacks=(), **more):
        defaults = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
        args = arguments(tmp_path, **(defaults | {"per_device_train_batch_size": 4} | more))
        return Trainer(
            linear_model(), args, train_dataset=make_data(count), loss="mse", callbacks=callbacks
        )

    make(16, [StopAt(3)]).fit()
    trainer = make(samples, **changes)
    trainer.fit(resume_from_checkpoint=True)
    return trainer


def test_data_of_another_length_within_an_epoch_is_an_error(tmp_path):
    with pytest.raises(
        CheckpointMismatchError, match=r"had 16 samples and has 24 now.*batch 3 of epoch 0"
    ):
        resumed_with(tmp_path, 24)


def test_data_of_another_length_is_taken_if_the_epoch_begins_anew(tmp_path, caplog):
    trainer = resumed_with(tmp_path, 24, ignore_data_skip=True)
    assert trainer.state.global_step == 12
    assert "had 16 samples and has 24 now" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_device_train_batch_size": 2}, "converted by samples"),
        ({"seed": 7}, "data order may differ"),
        ({"data_seed": 7}, "another order"),
        ({"learning_rate": 0.5}, "uses the new value"),
    ],
)
def test_other_settings_are_named_with_their_consequences(tmp_path, caplog, changes, words):
    resumed_with(tmp_path, 16, **changes)
    (name,) = changes
    assert f"Resuming with a different setting: {name} was" in caplog.text
    assert words in caplog.text


# Fields with an effect on the numbers, the data or the schedule of a resumed run.
CONSEQUENTIAL = {
    *("num_train_epochs", "max_steps", "steps_per_epoch", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "optim", "optim_args", "optim_target_modules"),
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "ema", "parameter_groups", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "seed", "data_seed", "train_sampling_strategy", "length_column_name"),
    *("bf16", "fp16", "on_nonfinite", "label_smoothing_factor", "neftune_noise_alpha"),
}
# Fields that may differ without a word.
SILENT = {
    *("output_dir", "run_name", "report_to", "per_device_eval_batch_size", "save_total_limit"),
    *("resume_from_checkpoint", "steps_per_execution", "auto_find_batch_size", "do_train", "debug"),
}


def test_every_argument_states_what_its_change_means_for_a_resumed_run():
    """By reflection: a new field must say so, too."""
    fields = {field.name: field.metadata["on_resume"] for field in dataclasses.fields(Fields)}
    assert {name for name, text in fields.items() if text} >= CONSEQUENTIAL
    assert {name for name, text in fields.items() if not text} >= SILENT
    saved = TrainingArguments().to_dict()
    assert compare_arguments(saved, saved) == []
    told = compare_arguments(dict.fromkeys(fields, "x"), saved)
    assert [message.split()[0] for message in told] == [n for n in saved if fields[n]]
    assert compare_arguments({}, saved) == []
    (own,) = compare_arguments({"mine": 1}, {"mine": 2})  # a field of a subclass
    assert "mine was 1 and is 2 now: the rest of the run uses the new value" in own
