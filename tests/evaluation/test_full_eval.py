"""ema, bf16_full_eval and fp16_full_eval: other weights and another precision to evaluate."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, same, weights

from kbtrain import Trainer
from kbtrain.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16_full_eval", ml_dtypes.bfloat16), ("fp16_full_eval", np.float16)]
)
def test_low_precision_outside_of_training_only(tmp_path, name, dtype):
    x, y = make_data(8)
    model = linear_model()
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, eval_strategy="steps", eval_steps=1,
                     **{name: True})  # fmt: skip
    trainer = Trainer(model, args, train_dataset=(x, y), eval_dataset=(x, y), loss="mse")
    trainer.fit()
    kernel, bias = weights(model)
    inside = trainer.state.log_history[1]["eval_loss"]
    assert inside == pytest.approx(np.mean((x @ kernel + bias - y) ** 2), rel=1e-5)

    def rounded(values):
        return values.astype(dtype).astype("float64")

    product = rounded(rounded(x) @ rounded(kernel))
    expected = np.mean((rounded(product + rounded(bias)) - y) ** 2)
    outside = trainer.evaluate()["eval_loss"]
    assert outside == pytest.approx(expected, rel=2e-2 if "bf16" in name else 2e-3)
    assert outside != inside
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {v.dtype for v in model.variables} == {"float32"}
    trainer.args = args.replace(**{name: False})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(inside, rel=1e-6)


def averaged(path, **changes):
    data = make_data(12)
    args = arguments(path, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
                     max_grad_norm=0, max_steps=5, per_device_train_batch_size=4,
                     eval_strategy="steps", eval_steps=5, **changes)  # fmt: skip
    trainer = Trainer(linear_model(), args, train_dataset=data, eval_dataset=data, loss="mse")
    trainer.fit()
    return trainer


def test_the_average_is_that_of_the_weights(tmp_path):
    found = averaged(tmp_path, ema={"decay": 0.7, "warmup": False})
    x, y = (a.astype("float64") for a in make_data(12))
    kernel, bias = (w.astype("float64") for w in weights(linear_model()))
    averages = None
    for step in range(5):
        rows = slice(4 * (step % 3), 4 * (step % 3) + 4)
        error = 2 * (x[rows] @ kernel + bias - y[rows]) / 4
        kernel, bias = kernel - 0.1 * x[rows].T @ error, bias - 0.1 * error.sum(0)
        now = kernel, bias
        averages = now if averages is None else [
            0.7 * a + 0.3 * n for a, n in zip(averages, now, strict=True)
        ]  # fmt: skip
    for value, expected in zip(weights(found.model), averages, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    evaluated = next(e["eval_loss"] for e in found.state.log_history if "eval_loss" in e)
    expected_loss = np.mean((x @ averages[0] + averages[1] - y) ** 2)
    assert evaluated == pytest.approx(expected_loss, rel=1e-5)


def test_ema_with_what_else_wraps_and_with_what_cannot(tmp_path):
    trainer = averaged(tmp_path / "a", ema=0.9, fp16=True, save_strategy="steps", save_steps=5)
    kinds = type(trainer.optimizer).__name__, type(trainer.optimizer.inner_optimizer).__name__
    assert kinds == ("LossScaleOptimizer", "EMA")
    saved = json.loads((tmp_path / "a" / "checkpoint-5" / "training_args.json").read_text())
    assert saved["ema"] == {"decay": 0.9}
    with pytest.raises(ConfigurationError, match="ema: .*no argument 'halflife'"):
        averaged(tmp_path / "b", ema={"halflife": 3})
    given = Trainer(linear_model(), arguments(tmp_path / "c", ema=0.9), loss="mse",
                    train_dataset=make_data(4),
                    optimizers=(keras.optimizers.SGD(0.1), None))  # fmt: skip
    with pytest.raises(ConfigurationError, match="created from the arguments"):
        given.fit()
    without = averaged(tmp_path / "d", ema=None)
    assert not same(weights(without.model), weights(trainer.model))
