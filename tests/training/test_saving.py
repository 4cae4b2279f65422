"""Saving while training: in the background, failures of the disk, folders that go away."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, same, weights
from helpers_saving import FULL, READ_ONLY, At, full_disk, train

from kbtrain import Trainer, TrainerCallback
from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.storage.lock import RunLock
from kbtrain.errors import CheckpointError, FolderInUseError
from kbtrain.training import best_model


def test_saving_in_the_background_changes_nothing(tmp_path):
    kept = []
    for name, background in (("a", True), ("b", False)):
        trainer = train(tmp_path / name, save_async=background, save_total_limit=2)
        checkpoints = trainer.store.list()
        assert [step for step, _ in checkpoints] == [6, 8]
        kept.append([trainer.store.load(path).arrays for _, path in checkpoints])
    for first, second in zip(*kept, strict=True):
        for group in ("model", "optimizer"):
            assert [a.tobytes() for a in first[group].values()] == [
                b.tobytes() for b in second[group].values()
            ]


def test_the_snapshot_is_of_its_step_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    """The write is held back until training is four steps further."""
    held, save = threading.Event(), CheckpointStore.save

    def late(store, step, *rest):
        assert held.wait(30)
        return save(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", late)
    seen = []
    callbacks = [
        At(2, lambda trainer: seen.extend(weights(trainer.model))),
        At(6, lambda trainer: held.set()),
    ]
    trainer = train(tmp_path, callbacks, save_steps=100, max_steps=7, save_strategy="no")
    assert not trainer.store.list()

    class SaveAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

    held.clear()
    seen.clear()
    trainer = train(tmp_path, [*callbacks, SaveAtTwo()], max_steps=7, save_strategy="no")
    checkpoint = trainer.store.latest_intact()
    assert checkpoint.step == 2
    saved = list(checkpoint.arrays["model"].values())
    assert [a.tobytes() for a in saved] == [w.tobytes() for w in seen]
    assert [a.tobytes() for a in saved] != [w.tobytes() for w in weights(trainer.model)]
    assert checkpoint.documents["trainer_state"]["global_step"] == 2
    assert checkpoint.documents["progress"]["batch"] == 2
    assert len(checkpoint.documents["trainer_state"]["log_history"]) == 2


def test_on_save_comes_when_the_checkpoint_is_complete(tmp_path):
    found = []

    def look(args, state, control, kwargs):
        store = kwargs["trainer"].store
        found.append((state.global_step, store.verify(store.path(state.global_step))))

    train(tmp_path, [Recorder({"on_save": look})])
    assert found == [(2, []), (4, []), (6, []), (8, [])]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_trouble_with_the_disk_does_not_end_a_run(tmp_path, monkeypatch, caplog, background, error):
    full_disk(monkeypatch, (4, 6), error)
    trainer = train(tmp_path, save_async=background, save_total_limit=1)
    assert trainer.state.global_step == 8
    assert [step for step, _ in trainer.store.list()] == [8]
    told = [m for m in caplog.messages if m.startswith("Could not write")]
    assert [m.split()[3] for m in told] == ["checkpoint-4", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-8", "run.json"]


def test_a_full_disk_leaves_the_last_good_one_and_says_what_to_free(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, (4, 6, 8))
    train(tmp_path, save_total_limit=1)
    assert CheckpointStore(tmp_path).latest_intact().step == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "run.json"]
    assert "The checkpoint there (checkpoint-2) takes" in caplog.text
    assert "MB are free on that disk" in caplog.text
    monkeypatch.undo()
    again = train(tmp_path, resume=True)
    assert again.state.global_step == 8
    expected = train(tmp_path / "whole")
    assert [w.tobytes() for w in weights(again.model)] == [
        w.tobytes() for w in weights(expected.model)
    ]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_a_run_that_wants_it(tmp_path, monkeypatch, background):
    full_disk(monkeypatch, (4,))
    with pytest.raises(CheckpointError, match="checkpoint-4 .*No space left"):
        train(tmp_path, save_async=background, on_save_error="raise")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "run.json"]


def test_the_folder_may_be_deleted_under_the_run(tmp_path):
    folder = tmp_path / "run"

    def delete(trainer):
        trainer.saver.settle()
        shutil.rmtree(folder)

    trainer = train(folder, [At(5, delete)])
    assert trainer.state.global_step == 8
    assert sorted(os.listdir(folder)) == ["checkpoint-6", "checkpoint-8", "run.json"]


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_an_output_dir_that_is_no_folder_is_refused_before_training(tmp_path, policy):
    steps = []
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="Could not write .*choose another output_dir"):
            train(folder, [At(1, steps.append)], on_save_error=policy)
    assert steps == []


def test_a_disk_that_is_full_at_the_start_is_a_warning(tmp_path, caplog, monkeypatch):
    def full(lock):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(RunLock, "acquire", full)
        assert train(tmp_path / "run", save_strategy="epoch").state.global_step == 8
    assert "nothing can be saved until this is fixed" in caplog.text


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    def second(trainer):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
            train(tmp_path)

    trainer = train(tmp_path, [At(3, second)])
    assert trainer.state.global_step == 8
    train(tmp_path)


def test_the_best_checkpoint_is_one_that_exists(tmp_path, monkeypatch, caplog):
    """The last step is the best and its save fails: the model has its weights and keeps them."""
    full_disk(monkeypatch, (8,))
    trainer = Trainer(
        linear_model(),
        arguments(
            tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            max_steps=8, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.05,
        ),
        train_dataset=make_data(), eval_dataset=make_data(), loss="mse",
    )  # fmt: skip
    trainer.fit()
    assert trainer.state.best_global_step == 8  # it gets better all the time
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert "the model keeps the weights of step 8" in caplog.text


def test_a_nonfinite_loss_names_a_checkpoint_that_is_complete(tmp_path):
    from kbtrain import NonFiniteError

    x, y = make_data(16)
    x = np.concatenate([x] * 2)
    x[20] = np.nan
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=8,
                  per_device_train_batch_size=4),
        train_dataset=(x, np.concatenate([y] * 2)), loss="mse",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="checkpoint-4"):
        trainer.fit()
    assert [step for step, _ in trainer.store.list()] == [2, 4]
    for _, path in trainer.store.list():
        for array in trainer.store.load(path).arrays["model"].values():
            assert np.isfinite(array).all()


def test_captured_values_share_no_memory_with_the_model(tmp_path):
    from kbtrain.checkpoint import capture, name_variables

    model = linear_model()
    captured = capture(name_variables(model.variables))
    before = {name: array.copy() for name, array in captured.items()}
    for variable in model.variables:
        variable.assign(np.ones(variable.shape))
    for name, array in captured.items():
        np.testing.assert_array_equal(array, before[name])
        assert array.flags.owndata


@pytest.mark.parametrize("name", ["with spaces", "größe-尺寸", "linked"])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    folder = tmp_path / name
    if name == "linked":
        (tmp_path / "real").mkdir()
        folder.symlink_to(tmp_path / "real")
    train(folder, save_total_limit=1)
    again = train(folder, resume=True, max_steps=9, save_total_limit=1)
    assert again.state.global_step == 9
    assert sorted(os.listdir(folder)) == ["checkpoint-9", "run.json"]


def test_a_program_may_go_elsewhere_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "begin").mkdir()
    (tmp_path / "end").mkdir()
    monkeypatch.chdir(tmp_path / "begin")
    away = [At(3, lambda trainer: os.chdir(tmp_path / "end"))]
    train("run", away, report_to="json", load_best_model_at_end=True, eval_strategy="steps",
          eval_steps=2, save_total_limit=1)  # fmt: skip
    assert os.listdir(tmp_path / "end") == []
    left = ["checkpoint-8", "log.jsonl", "run.json"]
    assert sorted(os.listdir(tmp_path / "begin" / "run")) == left
    text = (tmp_path / "begin" / "run" / "log.jsonl").read_text()
    assert [s for line in text.splitlines() if "loss" in (s := json.loads(line))][-1]["step"] == 8


def test_what_bears_a_checkpoints_name_and_is_none(tmp_path, caplog):
    for name in ("checkpoint-00002", "checkpoint-abc", "checkpoint-2 (copy)", "checkpoint-99"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4").write_text("a file where a checkpoint is to be")
    trainer = train(tmp_path, resume="auto", save_total_limit=2)
    assert [step for step, _ in trainer.store.list()] == [6, 8, 99]
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-00002", "checkpoint-2 (copy)", "checkpoint-4", "checkpoint-6", "checkpoint-8",
        "checkpoint-99", "checkpoint-abc", "run.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-4").read_text() == "a file where a checkpoint is to be"
    assert "Could not write checkpoint-4" in caplog.text
    assert "a file has that name" in caplog.text


def test_checkpoints_of_a_former_run_are_pointed_out(tmp_path, caplog):
    train(tmp_path)
    assert "former run" not in caplog.text
    train(tmp_path, resume=True, max_steps=9)
    assert "former run" not in caplog.text
    train(tmp_path, max_steps=4)
    assert "checkpoints of a former run (checkpoint-2 to checkpoint-9)" in caplog.text


@pytest.mark.parametrize("fault", ["deleted", "damaged"])
def test_the_best_checkpoint_may_be_lost_before_it_is_loaded(tmp_path, caplog, fault):
    def lose(trainer):
        trainer.saver.settle()
        best = trainer.store.path(6)
        if fault == "deleted":
            shutil.rmtree(best)
        else:
            (best / "model.weights.h5").write_bytes(b"")

    def degrade(trainer):
        for variable in trainer.model.trainable_variables:
            variable.assign(100 * np.ones(variable.shape))

    trainer = train(
        tmp_path, [At(7, degrade), At(8, lose)], load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=2, learning_rate=0.05,
    )  # fmt: skip
    assert trainer.state.best_global_step == 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert "the best step 6 has no checkpoint; these are the weights of" in caplog.text
    saved = trainer.store.load(tmp_path / "checkpoint-4").arrays["model"]
    assert [a.tobytes() for a in saved.values()] == [w.tobytes() for w in weights(trainer.model)]


def test_all_checkpoints_may_be_lost_before_the_best_is_loaded(tmp_path, caplog):
    def lose(trainer):
        trainer.saver.settle()
        for step in (2, 4, 6):
            shutil.rmtree(trainer.store.path(step))

    trainer = train(
        tmp_path, [At(8, lose)], load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_steps=2, max_steps=8, learning_rate=0.05, save_only_model=True,
    )  # fmt: skip
    before = weights(trainer.model)
    shutil.rmtree(tmp_path / "checkpoint-8")
    best_model.load(trainer)
    assert "the best step 8 has no checkpoint; the model keeps" in caplog.text
    assert same(weights(trainer.model), before)


def test_without_a_best_step_nothing_is_said_of_its_checkpoint(tmp_path, caplog):
    x, y = make_data()
    args = arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, max_steps=2,
    )  # fmt: skip
    data = {"train_dataset": (x, y), "eval_dataset": (x * np.nan, y)}
    Trainer(linear_model(), args, **data, loss="mse").fit()
    assert "no evaluation gave a best step; the model keeps its last weights" in caplog.text
    assert "best step None" not in caplog.text
