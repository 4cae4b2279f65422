"""Callbacks of Keras and transformers in place of kbtrain's, and early stopping that is resumed."""

import sys
import types

import keras
import pytest
from helpers import arguments, linear_model, make_data

from kbtrain import ConfigurationError, EarlyStoppingCallback, Trainer
from kbtrain.callbacks.interop import _OF_KERAS, advice

K = keras.callbacks


def make(tmp_path, callbacks, **changes):
    data = make_data(8)
    return Trainer(
        linear_model(),
        arguments(tmp_path, **({"max_steps": 1} | changes)),
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        callbacks=callbacks,
    )


def refusal(tmp_path, callback):
    with pytest.raises(ConfigurationError) as caught:
        make(tmp_path, [callback])
    assert "must be a TrainerCallback" in str(caught.value)
    return str(caught.value)


class OwnOfKeras(K.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print(epoch)


class OwnEarlyStopping(K.EarlyStopping):
    pass


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (
            K.EarlyStopping(patience=3, restore_best_weights=True),
            "EarlyStoppingCallback(early_stopping_patience=3), and in TrainingArguments "
            "eval_strategy='epoch', metric_for_best_model='loss', load_best_model_at_end=True",
        ),
        (
            K.EarlyStopping("val_accuracy", min_delta=0.01, mode="max"),
            "early_stopping_patience=1, early_stopping_threshold=0.01), and in TrainingArguments "
            "eval_strategy='epoch', metric_for_best_model='accuracy', greater_is_better=True;",
        ),
        (K.EarlyStopping, "early_stopping_patience=1)"),
        (K.ModelCheckpoint("best.keras"), "save_strategy='epoch'"),
        (
            K.ModelCheckpoint("best.keras", save_best_only=True),
            "save_strategy='best', eval_strategy='epoch', metric_for_best_model='loss'",
        ),
        (
            K.ModelCheckpoint("b.weights.h5", save_freq=50, save_weights_only=True),
            "save_strategy='steps', save_steps=50",
        ),
        (
            K.ReduceLROnPlateau(factor=0.5, patience=2),
            "lr_scheduler_type='reduce_lr_on_plateau', eval_strategy='epoch', "
            "metric_for_best_model='loss', lr_scheduler_kwargs={'factor': 0.5, 'patience': 2",
        ),
        (K.LearningRateScheduler(lambda epoch, rate: rate), "lr_scheduler_type"),
        (K.TensorBoard, "report_to='tensorboard'"),
        (K.CSVLogger("log.csv"), "report_to='csv'"),
        (K.TerminateOnNaN(), "on_nonfinite='raise'"),
        (K.BackupAndRestore("backup"), "resume_from_checkpoint='auto'"),
        (K.LambdaCallback(on_epoch_end=print), "kbtrain.TrainerCallback"),
        (K.SwapEMAWeights(), "ema=0.999"),
        (K.ProgbarLogger(), "disable_tqdm=False"),
        (K.History(), "trainer.state.log_history"),
        (K.RemoteMonitor(), "on_log"),
        (OwnOfKeras(), "derive from kbtrain.TrainerCallback"),
        (OwnEarlyStopping(), "For what OwnEarlyStopping adds to EarlyStopping"),
    ],
    ids=lambda item: item.__name__ if isinstance(item, type) else type(item).__name__,
)
def test_a_callback_of_keras_is_refused_with_what_to_write(tmp_path, callback, said):
    message = refusal(tmp_path, callback)
    assert "callback of Keras: " in message
    assert said in message


def test_every_callback_of_keras_has_an_answer():
    there = {name for name in dir(K) if isinstance(getattr(K, name), type)}
    assert there - {"Callback"} - set(_OF_KERAS) == set()


