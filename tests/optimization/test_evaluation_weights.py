"""Optimizers that evaluate other weights than they train: evaluate, save, best model, resume."""

import json

import keras
import numpy as np
import pytest
from helpers import Recorder, StopAt, arguments, linear_model, make_data, same, weights
from keras import ops

import optim
from kbtrain import Trainer
from kbtrain.checkpoint import CheckpointStore
from kbtrain.optimization.evaluation_weights import swapped_in


@keras.saving.register_keras_serializable(package="tests_trainer")
class Ahead(optim.Optimizer):
    """Descent that evaluates one remembered movement further than it has trained."""

    def slot_shapes(self, shape):
        return {"last": shape}

    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        movement = -learning_rate * gradient
        return parameter + movement, {"last": movement}

    def evaluated(self, parameter, slots):
        return parameter + slots["last"], {"last": ops.zeros_like(slots["last"])}


def stock():
    return keras.optimizers.SGD(0.05, momentum=0.5, use_ema=True, ema_momentum=0.7)


OPTIMIZERS = {
    "protocol": lambda: Ahead(0.05),
    "stock use_ema": stock,
    "inside a wrapper": lambda: keras.optimizers.LossScaleOptimizer(stock(), initial_scale=2.0),
}


def make(path, optimizer, callbacks=(), model=None, **changes):
    data = make_data(12)
    args = arguments(
        path,
        **({"per_device_train_batch_size": 4, "num_train_epochs": 3, "max_grad_norm": 0} | changes),
    )
    return Trainer(
        model or linear_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def loss_of(arrays):
    x, y = make_data(12)
    return float(np.mean((x @ arrays[0] + arrays[1] - y) ** 2))


def values_in_evaluation(optimizer, model):
    with swapped_in(optimizer, model.variables):
        return weights(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluation_in_training_and_after_it(tmp_path, name):
    expected = {}

    def remember(args, state, control, kwargs):
        trainer = kwargs["trainer"]
        inside = values_in_evaluation(trainer.optimizer, trainer.model)
        expected[state.global_step] = (weights(trainer.model), inside)

    recorder = Recorder({"on_step_end": remember})
    trainer = make(tmp_path, OPTIMIZERS[name](), [recorder], eval_strategy="steps", eval_steps=2)
    trainer.fit()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert sorted(evaluations) == [2, 4, 6, 8, 9]
    for step, value in evaluations.items():
        trained, evaluated = expected[step]
        assert not same(trained, evaluated)
        assert value == pytest.approx(loss_of(evaluated), rel=1e-5)
    assert same(weights(trainer.model), expected[9][1])
    # And it stays that way.
    assert trainer.evaluate()["eval_loss"] == evaluations[9]
    loaded = keras.models.load_model(trainer.save_model(), compile=False)
    assert same(weights(loaded), expected[9][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluating_saving_and_exporting_disturb_nothing(tmp_path, name):
    quiet = make(tmp_path / "quiet", OPTIMIZERS[name]())
    quiet.fit()

    def act(args, state, control, kwargs):
        trainer = kwargs["trainer"]
        path = trainer.save_model(tmp_path / f"{state.global_step}.keras")
        saved = keras.models.load_model(path, compile=False)
        assert same(weights(saved), values_in_evaluation(trainer.optimizer, trainer.model))
        trainer.predict(make_data(12))

    busy = make(
        tmp_path / "busy",
        OPTIMIZERS[name](),
        [Recorder({"on_step_end": act})],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        max_steps=9,
    )
    busy.fit()
    assert same(weights(busy.model), weights(quiet.model))


OF_OPTIM = {
    "schedule-free": lambda: optim.ScheduleFreeAdamW(0.05),
    "average": lambda: optim.EMA(keras.optimizers.SGD(0.05, momentum=0.5), decay=0.7),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OF_OPTIM])
def test_checkpoints_hold_the_training_state_and_what_is_evaluated(tmp_path, name):
    changes = {"save_strategy": "steps", "save_steps": 4}
    whole = make(tmp_path / "whole", (OPTIMIZERS | OF_OPTIM)[name](), **changes)
    whole.fit()
    first = make(tmp_path / "part", (OPTIMIZERS | OF_OPTIM)[name](), [StopAt(4)], **changes)
    first.fit()
    second = make(tmp_path / "part", (OPTIMIZERS | OF_OPTIM)[name](), **changes)
    second.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(second.model))
    for a, b in zip(whole.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    last = CheckpointStore(tmp_path / "whole").load(tmp_path / "whole" / "checkpoint-9")
    assert set(last.arrays["evaluation"]) == set(last.arrays["model"])
    assert same(list(last.arrays["evaluation"].values()), weights(whole.model))
    assert not same(list(last.arrays["model"].values()), weights(whole.model))


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_best_model_is_chosen_and_loaded_with_evaluation_weights(
    tmp_path, name, save_only_model
):
    remaining = iter([0.1, 0.9, 0.3])
    trainer = make(
        tmp_path,
        OPTIMIZERS[name](),
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        save_only_model=save_only_model,
    )
    trainer.compute_metrics = lambda _: {"accuracy": next(remaining)}
    losses = {}
    trainer.add_callback(
        Recorder(
            {
                "on_evaluate": lambda args, state, control, kwargs: losses.update(
                    {state.global_step: kwargs["metrics"]["eval_loss"]}
                )
            }
        )
    )
    trainer.fit()
    assert trainer.state.best_global_step == 6
    assert loss_of(weights(trainer.model)) == pytest.approx(losses[6], rel=1e-5)
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[6], rel=1e-5)


def test_an_interrupted_run_exports_what_it_evaluated(tmp_path):
    def interrupt(args, state, control, kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    trainer = make(tmp_path, Ahead(0.05), [Recorder({"on_step_end": interrupt})])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    evaluated = values_in_evaluation(trainer.optimizer, trainer.model)
    assert not same(weights(trainer.model), evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(evaluated), rel=1e-5)
    loaded = keras.models.load_model(trainer.save_model(), compile=False)
    assert same(weights(loaded), evaluated)


def test_other_optimizers_write_no_such_group(tmp_path):
    trainer = make(tmp_path, keras.optimizers.SGD(0.05), save_strategy="steps", save_steps=9)
    trainer.fit()
    manifest = json.loads((tmp_path / "checkpoint-9" / "manifest.json").read_text())
    assert not any(name.startswith("evaluation") for name in manifest["files"])
