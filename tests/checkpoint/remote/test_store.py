"""Runs at an address: trained, lost, resumed, rotated; what a failed upload means for a run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from faulty_files import FaultyFiles
from helpers import arguments, linear_model, make_data, same, weights, without_timings
from helpers_saving import train
from paths import ROOT

from kbtrain import Trainer, TrainerCallback, load_weights
from kbtrain.checkpoint.remote import files as remote_files
from kbtrain.checkpoint.remote.store import RemoteStore
from kbtrain.errors import CheckpointError, CheckpointNotFoundError, CheckpointUnreadableError

ADDRESS = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    FaultyFiles.wipe()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "_pause", lambda seconds: None)
    return tmp_path / "cache"


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def run(output_dir=ADDRESS, resume=None, callbacks=(), **changes):
    settings = {"max_steps": 6, "save_async": False, "report_to": "json"} | changes
    return train(output_dir, callbacks, resume, **settings)


def there(address=ADDRESS):
    """The names at the address, without the files of checkpoints."""
    start = "/" + address.partition("://")[2].rstrip("/") + "/"
    inside = (path.removeprefix(start) for path in FaultyFiles.store if path.startswith(start))
    return sorted({path.split("/")[0] for path in inside})


def lines():
    return [
        json.loads(line)
        for line in FaultyFiles.store["/bucket/run/log.jsonl"].getvalue().splitlines()
    ]


class Preempted(Exception):
    pass


@pytest.mark.core
def test_a_run_whose_machine_is_lost_goes_on_from_the_address(tmp_path, cache):
    whole = run(tmp_path / "whole")

    def lose():
        raise Preempted

    with pytest.raises(Preempted):
        run(callbacks=[At(5, lose)])
    shutil.rmtree(cache)
    resumed = run(resume=True)
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(whole.model))
    assert there() == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "log.jsonl", "run.json"]
    expected = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert without_timings(lines()) == without_timings(map(json.loads, expected))
    # On this machine: the newest one only.
    assert [path.name for _, path in resumed.store.list()] == ["checkpoint-6"]
    fresh = linear_model(seed=9)
    load_weights(fresh, ADDRESS)
    assert same(weights(fresh), weights(whole.model))


@pytest.mark.neutral
def test_the_best_model_is_there_after_the_machine_is_lost(cache):
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "learning_rate": 0.05,
    }  # fmt: skip
    worse = dict(best, learning_rate=50.0)
    first = run(**best, max_steps=2)
    assert first.state.best_model_checkpoint.endswith("checkpoint-2")
    shutil.rmtree(cache)
    resumed = run(resume=True, **worse)
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(weights(resumed.model), weights(first.model))
    assert there() == ["checkpoint-2", "log.jsonl", "run.json"]


@pytest.mark.neutral
def test_a_best_checkpoint_that_is_gone_is_said(cache, caplog):
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "learning_rate": 50.0, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    first = run(**best, max_steps=4)
    assert Path(first.state.best_model_checkpoint).name == "checkpoint-2"
    shutil.rmtree(cache)
    for path in [path for path in FaultyFiles.store if "/checkpoint-2/" in path]:
        del FaultyFiles.store[path]
    resumed = run(resume=True, **best)
    assert "checkpoint-2, which held the best model, is no longer in faulty://" in caplog.text
    assert Path(resumed.state.best_model_checkpoint).name in ("checkpoint-4", "checkpoint-6")


def failing(number=1, last=10**6, error=ConnectionError):
    return lambda: FaultyFiles.reset("error", number, last, error)


@pytest.mark.neutral
def test_an_upload_that_fails_does_not_end_a_run(caplog):
    trainer = run(callbacks=[At(3, failing()), At(5, FaultyFiles.reset)])
    assert trainer.state.global_step == 6
    assert "Could not upload checkpoint-4 to faulty://bucket/run" in caplog.text
    assert "Training continues (on_save_error='warn')" in caplog.text
    assert there()[:3] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.neutral
def test_an_upload_that_fails_to_the_end_is_said_at_the_end(caplog):
    trainer = run(callbacks=[At(3, failing())])
    assert trainer.state.global_step == 6
    said = [r.getMessage() for r in caplog.records if "The run is over" in r.getMessage()]
    assert len(said) == 1
    assert "Could not upload checkpoint-4" in said[0]
    assert str(trainer.store.directory) in said[0]
    assert "logs in" in caplog.text
    assert "As many as save_total_limit are kept in" in said[0]
    assert [step for step, _ in trainer.store.list()] == [4, 6]
    FaultyFiles.reset()
    assert RemoteStore(ADDRESS).resolve(True).step == 6  # on this machine


@pytest.mark.neutral
def test_an_upload_that_fails_ends_a_run_that_wants_it():
    with pytest.raises(CheckpointError, match="Could not upload checkpoint-4"):
        run(callbacks=[At(3, failing())], on_save_error="raise", max_steps=20)


@pytest.mark.neutral
def test_an_address_that_cannot_be_written_to_is_said_before_training():
    steps = []
    FaultyFiles.reset("error", 1, 10**6, PermissionError)
    with pytest.raises(CheckpointError, match="Could not write to faulty://bucket/run"):
        run(callbacks=[At(1, lambda: steps.append(1))], on_save_error="raise")
    assert steps == []


def put(path, data=b"precious"):
    FaultyFiles().pipe_file(path, data)


@pytest.mark.neutral
def test_a_run_deletes_only_what_it_wrote_there(caplog):
    run(max_steps=2)
    put("/bucket/run/checkpoint-3/pytorch_model.bin")
    run(save_steps=1, save_total_limit=1, max_steps=4)
    assert "faulty://bucket/run holds checkpoints of a former run" in caplog.text
    assert "this kbtrain must not replace it. It holds pytorch_model.bin" in caplog.text
    assert [n for n in there() if n.startswith("check")] == ["checkpoint-3", "checkpoint-4"]
    assert FaultyFiles.store["/bucket/run/checkpoint-3/pytorch_model.bin"].getvalue() == b"precious"


@pytest.mark.neutral
@pytest.mark.parametrize("manifest", [b'{"format": "other"}', b"{", None], ids=str)
def test_a_checkpoint_of_another_program_or_a_newer_kbtrain_is_not_replaced(manifest):
    put("/bucket/run/checkpoint-2/weights.pt")
    if manifest is not None:
        put("/bucket/run/checkpoint-2/manifest.json", manifest)
    before = dict(FaultyFiles.store)
    store = RemoteStore(ADDRESS)
    store.save(2, {"model": {"w": np.ones(3)}})
    with pytest.raises(CheckpointError, match="must not replace it") as info:
        store.send()
    assert isinstance(info.value.__cause__, FileExistsError)
    assert FaultyFiles.store == before


@pytest.mark.neutral
def test_two_machines_at_one_address_do_not_delete_each_others(cache, monkeypatch, caplog):
    stores = []
    for name, value in (("a", 1.0), ("b", 2.0)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache / name))
        store = RemoteStore(ADDRESS)
        for step in (2, 3):
            store.save(step, {"model": {"w": np.full(3, value)}})
        store.send()
        stores.append(store)
    first, second = stores
    first.save(4, {"model": {"w": np.ones(3)}})
    first.send()
    assert [path.name for path in first.rotate(1)] == ["checkpoint-2", "checkpoint-3"]  # here
    assert there() == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert caplog.text.count("Another run writes to faulty://bucket/run") == 1
    assert [path.name for path in second.rotate(1)] == ["checkpoint-2"]


@pytest.mark.neutral
def test_checkpoints_of_another_run_stay(caplog):
    run(max_steps=3, save_steps=3)
    run(max_steps=4, save_total_limit=1)
    assert [n for n in there() if n.startswith("check")] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.neutral
def test_resume_from_an_address(tmp_path):
    run(max_steps=4)
    one = run(tmp_path / "one", resume=f"{ADDRESS}/checkpoint-4")
    other = run("faulty://bucket/other/", resume=ADDRESS)
    assert same(weights(one.model), weights(other.model))
    assert there("faulty://bucket/other") == ["checkpoint-6", "log.jsonl", "run.json"]
    with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint faulty://.*-3"):
        run(tmp_path / "two", resume=f"{ADDRESS}/checkpoint-3")
    with pytest.raises(CheckpointNotFoundError, match="faulty://bucket/none holds no complete one"):
        run("faulty://bucket/none", resume=True)
    assert run("faulty://bucket/none", resume="auto", max_steps=2).state.global_step == 2


@pytest.mark.neutral
def test_what_is_written_after_a_run_is_there_too():
    trainer = run(save_strategy="no")
    trainer.save_model()
    trainer.save_metrics("train", {"loss": 1.0})
    (trainer.args.output_folder / "mine").mkdir()
    (trainer.args.output_folder / "mine" / "plot.svg").write_text("<svg/>")
    trainer.evaluate()
    expected = ["all_results.json", "log.jsonl", "mine", "model.keras", "run.json"]
    assert there() == [*expected, "train_results.json", "training_args.json"]
    FaultyFiles.calls.clear()
    trainer.save_state()  # and only what has changed
    assert [call for call in FaultyFiles.calls if call.startswith("put")] == [
        "put /bucket/run/trainer_state.json"
    ]


@pytest.mark.neutral
def test_what_was_left_on_a_machine_does_not_replace_newer_files(cache, monkeypatch):
    run(max_steps=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    run(max_steps=4, resume=True)
    expected = lines()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    FaultyFiles.reset("error", 3, 4)  # the first machine cannot read: its log is shorter
    monkeypatch.setattr(remote_files, "ATTEMPTS", 1)
    with pytest.raises(CheckpointUnreadableError):
        run(max_steps=6, resume=True)
    assert lines() == expected
    FaultyFiles.reset()
    again = Trainer(
        linear_model(), arguments(ADDRESS, report_to="json"), eval_dataset=make_data(), loss="mse"
    )
    again.evaluate()
    assert lines()[:-1] == expected
    assert "eval_loss" in lines()[-1]


@pytest.mark.neutral
def test_files_on_a_disk_by_their_address(tmp_path, cache):
    run(f"file://{tmp_path}/kept", max_steps=2)
    shutil.rmtree(cache)
    assert run(f"file://{tmp_path}/kept", resume=True).state.global_step == 6
    as_folder = run(tmp_path / "kept", resume=True, max_steps=8)  # it is a run's folder as any
    assert as_folder.state.global_step == 8
    assert np.isfinite(weights(as_folder.model)[0]).all()


@pytest.mark.neutral
def test_the_program_of_the_page():
    page = (ROOT / "docs" / "cloud-storage.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    program = program.replace("s3://", "faulty://").replace("20_000", "4").replace("500", "2")
    exec(
        compile(program, "cloud-storage.md", "exec"),
        {"make_model": linear_model, "data": make_data()},
    )
    assert there("faulty://bucket/digits") == [
        "checkpoint-2",
        "checkpoint-4",
        "log.csv",
        "run.json",
    ]
