"""On a GPU each update is a call: XLA's loops of unknown length would wait for the device."""

import importlib

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, weights

from kbtrain import Trainer
from kbtrain.backends import load

pytestmark = pytest.mark.cross  # needs JAX


@pytest.fixture
def programs(monkeypatch):
    """The texts of all programs that are compiled, as on a GPU."""
    compiling = importlib.import_module("kbtrain.backends.jax.compile")
    compile_it, texts = compiling._compile, []

    def recorded(jitted, *args):
        texts.append(jitted.lower(*args).as_text())
        compile_it(jitted, *args)

    monkeypatch.setattr(compiling, "_compile", recorded)
    monkeypatch.setattr(compiling, "on_gpu", lambda: True)
    return texts


def trained(folder, **settings):
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(4), keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), *hidden, keras.layers.Dense(1)])
    args = arguments(folder, per_device_train_batch_size=2, num_train_epochs=2, **settings)
    x, y = make_data(26)[:2]
    trainer = Trainer(model, args, train_dataset=(x, y), loss="mean_squared_error")
    trainer.fit()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return [*weights(model), *(v.numpy() for v in trainer.optimizer.variables)], losses


def test_updates_are_the_same_in_blocks_of_any_length(tmp_path, programs):
    alone = trained(tmp_path, steps_per_execution=1, logging_steps=5)
    one = programs[0]
    together = trained(tmp_path, steps_per_execution=8, logging_steps=5)
    other = programs[-1]
    for a, b in zip(alone[0], together[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert alone[1] == together[1]
    assert len(alone[1]) == 5
    assert "while" not in one + other


def test_results_of_several_updates_come_along_one_axis(programs):
    state = keras.Variable(np.float32(1.0))

    def double(x):
        state.assign(state.value * 2)
        return {"sum": state.value + x, "row": x * np.ones(2, "float32")}

    run = load().compile_steps(double, [state])
    block = np.arange(5, dtype="float32")
    for count, expected in ((3, [2, 5, 10]), (1, [16]), (5, [32, 65, 130, 259, 516])):
        outputs = load().to_host(run(block, count))
        np.testing.assert_array_equal(outputs["sum"][:count], expected)
        assert outputs["row"].shape == ((1, 2) if count == 1 else (5, 2))
    assert len(programs) == 1
    assert float(state.numpy()) == 512.0


def test_an_evaluation_takes_no_more_batches_than_its_outputs_may_be(tmp_path, programs):
    model = linear_model()
    x, y = make_data(40)[:2]
    trainer = Trainer(
        model, arguments(tmp_path, per_device_eval_batch_size=4), loss="mean_squared_error"
    )
    metrics = trainer.evaluate((x, y))
    predictions = trainer.predict(x).predictions
    expected = x @ weights(model)[0] + weights(model)[1]
    np.testing.assert_allclose(predictions, expected, rtol=1e-5)
    assert metrics["eval_loss"] == pytest.approx(np.mean((expected - y) ** 2), rel=1e-5)
    assert all("while" not in text for text in programs)

    run = load().compile_eval_steps(lambda x: x * 2, [], [], output_bytes=40)
    outputs, done = run(np.arange(28, dtype="float32").reshape(7, 4), 1, 6)
    assert done == 2
    np.testing.assert_array_equal(outputs[:2], 2 * np.arange(4, 12).reshape(2, 4))