def test_what_an_answer_says_to_write_is_accepted(tmp_path):
    plateau = advice(K.ReduceLROnPlateau(patience=1, min_lr=1e-6))
    options = eval(plateau[plateau.index("{") : plateau.index("}") + 1])
    make(
        tmp_path,
        [EarlyStoppingCallback(early_stopping_patience=1)],
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs=options,
        eval_strategy="epoch",
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        save_strategy="epoch",
    ).fit()


@pytest.fixture
def transformers(monkeypatch):
    """A stand-in for the package: classes of its names, in modules of its name."""
    module = types.ModuleType("transformers.trainer_callback")
    base = type("TrainerCallback", (), {"__module__": module.__name__})
    for name in ("EarlyStoppingCallback", "WandbCallback", "CometCallback", "DefaultFlowCallback"):
        cls = type(name, (base,), {"__module__": module.__name__, "early_stopping_patience": 3})
        setattr(module, name, cls)
    module.TrainerCallback = base
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("EarlyStoppingCallback", "write kbtrain.EarlyStoppingCallback(early_stopping_patience=3"),
        ("WandbCallback", "report_to='wandb'"),
        ("CometCallback", "entry points kbtrain.trackers"),
        ("DefaultFlowCallback", "Leave it out"),
    ],
)
def test_a_callback_of_transformers_is_refused_with_what_to_write(
    tmp_path, transformers, name, said
):
    message = refusal(tmp_path, getattr(transformers, name)())
    assert "of Transformers" in message
    assert said in message


@pytest.mark.parametrize("base", ["TrainerCallback", "EarlyStoppingCallback"])
def test_a_callback_derived_from_one_of_transformers(tmp_path, transformers, base):
    own = type("Own", (getattr(transformers, base),), {"__module__": __name__})
    assert f"Derive it from kbtrain.{base}: the events" in refusal(tmp_path, own())


def test_anything_else_is_refused_without_advice(tmp_path):
    assert refusal(tmp_path, print).endswith("Received: <built-in function print>.")


# --- early stopping that is resumed --------------------------------------------------------------


def records(caplog):
    return [record.getMessage() for record in caplog.records]


def stopped(tmp_path, callback, resume, **changes):
    settings = {
        **{"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"},
        **{"save_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True},
    }
    make(tmp_path, [callback], **(settings | changes)).fit(resume_from_checkpoint=resume)
    return callback


def test_a_resumed_early_stopping_has_patience_threshold_and_counter(tmp_path, caplog):
    stopped(tmp_path, EarlyStoppingCallback(5, 0.2), None)
    # Not one more update: the checkpoint is of the last one.
    default = stopped(tmp_path, EarlyStoppingCallback(), True)
    assert (default.early_stopping_patience, default.early_stopping_threshold) == (5, 0.2)
    assert default.early_stopping_patience_counter == 1  # the loss falls, and higher is better
    assert not [r for r in records(caplog) if "early_stopping" in r]
    given = stopped(tmp_path, EarlyStoppingCallback(4), True)
    assert (given.early_stopping_patience, given.early_stopping_threshold) == (4, 0.2)
    assert "early_stopping_patience was 5 and is 4 now." in "\n".join(records(caplog))
    fresh = stopped(
        tmp_path, EarlyStoppingCallback(), True, restore_callback_states_from_checkpoint=False
    )
    assert (fresh.early_stopping_patience, fresh.early_stopping_patience_counter) == (1, 0)


def test_a_state_of_before_the_patience_was_saved():
    callback = EarlyStoppingCallback(2)
    callback.load_state({"best": 0.5, "counter": 1})
    assert (callback.best, callback.early_stopping_patience) == (0.5, 2)
    for wrong in ({"early_stopping_patience": 0}, {"early_stopping_threshold": "a"}):
        with pytest.raises(ConfigurationError, match="EarlyStoppingCallback needs"):
            callback.load_state({"best": 0.5, "counter": 1, **wrong})


def test_the_defaults_of_early_stopping():
    callback = EarlyStoppingCallback()
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (1, 0.0)
