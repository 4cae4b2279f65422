"""Layers that are frozen at the start and unfrozen during the run."""

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, make_data, same, weights, with_weights

from kbtrain import ConfigurationError, FinetuningCallback, Trainer, TrainerCallback


def make_model():
    layers = keras.layers
    backbone = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "tanh", name="block_1"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(4, "tanh", name="block_2"),
        ],
        name="backbone",
    )
    return with_weights(
        keras.Sequential([keras.Input((3,)), backbone, layers.Dense(1, name="head")], name="net")
    )


class Changes(TrainerCallback):
    """Which variables each update has changed."""

    def __init__(self):
        self.changed = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = weights(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        now = weights(kwargs["model"])
        variables = [v.path.partition("/")[2] for v in kwargs["model"].variables]
        self.changed.append(
            {
                v.rpartition("/")[0].rpartition("/")[2]
                for v, a, b in zip(variables, self.before, now, strict=True)
                if not np.array_equal(a, b)
            }
        )


def run(tmp_path, callbacks, resume=None, model=None, **changes):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 3}
    trainer = Trainer(
        model or make_model(),
        arguments(tmp_path, **(settings | changes)),
        train_dataset=make_data(8),
        loss="mse",
        callbacks=callbacks,
    )
    trainer.fit(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("unfreeze", "unit"),
    [({1: "block_2$", 2: ["backbone"]}, "epochs"), ({2: "block_2$", 4: ["backbone"]}, "steps")],
)
def test_layers_are_unfrozen_when_they_are_due(tmp_path, unfreeze, unit):
    changes = Changes()
    trainer = run(tmp_path, [changes, FinetuningCallback("backbone", unfreeze, unit)])
    every = {"head", "block_1", "block_2", "norm"}
    assert changes.changed == [{"head"}] * 2 + [{"head", "block_2"}] * 2 + [every] * 2
    assert len(trainer.optimizer.variables) > 4


def test_a_container_that_was_frozen_by_the_user_is_opened(tmp_path):
    model, changes = make_model(), Changes()
    model.get_layer("backbone").trainable = False
    callback = FinetuningCallback([], {1: "block_2$"}, "steps")
    run(tmp_path, [changes, callback], model=model)
    assert changes.changed == [{"head"}] + [{"head", "block_2"}] * 5


@pytest.mark.core
def test_a_resumed_run_is_exact(tmp_path):
    def make():
        return FinetuningCallback("backbone", {2: "block_2$"}, "steps")

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = run(tmp_path / "a", [make()], **settings)
    for stop in (2, 3):  # before and after the first update of the layer
        folder = tmp_path / str(stop)
        run(folder, [make(), StopAt(stop)], **settings)
        resumed = run(folder, [make()], resume=True, **settings)
        assert same(weights(resumed.model), weights(whole.model)), stop


def test_the_optimizer_has_no_state_of_what_is_frozen_from_the_start(tmp_path):
    trainer = run(tmp_path, [FinetuningCallback("backbone")])
    head = trainer.model.get_layer("head").trainable_variables
    slots = [v for v in trainer.optimizer.variables if tuple(v.shape) == tuple(head[0].shape)]
    assert slots
    assert not any(tuple(v.shape) == (3, 4) for v in trainer.optimizer.variables)


def test_mistakes_are_said(tmp_path):
    for wrong in (("(",), ("a", {0: "a"}), ("a", {1: "a"}, "batches")):
        with pytest.raises(ConfigurationError, match="FinetuningCallback: "):
            FinetuningCallback(*wrong)
    with pytest.raises(ConfigurationError, match=r"'block_9' matches no layer.*backbone"):
        run(tmp_path, [FinetuningCallback("backbone", {1: "block_9"})])


@pytest.mark.parametrize(
    ("unit", "last", "ended"), [("epochs", 3, "3 epochs"), ("steps", 6, "6 steps")]
)
def test_layers_that_the_run_did_not_get_to_are_named(tmp_path, caplog, unit, last, ended):
    run(tmp_path, [FinetuningCallback("backbone", {1: "block_2$", last - 1: "norm"}, unit)])
    assert "FinetuningCallback" not in caplog.text
    run(tmp_path, [FinetuningCallback("backbone", {1: "block_2$", last: "norm", 9: "b"}, unit)])
    assert f"ended after {ended}, so these layers were not trained" in caplog.text
    assert f"says: norm (from {last} on); b (from 9 on)." in caplog.text


def test_layers_without_a_path_are_not_listed(tmp_path):
    with pytest.raises(ConfigurationError, match="matches no layer") as caught:
        run(tmp_path, [FinetuningCallback("block_9")])
    assert "None" not in str(caught.value)
