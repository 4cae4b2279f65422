"""How a run ended: the reason, the weights, the checkpoint to go on from."""

import dataclasses
import json
import os
import signal

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data

from kbtrain import (
    EarlyStoppingCallback,
    NonFiniteError,
    Trainer,
    TrainerCallback,
    WeightAveraging,
)
from kbtrain.display.format import ending_rows
from kbtrain.report.ending import RunEnding
from kbtrain.report.record import RunRecord
from kbtrain.report.summary import commands, took


class Ending(TrainerCallback):
    """Keeps what it was told."""

    every_step = False

    def __init__(self):
        self.phases = []

    def phase(self, text):
        self.phases.append(text)

    def ended(self, ending):
        self.ending = ending


def run(folder, callbacks=(), data=None, raises=None, resume=None, **changes):
    """Four updates; returns the ending."""
    told = Ending()
    data = make_data(16) if data is None else data
    trainer = Trainer(
        linear_model(),
        arguments(folder, **({"per_device_train_batch_size": 4, "num_train_epochs": 1} | changes)),
        train_dataset=data,
        eval_dataset=make_data(16),
        loss="mse",
        callbacks=[told, *callbacks],
    )
    if raises is None:
        trainer.fit(resume)
    else:
        with pytest.raises(raises):
            trainer.fit(resume)
    return told.ending


SAVING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


@pytest.mark.core
def test_a_complete_run(tmp_path):
    ending = run(tmp_path, learning_rate=0.1, **SAVING)
    assert (ending.reason, ending.completed) == ("all updates are done", True)
    assert (ending.step, ending.updates, ending.epoch) == (4, 4, 1.0)
    assert ending.best_metric == "loss"
    assert ending.best_loaded
    assert ending.weights == f"the best, of checkpoint-{ending.best_step}"
    assert ending.best_checkpoint == str(tmp_path / f"checkpoint-{ending.best_step}")
    assert ending.checkpoint == str(tmp_path / "checkpoint-4")
    assert ending.resume_change == 'fit(resume_from_checkpoint="auto")'
    assert sum(ending.shares.values()) == pytest.approx(1, abs=1e-3)
    assert 0 < ending.compile_seconds < ending.seconds
    assert ending.samples_per_second > 0
    assert ending.error is None
    assert RunEnding.from_dict(json.loads(json.dumps(ending.to_dict())) | {"new": 1}) == ending


def test_early_stopping_says_so(tmp_path):
    still = make_data(16)
    stop = EarlyStoppingCallback(2, early_stopping_threshold=100.0)
    ending = run(tmp_path, [stop], still, num_train_epochs=3, **SAVING)
    assert ending.reason == "early stopping: no better loss for 2 evaluations"
    assert ending.completed
    assert ending.step == 3
    assert ending.evaluations_since_best == 3 - ending.best_step


def test_a_callback_that_stops_is_named(tmp_path):
    assert run(tmp_path / "last", [StopAt(4)]).reason == "all updates are done"
    ending = run(tmp_path, [StopAt(2)])
    assert ending.reason == "StopAt asked to stop"
    assert (ending.checkpoint, ending.resume_command) == (None, "")
    assert ending.weights == "the newest, of update 2"


def test_a_callback_may_give_its_reason(tmp_path):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop, control.stop_reason = True, "good enough"

    assert run(tmp_path, [Enough()]).reason == "good enough"


