"""Early stopping: patience, thresholds, several evaluation sets."""

import pytest
from helpers import arguments, linear_model, make_data
from helpers_callbacks import make_trainer

from kbtrain import (
    ConfigurationError,
    EarlyStoppingCallback,
    Trainer,
    TrainerControl,
)
from kbtrain.callbacks.base import metric_value
from kbtrain.callbacks.state import TrainerState

pytestmark = pytest.mark.core


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


def test_a_metric_that_is_no_number_cannot_be_best():
    with pytest.raises(ConfigurationError, match="must be a number.*eval_acc='high'"):
        metric_value({"eval_acc": "high"}, "acc")
