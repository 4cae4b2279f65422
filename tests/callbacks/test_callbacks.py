"""Callbacks: the events, what they may ask for, early stopping, their state, the progress bar."""

import json
import logging
import sys

import keras
import numpy as np
import pytest
from helpers import Recorder, StopAt, arguments, linear_model, make_data, without_timings

from kbtrain import (
    ConfigurationError,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from kbtrain.callbacks.base import EVENTS, metric_value
from kbtrain.callbacks.handler import CallbackHandler
from kbtrain.callbacks.progress_bar import display
from kbtrain.callbacks.state import TrainerState
from kbtrain.utils.logging import set_log_level


def make_trainer(output_dir, callbacks=(), model=None, **changes):
    """Four updates of 4 samples; evaluation on the same data."""
    data = make_data(16)
    args = arguments(
        output_dir,
        **(
            {"per_device_train_batch_size": 4, "num_train_epochs": 1, "jit_compile": False}
            | changes
        ),
    )
    return Trainer(
        model or linear_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        callbacks=list(callbacks),
    )


def happened(recorder, event):
    """The steps at which an event happened."""
    return [s for e, s in zip(recorder.events, recorder.steps, strict=True) if e == event]


# --- events ---------------------------------------------------------------------------------------


def test_every_event_but_the_upload_is_fired_with_everything(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        [recorder],
        eval_strategy="epoch",
        save_strategy="epoch",
        gradient_accumulation_steps=2,
    )
    trainer.fit()
    trainer.predict(make_data(4))
    assert set(recorder.events) == set(EVENTS) - {"on_push_begin"}
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
    }
    for event, kwargs in zip(recorder.events, recorder.kwargs, strict=True):
        assert kwargs.keys() == always | extra.get(event, set()), event
        assert kwargs["trainer"] is trainer
        assert kwargs["model"] is trainer.model
    in_training = recorder.kwargs[recorder.events.index("on_step_end")]
    assert in_training["optimizer"] is trainer.optimizer
    assert len(in_training["train_dataloader"]) == 4


def test_predict_logs_nothing(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], per_device_eval_batch_size=4)
    trainer.predict(make_data(10))
    assert recorder.events == ["on_init_end", *["on_prediction_step"] * 3, "on_predict"]
    assert trainer.state.log_history == []


