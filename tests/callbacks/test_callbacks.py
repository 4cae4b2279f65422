"""Callbacks: the events, what they may ask for, adding and removing, mistakes."""

import keras
import numpy as np
import pytest
from helpers import FullRecorder, Recorder, StopAt, make_data
from helpers_callbacks import happened, make_trainer

from kbtrain import (
    ConfigurationError,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
)
from kbtrain.callbacks.base import ALL_EVENTS

pytestmark = pytest.mark.core

# --- events ---------------------------------------------------------------------------------------


def test_every_event_but_the_upload_is_fired_with_everything(tmp_path):
    recorder = FullRecorder()
    trainer = make_trainer(
        tmp_path,
        [recorder],
        eval_strategy="epoch",
        save_strategy="epoch",
        gradient_accumulation_steps=2,
    )
    trainer.fit()
    trainer.predict(make_data(4))
    assert set(recorder.events) == set(ALL_EVENTS) - {"on_push_begin"}
    always = {
        "trainer",
        "model",
        "processing_class",
        "batch",
        "loss",
        "metrics",
        "optimizer",
        "lr_scheduler",
        "train_dataloader",
        "eval_dataloader",
    }
    extra = {
        "on_log": {"logs"},
        "on_evaluate": {"metrics"},
        "on_predict": {"metrics"},
        "on_prediction_step": {"batches"},
        "on_evaluate_begin": {"prefix"},
        "on_predict_begin": {"prefix"},
    }
    for event, kwargs in zip(recorder.events, recorder.kwargs, strict=True):
        assert kwargs.keys() == always | extra.get(event, set()), event
        assert kwargs["trainer"] is trainer
        assert kwargs["model"] is trainer.model
    in_training = recorder.kwargs[recorder.events.index("on_step_end")]
    assert in_training["optimizer"] is trainer.optimizer
    assert len(in_training["train_dataloader"]) == 4


def test_predict_logs_nothing(tmp_path):
    recorder = FullRecorder()
    trainer = make_trainer(tmp_path, [recorder], per_device_eval_batch_size=4)
    trainer.predict(make_data(10))
    batch = ["on_prediction_step_begin", "on_prediction_step"]
    assert recorder.events == ["on_init_end", "on_predict_begin", *batch * 3, "on_predict"]
    assert trainer.state.log_history == []