def test_ctrl_c(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    ending = run(tmp_path, [Interrupt()], raises=KeyboardInterrupt, save_strategy="steps")
    assert (ending.reason, ending.completed) == ("Ctrl-C (SIGINT)", False)
    assert ending.checkpoint == str(tmp_path / "checkpoint-1")
    assert ending.error is None


def test_an_error(tmp_path):
    x, y = make_data(16)
    y[9] = np.nan
    ending = run(tmp_path, data=(x, y), raises=NonFiniteError, save_strategy="steps", save_steps=1)
    assert ending.reason == "the loss or the gradient of update 3 was not finite"
    assert ending.error.startswith("NonFiniteError: Update 3 was not finite")
    assert ending.weights == "the newest, of update 2"
    assert not ending.completed


def test_nothing_to_do(tmp_path):
    run(tmp_path, **SAVING)
    ending = run(tmp_path, resume=True, **SAVING)
    assert ending.reason == "there was nothing to do"
    assert ending.step == 4
    assert ending.resume_command or ending.resume_change == "the same call of fit() again"
    assert ending.samples_per_second is None
    assert "1 epoch; 0 of them now, in " in dict(ending_rows(ending))["trained"]


def test_a_resumed_run_says_which_of_the_updates_are_its_own(tmp_path):
    run(tmp_path, [StopAt(3)], **SAVING)
    ending = run(tmp_path, resume=True, **SAVING)
    assert (ending.first_step, ending.step) == (3, 4)
    assert "4 updates, 1 epoch; 1 of them now, in " in dict(ending_rows(ending))["trained"]
    assert took(ending.to_dict()).endswith("since update 3")


def test_terminate_on_nan_at_the_first_update(tmp_path):
    x, y = make_data(16)
    ending = run(tmp_path, [keras.callbacks.TerminateOnNaN()], (x * np.nan, y))
    assert ending.reason == "TerminateOnNaN: Update 1 was not finite: loss nan, gradient norm nan"
    assert ending.step == 0


def test_skipped_updates_are_counted(tmp_path):
    x, y = make_data(16)
    y[9] = np.nan
    ending = run(tmp_path, data=(x, y), on_nonfinite="skip")
    assert (ending.step, ending.skipped) == (4, 1)
    assert dict(ending_rows(ending))["trained"].startswith(
        "4 updates, 1 of them skipped as not finite, 1 epoch, in "
    )


@pytest.mark.core
def test_weights_that_keras_restores_are_named(tmp_path):
    """The loss falls, and the largest counts as the best: that of the first epoch."""
    stop = keras.callbacks.EarlyStopping(patience=1, mode="max", restore_best_weights=True)
    settings = {"num_train_epochs": 3, "eval_strategy": "epoch", "learning_rate": 0.01}
    ending = run(tmp_path, [stop], **settings, save_strategy="epoch")
    assert ending.reason == "early stopping: no better val_loss for 1 epoch"
    assert ending.weights == "the best by val_loss, of update 4, restored by EarlyStopping"
    assert (ending.step, ending.weights_step, ending.best_loaded) == (8, 4, False)
    assert ("weights", f"the model holds {ending.weights}") in ending_rows(ending)
    load = {
        command.title: command.text for command in commands(RunRecord.load(tmp_path / "run.json"))
    }
    assert "checkpoint-4" in load["Load the weights that the model held"]


def test_averages_are_named(tmp_path):
    ending = run(tmp_path, [WeightAveraging(3, 1, "steps")], save_strategy="steps", save_steps=4)
    assert ending.weights == "the average of the weights of 2 updates"
    assert ending.weights_step is None
    (load,) = [
        command
        for command in commands(RunRecord.load(tmp_path / "run.json"))
        if command.title == "Load the newest weights"
    ]
    assert "The model held others, the average of the weights of 2 updates" in load.note
    changes = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    ending = run(tmp_path / "2", [WeightAveraging(4, 1, "steps", evaluate=True)], **changes)
    assert ending.weights == "the average of the weights of 1 update"
    assert dict(ending_rows(ending))["trained"].startswith("4 updates, 1 epoch, in ")
    one = dataclasses.replace(ending, step=1, updates=1)
    assert dict(ending_rows(one))["trained"].startswith("1 update, 1 epoch, in ")
    assert ending.weights_step == 4


def test_a_failure_before_the_first_update(tmp_path):
    def broken(y_true, y_pred):
        raise RuntimeError("no loss today")

    told = Ending()
    trainer = Trainer(
        linear_model(), arguments(tmp_path), train_dataset=make_data(), loss=broken,
        callbacks=[told],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="no loss today"):
        trainer.fit()
    assert told.ending.reason == "an error: RuntimeError"
    assert told.phases[0] == "preparing"


def test_what_only_talks_cannot_end_a_run(tmp_path):
    class Broken(Ending):
        def phase(self, text):
            raise OSError("screen gone")

        def ended(self, ending):
            raise OSError("screen gone")

    assert run(tmp_path, [Broken()]).completed


def test_each_call_that_compiles_counts_as_compiling(tmp_path):
    # Seven batches of 2 rows and one of 1: two shapes, so that two calls compile.
    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found = kwargs["trainer"].current_run
            self.seen = found.compiling_samples, found.samples

    count = Count()
    run(tmp_path, [count], make_data(15), num_train_epochs=2, per_device_train_batch_size=2)
    compiled, samples = count.seen
    assert samples == 30
    assert 3 <= compiled <= 6
