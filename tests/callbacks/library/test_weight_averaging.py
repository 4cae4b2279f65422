"""Averages of weights: their numbers from NumPy, their use, and their place in checkpoints."""

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, batch_norm_model, linear_model, make_data, same, weights

from kbtrain import ConfigurationError, Trainer, TrainerCallback, WeightAveraging, load_weights


class Weights(TrainerCallback):
    """The weights after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append([w.astype(np.float64) for w in weights(kwargs["model"])])


def run(tmp_path, callbacks, model=None, resume=None, **changes):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 0.1}
    trainer = Trainer(
        model or linear_model(),
        arguments(tmp_path, **(settings | changes)),
        train_dataset=make_data(16),
        eval_dataset=make_data(16, seed=3),
        loss="mse",
        callbacks=callbacks,
    )
    trainer.fit(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.core
@pytest.mark.parametrize(
    ("start", "every", "unit", "updates"),
    [(5, 3, "steps", [5, 8, 11]), (2, 1, "epochs", [8, 12]), (1, 2, "epochs", [4, 12])],
)
def test_the_model_ends_with_the_mean_of_the_weights(tmp_path, start, every, unit, updates):
    record, average = Weights(), WeightAveraging(start, every, unit)
    trainer = run(tmp_path, [record, average])
    assert average.count == len(updates)
    for i, value in enumerate(weights(trainer.model)):
        expected = np.mean([record.seen[step - 1][i] for step in updates], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_updates_are_still_run_together(tmp_path):
    """A call to the device ends only where an average is due."""
    average = WeightAveraging(5, 3, "steps")
    trainer = run(tmp_path, [average], logging_steps=100)
    assert not trainer.callback_handler.need_every_step()
    assert [average.next_step(_at(n)) for n in (0, 4, 5, 6, 8)] == [5, 5, 8, 8, 11]


def _at(step):
    from kbtrain import TrainerState

    return TrainerState(global_step=step)


def test_a_resumed_average_is_exact(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "a", [WeightAveraging(3, 2, "steps")], **settings)
    run(tmp_path / "b", [WeightAveraging(3, 2, "steps"), StopAt(6)], **settings)
    again = WeightAveraging(3, 2, "steps")
    resumed = run(tmp_path / "b", [again], resume=True, **settings)
    assert again.count == 5
    assert same(weights(resumed.model), weights(whole.model))


def test_evaluations_and_checkpoints_have_the_average(tmp_path):
    x, y = make_data(16, seed=3)
    record = Weights()
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss"}
    trainer = run(
        tmp_path,
        [record, WeightAveraging(1, evaluate=True)],
        load_best_model_at_end=True,
        **settings,
    )
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    expected = []
    for epochs in (1, 2, 3):
        kernel, bias = (
            np.mean([record.seen[4 * e - 1][i] for e in range(1, epochs + 1)], axis=0)
            for i in range(2)
        )
        expected.append((kernel, bias, np.mean((x @ kernel + bias - y) ** 2)))
    assert losses == pytest.approx([e[2] for e in expected], rel=1e-5)
    best = int(np.argmin(losses))
    np.testing.assert_allclose(trainer.model.get_weights()[0], expected[best][0], rtol=1e-5)
    model = linear_model()
    load_weights(model, tmp_path / "checkpoint-12")
    np.testing.assert_allclose(model.get_weights()[0], expected[2][0], rtol=1e-5)
    # The training itself is that without an average.
    plain = Weights()
    run(tmp_path / "plain", [plain])
    assert same(plain.seen[-1], record.seen[-1])


def test_statistics_of_batch_normalization_are_computed_again(tmp_path):
    x, _ = make_data(16)
    model = batch_norm_model()
    settings = {"train_sampling_strategy": "sequential", "eval_strategy": "epoch"}
    callback = WeightAveraging(1, evaluate=True, batch_norm_batches=3)
    trainer = run(tmp_path, [callback], model, **settings)
    kernel, bias = (w.astype(np.float64) for w in model.layers[0].get_weights())
    inputs = [x[4 * i : 4 * i + 4] @ kernel + bias for i in range(3)]
    mean, variance = model.layers[1].get_weights()[2:]
    np.testing.assert_allclose(mean, np.mean([h.mean(0) for h in inputs], axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, np.mean([h.var(0) for h in inputs], axis=0), rtol=1e-4)
    assert model.layers[1].momentum == 0.7
    last = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-5)


def test_what_cannot_be_averaged_is_said(tmp_path, caplog):
    for wrong in ((0,), (1, 0), (1, 1, "batches"), (1, 1, "steps", False, -1)):
        with pytest.raises(ConfigurationError, match="WeightAveraging: "):
            WeightAveraging(*wrong)
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    with pytest.raises(ConfigurationError, match="evaluate=True"):
        run(tmp_path, [WeightAveraging(1)], **settings)
    trainer = run(tmp_path, [WeightAveraging(9)])
    assert "before the first average" in caplog.text
    assert isinstance(trainer.model, keras.Model)
