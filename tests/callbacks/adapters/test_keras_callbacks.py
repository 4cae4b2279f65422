"""Callbacks of Keras in a run: the same as in ``keras.Model.fit``, event by event."""

import csv

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, weights

from kbtrain import ConfigurationError, NonFiniteError, Trainer

K = keras.callbacks
BATCH = 8


def data(samples, seed):
    x, _ = make_data(samples, seed=seed)
    return x, (x @ np.array([[1.0], [2.0], [-1.0]], np.float32) > 0).astype(np.float32)


TRAIN, TEST = data(40, 1), data(16, 2)


def classifier(rate=0.5):
    """A compiled model with known weights."""
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(1, "sigmoid")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(generator.normal(size=variable.shape).astype(np.float32))
    model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=["accuracy"])
    return model


def trainer_for(tmp_path, callbacks, model=None, **changes):
    settings = {
        **{"learning_rate": None, "num_train_epochs": 5, "per_device_train_batch_size": BATCH},
        **{"per_device_eval_batch_size": BATCH, "eval_strategy": "epoch", "logging_steps": 2},
    }
    return Trainer(
        model or classifier(),
        arguments(tmp_path, **(settings | changes)),
        train_dataset=TRAIN,
        eval_dataset=TEST,
        callbacks=callbacks,
    )


class Record(K.Callback):
    """What happened, in order, with the logs and the learning rate of each epoch."""

    def __init__(self):
        super().__init__()
        self.events, self.rates = [], []

    def _seen(self, name, *details):
        self.events.append((name, *(dict(x) if isinstance(x, dict) else x for x in details)))

    def on_train_begin(self, logs=None):
        self._seen("train begin", self.params["epochs"], self.params["steps"])

    def on_epoch_begin(self, epoch, logs=None):
        self._seen("epoch begin", epoch)

    def on_test_begin(self, logs=None):
        self._seen("test begin")

    def on_test_end(self, logs=None):
        self._seen("test end", logs)

    def on_epoch_end(self, epoch, logs=None):
        self._seen("epoch end", epoch, logs)
        self.rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_end(self, logs=None):
        self._seen("train end", logs)


class RecordBatches(Record):
    def on_train_batch_begin(self, batch, logs=None):
        self._seen("batch begin", batch)

    def on_train_batch_end(self, batch, logs=None):
        self._seen("batch end", batch, logs)

    def on_test_batch_begin(self, batch, logs=None):
        self._seen("test batch begin", batch)

    def on_test_batch_end(self, batch, logs=None):
        self._seen("test batch end", batch, logs)