def test_evaluate_alone_logs_and_fires(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert recorder.events == ["on_init_end", *["on_prediction_step"] * 2, "on_log", "on_evaluate"]
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


def test_stop(tmp_path):
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


def test_stop_the_epoch(tmp_path):
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
    assert list(tmp_path.iterdir()) == []


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


def test_add_pop_remove(tmp_path, caplog):
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
    assert "PrinterCallback was there already" in caplog.text


@pytest.mark.parametrize("callback", [object(), print, keras.callbacks.Callback()])
def test_what_is_no_callback_is_refused(tmp_path, callback):
    with pytest.raises(ConfigurationError, match="must be a TrainerCallback"):
        make_trainer(tmp_path, [callback])
    assert list(tmp_path.iterdir()) == []


# --- early stopping -------------------------------------------------------------------------------


class FakeTrainer:
    is_in_train = True


def feed(callback, values, name="eval_loss", better="lower", prefix=None):
    """Evaluations with these values; returns the counters and whether a stop was asked for."""
    args = arguments(
        "unused",
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        greater_is_better=better == "higher",
    )
    control, counters = TrainerControl(), []
    for step, value in enumerate(values, 1):
        callback.on_evaluate(
            args,
            TrainerState(global_step=step),
            control,
            metrics={name: value},
            trainer=FakeTrainer(),
        )
        counters.append(callback.early_stopping_patience_counter)
    return counters, control.should_training_stop


def test_patience_counts_evaluations_without_a_new_best():
    callback = EarlyStoppingCallback(3)
    assert feed(callback, [1.0, 0.9, 0.95, 0.9, 0.8, 0.8, 0.81]) == ([0, 0, 1, 2, 0, 1, 2], False)
    assert feed(callback, [0.8]) == ([3], True)


def test_higher_may_be_better():
    assert feed(EarlyStoppingCallback(2), [0.5, 0.6, 0.6, 0.55], better="higher") == (
        [0, 0, 1, 2],
        True,
    )


def test_small_steady_gains_add_up():
    """0.06 better each time with a threshold of 0.1: every second evaluation is a new best."""
    values = [1.0, 0.94, 0.88, 0.82, 0.76, 0.70]
    counters, stopped = feed(EarlyStoppingCallback(2, 0.1), values)
    assert (counters, stopped) == ([0, 1, 0, 1, 0, 1], False)


def test_a_gain_of_exactly_the_threshold_is_none():
    assert feed(EarlyStoppingCallback(1, 0.5), [2.0, 1.5]) == ([0, 1], True)


def test_nan_is_never_an_improvement_and_never_the_best():
    nan = float("nan")
    callback = EarlyStoppingCallback(3)
    assert feed(callback, [nan, 1.0, nan, 0.9, nan, nan]) == ([1, 0, 1, 0, 1, 2], False)
    assert callback.best == 0.9


def test_other_evaluations_do_not_count():
    callback = EarlyStoppingCallback(1)
    assert feed(callback, [1.0, 2.0, 3.0], name="test_loss") == ([0, 0, 0], False)
    assert callback.best is None


@pytest.mark.parametrize("arguments_", [(0,), (-1,), (1, -0.1)])
def test_early_stopping_refuses_nonsense(arguments_):
    with pytest.raises(ConfigurationError, match="early_stopping_patience"):
        EarlyStoppingCallback(*arguments_)


@pytest.mark.parametrize(
    "changes", [{}, {"eval_strategy": "epoch"}, {"metric_for_best_model": "loss"}]
)
def test_early_stopping_needs_something_to_watch(tmp_path, changes):
    trainer = make_trainer(tmp_path, [EarlyStoppingCallback()], **changes)
    with pytest.raises(ConfigurationError, match="metric_for_best_model"):
        trainer.fit()
    assert list(tmp_path.iterdir()) == []


def scripted(values):
    """A `compute_metrics` that reports these values, whatever the model does."""
    remaining = iter(values)
    return lambda _: {"score": next(remaining)}


def test_early_stopping_in_a_run(tmp_path):
    callback = EarlyStoppingCallback(2)
    trainer = make_trainer(
        tmp_path,
        [callback],
        num_train_epochs=5,
        eval_strategy="epoch",
        metric_for_best_model="score",
    )
    trainer.compute_metrics = scripted([0.5, 0.4, 0.3])
    assert trainer.fit().global_step == 12
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 4)
    # A new run forgets: the counter of the last one would stop it at once.
    trainer.compute_metrics = scripted([0.2, 0.3, 0.4, 0.3, 0.2])
    assert trainer.fit().global_step == 20
    # Evaluations afterwards are nobody's business, whatever their prefix.
    assert callback.early_stopping_patience_counter == 2
    trainer.compute_metrics = None
    assert trainer.evaluate(make_data(4), metric_key_prefix="test")["test_loss"] > 0
    assert callback.early_stopping_patience_counter == 2


def test_early_stopping_with_several_evaluation_sets(tmp_path):
    data = make_data(16)
    trainer = Trainer(
        linear_model(),
        arguments(
            tmp_path,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            eval_strategy="epoch",
            metric_for_best_model="b_score",
        ),
        train_dataset=data,
        eval_dataset={"a": data, "b": data},
        loss="mse",
        compute_metrics=scripted([0.1, 0.9, 0.2, 0.8]),  # a, b, a, b: only a gets better
        callbacks=[EarlyStoppingCallback(1)],
    )
    assert trainer.fit().global_step == 4
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 2)


def test_metric_value_finds_the_name_with_and_without_prefix():
    metrics = {"eval_loss": 1.0, "eval_accuracy": 0.5}
    assert metric_value(metrics, "loss") == 1.0
    assert metric_value(metrics, "eval_accuracy") == 0.5
    with pytest.raises(ConfigurationError, match="'f1'.*eval_accuracy, eval_loss"):
        metric_value(metrics, "f1")


# --- state ----------------------------------------------------------------------------------------


class Counting(TrainerCallback):
    def __init__(self):
        self.count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


def test_states_are_saved_and_restored_one_by_one(tmp_path):
    first, second = Counting(), Counting()
    second.count = 100
    trainer = make_trainer(tmp_path, [first, second], save_strategy="steps", save_steps=3)
    trainer.fit()
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Counting"] == [{"count": 3}, {"count": 103}]
    first, second = Counting(), Counting()
    make_trainer(tmp_path, [first, second]).fit(str(tmp_path / "checkpoint-3"))
    assert (first.count, second.count) == (4, 104)


