"""A model's own train_step, test_step and predict_step, against plain Keras on the same backend."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, same, weights, with_weights
from helpers_model_steps import BACKEND, CallsSuper, Contrastive, Gan, OwnEvaluation, Vae, host

from kbtrain import ConfigurationError, NonFiniteError, Trainer
from kbtrain.model.custom_steps import optimizers_of

X, Y = make_data(16)


def compiled(kind):
    model = kind()
    if kind is CallsSuper:
        model(X[:1])
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    elif kind is Gan:
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02), loss)
    else:
        model.compile(keras.optimizers.Adam(0.01))
    return with_weights(model)


def data_of(kind):
    return (X, Y) if kind is CallsSuper else X


def run(model, folder, data, **changes):
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "logging_strategy": "epoch",
    }
    args = arguments(folder, learning_rate=None, **(defaults | changes))
    return Trainer(model, args, train_dataset=data)


@pytest.mark.parametrize("kind", [Vae, Contrastive, Gan, CallsSuper])
def test_trains_and_resumes_as_keras_trains(tmp_path, kind):
    data, model, reference = data_of(kind), compiled(kind), compiled(kind)
    x, y = data if kind is CallsSuper else (data, None)
    reference.run_eagerly = True  # its numbers are wanted, there is nothing to compile for
    history = reference.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    trainer = run(model, tmp_path, data, save_strategy="steps", save_steps=3)
    output = trainer.fit()
    for got, expected in zip(weights(model), weights(reference), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    entries = [e for e in trainer.state.log_history if set(history) <= set(e)]
    for name, values in history.items():
        assert [e[name] for e in entries] == pytest.approx(values, rel=1e-4)
    assert "grad_norm" not in entries[0]
    # What it returns as a loss is a mean since the last log.
    assert kind is Gan or output.training_loss == pytest.approx(np.mean(history["loss"]), rel=1e-4)

    again = compiled(kind)
    resumed = run(again, tmp_path, data)
    resumed.fit(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(again), weights(model))
    assert resumed.state.log_history[-2] == trainer.state.log_history[-2]
    for first, second in zip(_optimizers(model), _optimizers(again), strict=True):
        assert len(first.variables) > 2
        assert same(host(first.variables), host(second.variables))


def _optimizers(model):
    return [o for o in (*optimizers_of(model).values(), model.optimizer) if len(o.variables) > 2]


def test_the_optimizers_of_a_gan_are_in_its_checkpoints(tmp_path):
    model = compiled(Gan)
    trainer = run(model, tmp_path, X, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.fit()
    arrays = trainer.store.load(tmp_path / "checkpoint-1").arrays
    names = (
        {"optimizer"} if BACKEND == "jax" else {"optimizer.d_optimizer", "optimizer.g_optimizer"}
    )
    assert all(any(key.startswith("momentum/") for key in arrays[name]) for name in names)


def test_one_warning_says_what_does_not_hold(tmp_path, caplog):
    run(compiled(Vae), tmp_path, X, max_steps=1).fit()
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "Vae.train_step" in record.message
    assert "accumulated" in record.message


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
        ({"max_grad_norm": 1.0}, "global_clipnorm"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"gradient_checkpointing": True}, "keras.remat"),
    ],
)
def test_arguments_about_gradients_are_refused(tmp_path, changes, advice):
    with pytest.raises(ConfigurationError, match=advice) as caught:
        run(compiled(Vae), tmp_path, X, **changes).fit()
    assert "Trainer.compute_loss" in str(caught.value)


def test_what_the_step_would_not_see_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="Compile the model with that loss"):
        Trainer(compiled(CallsSuper), arguments(tmp_path), train_dataset=(X, Y), loss="mse")
    with pytest.raises(ConfigurationError, match="not compiled"):
        run(Vae(), tmp_path, X).fit()
    optimizers = (keras.optimizers.SGD(), None)
    with pytest.raises(ConfigurationError, match="optimizers="):
        Trainer(compiled(Vae), arguments(tmp_path), train_dataset=X, optimizers=optimizers).fit()


def test_the_form_of_another_backend_is_explained(tmp_path):
    class Foreign(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

    def of_jax(self, state, data):
        raise AssertionError

    def of_the_others(self, data):
        raise AssertionError

    Foreign.train_step = of_the_others if BACKEND == "jax" else of_jax
    model = Foreign()
    model.compile("sgd", "mse")
    with pytest.raises(ConfigurationError, match="train_step must be defined as train_step"):
        run(model, tmp_path, (X, Y)).fit()


def test_an_overridden_loop_is_refused(tmp_path):
    class Own(Vae):
        def make_train_function(self, force=False):
            raise AssertionError

    with pytest.raises(ConfigurationError, match="make_train_function"):
        run(compiled(Own), tmp_path, X).fit()


def test_a_step_must_return_numbers_by_name(tmp_path):
    class Silent(Vae):
        def train_step(self, *args):
            result = super().train_step(*args)
            return (None, result[1]) if BACKEND == "jax" else None

    with pytest.raises(ConfigurationError, match="must return a dict"):
        run(compiled(Silent), tmp_path, X).fit()


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    bad = X.copy()
    bad[9] = np.nan
    model, reference = compiled(Vae), compiled(Vae)
    with pytest.raises(NonFiniteError, match="Update 2"):
        run(model, tmp_path, bad).fit()
    run(reference, tmp_path, X[:8], max_steps=1).fit()
    assert same(weights(model), weights(reference))
    model = compiled(Vae)
    run(model, tmp_path, bad, on_nonfinite="skip", num_train_epochs=1).fit()
    assert same(weights(model), weights(reference))


def test_trainer_compute_loss_replaces_the_step(tmp_path, caplog):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, _ = model.losses_of(inputs)
            return (loss, loss) if return_outputs else loss

    model = compiled(Vae)
    before = weights(model)
    args = arguments(tmp_path, learning_rate=None, max_steps=2, per_device_train_batch_size=8)
    trainer = Own(model, args, train_dataset=X, eval_dataset=X)
    trainer.fit()
    assert "Vae.train_step is not used" in caplog.text
    assert "grad_norm" in trainer.state.log_history[0]
    assert not same(weights(model), before)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


# --- evaluation -----------------------------------------------------------------------------------


def own_evaluation():
    model = OwnEvaluation()
    model(X[:1])
    model.compile("sgd", "mse")
    return with_weights(model)


def test_own_test_step_and_predict_step(tmp_path):
    model, args = own_evaluation(), arguments(tmp_path, per_device_eval_batch_size=6)
    trainer = Trainer(model, args, train_dataset=(X, Y), eval_dataset=(X, Y))
    outputs = X @ weights(model)[0] + weights(model)[1]
    largest = [np.abs(outputs - Y)[i : i + 6].max() for i in (0, 6, 12)]
    metrics = trainer.evaluate()
    assert metrics["eval_largest"] == pytest.approx(np.mean(largest), rel=1e-6)
    assert "eval_loss" not in metrics
    predicted = trainer.predict(X)
    np.testing.assert_array_equal(predicted.predictions, np.round(outputs))
    both = trainer.predict((X, Y))
    np.testing.assert_array_equal(both.predictions, np.round(outputs))
    assert both.metrics["test_largest"] == pytest.approx(np.mean(largest), rel=1e-6)
    np.testing.assert_allclose(
        model.evaluate(X, Y, batch_size=6, verbose=0, return_dict=True)["largest"],
        metrics["eval_largest"],
        rtol=1e-6,
    )


def test_own_predict_step_beside_the_loss_of_the_trainer(tmp_path):
    class Rounding(OwnEvaluation):
        test_step = keras.Model.test_step

    model = Rounding()
    model(X[:1])
    trainer = Trainer(with_weights(model), arguments(tmp_path), eval_dataset=(X, Y), loss="mse")
    outputs = X @ weights(model)[0] + weights(model)[1]
    result = trainer.predict((X, Y))
    np.testing.assert_array_equal(result.predictions, np.round(outputs))
    assert result.metrics["test_loss"] == pytest.approx(np.mean((outputs - Y) ** 2), rel=1e-6)


def test_evaluation_in_training_leaves_its_metrics_alone(tmp_path):
    model = compiled(CallsSuper)
    args = arguments(
        tmp_path,
        learning_rate=None,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        logging_strategy="epoch",
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = Trainer(model, args, train_dataset=(X, Y), eval_dataset=(X, Y))
    reference = compiled(CallsSuper)
    history = reference.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history
    trainer.fit()
    (entry,) = [e for e in trainer.state.log_history if "double" in e]
    assert entry["mae"] == pytest.approx(history["mae"][0], rel=1e-5)
    expected = reference.evaluate(X, Y, verbose=0, return_dict=True)
    last = [e for e in trainer.state.log_history if "eval_loss" in e][-1]
    assert last["eval_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert last["eval_mae"] == pytest.approx(expected["mae"], rel=1e-5)


def test_what_is_missing_for_an_evaluation_is_named(tmp_path):
    trainer = Trainer(compiled(Vae), arguments(tmp_path), eval_dataset=X)
    with pytest.raises(ConfigurationError, match="no call and no test_step"):
        trainer.evaluate()
    with pytest.raises(ConfigurationError, match="no call and no predict_step"):
        trainer.predict(X)


def test_a_number_of_the_steps_own_is_not_hidden_by_keras_mean_of_that_name(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def test_step(self, *args):  # Keras' steps get another first argument on JAX
            data = args[-1]
            logs = {"loss": keras.ops.sum(keras.ops.ones_like(data[1]))}
            return (logs, args[0]) if len(args) > 1 else logs

    model = Own()
    model(X[:1])
    model.compile("sgd", "mse")  # which makes a mean called "loss", and nothing updates it
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    metrics = Trainer(model, args, eval_dataset=(X[:8], Y[:8])).evaluate()
    assert metrics["eval_loss"] == Y[:8].size