class HalveWeights(K.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.model.set_weights([w / 2 for w in self.model.get_weights()])


class StopInEpoch(K.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 7:
            self.model.stop_training = True


def same_events(first, second):
    assert [e[:-1] if isinstance(e[-1], dict) else e for e in first] == [
        e[:-1] if isinstance(e[-1], dict) else e for e in second
    ]
    for one, other in zip(first, second, strict=True):
        if isinstance(one[-1], dict):
            assert one[-1] == pytest.approx(other[-1], rel=1e-5, abs=1e-6), one[:-1]


CASES = {
    "none": list,
    "early": lambda: [K.EarlyStopping("val_accuracy", patience=1, restore_best_weights=True)],
    "baseline": lambda: [K.EarlyStopping(patience=0, baseline=0.1, start_from_epoch=2)],
    "rates": lambda: [K.LearningRateScheduler(lambda epoch, rate: rate * 0.7)],
    "plateau": lambda: [K.ReduceLROnPlateau(patience=1, min_delta=0.1, factor=0.5, cooldown=1)],
    "weights": lambda: [HalveWeights()],
    "stop": lambda: [StopInEpoch()],
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.core] * (c in ("early", "rates"))) for c in CASES]
)
def test_a_run_is_that_of_keras_fit(tmp_path, case):
    ours, theirs = [*CASES[case](), Record()], [*CASES[case](), Record()]
    if case == "stop":
        ours[-1], theirs[-1] = RecordBatches(), RecordBatches()
    model = classifier()
    options = {"batch_size": BATCH, "epochs": 5, "shuffle": False, "verbose": 0}
    model.fit(
        *TRAIN, validation_data=TEST, validation_batch_size=BATCH, callbacks=theirs, **options
    )
    trainer = trainer_for(tmp_path, ours)
    trainer.fit()
    same_events(ours[-1].events, theirs[-1].events)
    assert ours[-1].rates == pytest.approx(theirs[-1].rates)
    for own, expected in zip(weights(trainer.model), weights(model), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_not_compiled_has_the_optimizer_of_the_run(tmp_path):
    """Loss and metrics are those passed to the Trainer; files are those of Keras."""
    model, record, history = linear_model(), Record(), K.History()
    path = str(tmp_path / "{epoch}-{val_rmse:.1f}.keras")
    callbacks = [
        K.EarlyStopping("val_rmse", patience=2),  # Keras finds no direction in such a model
        K.ModelCheckpoint(path, "val_rmse", save_best_only=True),
        K.ModelCheckpoint(str(tmp_path / "w.weights.h5"), save_weights_only=True, save_freq=3),
        K.CSVLogger(str(tmp_path / "log.csv")),
        K.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        K.ReduceLROnPlateau("loss", patience=9),
        history,
        record,
    ]
    args = arguments(
        tmp_path,
        **{"num_train_epochs": 3, "eval_strategy": "epoch", "lr_scheduler_type": "constant"},
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=make_data(20),
        eval_dataset=make_data(20),  # its error falls
        loss="mse",
        metrics=[keras.metrics.RootMeanSquaredError(name="rmse")],
        callbacks=callbacks,
    )
    trainer.fit()
    assert record.rates == pytest.approx([0.01] * 3)
    assert "optimizer" not in vars(model)
    assert list(history.history) == ["loss", "rmse", "val_loss", "val_rmse", "learning_rate"]
    saved = sorted(p.name for p in tmp_path.glob("*.keras"))
    assert saved == [f"{i + 1}-{v:.1f}.keras" for i, v in enumerate(history.history["val_rmse"])]
    again = keras.models.load_model(tmp_path / saved[-1])
    assert np.array_equal(again.get_weights()[0], model.get_weights()[0])
    assert (tmp_path / "w.weights.h5").exists()
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in rows] == pytest.approx(history.history["loss"])
    trainer.evaluate()
    assert record.events[-1][0] == "test end"


def test_several_updates_still_run_in_one_call(tmp_path):
    callbacks = [
        *(K.ModelCheckpoint(str(tmp_path / "a.keras")), K.EarlyStopping(), K.TerminateOnNaN()),
        *(K.TensorBoard(str(tmp_path / "tb")), K.CSVLogger(str(tmp_path / "a.csv")), Record()),
    ]
    handler = trainer_for(tmp_path, callbacks).callback_handler
    assert not handler.need_every_step()
    assert not [c for c in handler.listeners("on_step_end") if hasattr(c, "callbacks")]
    batches = RecordBatches()
    handler.add(batches)
    assert handler.need_every_step()
    assert handler.pop(batches) is batches
    assert not handler.need_every_step()
    handler.add(K.ModelCheckpoint(str(tmp_path / "b.keras"), save_freq=3))
    assert handler.need_every_step()