def test_states_can_be_left_alone(tmp_path):
    make_trainer(tmp_path, [Counting()], save_strategy="steps", save_steps=3).fit()
    counting = Counting()
    make_trainer(tmp_path, [counting], restore_callback_states_from_checkpoint=False).fit(
        str(tmp_path / "checkpoint-3")
    )
    assert counting.count == 1


def test_a_state_without_its_callback_is_reported(tmp_path, caplog):
    make_trainer(tmp_path, [Counting()], save_strategy="steps", save_steps=3).fit()
    make_trainer(tmp_path).fit(str(tmp_path / "checkpoint-3"))
    assert "Counting, which is not in use" in caplog.text


def test_an_attribute_called_state_is_no_state(tmp_path):
    class Keeper(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.state = state

    make_trainer(tmp_path, [Keeper], save_strategy="steps", save_steps=4).fit()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_handler_without_listeners_does_not_gather_arguments():
    def explode():
        raise AssertionError("nobody listens")

    handler = CallbackHandler([TrainerCallback()], explode)
    control = TrainerControl()
    args = arguments("unused")
    assert handler.fire("on_step_end", args, TrainerState(), control) is control


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
        (NeedsArguments, "NeedsArguments cannot be made without arguments.*path.*give an object"),
        (ReturnsText, "ReturnsText.on_step_end must return a TrainerControl or None.*'stop'"),
    ],
)
def test_a_callback_that_cannot_work_is_named(tmp_path, callback, match):
    with pytest.raises(ConfigurationError, match=match):
        make_trainer(tmp_path, [callback]).fit()


def test_a_metric_that_is_no_number_cannot_be_best():
    with pytest.raises(ConfigurationError, match="must be a number.*eval_acc='high'"):
        metric_value({"eval_acc": "high"}, "acc")


# --- progress bar and JSON lines ------------------------------------------------------------------


def test_lines_without_a_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=None, eval_strategy="epoch")
    trainer.fit()
    out, err = capsys.readouterr()
    assert out == ""
    assert "it/s" not in err
    lines = err.splitlines()
    assert len(lines) == len(trainer.state.log_history) == 6
    loss = trainer.state.log_history[3]["loss"]
    assert lines[3].startswith(f"step 4/4: loss {loss:.4g}, grad_norm ")
    assert lines[4].startswith("step 4/4: eval_loss ")


@pytest.mark.parametrize(
    ("disable", "level", "terminal", "notebook", "shown"),
    [
        (None, "passive", False, False, ["PrinterCallback"]),
        (None, "passive", True, False, ["ProgressCallback"]),
        (None, "passive", False, True, ["ProgressCallback"]),
        (True, "passive", True, True, ["PrinterCallback"]),
        (None, "error", True, False, []),
        (True, "error", False, False, []),
        (False, "error", False, False, ["ProgressCallback"]),
    ],
)
def test_what_is_shown(monkeypatch, kbtrain_logger, disable, level, terminal, notebook, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    set_log_level(level)
    displayed = display(TrainingArguments(disable_tqdm=disable, log_level=level))
    assert [type(callback).__name__ for callback in displayed] == shown


def test_a_bar_where_it_is_wanted(tmp_path, capfd):
    make_trainer(tmp_path, disable_tqdm=False, eval_strategy="epoch").fit()
    _, err = capfd.readouterr()
    assert "4/4" in err
    assert "loss" in err


@pytest.fixture
def kbtrain_logger():
    """The logger as it was before the test."""
    logger = logging.getLogger("kbtrain")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers


def json_lines(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_json_lines_hold_what_was_logged(tmp_path):
    trainer = make_trainer(tmp_path, report_to="json", eval_strategy="epoch")
    trainer.fit()
    lines = json_lines(tmp_path)
    assert lines == trainer.state.log_history
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 4]


def test_json_lines_of_a_fresh_run_begin_anew(tmp_path):
    make_trainer(tmp_path, report_to="json").fit()
    make_trainer(tmp_path, report_to="json", max_steps=2).fit()
    assert [line["step"] for line in json_lines(tmp_path)] == [1, 2, 2]


def test_json_lines_are_cut_back_on_resume(tmp_path):
    def run(resume=None, callbacks=()):
        trainer = make_trainer(
            tmp_path,
            callbacks,
            report_to="json",
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.fit(resume)
        return without_timings(json_lines(tmp_path))

    whole = run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "ste')  # torn by a crash
    assert run(str(tmp_path / "checkpoint-2")) == whole
    assert [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 4]
