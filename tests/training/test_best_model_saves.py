"""The best model when a save fails: what was seen, what was saved, what is kept and loaded."""

import errno
import json
import os
import shutil
import threading

import pytest
from helpers import arguments, linear_model, make_data, same, weights

from kbtrain import Trainer, TrainerCallback, TrainerState
from kbtrain.checkpoint import CheckpointStore
from kbtrain.errors import CheckpointError, CheckpointUnreadableError
from kbtrain.training import best_model

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def steps(folder):
    return sorted(int(name[11:]) for name in os.listdir(folder) if name.startswith("checkpoint-"))


def make_trainer(folder, scores, **changes):
    """A run with an evaluation and a save at each step; the evaluations say these scores."""
    remaining, seen = iter(scores), {}
    settings = {
        "max_steps": len(scores), "save_strategy": "steps", "save_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "score", "greater_is_better": True,
        "per_device_train_batch_size": 4,
    }  # fmt: skip

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"])

    trainer = Trainer(
        linear_model(), arguments(folder, **(settings | changes)), train_dataset=make_data(),
        eval_dataset=make_data(), loss="mse",
        compute_metrics=lambda prediction: {"score": next(remaining)}, callbacks=[Look()],
    )  # fmt: skip
    return trainer, seen


def failing(monkeypatch, failing_steps, wait=None):
    """Let the writing of some steps' checkpoints fail, after an event if there is one."""
    original = CheckpointStore.save

    def save(store, step, *rest):
        if step in failing_steps:
            if wait is not None:
                assert wait.wait(30)
            raise CheckpointError(f"Could not write checkpoint-{step}") from FULL
        return original(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", save)


def test_the_best_one_stays_while_a_better_one_fails(tmp_path, monkeypatch):
    """The next save is due while the failing one is still being written."""
    reached = threading.Event()
    failing(monkeypatch, {4}, reached)
    trainer, seen = make_trainer(tmp_path, [0.1, 0.5, 0.2, 0.9, 0.3, 0.3], save_total_limit=2)
    wait = trainer.saver.wait

    def waiting():
        if trainer.state.global_step == 5:
            reached.set()
        wait()

    trainer.saver.wait = waiting
    trainer.fit()
    assert steps(tmp_path) == [2, 6]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 4)
    assert trainer.state.best_saved_metric == 0.5
    assert same(weights(trainer.model), seen[2])


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_later_ones_become_the_best_that_was_saved(tmp_path, monkeypatch, load, background):
    failing(monkeypatch, {4})
    trainer, seen = make_trainer(
        tmp_path, [0.1, 0.5, 0.2, 0.9, 0.8, 0.7], load_best_model_at_end=load,
        save_async=background,
    )  # fmt: skip
    trainer.fit()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    assert trainer.state.best_saved_metric == 0.8
    assert same(weights(trainer.model), seen[5 if load else 6])
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-5")
    assert (saved["best_metric"], saved["best_saved_metric"]) == (0.9, 0.8)


def test_saving_only_the_best_goes_on_after_a_failure(tmp_path, monkeypatch):
    failing(monkeypatch, {2})
    trainer, seen = make_trainer(
        tmp_path, [0.1, 0.9, 0.3, 0.2, 0.5], save_strategy="best", save_async=False
    )
    trainer.fit()
    assert steps(tmp_path) == [1, 3, 5]
    assert same(weights(trainer.model), seen[5])


@pytest.mark.parametrize("failed", [{6}, {4, 6}])
def test_a_model_in_memory_that_is_better_than_all_saved_ones_is_kept(
    tmp_path, monkeypatch, caplog, failed
):
    failing(monkeypatch, failed)
    trainer, seen = make_trainer(tmp_path, [0.1, 0.5, 0.2, 0.95 if 4 in failed else 0.3, 0.4, 0.9])
    trainer.fit()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert same(weights(trainer.model), seen[6])
    assert "the model keeps the weights of step 6" in caplog.text


def test_the_last_one_is_not_kept_if_it_is_worse(tmp_path, monkeypatch):
    failing(monkeypatch, {4, 6})
    trainer, seen = make_trainer(tmp_path, [0.1, 0.5, 0.2, 0.9, 0.4, 0.45])
    trainer.fit()
    assert same(weights(trainer.model), seen[2])


def test_what_a_resumed_run_takes_over(tmp_path, monkeypatch):
    failing(monkeypatch, {3})
    first, _ = make_trainer(tmp_path, [0.1, 0.5, 0.9, 0.2], save_total_limit=1)
    first.fit()
    assert steps(tmp_path) == [2, 4]
    again, seen = make_trainer(tmp_path, [0.6, 0.3], max_steps=6, save_total_limit=1)
    again.fit(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-5")
    assert steps(tmp_path) == [5, 6]
    assert same(weights(again.model), seen[5])


def test_a_deleted_best_checkpoint_is_replaced_by_the_next_best(tmp_path):
    trainer, seen = make_trainer(tmp_path, [0.3, 0.9, 0.5, 0.4, 0.2])
    save = trainer.saver.save

    def deleting(snapshot, *rest):
        if snapshot.step == 4:
            shutil.rmtree(tmp_path / "checkpoint-2")
        return save(snapshot, *rest)

    trainer.saver.save = deleting
    trainer.fit()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert same(weights(trainer.model), seen[3])


def test_the_end_of_a_run_deletes_no_others_checkpoints(tmp_path):
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99" / "model.safetensors").write_bytes(b"theirs")
    trainer, _ = make_trainer(tmp_path, [0.9, 0.2, 0.3], save_total_limit=1)
    trainer.fit()
    assert steps(tmp_path) == [1, 99]


def test_a_best_one_that_cannot_be_read_now_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    trainer, seen = make_trainer(tmp_path, [0.9, 0.2])
    opened = os.open

    def refusing(path, *rest, **more):
        if "checkpoint-1/" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *rest, **more)

    with monkeypatch.context() as patch:
        trainer.saver.store.rotate = lambda *rest: patch.setattr(os, "open", refusing)
        with pytest.raises(CheckpointUnreadableError, match=r"EIO|Input.*Training itself is compl"):
            trainer.fit()
    assert steps(tmp_path) == [1, 2]
    again, _ = make_trainer(tmp_path, [], max_steps=2)
    again.fit(resume_from_checkpoint=True)
    assert same(weights(again.model), seen[1])


def test_a_state_of_an_earlier_version_says_how_good_the_best_one_is():
    log = [{"loss": 0.1, "step": 2}, {"eval_loss": 0.5, "step": 2}, {"eval_loss": 0.4, "step": 4}]
    state = TrainerState(
        best_metric=0.4, best_global_step=4, best_model_checkpoint="a/checkpoint-2", log_history=log
    )
    best_model.recall(state, "loss")
    assert state.best_saved_metric == 0.5
    state = TrainerState(
        best_metric=0.4, best_global_step=4, best_model_checkpoint="a/checkpoint-4"
    )
    best_model.recall(state, "loss")
    assert state.best_saved_metric == 0.4