def test_evaluate_alone_logs_and_fires(tmp_path):
    recorder = FullRecorder()
    trainer = make_trainer(tmp_path, [recorder], per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    batch = ["on_prediction_step_begin", "on_prediction_step"]
    events = ["on_init_end", "on_evaluate_begin", *batch * 2, "on_log", "on_evaluate"]
    assert recorder.events == events
    assert recorder.kwargs[-1]["metrics"] == metrics
    assert trainer.state.log_history == [metrics | {"epoch": 0.0, "step": 0}]


def test_the_variables_are_old_before_and_new_after_the_update(tmp_path):
    seen = {}

    def look(name):
        def action(args, state, control, kwargs):
            kernel = kwargs["model"].trainable_variables[0]
            seen.setdefault(name, []).append(keras.ops.convert_to_numpy(kernel.value).copy())

        return action

    recorder = Recorder(
        {"on_pre_optimizer_step": look("before"), "on_optimizer_step": look("after")}
    )
    make_trainer(tmp_path, [recorder]).fit()
    for step in range(3):
        assert not np.array_equal(seen["before"][step], seen["after"][step])
        np.testing.assert_array_equal(seen["after"][step], seen["before"][step + 1])


def test_each_callback_gets_the_control_of_the_one_before(tmp_path):
    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    seen = []
    look = Recorder({"on_step_end": lambda a, s, control, k: seen.append(control)})
    trainer = make_trainer(tmp_path, [Replace, look])
    assert trainer.fit().global_step == 1
    assert seen[0].should_training_stop
    assert seen[0] is trainer.control


def test_an_exception_names_the_callback_the_event_and_the_step(tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyError("mine")

    trainer = make_trainer(tmp_path, [Broken])
    with pytest.raises(KeyError, match="mine") as caught:
        trainer.fit()
    assert "Broken.on_step_end at step 2" in "".join(caught.value.__notes__)
    assert not trainer.is_in_train


def test_callbacks_are_closed_also_after_an_error(tmp_path):
    closed = []

    class Holder(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("stop")

        def close(self):
            closed.append(True)

    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(tmp_path, [Holder]).fit()
    assert closed == [True]


# --- requests -------------------------------------------------------------------------------------


def ask(name, at, event="on_step_end"):
    def action(args, state, control, kwargs):
        if state.global_step in at:
            setattr(control, name, True)

    return Recorder({event: action})


def test_should_training_stop_ends_the_run(tmp_path):
    recorder = ask("should_training_stop", [2])
    output = make_trainer(tmp_path, [recorder], num_train_epochs=3).fit()
    assert output.global_step == 2
    assert recorder.events[-3:] == ["on_epoch_end", "on_log", "on_train_end"]
    assert recorder.events.count("on_epoch_begin") == 1


def test_a_second_fit_is_not_stopped_by_the_first(tmp_path):
    recorder = ask("should_training_stop", [2])
    trainer = make_trainer(tmp_path, [recorder])
    assert trainer.fit().global_step == 2
    recorder.on.clear()
    assert trainer.fit().global_step == 4


def test_should_epoch_stop_ends_the_epoch(tmp_path):
    recorder = ask("should_epoch_stop", [1, 2])
    output = make_trainer(tmp_path, [recorder], num_train_epochs=3).fit()
    # Epochs of 1, 1 and 4 updates: the plan of 12 is not reached, the number of epochs is.
    assert output.global_step == 6
    assert happened(recorder, "on_epoch_begin") == [0, 1, 2]
    assert happened(recorder, "on_epoch_end") == [1, 2, 6]


def test_an_epoch_can_be_left_out(tmp_path, caplog):
    begun = []

    def action(args, state, control, kwargs):
        begun.append(state.global_step)
        control.should_epoch_stop = len(begun) == 2

    recorder = Recorder({"on_epoch_begin": action})
    assert make_trainer(tmp_path, [recorder], num_train_epochs=3).fit().global_step == 8
    assert begun == [0, 4, 4]
    assert "No data" not in caplog.text  # there is some, and nobody wanted it


def test_save_evaluate_and_log_on_request(tmp_path):
    requests = [ask("should_save", [2]), ask("should_evaluate", [1, 3]), ask("should_log", [3])]
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [*requests, recorder], logging_strategy="no")
    trainer.fit()
    assert happened(recorder, "on_save") == [2]
    assert happened(recorder, "on_evaluate") == [1, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    losses = [(e["step"], "eval_loss" in e) for e in trainer.state.log_history]
    assert losses == [(1, True), (3, False), (3, True), (4, False)]
    # A request is done once.
    assert recorder.events.count("on_save") == 1


def test_a_request_can_be_withdrawn(tmp_path):
    def withdraw(args, state, control, kwargs):
        control.should_save = control.should_log = False

    recorder = Recorder({"on_step_end": withdraw})
    make_trainer(tmp_path, [recorder], save_strategy="steps", save_steps=1).fit()
    assert "on_save" not in recorder.events
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_request_at_the_end_of_an_epoch(tmp_path):
    recorder = ask("should_evaluate", [4, 8], event="on_epoch_end")
    make_trainer(tmp_path, [recorder], num_train_epochs=2).fit()
    assert happened(recorder, "on_evaluate") == [4, 8]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4, 6, 8]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 8]),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, [4, 8]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, [6, 8]),
        ({"eval_strategy": "epoch"}, [4, 8]),
        ({"eval_strategy": "epoch", "eval_delay": 1.5}, [8]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 4, 8]),
    ],
)
def test_when_evaluations_are_due(tmp_path, changes, steps):
    recorder = Recorder()
    make_trainer(tmp_path, [recorder], num_train_epochs=2, **changes).fit()
    assert happened(recorder, "on_evaluate") == steps


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.25}, [2, 4, 6, 8]),
        ({"logging_strategy": "epoch"}, [4, 8]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 500}, []),
    ],
)
def test_when_logs_are_due(tmp_path, changes, steps):
    trainer = make_trainer(tmp_path, num_train_epochs=2, **changes)
    trainer.fit()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == steps
    assert "train_loss" in trainer.state.log_history[-1]


