"""Callbacks of Keras and transformers in place of kbtrain's, and early stopping that is resumed."""

import sys
import types

import keras
import pytest
from helpers import arguments, linear_model, make_data

from kbtrain import ConfigurationError, EarlyStoppingCallback, Trainer
from kbtrain.callbacks.adapters.advice import _REFUSED_OF_KERAS, usable

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


class OwnBackup(K.BackupAndRestore):
    pass


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (K.BackupAndRestore("backup"), "resume_from_checkpoint='auto'"),
        (OwnBackup("backup"), "resume_from_checkpoint='auto'"),
        (K.ProgbarLogger(), "disable_tqdm=False"),
        (K.CallbackList(), "pass the callbacks themselves"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_a_callback_of_keras_for_what_the_trainer_does_is_refused(tmp_path, callback, said):
    message = refusal(tmp_path, callback)
    assert "callback of Keras: " in message
    assert said in message


def test_every_other_callback_of_keras_is_accepted():
    there = {name for name in dir(K) if isinstance(getattr(K, name), type)}
    refused = {name for name in there if usable(getattr(K, name)) is None}
    assert refused <= set(_REFUSED_OF_KERAS)


@pytest.fixture
def transformers(monkeypatch):
    """A stand-in for the package: its classes, as far as callbacks need them."""
    module = types.ModuleType("transformers.trainer_callback")
    exec(STAND_IN, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


STAND_IN = """
class TrainerCallback:
    def on_log(self, args, state, control, **kwargs):
        pass
    def on_step_end(self, args, state, control, **kwargs):
        pass
    def on_evaluate(self, args, state, control, **kwargs):
        pass
class ExportableState:
    pass
class EarlyStoppingCallback(TrainerCallback, ExportableState):
    def __init__(self, patience=1):
        self.early_stopping_patience, self.early_stopping_patience_counter = patience, 0
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        assert args.metric_for_best_model == "loss"
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
    def state(self):
        return {"args": {"patience": self.early_stopping_patience},
                "attributes": {"early_stopping_patience_counter":
                               self.early_stopping_patience_counter}}
class WandbCallback(TrainerCallback):
    pass
class NeptuneCallback(TrainerCallback):
    pass
class DefaultFlowCallback(TrainerCallback):
    pass
class ProgressCallback(TrainerCallback):
    pass
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("WandbCallback", "report_to='wandb'"),
        ("NeptuneCallback", "entry points kbtrain.trackers"),
        ("DefaultFlowCallback", "Leave it out"),
        ("ProgressCallback", "disable_tqdm=False"),
    ],
)
def test_a_callback_of_transformers_for_its_own_loop_or_a_service_is_refused(
    tmp_path, transformers, name, said
):
    message = refusal(tmp_path, getattr(transformers, name)())
    assert "of Transformers" in message
    assert said in message
    own = type("Own", (getattr(transformers, name),), {"__module__": __name__})
    assert f"It derives from {name}, a callback of Transformers" in refusal(tmp_path, own())


def test_a_callback_of_transformers_is_called_with_the_arguments_of_the_run(tmp_path, transformers):
    calls = []

    class Own(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs.pop("loss", None)  # as Transformers' own callbacks do
            calls.append((args.max_steps, state.global_step, kwargs["model"]))

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            control.should_training_stop = True
            return control

    own = Own()
    trainer = make(tmp_path, [own], max_steps=9, eval_strategy="steps", eval_steps=2)
    # Only what it overrides is listened to, so several updates still run in one call.
    assert not trainer.callback_handler.need_every_step()
    trainer.fit()
    assert trainer.state.global_step == 2
    assert calls[0] == (9, 1, trainer.model)
    assert "loss" in trainer.state.log_history[0]
    assert trainer.control.stop_reason == "Own asked to stop"
    assert trainer.pop_callback(Own) is own


def test_what_a_callback_of_transformers_needs_and_does_not_get_is_named(tmp_path, transformers):
    class Own(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return state.total_flos > 0

    with pytest.raises(ConfigurationError, match=r"Own.on_step_end.* uses state.total_flos, which"):
        make(tmp_path, [Own()]).fit()
    Own.on_step_end = lambda self, args, state, control: None
    with pytest.raises(
        ConfigurationError, match=r"on_step_end\(self, args, state, control, \*\*kw"
    ):
        make(tmp_path, [Own()])


def test_early_stopping_of_transformers_is_resumed(tmp_path, transformers):
    settings = {
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        # The loss falls, and higher is taken for better.
        **{"metric_for_best_model": "loss", "greater_is_better": True},
    }
    make(tmp_path, [transformers.EarlyStoppingCallback(9)], max_steps=2, **settings).fit()
    again = transformers.EarlyStoppingCallback(9)
    make(tmp_path, [again], max_steps=2, **settings).fit(resume_from_checkpoint=True)
    assert again.early_stopping_patience_counter == 0
    stops = transformers.EarlyStoppingCallback(1)
    trainer = make(tmp_path / "b", [stops], max_steps=9, **settings | {"learning_rate": 0.0})
    trainer.fit()
    assert trainer.state.global_step == 2


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
