"""Callbacks that act at logs say so in a run without logs."""

import logging

import pytest
from helpers import arguments, linear_model, make_data

from kbtrain import (
    GradientNoiseScale,
    HistogramCallback,
    SystemMetricsCallback,
    ThroughputCallback,
    Trainer,
)

CALLBACKS = (GradientNoiseScale, HistogramCallback, SystemMetricsCallback, ThroughputCallback)


def messages(tmp_path, caplog, **changes):
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, **({"max_steps": 2} | changes)),
        train_dataset=make_data(16),
        loss="mse",
        callbacks=[cls() for cls in CALLBACKS],
    )
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer.fit()
    return [m for r in caplog.records if "acts at logs" in (m := r.getMessage())]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"logging_strategy": "no"}, "logging_strategy='no'"),
        ({"logging_steps": 3}, "logging_steps=3, and the run ends after 2 updates"),
    ],
)
def test_a_run_without_logs_is_named(tmp_path, caplog, changes, setting):
    said = messages(tmp_path, caplog, **changes)
    assert sorted(m.partition(" ")[0] for m in said) == [cls.__name__ for cls in CALLBACKS]
    assert all(setting in m for m in said)


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 2},
        {"logging_steps": 3, "logging_first_step": True},
        {"logging_strategy": "epoch"},
    ],
)
def test_a_run_with_logs_is_not(tmp_path, caplog, changes):
    assert messages(tmp_path, caplog, **changes) == []
