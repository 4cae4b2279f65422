"""Layers that are frozen and unfrozen during and between fits."""

import keras
import numpy as np
import pytest
from helpers import arguments, batch_norm_model, make_data, same, train_logs, weights, with_weights

import optim
from kbtrain import Trainer, TrainerCallback
from kbtrain.errors import ConfigurationError

RATE, CLIP = 0.1, 0.5
LEFT, RIGHT = "left", "right"


def two_parts():
    """The sum of two linear layers, one for each half of the inputs."""
    x = keras.Input((4,))
    parts = [
        keras.layers.Dense(1, use_bias=False, name=name)(x[:, i : i + 2])
        for name, i in ((LEFT, 0), (RIGHT, 2))
    ]
    return with_weights(keras.Model(x, keras.layers.add(parts)), 3)


class Switch(TrainerCallback):
    """Sets `trainable` of a layer at the end of an update: ``plan`` is {update: (layer, flag)}."""

    def __init__(self, plan):
        self.plan = plan

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.plan:
            name, flag = self.plan[state.global_step]
            kwargs["model"].get_layer(name).trainable = flag


class Kernels(TrainerCallback):
    """Both kernels after every update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        self.seen.append([weights(model.get_layer(name))[0].ravel() for name in (LEFT, RIGHT)])


def adam(x, y, kernels, plan, updates, trained):
    """Adam in float64, clipped by the norm of what is trained; a frozen part keeps its state."""
    x, y = x.astype("float64"), y.astype("float64")
    w = dict(zip((LEFT, RIGHT), [k.astype("float64") for k in kernels], strict=True))
    m, v = ({k: np.zeros_like(a) for k, a in w.items()} for _ in range(2))
    halves, history, trained = {LEFT: x[:, :2], RIGHT: x[:, 2:]}, [], set(trained)
    for t in range(1, updates + 1):
        error = 2 * (sum(halves[k] @ w[k] for k in w) - y) / len(x)
        g = {k: halves[k].T @ error for k in trained}
        norm = np.sqrt(sum(np.sum(a * a) for a in g.values()))
        for k in trained:
            clipped = g[k] * min(1.0, CLIP / (norm + 1e-6))
            m[k] = 0.9 * m[k] + 0.1 * clipped
            v[k] = 0.999 * v[k] + 0.001 * clipped**2
            root = np.sqrt(v[k] / (1 - 0.999**t)) + 1e-7
            w[k] = w[k] - RATE * m[k] / (1 - 0.9**t) / root
        history.append([w[LEFT].ravel(), w[RIGHT].ravel()])
        if t in plan:
            name, flag = plan[t]
            trained = trained | {name} if flag else trained - {name}
    return np.array(history)


OPTIMIZERS = {
    "keras": lambda: keras.optimizers.Adam(RATE),
    "optim": lambda: optim.Adam(RATE, epsilon=1e-7),
    "average": lambda: optim.EMA(optim.Adam(RATE, epsilon=1e-7)),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(RATE), initial_scale=8.0
    ),
    "both": lambda: keras.optimizers.LossScaleOptimizer(
        optim.EMA(keras.optimizers.Adam(RATE)), initial_scale=8.0
    ),
    "keras average": lambda: keras.optimizers.Adam(RATE, use_ema=True),
}


def options(folder, **changes):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "max_grad_norm": CLIP,
    }
    return arguments(folder, **(defaults | changes))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_freeze_return_and_join(tmp_path, kind):
    x, y = make_data(8, features=4)
    for plan, trained in (
        ({2: (RIGHT, False), 5: (RIGHT, True)}, (LEFT, RIGHT)),
        ({3: (RIGHT, True), 6: (LEFT, False)}, (LEFT,)),
    ):
        model = two_parts()
        want = adam(x, y, weights(model), plan, 8, trained)
        model.get_layer(RIGHT).trainable = RIGHT in trained
        seen = Kernels()
        Trainer(
            model,
            options(tmp_path),
            train_dataset=(x, y),
            loss="mse",
            optimizers=(OPTIMIZERS[kind](), None),
            callbacks=[Switch(plan), seen],
        ).fit()
        np.testing.assert_allclose(seen.seen, want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["made", "both"])
def test_resume_goes_on_with_what_was_trained(tmp_path, kind):
    data = make_data(32, features=4)
    plan = {2: (RIGHT, False), 6: (RIGHT, True)}

    def run(folder, resume=None):
        optimizer = None if kind == "made" else OPTIMIZERS[kind]()
        trainer = Trainer(
            two_parts(),
            options(folder, save_strategy="steps", save_steps=1),
            train_dataset=data,
            loss="mse",
            optimizers=(optimizer, None),
            callbacks=[Switch(plan)],
        )
        trainer.fit(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    for step in (1, 4, 7):
        resumed = run(tmp_path / f"from-{step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert same(weights(resumed.model), weights(whole.model)), step
        assert train_logs(resumed) == train_logs(whole)


def test_the_average_of_a_part_that_joins_begins_at_its_weight(tmp_path):
    model, data = two_parts(), make_data(8, features=4)
    model.get_layer(RIGHT).trainable = False
    optimizer = optim.EMA(keras.optimizers.SGD(0.0), decay=0.9, warmup=False)
    before = weights(model)
    Trainer(
        model,
        options(tmp_path),
        train_dataset=data,
        loss="mse",
        optimizers=(optimizer, None),
        callbacks=[Switch({4: (RIGHT, True)})],
    ).fit()
    np.testing.assert_allclose(weights(model)[1], before[1], rtol=1e-6)


def test_batch_normalization_runs_as_in_inference_once_frozen(tmp_path):
    x, y = make_data(8)
    model = batch_norm_model()

    class Freeze(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            model.layers[1].trainable = state.epoch < 1
            if state.epoch == 1:
                self.statistics = weights(model.layers[1])

    callback = Freeze()
    trainer = Trainer(
        model,
        options(tmp_path, max_steps=-1, num_train_epochs=3, learning_rate=1e-30),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        loss="mse",
        callbacks=[callback],
    )
    trainer.fit()
    losses = train_logs(trainer)
    assert losses[1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
    assert same(callback.statistics, weights(model.layers[1]))


@pytest.mark.parametrize("optimizer", [None, keras.optimizers.Adam])
def test_between_fits(tmp_path, optimizer):
    model, (x, y) = two_parts(), make_data(8, features=4)
    given = None if optimizer is None else optimizer(RATE)
    trainer = Trainer(
        model, options(tmp_path), train_dataset=(x, y), loss="mse", optimizers=(given, None)
    )
    for frozen in (LEFT, RIGHT):
        model.get_layer(LEFT).trainable = frozen != LEFT
        model.get_layer(RIGHT).trainable = frozen != RIGHT
        before = {name: weights(model.get_layer(name)) for name in (LEFT, RIGHT)}
        trainer.fit()
        moved = {name for name in before if not same(before[name], weights(model.get_layer(name)))}
        assert moved == {LEFT, RIGHT} - {frozen}
    assert given is None or trainer.optimizer is given


def test_a_group_of_parameters_that_is_frozen_is_no_mistake(tmp_path):
    model, data = two_parts(), make_data(8, features=4)
    groups = [{"match": RIGHT, "lr_multiplier": 0.5}]
    trainer = Trainer(
        model,
        options(tmp_path, parameter_groups=groups),
        train_dataset=data,
        loss="mse",
        callbacks=[Switch({2: (RIGHT, False), 4: (RIGHT, True)})],
    )
    trainer.fit()
    assert "0.5" in trainer.optimizer.parameter_groups_table()


def test_nothing_left_to_train(tmp_path):
    plan = {1: (RIGHT, False), 2: (LEFT, False)}
    trainer = Trainer(
        two_parts(),
        options(tmp_path),
        train_dataset=make_data(8, features=4),
        loss="mse",
        callbacks=[Switch(plan)],
    )
    with pytest.raises(ConfigurationError, match="no trainable variables"):
        trainer.fit()
