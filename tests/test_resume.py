"""Stop anywhere, go on in a new process: bit for bit the run that was never stopped.

The negative controls take one part out of a checkpoint and show that then the end is another one;
without them the tests above could pass on a run in which that part does not matter.
"""

import json
import shutil

import numpy as np
import pytest
from helpers_resume import in_new_process, make_trainer, results

from kbtrain.checkpoint import CheckpointStore

STEPS = {"plain": 18, "accumulation": 9, "short group": 6}


def identical(first, second):
    """Names of what is not equal bit for bit."""
    assert first.keys() == second.keys()
    return [k for k in first if first[k].dtype != second[k].dtype
            or first[k].tobytes() != second[k].tobytes()]


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


def resume_jobs(folder, tmp_path, steps):
    """One job per step: a run folder of its own with nothing but that checkpoint."""
    jobs = []
    for step in steps:
        target = tmp_path / f"from-{step}"
        shutil.copytree(folder / f"checkpoint-{step}", target / f"checkpoint-{step}")
        jobs.append({"output_dir": str(target), "resume": True})
    return jobs


# Mid-epoch, the epoch's boundary, and the last step before the end.
STOPS = {"plain": [1, 6, 11, 17], "accumulation": [2, 3, 7], "short group": [1, 2, 5]}


@pytest.mark.parametrize("case", STOPS)
def test_resume_in_a_new_process_is_exact(case, whole, tmp_path):
    folder, expected = whole(case)
    assert json.loads(str(expected["state"]))[2] == STEPS[case]
    jobs = resume_jobs(folder, tmp_path, STOPS[case])
    for step, got in zip(STOPS[case], in_new_process(tmp_path, case, jobs), strict=True):
        assert identical(got, expected) == [], f"resumed from {step}"


def test_a_run_that_was_stopped_in_another_process(whole, tmp_path):
    """The same with a real stop: the first process ends, the second finds its folder."""
    _, expected = whole("accumulation")
    folder = str(tmp_path / "run")
    in_new_process(tmp_path / "first", "accumulation", [{"output_dir": folder, "stop": 4}])
    (got,) = in_new_process(tmp_path / "second", "accumulation",
                            [{"output_dir": folder, "resume": "auto"}])
    assert identical(got, expected) == ["log"]  # the first process wrote its own last entry
    logs = [json.loads(str(r["log"])) for r in (got, expected)]
    without_ends = [[e for e in log if "train_loss" not in e] for log in logs]
    assert without_ends[0] == without_ends[1]


def test_saving_does_not_change_a_run(whole, tmp_path):
    _, expected = whole("accumulation")
    trainer = make_trainer("accumulation", tmp_path, save_strategy="no")
    trainer.fit()
    got = results(trainer)
    assert identical(got, expected) == []


def test_resume_in_the_same_process_with_a_second_model(whole, tmp_path):
    """Its layers have other automatic names (dense_7 for dense_5)."""
    folder, expected = whole("plain")
    jobs = resume_jobs(folder, tmp_path, [8])
    trainer = make_trainer("plain", jobs[0]["output_dir"])
    trainer.fit(resume_from_checkpoint=True)
    assert identical(results(trainer), expected) == []