# --- adding and removing --------------------------------------------------------------------------


def test_what_looks_like_an_event_and_is_none_is_pointed_out(tmp_path, caplog):
    class Hopeful(TrainerCallback):
        def on_step_ends(self, args, state, control, **kwargs):
            raise AssertionError

        def on_my_own_business(self):
            raise AssertionError

        def state(self):
            return {"args": {}, "attributes": {}}

        @classmethod
        def from_state(cls, state):
            raise AssertionError

    make_trainer(tmp_path, [Hopeful()])
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "Hopeful.on_step_ends is never called" in warnings[0]
    assert "Did you mean on_step_end?" in warnings[0]
    assert "load_state(self, state)" in warnings[1]


def test_callbacks_can_be_added_popped_and_removed(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.add_callback(StopAt(1))
    assert trainer.pop_callback(Recorder) is recorder
    assert trainer.pop_callback(Recorder) is None
    trainer.remove_callback(StopAt)
    assert trainer.fit().global_step == 4
    assert recorder.events == []
    trainer.add_callback(PrinterCallback)
    assert "PrinterCallback is already in use" in caplog.text


@pytest.mark.parametrize("callback", [object(), print, keras.callbacks.CallbackList()])
def test_what_is_no_callback_is_refused(tmp_path, callback):
    with pytest.raises(ConfigurationError, match="must be a TrainerCallback"):
        make_trainer(tmp_path, [callback])
    assert list(tmp_path.iterdir()) == []


# --- mistakes ------------------------------------------------------------------------------------


class WithoutMore(TrainerCallback):
    def on_log(self, args, state, control, logs):
        pass


class NeedsArguments(TrainerCallback):
    def __init__(self, path):
        self.path = path


class ReturnsText(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        return "stop"


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (WithoutMore, r"on_log must be defined as on_log\(self, args, state, control, \*\*kwargs"),
        (
            NeedsArguments,
            "NeedsArguments cannot be created without arguments.*path.*Pass an object",
        ),
        (ReturnsText, "ReturnsText.on_step_end must return a TrainerControl or None.*'stop'"),
    ],
)
def test_a_callback_that_cannot_work_is_named(tmp_path, callback, match):
    with pytest.raises(ConfigurationError, match=match):
        make_trainer(tmp_path, [callback]).fit()


# --- values for the logs --------------------------------------------------------------------------


class Values(TrainerCallback):
    """Returns numbers, other things, and the run's own names."""

    def log_values(self, trainer):
        mine = {"loss": -1.0, "learning_rate": -1.0, "epoch": -1.0}
        words = {"word": "high", "list": [1, 2], "nothing": None}
        return mine | words | {"mine": np.float32(2), "tensor": keras.ops.ones(())}


def test_a_callback_cannot_replace_the_numbers_of_a_run(tmp_path, caplog):
    plain, trainer = make_trainer(tmp_path), make_trainer(tmp_path, [Values()])
    for each in (plain, trainer):
        each.fit()
    logs, expected = trainer.state.log_history[:-1], plain.state.log_history[:-1]
    added = {"mine": 2.0, "tensor": 1.0}
    names = ("loss", "learning_rate", "epoch", "grad_norm")
    assert [{n: log[n] for n in (*names, *added)} for log in logs] == [
        {n: log[n] for n in names} | added for log in expected
    ]
    assert all(not {"word", "list", "nothing"} & set(log) for log in logs)
    said = [r.getMessage() for r in caplog.records if "Values.log_values" in r.getMessage()]
    assert len(said) == 2
    assert "'epoch', 'learning_rate', 'loss', because the run" in said[0]
    assert "'list', 'nothing', 'word', because they are no numbers" in said[1]