def test_a_new_learning_rate_does_not_compile_again(tmp_path, caplog):
    trainer = trainer_for(
        tmp_path, [K.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1))]
    )
    trainer.fit()
    rates = {e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    assert sorted(rates) == pytest.approx([0.1 / 5, 0.1 / 4, 0.1 / 3, 0.1 / 2, 0.1])
    assert "recompiled" not in caplog.text


@pytest.mark.parametrize(
    "callback", [K.LearningRateScheduler(lambda epoch, rate: rate), K.ReduceLROnPlateau("loss")]
)
def test_a_schedule_and_a_callback_that_sets_the_rate(tmp_path, callback):
    settings = {"lr_scheduler_type": "linear", "learning_rate": 0.1}
    with pytest.raises(ConfigurationError, match="lr_scheduler_type='constant'"):
        trainer_for(tmp_path, [callback], **settings).fit()


def test_a_custom_callback_that_assigns_a_scheduled_rate(tmp_path):
    class Assign(K.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 0.1

    with pytest.raises(ConfigurationError, match=r"Assign.on_epoch_begin assigned the learning"):
        trainer_for(tmp_path, [Assign()], lr_scheduler_type="linear", learning_rate=0.1).fit()


@pytest.mark.parametrize(
    ("callback", "changes", "said"),
    [
        (K.EarlyStopping(), {"eval_strategy": "no"}, "eval_strategy='epoch'"),
        (K.EarlyStopping("val_acc"), {}, "val_acc.*not among the results.*val_accuracy"),
        (K.SwapEMAWeights(), {}, "use_ema=True"),
        (K.LearningRateScheduler(lambda epoch, rate: "fast"), {}, "should be a float"),
    ],
)
def test_what_a_callback_of_keras_lacks_is_said(tmp_path, callback, changes, said):
    with pytest.raises(ConfigurationError, match=said):
        trainer_for(tmp_path, [callback], **changes).fit()


def test_terminate_on_nan_ends_the_run_before_the_bad_update(tmp_path):
    x, y = make_data(16)
    x[9] = np.nan  # in the third update
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2}

    def run(callbacks):
        model = linear_model()
        args = arguments(tmp_path, **settings)
        Trainer(model, args, train_dataset=(x, y), loss="mse", callbacks=callbacks).fit()
        return model

    with pytest.raises(NonFiniteError):
        run([])
    record = Record()
    assert np.isfinite(run([K.TerminateOnNaN(), record]).get_weights()[0]).all()
    assert record.events[-1][0] == "train end"


def test_averages_of_keras_are_swapped_for_the_callbacks_of_an_epoch(tmp_path):
    seen = []

    class Watch(K.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model.get_weights()[0])

    def run(callbacks, name):
        model = classifier()
        model.optimizer.use_ema = True
        model.compile(
            keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.8), "binary_crossentropy"
        )
        trainer = trainer_for(tmp_path / name, callbacks, model)
        trainer.fit()
        return model, trainer

    expected, plain = run([], "a")
    model, trainer = run([K.SwapEMAWeights(swap_on_epoch=True), Watch()], "b")
    for own, other in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[-1], model.get_weights()[0], rtol=1e-5, atol=1e-6)
    losses = [
        [e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (plain, trainer)
    ]
    assert losses[0] == pytest.approx(losses[1])


# --- resuming -------------------------------------------------------------------------------------


def callbacks_of(tmp_path):
    return [
        K.EarlyStopping("loss", patience=1, min_delta=0.05, restore_best_weights=True),
        K.ReduceLROnPlateau("val_loss", patience=1, min_delta=0.03, factor=0.5),
        K.CSVLogger(str(tmp_path / "log.csv")),
        K.History(),
        Record(),
    ]


def test_a_resumed_run_continues_the_callbacks_exactly(tmp_path):
    """Interrupted within an epoch and at the end of one; the results are those of one run."""
    whole = callbacks_of(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    (tmp_path / "part").mkdir()
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 8}
    expected = trainer_for(tmp_path / "whole", whole, **settings)
    expected.fit()
    assert 5 < expected.state.global_step < 40
    events = []
    for last in (3, 10, -1):
        part = callbacks_of(tmp_path / "part")
        trainer = trainer_for(tmp_path / "part", part, max_steps=last, **settings)
        if last > 0:
            trainer.args = trainer.args.replace(max_steps=40)
            trainer.add_callback(StopAt(last))
        trainer.fit(resume_from_checkpoint="auto")
        events += part[-1].events
    ends = {e[1]: e[2] for e in events if e[0] == "epoch end"}
    for event in whole[-1].events:
        if event[0] == "epoch end":
            assert ends[event[1]] == pytest.approx(event[2]), event[1]
    assert trainer.state.global_step == expected.state.global_step
    for own, other in zip(weights(trainer.model), weights(expected.model), strict=True):
        assert np.array_equal(own, other)


def test_what_cannot_be_resumed_is_said_once(tmp_path, caplog):
    class Counts(K.Callback):
        def __init__(self):
            super().__init__()
            self.count = 0

    class Remembers(Counts):
        def state(self):
            return {"count": self.count + 7}

        def load_state(self, state):
            self.count = state["count"]

    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    trainer_for(tmp_path, [Counts(), Remembers()], **settings).fit()
    caplog.clear()
    again = Remembers()
    trainer_for(tmp_path, [Counts(), again], **settings).fit(resume_from_checkpoint=True)
    told = [r.getMessage() for r in caplog.records if "start anew" in r.getMessage()]
    assert len(told) == 1
    assert "anew: Counts." in told[0]
    assert again.count == 7
