"""Best model, rotation, saving: numbers of Transformers, and loading back."""

import json

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    linear_model,
    make_data,
    same,
    weights,
)

from kbtrain import ConfigurationError, Trainer, TrainingArguments


def make_trainer(output_dir, accuracies, model=None, **changes):
    """A run whose evaluations report these accuracies, whatever the model does."""
    data = make_data(12)
    remaining = iter(accuracies)
    args = arguments(
        output_dir,
        **(
            {
                "per_device_train_batch_size": 4,
                "num_train_epochs": 3,
                "jit_compile": False,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "metric_for_best_model": "accuracy",
            }
            | changes
        ),
    )
    return Trainer(
        model or linear_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        compute_metrics=lambda _: {"accuracy": next(remaining)},
    )


def checkpoints(path):
    return sorted(int(p.name.split("-")[1]) for p in path.glob("checkpoint-*"))


@pytest.mark.core
def test_the_first_of_three_is_best(tmp_path):
    trainer = make_trainer(tmp_path, [0.59, 0.57, 0.55])
    trainer.fit()
    assert trainer.state.best_metric == 0.59
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert checkpoints(tmp_path) == [3, 6, 9]


def test_lower_is_better_for_a_loss_and_where_it_is_said(tmp_path):
    trainer = make_trainer(tmp_path, [0.59, 0.57, 0.58], greater_is_better=False)
    trainer.fit()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.57, 6)


def test_an_equal_value_is_not_better(tmp_path):
    trainer = make_trainer(tmp_path, [0.5, 0.5, 0.5])
    trainer.fit()
    assert trainer.state.best_global_step == 3


def test_a_best_step_without_a_checkpoint_has_none(tmp_path):
    trainer = make_trainer(
        tmp_path,
        [0.9, 0.8, 0.7, 0.6],
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
    )
    trainer.fit()
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_model_checkpoint is None
    assert checkpoints(tmp_path) == [2, 4]


def test_nan_is_not_the_best_for_ever(tmp_path):
    trainer = make_trainer(tmp_path, [float("nan"), 0.4, 0.3])
    trainer.fit()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.4, 6)


def test_save_only_when_better(tmp_path):
    trainer = make_trainer(tmp_path, [0.60, 0.65, 0.64], save_strategy="best")
    trainer.fit()
    assert checkpoints(tmp_path) == [3, 6]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


@pytest.mark.core
@pytest.mark.parametrize(
    ("limit", "accuracies", "kept"),
    [
        (2, [0.1, 0.2, 0.3, 0.4, 0.5], [12, 15]),
        (2, [0.9, 0.2, 0.3, 0.4, 0.5], [3, 15]),
        (1, [0.1, 0.2, 0.3, 0.4, 0.5], [15]),
        (1, [0.9, 0.2, 0.3, 0.4, 0.5], [3, 15]),
        (3, [0.1, 0.9, 0.3, 0.4, 0.5], [6, 12, 15]),
        (9, [0.1, 0.9, 0.3, 0.4, 0.5], [3, 6, 9, 12, 15]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, accuracies, kept):
    make_trainer(tmp_path, accuracies, num_train_epochs=5, save_total_limit=limit).fit()
    assert checkpoints(tmp_path) == kept


@pytest.mark.core
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = batch_norm_model()
    trainer = make_trainer(tmp_path, [0.5, 0.9, 0.1], model=model, load_best_model_at_end=True)
    seen = {}

    def keep(event):
        def action(args, state, control, **kwargs):
            seen[event] = weights(kwargs["model"])

        return action

    class Look(type(trainer.callback_handler.callbacks[0]).__mro__[1]):
        on_evaluate = staticmethod(
            lambda args, state, control, **kwargs: seen.update(
                {state.global_step: weights(kwargs["model"])}
            )
        )
        on_train_end = staticmethod(keep("end"))

    trainer.add_callback(Look())
    trainer.fit()
    assert same(weights(model), seen[6])  # moving statistics included
    assert same(seen["end"], seen[6])  # loaded before on_train_end
    assert not same(seen[9], seen[6])


def test_with_limit_1_only_the_best_is_left_at_the_end(tmp_path):
    make_trainer(tmp_path, [0.9, 0.2, 0.3], save_total_limit=1, load_best_model_at_end=True).fit()
    assert checkpoints(tmp_path) == [3]


def test_a_metric_that_is_not_there_is_named(tmp_path):
    trainer = make_trainer(tmp_path, [0.5], metric_for_best_model="f1")
    with pytest.raises(ConfigurationError, match="'f1'.*eval_accuracy"):
        trainer.fit()
    assert checkpoints(tmp_path) == []


def test_the_best_so_far_outlives_a_resume(tmp_path):
    make_trainer(tmp_path, [0.9, 0.5], num_train_epochs=2).fit()
    trainer = make_trainer(tmp_path, [0.8, 0.7], num_train_epochs=4, load_best_model_at_end=True)
    trainer.fit(resume_from_checkpoint=True)
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 3)
    evaluated = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert evaluated == [0.9, 0.5, 0.8, 0.7]


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "folder", "file.keras"])
def test_a_saved_model_loads_back_without_kbtrain(tmp_path, target):
    model, (x, y) = batch_norm_model(dropout=0.3), make_data()
    trainer = Trainer(
        model, arguments(tmp_path / "run", max_steps=2), train_dataset=(x, y), loss="mse"
    )
    trainer.fit()
    path = trainer.save_model(None if target is None else tmp_path / target)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(loaded(x)), trainer.predict(x).predictions, rtol=1e-6, atol=1e-7
    )
    expected = {
        None: tmp_path / "run" / "model.keras",
        "folder": tmp_path / "folder/model.keras",
        "file.keras": tmp_path / "file.keras",
    }
    assert path == expected[target]
    if target != "file.keras":
        saved = TrainingArguments.from_json_file(path.parent / "training_args.json")
        assert saved == trainer.args
    assert not list(tmp_path.rglob(".tmp*"))


def test_save_state_writes_the_log_history(tmp_path):
    trainer = Trainer(
        linear_model(), arguments(tmp_path, max_steps=2), train_dataset=make_data(), loss="mse"
    )
    trainer.fit()
    path = trainer.save_state()
    assert path == tmp_path / "trainer_state.json"
    assert json.loads(path.read_text())["log_history"] == trainer.state.log_history


def test_a_model_that_cannot_be_saved_leaves_nothing(tmp_path):
    trainer = Trainer(
        linear_model(), arguments(tmp_path, max_steps=1), train_dataset=make_data(), loss="mse"
    )
    target = tmp_path / "there.keras"
    target.write_text("something of mine")

    def broken(path, **kwargs):
        path.write_text("half")
        raise OSError("disk full")

    trainer.model.save = broken
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model(target)
    assert target.read_text() == "something of mine"
    assert [p.name for p in tmp_path.iterdir()] == ["there.keras"]


def test_only_the_model_can_be_saved(tmp_path):
    make_trainer(tmp_path, [1.0, 1.0, 1.0], save_only_model=True).fit()
    names = {p.name for p in (tmp_path / "checkpoint-9").iterdir()}
    assert "model.weights.h5" in names
    assert not names & {"optimizer.h5", "rng.h5", "metrics.h5", "progress.json"}
