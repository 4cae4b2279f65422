"""Every schedule through the Trainer: logged rates against Transformers' numbers."""

import json

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, same, train_logs, weights
from paths import GOLDEN

import optim
from kbtrain import ConfigurationError, Trainer, TrainingArguments
from kbtrain.errors import CheckpointMismatchError

GOLDEN = json.loads((GOLDEN / "schedules.json").read_text())
# Name -> (key in the golden file, for a learning rate of 10, and arguments for one of 0.01).
NAMES = {
    "constant": ("constant", {}),
    "linear": ("linear w=2 T=10", {}),
    "cosine": ("cosine w=2 T=10", {}),
    "cosine_with_restarts": ("cosine_with_restarts w=2 T=10 num_cycles=2", {"num_cycles": 2}),
    "polynomial": (
        "polynomial w=2 T=10 power=2 lr_end=1e-7",
        {"power": 2, "lr_end": 1e-10},
    ),
    "inverse_sqrt": ("inverse_sqrt w=2", {}),
    "cosine_with_min_lr": ("cosine_with_min_lr w=2 T=10 min_lr=1.0", {"min_lr": 0.001}),
    "cosine_warmup_with_min_lr": (
        "cosine_warmup_with_min_lr w=2 T=10 min_lr=1.0",
        {"min_lr_rate": 0.1},
    ),
    "warmup_stable_decay": (
        "wsd w=2 T=10 decay=4 (default: linear/cosine)",
        {"num_decay_steps": 4},
    ),
}
METRICS = GOLDEN["metrics"]
METRIC_DRIVEN = {
    "greedy": ("greedy factor=.9 patience=1", {"factor": 0.9, "patience": 1}),
    "reduce_lr_on_plateau": (
        "reduce_lr_on_plateau factor=.5 patience=1",
        {"factor": 0.5, "patience": 1},
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_rates_of_the_log(tmp_path, name):
    key, kwargs = NAMES[name]
    args = arguments(
        tmp_path,
        max_steps=10,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=0 if name == "constant" else 2,
    )
    trainer = Trainer(linear_model(), args, train_dataset=make_data(8), loss="mse")
    trainer.fit()
    expected = np.array(GOLDEN["schedules"][key][:10]) / 1000
    np.testing.assert_allclose(train_logs(trainer, "learning_rate"), expected, rtol=1e-5, atol=1e-9)


def test_no_name_is_left_out():
    assert {*NAMES, *METRIC_DRIVEN, "constant_with_warmup"} == set(optim.scheduler_names())


class Counted(keras.layers.Layer):
    """The input, and how often Python has seen it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def call(self, x, training=None):
        if training:
            self.calls.append(1)
        return x


def metric_trainer(
    output_dir, name, callbacks=(), metrics=METRICS, optimizers=(None, None), **more
):
    """A run that evaluates after each step, with the given numbers as its metric."""
    model = keras.Sequential([keras.Input((3,)), Counted(), *linear_model().layers])
    kwargs = METRIC_DRIVEN[name][1] if name in METRIC_DRIVEN else None
    changes = {
        "max_steps": len(metrics),
        "learning_rate": 0.1,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": kwargs,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "pretended",
        "greater_is_better": False,
        **more,
    }
    x, y = make_data(8)
    trainer = Trainer(
        model,
        arguments(output_dir, **changes),
        train_dataset=(x, y),
        eval_dataset=(x[:2], y[:2]),
        loss="mse",
        compute_metrics=lambda _: {"pretended": metrics[max(0, trainer.state.global_step - 1)]},
        callbacks=list(callbacks),
        optimizers=optimizers,
    )
    return trainer


@pytest.mark.parametrize("name", METRIC_DRIVEN)
def test_a_rate_that_answers_to_a_metric(tmp_path, name):
    trainer = metric_trainer(tmp_path, name, eval_on_start=True)
    trainer.fit()
    expected = GOLDEN["metric_schedules"][METRIC_DRIVEN[name][0]]
    # The metric of an update moves the rate of the next one; that of the start moves nothing.
    seen = train_logs(trainer, "learning_rate")
    np.testing.assert_allclose(seen, [0.1, *expected[:-1]], rtol=1e-6)
    assert trainer.lr_scheduler.rate == pytest.approx(expected[-1], rel=1e-14)
    # Changes of the rate compile nothing: a run without changes saw the model as often.
    other = metric_trainer(tmp_path, "constant", eval_on_start=True)
    other.fit()
    assert len(set(train_logs(other, "learning_rate"))) == 1
    assert len(trainer.model.layers[0].calls) == len(other.model.layers[0].calls)


@pytest.mark.parametrize("greater", [True, False])
def test_the_direction_is_that_of_the_best_model(tmp_path, greater):
    trainer = metric_trainer(
        tmp_path, "reduce_lr_on_plateau", metrics=[1, 2, 3, 4], greater_is_better=greater
    )
    trainer.fit()
    assert trainer.lr_scheduler.mode == ("max" if greater else "min")
    assert trainer.lr_scheduler.rate == (0.1 if greater else 0.05)


@pytest.mark.parametrize("name", METRIC_DRIVEN)
@pytest.mark.parametrize("cut", [1, 6])
def test_metric_driven_schedules_resume_exactly(tmp_path, name, cut):
    changes = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, "eval_delay": 2}
    whole = metric_trainer(tmp_path / "whole", name, **changes)
    whole.fit()
    metric_trainer(tmp_path / "cut", name, [StopAt(cut)], **changes).fit()
    resumed = metric_trainer(tmp_path / "cut", name, **changes)
    resumed.fit(resume_from_checkpoint=True)
    assert resumed.lr_scheduler.state() == whole.lr_scheduler.state()
    assert train_logs(resumed, "learning_rate") == train_logs(whole, "learning_rate")
    assert same(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_of_another_kind_of_schedule(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "metrics": [1.0, 1.0]}
    metric_trainer(tmp_path, "constant", [StopAt(1)], **changes).fit()
    other = metric_trainer(tmp_path, "greedy", **changes)
    with pytest.raises(CheckpointMismatchError):
        other.fit(resume_from_checkpoint=True)


def schedule():
    return optim.ReduceLROnPlateau(0.1, factor=0.5, patience=0)


@pytest.mark.parametrize(
    "optimizers",
    [
        lambda: (None, schedule()),
        lambda: (optim.AdamW(0.3), schedule()),
        lambda: (optim.AdamW(schedule()), None),
        lambda: (keras.optimizers.SGD(0.3), schedule()),
        lambda: (keras.optimizers.LossScaleOptimizer(optim.AdamW(schedule())), None),
    ],
    ids=["schedule", "both", "optimizer", "keras", "loss scale"],
)
def test_given_to_the_trainer(tmp_path, optimizers):
    trainer = metric_trainer(tmp_path, "linear", metrics=[1.0, 1.0, 1.0], optimizers=optimizers())
    trainer.fit()
    expected = [0.1, 0.1, 0.05]
    np.testing.assert_allclose(train_logs(trainer, "learning_rate"), expected, rtol=1e-6)
    assert trainer.lr_scheduler.rate == 0.025


def test_arguments_need_evaluations():
    with pytest.raises(ConfigurationError, match="eval_strategy='no'.*Set eval_strategy"):
        TrainingArguments(lr_scheduler_type="greedy")
    args = TrainingArguments(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


def test_a_given_schedule_needs_evaluations(tmp_path):
    trainer = metric_trainer(
        tmp_path, "linear", metrics=[1.0], eval_strategy="no", optimizers=(None, schedule())
    )
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau.*eval_strategy='no'"):
        trainer.fit()


def test_an_optimizer_whose_rate_is_a_function(tmp_path):
    optimizer = optim.AdamW(optim.Constant(0.1))
    trainer = metric_trainer(tmp_path, "linear", optimizers=(optimizer, schedule()))
    with pytest.raises(ConfigurationError, match="must be a number, not a function of the step"):
        trainer.fit()


def test_half_an_interface_is_an_error(tmp_path):
    class Half:
        rate = 0.1

        def on_metric(self, value):
            pass

    trainer = metric_trainer(tmp_path, "linear", optimizers=(None, Half()))
    with pytest.raises(ConfigurationError, match="Half lacks bind, state, load_state"):
        trainer.fit()


def test_a_missing_argument_is_named(tmp_path):
    args = arguments(tmp_path, lr_scheduler_type="warmup_stable_decay")
    trainer = Trainer(linear_model(), args, train_dataset=make_data(8), loss="mse")
    with pytest.raises(ConfigurationError, match="lr_scheduler_kwargs: .*num_decay_steps"):
        trainer.fit()
