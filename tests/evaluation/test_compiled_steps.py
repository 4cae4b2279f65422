"""Evaluation in blocks: many batches per call, the numbers of one batch at a time."""

import weakref

import keras
import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, weights, with_weights
from helpers_fast_paths import CASES

from kbtrain import Trainer, TrainerCallback
from kbtrain.data.block_length import BlockLength
from kbtrain.evaluation.eval_loop import Evaluation


class EveryBatch(TrainerCallback):
    """Listens to each batch, so each is a call of its own."""

    def on_prediction_step(self, args, state, control, **kwargs):
        assert kwargs["batches"] == 1


@pytest.fixture
def blocks(monkeypatch):
    """The numbers of batches of all blocks that were run, however slow the machine is."""
    sizes = []
    run = Evaluation._run_block

    def recorded(self, block):
        sizes.append(block.updates)
        run(self, block)

    monkeypatch.setattr(Evaluation, "_run_block", recorded)
    monkeypatch.setattr("kbtrain.data.block_length.BLOCK_SECONDS", 1e9)
    return sizes


def without_speed(metrics):
    return {k: v for k, v in metrics.items() if not k.endswith(("_runtime", "_second"))}


@pytest.mark.parametrize("case", ["dense, batch norm, dropout", "attention", "convolution"])
def test_the_numbers_do_not_depend_on_how_many_batches_run_in_one_call(case, tmp_path, blocks):
    make, data, loss, metrics = CASES[case]
    x, y = (np.tile(a, (2, *[1] * (a.ndim - 1)))[:46] for a in data())
    trainer = Trainer(
        make(),
        arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=(x, y),
        loss=loss,
        metrics=metrics,
    )
    results = []
    for _ in range(2):
        evaluated = without_speed(trainer.evaluate())
        results.append((evaluated, trainer.predict((x, y)), list(blocks)))
        blocks.clear()
        trainer.add_callback(EveryBatch())
    (together, first, sizes), (apart, second, each) = results
    assert together == apart
    assert first.predictions.tobytes() == second.predictions.tobytes()
    np.testing.assert_array_equal(first.label_ids, y)
    assert sizes == [1, 1, 4, 5, 1] * 2  # the last of each is the short batch
    assert set(each) == {1}
    evaluated = {k: v for k, v in together.items() if k != "epoch"}  # a prediction has none
    assert without_speed(first.metrics) == {
        k.replace("eval_", "test_"): v for k, v in evaluated.items()
    }
    if loss == "mse":
        return
    logits = first.predictions.astype(np.float64)
    picked = np.take_along_axis(logits, y[..., None], -1)[..., 0]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
    assert together["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert together["eval_accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == y), rel=1e-6)


def test_loss_is_added_up_in_double_precision(tmp_path):
    """A float32 sum over these batches would be off by 3e-5."""
    count = 3000
    x, y = np.ones((count, 3), "float32"), np.full((count, 1), 0.1, "float32")
    x[0] = 3e3
    trainer = Trainer(linear_model(), arguments(tmp_path, per_device_eval_batch_size=1), loss="mse")
    kernel, bias = (w.astype(np.float64) for w in weights(trainer.model))
    expected = np.mean((x @ kernel + bias - y) ** 2)
    assert trainer.evaluate((x, y))["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gather", [False, True])
def test_no_more_shapes_are_compiled_for_more_data(tmp_path, monkeypatch, gather):
    """The model's Python runs while it is traced: for full batches and for the short last one."""
    model = linear_model()
    traced = []
    call = type(model.layers[-1]).call
    monkeypatch.setattr(
        type(model.layers[-1]), "call", lambda *a, **k: traced.append(1) or call(*a, **k)
    )

    def traces(samples):
        traced.clear()
        trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=4), loss="mse")
        data = make_data(samples)
        trainer.predict(data) if gather else trainer.evaluate(data)
        assert (calls := len(traced)) > 0
        trainer.predict(data) if gather else trainer.evaluate(data)
        assert len(traced) == calls
        return calls

    assert traces(11) == traces(4 * 70 + 1)


