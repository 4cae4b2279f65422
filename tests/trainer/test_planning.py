"""``trainer.plan()``: on JAX here, on other backends in a process that has it."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers_plan import made_up, make_trainer

from kbtrain import Trainer, TrainingArguments
from kbtrain.data import as_loader
from kbtrain.errors import ConfigurationError
from kbtrain.plan import planner, process
from kbtrain.plan.rehearsal import SEED_GENERATOR, rehearsing
from kbtrain.trainer import planned_elsewhere
from kbtrain.utils.packages import keras_private

X, Y = np.zeros((12, 4), "float32"), np.zeros((12, 2), "float32")


@pytest.fixture
def compiled(monkeypatch):
    asked = []

    def compile_program(trainer, **options):
        asked.append((trainer, options))
        return made_up(trainer, **options)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    monkeypatch.setattr("kbtrain.trainer.planning.environment", dict)
    return asked


@pytest.fixture
def elsewhere(compiled, monkeypatch):
    """As on a backend without JAX; the other process is this one."""

    def run(command, **options):
        assert command[:3] == [sys.executable, "-m", "kbtrain.trainer.planned_elsewhere"]
        compiled.append(json.loads(Path(command[3]).read_text()))
        return SimpleNamespace(returncode=planned_elsewhere.main(command[3:]), stderr="")

    monkeypatch.setattr(subprocess, "run", run)

    def pretend(trainer):
        monkeypatch.setattr(trainer.backend, "COMPILES_AHEAD", False)
        return trainer

    return pretend


@pytest.mark.core
def test_a_plan_leaves_model_and_folder_alone(compiled, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "runs")
    monkeypatch.setattr(trainer.backend, "COMPILES_AHEAD", True)
    before = [w.copy() for w in trainer.model.get_weights()]
    plan = trainer.plan("h100", 4, batch=[2], quick=True, bf16=True)
    assert [facts.samples for facts in [plan.run.facts]] == [8]
    assert plan.run.roofline.dtype == "bfloat16"
    assert compiled[0][0] is trainer
    assert all(map(np.array_equal, before, trainer.model.get_weights()))
    assert not (tmp_path / "runs").exists()
    assert trainer.args.bf16 is False


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_another_process_gets_the_run(compiled, elsewhere, tmp_path):
    inputs = keras.Input((4,), name="a")
    hidden = keras.layers.Dense(8, name="frozen")
    hidden.trainable = False
    outputs = keras.layers.BatchNormalization()(hidden(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, dtype="mixed_bfloat16")(outputs))
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, weight_decay=0.1,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=(X, Y, np.ones(12, "float32")), eval_dataset=(X, Y),
        loss=keras.losses.Huber(delta=0.5), metrics=["mae"],
        optimizers=(keras.optimizers.SGD(0.1, momentum=0.9), None),
    )  # fmt: skip
    plan = elsewhere(trainer).plan("v5e", 2, quick=True)
    task, (other, options) = compiled
    assert "output_dir" in task["run"]["args"]
    assert other is not trainer
    assert other.args.weight_decay == 0.1
    assert [v.path for v in other.model.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    assert [layer.dtype_policy.name for layer in other.model.layers] == [
        layer.dtype_policy.name for layer in model.layers
    ]
    assert other.given_loss.get_config() == trainer.given_loss.get_config()
    assert other.given_optimizers[0].momentum == 0.9
    assert [part.shape for part in batch_of(other)] == [(3, 4), (3, 2), (3,)]
    assert (options["count"], options["device"].name) == (2, "v5e")
    assert plan.notes[0].startswith("The program runs on ")


@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error, keras.losses.LogCosh()])
def test_inputs_by_name_and_any_loss_of_keras(compiled, elsewhere, tmp_path, loss):
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(2)(keras.layers.concatenate([a, b])))
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4)
    data = {"a": X, "b": Y, "labels": Y}
    trainer = Trainer(model, args, train_dataset=data, loss=loss)
    elsewhere(trainer).plan("h100", quick=True)
    assert type(compiled[-1][0].given_loss) is type(trainer.given_loss)
    x, y = batch_of(compiled[-1][0])
    assert {name: value.shape for name, value in x.items()} == {"a": (4, 4), "b": (4, 2)}
    assert y.shape == (4, 2)


class Drawing:
    """A data set that draws from the global generators."""

    def __iter__(self):
        while True:
            yield np.random.rand(4).astype("float32"), np.float32(random.random())


def global_state():
    return random.getstate(), [str(part) for part in np.random.get_state(legacy=True)]


def test_reading_a_batch_leaves_the_random_state_and_the_trainer(elsewhere, tmp_path):
    trainer = elsewhere(make_trainer(tmp_path, max_steps=2))
    trainer.train_dataset = Drawing()
    keras_private.set_global_attribute(SEED_GENERATOR, None)
    before = global_state()
    trainer.plan("h100", quick=True)
    assert global_state() == before
    assert keras_private.get_global_attribute(SEED_GENERATOR) is None


def test_an_iterator_is_not_read(elsewhere, tmp_path):
    trainer = elsewhere(make_trainer(tmp_path, max_steps=2))
    trainer.train_dataset = data = iter(Drawing())
    with pytest.raises(ConfigurationError, match="an iterator can be read only once"):
        trainer.plan("h100", quick=True)
    assert next(data)


def test_a_rehearsal_that_fails_leaves_the_random_state(tmp_path, monkeypatch):
    def build(batch):
        random.random()
        raise ConfigurationError("It cannot be built.")

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.bound, "build", build)
    before = global_state()
    with (
        pytest.raises(ConfigurationError, match="It cannot be built"),
        rehearsing(trainer, "plan", lambda variables: lambda: None),
    ):
        pass
    assert global_state() == before


def test_what_a_rehearsal_adds_to_a_trainer_is_taken_away(tmp_path):
    trainer = make_trainer(tmp_path)
    with rehearsing(trainer, "plan", lambda variables: lambda: None):
        trainer.agreement = "of the rehearsal"
    assert not hasattr(trainer, "agreement")


def test_weights_without_targets_keep_their_place(compiled, elsewhere, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activity_regularizer="l2")])
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4)
    data = as_loader([(X[:4], None, np.ones(4, "float32"))])
    elsewhere(Trainer(model, args, train_dataset=data)).plan("h100", quick=True)
    x, y, weights = batch_of(compiled[-1][0])
    assert (x.shape, y, weights.shape) == ((4, 4), None, (4,))


@pytest.mark.neutral
def test_a_process_that_takes_too_long_is_a_mistake_in_words(monkeypatch):
    monkeypatch.setattr(process, "LONGEST", 0.01)
    with pytest.raises(ConfigurationError, match="was ended after"):
        process.run_process([sys.executable, "-c", "import time; time.sleep(60)"], {})


class Mine(Trainer):
    pass


class Own(keras.layers.Dense):
    pass


def with_layer(layer):
    return keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda args, **k: Mine(with_layer(keras.layers.Dense(2)), args, loss="mse", **k), "Mine"),
        (
            lambda args, **k: Trainer(
                with_layer(keras.layers.Dense(2)), args, compute_loss_func=lambda o, y: o, **k
            ),
            "compute_loss_func is a function",
        ),
        (
            lambda args, **k: Trainer(
                with_layer(keras.layers.Lambda(lambda x: x)), args, loss="mse", **k
            ),
            "Lambda",
        ),
    ],
)
def test_what_cannot_be_handed_over_names_the_command(elsewhere, tmp_path, made, why):
    trainer = made(TrainingArguments(output_dir=str(tmp_path)), train_dataset=(X, Y))
    with pytest.raises(ConfigurationError, match="kbtrain plan .* --device h100") as caught:
        elsewhere(trainer).plan("h100", quick=True)
    assert why in str(caught.value)


def test_a_class_of_the_program_is_named(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setattr(Own, "__module__", "__main__")
    args = TrainingArguments(output_dir=str(tmp_path))
    trainer = Trainer(with_layer(Own(3)), args, train_dataset=(X, Y), loss="mse")
    with pytest.raises(ConfigurationError, match="Own is defined in this program"):
        elsewhere(trainer).plan("h100")


def test_an_error_of_the_other_process_is_raised_here(elsewhere, tmp_path):
    with pytest.raises(ConfigurationError, match="gradient_accumulation_steps"):
        elsewhere(make_trainer(tmp_path)).plan("h100", gradient_accumulation_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "h10"}, "Did you mean h100"),
        ({"device": "h100", "count": 0}, "count is a number"),
        ({"device": "h100", "batch": 8}, "batch is a list"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path).plan(**options)
