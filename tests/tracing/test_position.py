"""`state.global_step` and `state.epoch` in a step: right at every update, however they are used."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, same, weights
from keras import ops

from kbtrain import Trainer
from kbtrain.tracing.moment import Moment
from kbtrain.tracing.position import Decisions

EXPRESSIONS = {
    "updates": lambda s: s.global_step,
    "share": lambda s: s.global_step / 4,
    "minimum": lambda s: min(1.0, s.global_step / 4),
    "maximum": lambda s: max(0.25, 1 - s.global_step / 4),
    "reflected": lambda s: 2 - 3 * s.global_step + 5 / (1 + s.global_step),
    "modulo": lambda s: s.global_step % 3 + s.global_step // 3,
    "power": lambda s: 0.5**s.global_step + s.global_step**2,
    "branch": lambda s: 1.0 if s.global_step < 3 else 2.0,
    "several": lambda s: 1.0 if 1 < s.global_step <= 4 and s.global_step != 3 else 2.0,
    "every other": lambda s: 5.0 if s.global_step % 2 else 7.0,
    "truth": lambda s: 1.0 if s.global_step else 0.0,
    "abs": lambda s: abs(s.global_step - 4),
    "floor": lambda s: math.floor(s.global_step / 3) + math.ceil(s.global_step / 3),
    "round": lambda s: round(s.global_step / 3) + round(s.global_step / 3, 1),
    "epochs": lambda s: s.epoch * 10,
    "both": lambda s: s.epoch + s.global_step,
    "whole epoch": lambda s: int(s.epoch),
    "epoch parity": lambda s: 3.0 if int(s.epoch) % 2 else 4.0,
    "numpy": lambda s: np.minimum(s.global_step, 3) + np.exp(-s.global_step / 4),
    "clip": lambda s: np.clip(s.global_step / 4, 0.25, 0.75),
    "in words": lambda s: len(f"{s.global_step}"),
    "constant": lambda s: s.max_steps,
}


class Tracking(Trainer):
    """Logs what the expressions are."""

    expressions = EXPRESSIONS

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        for name, expression in self.expressions.items():
            self.track(name, expression(self.state))
        return super().compute_loss(model, inputs, return_outputs)


def expected(expression, steps, per_epoch):
    states = [
        SimpleNamespace(global_step=i, epoch=i / per_epoch, max_steps=steps) for i in range(steps)
    ]
    return [float(expression(state)) for state in states]


@pytest.mark.core
@pytest.mark.parametrize("accumulation", [1, 2])
def test_expressions_are_those_of_the_update(tmp_path, accumulation):
    args = arguments(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer = Tracking(linear_model(), args, train_dataset=make_data(20), loss="mse")
    trainer.fit()
    for name, expression in EXPRESSIONS.items():
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        np.testing.assert_allclose(logged, expected(expression, 10, 5), rtol=1e-5, err_msg=name)


def test_numbers_that_python_takes_away_run_eagerly(tmp_path, caplog):
    class Taking(Tracking):
        expressions = {"exp": lambda s: math.exp(-s.global_step / 4), "int": lambda s: int(s.epoch)}

    args = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=4)
    trainer = Taking(linear_model(), args, train_dataset=make_data(16), loss="mse")
    with caplog.at_level(logging.INFO, "kbtrain"):
        trainer.fit()
    logged = [entry["exp"] for entry in trainer.state.log_history if "exp" in entry]
    np.testing.assert_allclose(logged, expected(Taking.expressions["exp"], 4, 4), rtol=1e-6)
    assert "runs eagerly" in caplog.text
    assert "test_position.py" in caplog.text


class Warmed(Trainer):
    """The weight of the loss grows over eight updates."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = inputs
        outputs = model(x)
        loss = ops.mean(ops.square(outputs - y)) * min(1.0, self.state.global_step / 8)
        return (loss, outputs) if return_outputs else loss


def descent(x, y, w, b, rate, updates):
    """Gradient descent in float64 with the weight of `Warmed`."""
    x, y, w, b = (np.asarray(a, "float64") for a in (x, y, w, b))
    for step in range(updates):
        error = 2 * (x @ w + b - y) / len(x) * min(1.0, step / 8)
        w, b = w - rate * x.T @ error, b - rate * error.sum(0)
    return w, b


def test_a_weight_that_grows_with_many_updates_in_one_call(tmp_path):
    x, y = make_data(4)
    model = linear_model()
    w, b = descent(x, y, *weights(model), 0.1, 40)
    args = arguments(
        tmp_path,
        num_train_epochs=40,
        per_device_train_batch_size=4,
        logging_steps=1000,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        weight_decay=0.0,
        steps_per_execution=16,
    )
    data = tuple(np.tile(a, (10, 1)) for a in (x, y))  # ten updates of the same samples
    Warmed(model, args.replace(num_train_epochs=4), train_dataset=data).fit()
    np.testing.assert_allclose(weights(model)[0], w, rtol=1e-5)
    np.testing.assert_allclose(weights(model)[1], b, rtol=1e-4, atol=1e-6)


def test_resumed_and_evaluated_where_the_run_stands(tmp_path):
    data = make_data(24)

    def run(folder, resume, **changes):
        args = arguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=5,
            **changes,
        )
        trainer = Warmed(linear_model(), args, train_dataset=data, eval_dataset=data)
        trainer.fit(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", None)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-5")
    assert same(weights(whole.model), weights(resumed.model))
    x, y = data
    w, b = weights(whole.model)
    mse = float(np.mean(np.square(x.astype("float64") @ w + b - y)))
    assert whole.evaluate()["eval_loss"] == pytest.approx(mse, rel=1e-5)
    whole.state.global_step = 2
    assert whole.evaluate()["eval_loss"] == pytest.approx(mse / 4, rel=1e-5)


def test_callbacks_and_the_log_get_plain_numbers(tmp_path):
    kinds = set()
    seen = Recorder(
        {"on_step_end": lambda args, state, control, kwargs: kinds.add(type(state.epoch))}
    )
    args = arguments(tmp_path, num_train_epochs=1)
    trainer = Warmed(linear_model(), args, train_dataset=make_data(), callbacks=[seen])
    trainer.fit()
    assert kinds == {float}
    assert type(trainer.state.global_step) is int
    assert trainer.state.to_dict()["global_step"] == 2


def test_how_long_decisions_hold():
    decisions = Decisions()
    start = Moment(step=10, epoch=1, batch=3, batches=8, micro_batches=2)
    assert decisions.horizon(start, 64) == 64
    decisions.made["a"] = (lambda moment: moment.step < 13), True
    assert decisions.horizon(start, 64) == 3
    decisions.made["b"] = (lambda moment: moment.read("epoch") < 1.7), True
    assert decisions.horizon(start, 64) == 2  # 1 + 3/8, 1 + 5/8, 1 + 7/8
    assert not decisions.hold(start.after(2))
