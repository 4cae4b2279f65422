"""Evaluating and saving by the clock; the clock is a test's own, a second for every update."""

import pytest
from helpers import Recorder, arguments, linear_model, make_data

from kbtrain import Trainer, TrainingArguments
from kbtrain.callbacks import time_triggers
from kbtrain.errors import ConfigurationError

X, Y = make_data(16)


class Clock:
    """Time that passes with the updates alone."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(time_triggers, "time", fake)
    return fake


def steps_of(event, folder, clock, **changes):
    """The steps at which `event` came in a run of 12 updates, a second each."""

    def tick(*_):
        clock.now += 1.0

    recorder = Recorder({"on_step_begin": tick})
    settings = {"max_steps": 12, "per_device_train_batch_size": 4} | changes
    args = arguments(folder, logging_strategy="no", **settings)
    data = {"train_dataset": (X, Y), "eval_dataset": (X, Y)}
    trainer = Trainer(linear_model(), args, **data, loss="mse", callbacks=[recorder])
    trainer.fit()
    seen = zip(recorder.events, recorder.steps, strict=True)
    return [step for name, step in seen if name == event]


def test_saving_every_few_minutes(tmp_path, clock):
    assert steps_of("on_save", tmp_path, clock, save_minutes=5 / 60) == [5, 10]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-5",
    ]


def test_evaluating_every_few_minutes(tmp_path, clock):
    assert steps_of("on_evaluate", tmp_path, clock, eval_minutes=4 / 60) == [4, 8, 12]


def test_the_strategies_count_as_well(tmp_path, clock):
    """Every 7 updates, and 4 seconds after the last one: at 4, 7, 11 and, being the last, 12."""
    changes = {"eval_minutes": 4 / 60, "eval_strategy": "steps", "eval_steps": 7}
    assert steps_of("on_evaluate", tmp_path, clock, **changes) == [4, 7, 11, 12]


def test_without_minutes_nobody_looks_at_the_clock(tmp_path, clock):
    assert steps_of("on_save", tmp_path, clock) == []
    assert steps_of("on_evaluate", tmp_path, clock) == []


def test_a_block_may_have_many_updates_all_the_same():
    assert time_triggers.TimedCallback.every_step is False


def test_an_evaluation_needs_data(tmp_path):
    args = arguments(tmp_path, eval_minutes=1)
    with pytest.raises(ConfigurationError, match="eval_minutes=1.0 needs an eval_dataset"):
        Trainer(linear_model(), args, train_dataset=(X, Y), loss="mse")


def test_the_best_model_needs_checkpoints_of_evaluated_steps():
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ConfigurationError, match="save_minutes"):
        TrainingArguments(load_best_model_at_end=True, save_minutes=5, **strategies)
    TrainingArguments(load_best_model_at_end=True, eval_minutes=5, **strategies)