def test_a_trainer_can_resume_itself(whole, tmp_path):
    folder, expected = whole("plain")
    trainer = make_trainer("plain", tmp_path)
    trainer.fit()
    trainer.fit(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert identical(results(trainer), expected) == []


def test_random_numbers_of_the_data_go_on(whole, tmp_path):
    """Augmentation in ``__getitem__`` draws from NumPy's global state."""
    folder, expected = whole("augmented")
    jobs = resume_jobs(folder, tmp_path, [4, 9])
    for got in in_new_process(tmp_path, "augmented", jobs):
        assert identical(got, expected) == []


def test_evaluation_best_model_and_early_stopping_go_on(whole, tmp_path):
    folder, expected = whole("watched")
    jobs = resume_jobs(folder, tmp_path, [5])
    (got,) = in_new_process(tmp_path, "watched", jobs)
    assert identical(got, expected) == []
    metric, step, _, _, callbacks = json.loads(str(expected["state"]))
    evaluated = [e for e in json.loads(str(expected["log"])) if "eval_loss" in e]
    assert len(evaluated) == 12
    best = min(evaluated, key=lambda e: e["eval_loss"])
    assert (metric, step) == (best["eval_loss"], best["step"])
    assert callbacks["EarlyStoppingCallback"] == [
        {"best": best["eval_loss"], "counter": 12 - best["step"]}]


def test_longer_training_after_the_end(tmp_path):
    """A run of one epoch, resumed with two: the constant schedule does not depend on the length."""
    changes = {"lr_scheduler_type": "constant", "num_train_epochs": 1, "warmup_steps": 0}
    make_trainer("plain", tmp_path / "short", **changes).fit()
    changes["num_train_epochs"] = 2
    longer = make_trainer("plain", tmp_path / "short", **changes)
    longer.fit(resume_from_checkpoint=True)
    once = make_trainer("plain", tmp_path / "long", **changes)
    once.fit()
    differing = set(identical(results(longer), results(once)))
    assert not any(name.startswith(("model", "optimizer")) for name in differing)


# --- negative controls ----------------------------------------------------------------------------


def without_optimizer_slots(arrays, documents):
    for name, value in arrays["optimizer"].items():
        if value.dtype.kind == "f":
            arrays["optimizer"][name] = np.zeros_like(value)


def without_update_count(arrays, documents):
    (name,) = [n for n in arrays["optimizer"] if n.endswith("iteration")]
    arrays["optimizer"][name] = np.zeros_like(arrays["optimizer"][name])


def without_dropout_state(arrays, documents):
    (name,) = [n for n in arrays["model"] if "seed_generator_state" in n]
    fresh = np.zeros_like(arrays["model"][name])
    fresh[..., 0] = 5
    arrays["model"][name] = fresh


def without_global_generator(arrays, documents):
    arrays["rng"]["keras"] = np.zeros_like(arrays["rng"]["keras"])


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


CONTROLS = [without_optimizer_slots, without_update_count, without_dropout_state,
            without_global_generator, without_position, without_moving_statistics, without_weights]


def test_every_part_of_a_checkpoint_matters(whole, tmp_path):
    folder, expected = whole("plain")
    jobs = []
    for control in CONTROLS:
        checkpoint = CheckpointStore(folder).load(folder / "checkpoint-8")
        arrays = {group: dict(values) for group, values in checkpoint.arrays.items()}
        documents = json.loads(json.dumps(dict(checkpoint.documents)))
        control(arrays, documents)
        target = tmp_path / control.__name__
        CheckpointStore(target).save(8, arrays, documents)
        jobs.append({"output_dir": str(target), "resume": True})
    # A copy through the same code without a loss: what differs below is not the copying.
    CheckpointStore(tmp_path / "copy").save(8, checkpoint.arrays, checkpoint.documents)
    jobs.append({"output_dir": str(tmp_path / "copy"), "resume": True})
    *damaged, copy = in_new_process(tmp_path, "plain", jobs)
    assert identical(copy, expected) == []
    for control, got in zip(CONTROLS, damaged, strict=True):
        differing = {name for name in identical(got, expected) if name.startswith("model")}
        assert differing, control.__name__


def test_ignore_data_skip_begins_the_epoch_anew(whole, tmp_path):
    folder, expected = whole("plain")
    jobs = resume_jobs(folder, tmp_path, [8])
    trainer = make_trainer("plain", jobs[0]["output_dir"], ignore_data_skip=True)
    trainer.fit(resume_from_checkpoint=True)
    assert any(name.startswith("model") for name in identical(results(trainer), expected))


def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path, caplog):
    folder, expected = whole("plain")
    for step in (7, 8):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    broken = tmp_path / "checkpoint-8" / "model.h5"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    trainer = make_trainer("plain", tmp_path)
    trainer.fit(resume_from_checkpoint="auto")
    assert "checkpoint-8" in caplog.text
    assert identical(results(trainer), expected) == []
