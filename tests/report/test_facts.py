"""What a run is, as the plain values that every screen and page shows."""

import json
import sys

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.report.command import command_line, longer, resume_command
from kbtrain.report.facts import RunFacts, facts_of


class Note(TrainerCallback):
    """Keeps the facts of a run."""

    every_step = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.facts = facts_of(kwargs["trainer"])


def facts(folder, model=None, trainer_options=(), eval_dataset=None, **changes):
    note, data = Note(), make_data(16)
    trainer = Trainer(
        linear_model() if model is None else model,
        arguments(folder, **({"per_device_train_batch_size": 4} | changes)),
        train_dataset=data,
        eval_dataset=eval_dataset,
        callbacks=[note],
        **({"loss": "mse"} | dict(trainer_options)),
    )
    trainer.fit()
    return note.facts


@pytest.mark.core
def test_the_facts_of_a_run_are_plain_values(tmp_path):
    found = facts(
        tmp_path / "digits",
        eval_dataset={"near": make_data(8), "far": make_data(6)},
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        lr_scheduler_type="cosine",
    )
    assert (found.parameters, found.trainable, found.model_bytes) == (4, 4, 16)
    assert found.eval_examples == {"near": 8, "far": 6}
    assert (found.examples, found.batch_size, found.accumulation) == (16, 8, 2)
    assert (found.updates, found.epochs, found.start_step) == (4, 2.0, 0)
    assert (found.optimizer, found.learning_rate, found.schedule) == ("AdamW", 0.01, "cosine")
    assert (found.backend, found.precision) == (keras.config.backend(), "float32")
    assert (found.run_name, found.output_dir) == ("digits", str(tmp_path / "digits"))
    assert found.changed["lr_scheduler_type"] == "cosine"
    assert found.resumed_from is None
    assert RunFacts.from_dict(json.loads(json.dumps(found.to_dict())) | {"newer": 1}) == found


def test_frozen_layers_count_as_parameters_only(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    found = facts(tmp_path, model)
    assert (found.parameters, found.trainable) == (8 + 3, 3)


def test_a_resumed_run_says_from_where(tmp_path):
    facts(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    found = facts(tmp_path, save_strategy="no", max_steps=4, resume_from_checkpoint=True)
    assert found.start_step == 2
    assert found.resumed_from == str(tmp_path / "checkpoint-2")


def test_the_peak_of_a_given_schedule(tmp_path):
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 6, warmup_target=0.5, warmup_steps=2)
    given = {"optimizers": (keras.optimizers.SGD(schedule), None)}
    found = facts(tmp_path, trainer_options=given, max_steps=8, learning_rate=None)
    assert (found.optimizer, found.schedule) == ("SGD", "CosineDecay")
    assert found.learning_rate == pytest.approx(0.5)
    fixed = {"optimizers": (keras.optimizers.SGD(0.25), None)}
    found = facts(tmp_path, trainer_options=fixed, max_steps=1, learning_rate=None)
    assert (found.learning_rate, found.schedule) == (0.25, "constant")


def test_data_and_models_that_say_less(tmp_path):
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(1)

        def call(self, x):
            return self.layer(x)

    def stream():
        yield from zip(*make_data(16), strict=True)

    def endless():
        yield np.zeros(3, "float32"), np.zeros(1, "float32")

    note = Note()
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=2)
    trainer = Trainer(
        Plain(), args, train_dataset=stream, eval_dataset=endless, loss="mse", callbacks=[note]
    )
    trainer.fit()
    assert note.facts.examples is None
    assert note.facts.eval_examples == {"eval": None}
    assert (note.facts.parameters, note.facts.model_class) == (4, "Plain")


@pytest.mark.neutral
def test_arguments_that_differ_from_their_defaults(tmp_path):
    assert TrainingArguments().changed() == {}
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=5e-5, max_steps=3)
    assert args.changed() == {"output_dir": str(tmp_path), "max_steps": 3}


@pytest.mark.neutral
def test_the_command_and_how_to_go_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--name", "two words"])
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": Main()})
    assert command_line() == "python train.py --name 'two words'"
    again = "KERAS_BACKEND=jax python train.py --name 'two words'"
    assert resume_command("auto", "jax") == resume_command(True, "jax") == (again, "")
    assert resume_command(None, "jax") == (again, 'fit(resume_from_checkpoint="auto")')


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", "hf_X", "--seed", "1"], "--hub_token '<HUB_TOKEN>' --seed 1"),
        (["--args.hub-token", "hf_X", "a"], "--args.hub-token '<HUB_TOKEN>' a"),
        (["--training.hub_token=hf_X"], "'--training.hub_token=<HUB_TOKEN>'"),
        (["args.hub_token=hf_X", "b=1"], "'args.hub_token=<HUB_TOKEN>' b=1"),
        (["+args.hub_token=hf_X"], "'+args.hub_token=<HUB_TOKEN>'"),
        (["--args", "{hub_token: hf_X, seed: 1}"], "--args '{hub_token: <HUB_TOKEN>, seed: 1}'"),
        (["--args={'hub_token': 'hf_X'}"], None),
        (["--hub_token", "--hub_token", "hf_X"], None),
        (["--data=sftp://ada:hf_X@host/d"], "'--data=sftp://ada:<PASSWORD>@host/d'"),
        (["https://host/d?key=hf_X"], "'https://host/d?<QUERY>'"),
    ],
)
def test_a_command_is_shown_without_a_token(monkeypatch, words, shown):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": Main()})
    assert "hf_X" not in command_line()
    assert shown is None or command_line() == f"python train.py {shown}"


@pytest.mark.neutral
def test_a_notebook_has_no_command(monkeypatch):
    monkeypatch.setattr("kbtrain.report.command.is_notebook", lambda: True)
    assert command_line() == ""
    assert resume_command(None, "jax") == ("", 'fit(resume_from_checkpoint="auto")')


@pytest.mark.neutral
def test_a_program_from_stdin_has_no_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["-"])
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": Main("<stdin>")})
    assert command_line() == ""


@pytest.mark.neutral
def test_the_command_kbtrain_train_names_its_own_settings(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/opt/env/bin/kbtrain", "train", "a.yaml"])
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": Main("/opt/env/bin/kbtrain")})
    assert command_line() == "kbtrain train a.yaml"
    again = "KERAS_BACKEND=jax kbtrain train a.yaml"
    assert resume_command("auto", "jax") == (again, "")
    assert resume_command(None, "jax") == (again, "--args.resume_from_checkpoint auto")
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=5)
    assert longer(args) == "--args.num_train_epochs N (more than 5)"
    assert longer(args.replace(max_steps=9)) == "--args.max_steps N (more than 9)"
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert longer(args) == "more epochs"


class Main:
    __spec__ = None

    def __init__(self, file="train.py"):
        self.__file__ = file