class Outputs:
    """Wraps a compiled evaluation step and counts whose outputs are alive."""

    def __init__(self, step):
        self._run = step.run
        self.calls, self._alive, self.most = [], [], 0
        step.run = self

    def __call__(self, block, start, count):
        results, done = self._run(block, start, count)
        self.calls.append(done)
        self._alive = [r for r in self._alive if r() is not None]
        self._alive.append(weakref.ref(keras.tree.flatten(results["outputs"])[0]))
        self.most = max(self.most, len(self._alive))
        return results, done


def test_outputs_of_any_size_leave_the_device(tmp_path, blocks):
    """Inputs are small enough for 64 batches a call, outputs only for three."""
    x = make_data(4 * 40)[0]
    inputs = keras.Input((3,))
    wide = keras.layers.Dense(5, use_bias=False)(inputs)
    model = with_weights(keras.Model(inputs, keras.ops.repeat(wide, 14_000, axis=-1)))
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=4))
    trainer.bound.build(x[:4])
    outputs = Outputs(trainer.eval_steps.get(with_loss=False, gather=True))
    predictions = trainer.predict(x).predictions
    assert blocks == [1, 1, 4, 16, 18]
    assert outputs.calls == [1, 1, 3, 1, 3, 3, 3, 3, 3, 1, 3, 3, 3, 3, 3, 3]
    assert outputs.most <= 3  # being computed, being read, and this one
    expected = np.repeat(x @ weights(model)[0], 14_000, axis=-1)
    np.testing.assert_allclose(predictions, expected, rtol=1e-5, atol=1e-6)


def test_a_listener_to_each_batch_gets_each_batch(tmp_path, blocks):
    recorder = Recorder()
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path),
        eval_dataset=make_data(50),
        loss="mse",
        callbacks=[recorder],
    )
    trainer.evaluate()
    seen = [
        k["batches"]
        for e, k in zip(recorder.events, recorder.kwargs, strict=True)
        if e == "on_prediction_step"
    ]
    assert seen == blocks == [1] * 7


def test_other_listeners_are_told_how_many(tmp_path, blocks):
    seen = []

    class Now(TrainerCallback):
        every_step = False

        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append(kwargs["batches"])

    Trainer(linear_model(), arguments(tmp_path), loss="mse", callbacks=[Now]).evaluate(
        make_data(80)
    )
    assert seen == blocks == [1, 1, 4, 4]


class Noise(keras.layers.Layer):
    """Random also in evaluation, from a seed: torch cannot record that."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seeds)


def test_a_model_that_cannot_be_compiled_ahead_is_evaluated_all_the_same(tmp_path):
    model = with_weights(keras.Sequential([keras.Input((3,)), Noise(), keras.layers.Dense(1)]))
    x, y = make_data(40)
    results = []
    for jit_compile in ("auto", False):
        trainer = Trainer(model, arguments(tmp_path, jit_compile=jit_compile), loss="mse")
        results += [trainer.predict((x, y)) for _ in range(2)]
    for other in results[1:]:
        np.testing.assert_allclose(other.predictions, results[0].predictions, rtol=1e-5, atol=1e-6)
    assert results[0].metrics["test_loss"] == results[1].metrics["test_loss"]


def test_blocks_grow_while_they_are_short(monkeypatch):
    length = BlockLength()
    assert not length.is_worth_measuring("a")  # it compiles
    for seconds, expected in ((0.01, 4), (0.01, 16), (0.08, 20), (0.2, 20), (0.2, 20), (0.1, 20)):
        assert length.is_worth_measuring("a")
        length.measured(length.affordable, 64, seconds)
        assert length.affordable == expected
    assert not length.is_worth_measuring("a")
