"""One update: clipping, the finite check, what is frozen, what accumulation does to the state."""

import keras
import numpy as np
import pytest
from helpers import (
    Recorder,
    arguments,
    batch_norm_model,
    fit,
    linear_model,
    make_data,
    same,
    train_logs,
    weights,
)

from kbtrain import Trainer
from kbtrain.errors import ConfigurationError, NonFiniteError


def poisoned(samples=16, row=9, value=np.nan, seed=0):
    x, y = make_data(samples, seed=seed)
    x[row] = value
    return x, y


class Snapshots(Recorder):
    """The model's variables as every update begins."""

    def __init__(self):
        super().__init__()
        self.before = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before[state.global_step + 1] = weights(kwargs["model"])


# --- not finite -----------------------------------------------------------------------------------


# Micro-batches of 4: row 9 is in update 3 without, and in the first or second half of update 2 with
# accumulation over 2 (rows 8-11 and 12-15).
PLACES = {
    "one batch": (1, 9, 3),
    "first micro-batch": (2, 9, 2),
    "last micro-batch": (2, 13, 2),
    "short last group": (3, 14, 2),
}


@pytest.mark.core
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", PLACES)
def test_raise_leaves_everything_as_it_was(tmp_path, place, value):
    accumulation, row, step = PLACES[place]
    model, snapshots = batch_norm_model(dropout=0.5), Snapshots()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=4,
            num_train_epochs=3,
            gradient_accumulation_steps=accumulation,
            logging_steps=100,
        ),
        train_dataset=poisoned(row=row, value=value),
        loss="mse",
        callbacks=[snapshots],
    )
    with pytest.raises(NonFiniteError, match=f"Update {step} was not finite") as caught:
        trainer.fit()
    assert isinstance(caught.value, FloatingPointError)
    assert same(weights(model), snapshots.before[step])
    assert not same(snapshots.before[step], snapshots.before[1])
    assert int(keras.ops.convert_to_numpy(trainer.optimizer.iterations.value)) == step - 1
    assert trainer.state.global_step == step - 1
    assert list(tmp_path.iterdir()) == []


def test_raise_names_the_last_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="checkpoint-2") as caught:
        fit(
            linear_model(),
            arguments(tmp_path, per_device_train_batch_size=4, save_strategy="steps", save_steps=1),
            poisoned(),
        )
    for part in ("Update 3", "loss nan", "on_nonfinite"):
        assert part in str(caught.value)
    left = ["checkpoint-1", "checkpoint-2", "run.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_raise_also_for_a_gradient_that_is_not_finite_though_the_loss_is(tmp_path):
    model = linear_model()

    def root(outputs, labels):  # the derivative of a root at 0 is infinite
        return keras.ops.sqrt(keras.ops.abs(outputs[:, 0] * 0.0))

    before = weights(model)
    with pytest.raises(NonFiniteError, match="loss 0.0"):
        fit(model, arguments(tmp_path, max_steps=2), make_data(), loss=None, compute_loss_func=root)
    assert same(weights(model), before)


def test_the_mean_loss_of_no_update_is_no_number(tmp_path):
    x, y = make_data(8)
    args = arguments(tmp_path, max_steps=2, on_nonfinite="skip")
    output = Trainer(linear_model(), args, train_dataset=(x * np.nan, y), loss="mse").fit()
    assert output.global_step == 2
    assert np.isnan(output.training_loss)
    assert np.isnan(output.metrics["train_loss"])


@pytest.mark.core
def test_skip_equals_a_run_without_that_batch(tmp_path):
    args = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        on_nonfinite="skip",
    )
    x, y = poisoned()
    trainer = fit(batch_norm_model(), args, (x, y))
    clean = [np.delete(a, slice(8, 12), 0) for a in (x, y)]
    other = fit(batch_norm_model(), args, tuple(clean))
    assert trainer.state.global_step == 4  # the skipped one is counted, as in Transformers
    assert same(weights(trainer.model), weights(other.model))
    assert train_logs(trainer) == train_logs(other)
    assert train_logs(trainer, "train_loss") == train_logs(other, "train_loss")


@pytest.mark.parametrize("row", [9, 13])
def test_skip_leaves_out_the_whole_group(tmp_path, row):
    args = arguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        on_nonfinite="skip",
        gradient_accumulation_steps=2,
    )
    trainer = fit(batch_norm_model(), args, poisoned(row=row))
    x, y = make_data()
    other = fit(batch_norm_model(), args, (x[:8], y[:8]))
    assert same(weights(trainer.model), weights(other.model))


def test_ignore_applies_a_nonfinite_update(tmp_path):
    trainer = fit(
        linear_model(),
        arguments(
            tmp_path, per_device_train_batch_size=4, num_train_epochs=1, on_nonfinite="ignore"
        ),
        poisoned(),
    )
    assert trainer.state.global_step == 4
    assert all(np.isnan(w).any() for w in weights(trainer.model))
    assert np.isnan(train_logs(trainer)).tolist() == [False, False, True, True]


def test_the_error_comes_late_but_nothing_moves_in_between(tmp_path):
    """The host looks at the flag only where it logs; the updates until then must do nothing."""
    model = batch_norm_model()
    x, y = poisoned(samples=64, row=4)  # update 2 of 16
    with pytest.raises(NonFiniteError, match="Update 2"):
        fit(
            model,
            arguments(
                tmp_path, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=16
            ),
            (x, y),
        )
    other = fit(
        batch_norm_model(),
        arguments(tmp_path, per_device_train_batch_size=4, max_steps=1, learning_rate=0.01),
        (x, y),
    )
    moved, expected = weights(model), weights(other.model)
    # The schedules end at different steps, so the first rate is the same: lr * (T - 0) / T.
    assert same(moved, expected)


def test_a_trainer_can_go_on_after_the_error(tmp_path):
    x, y = poisoned()
    model = linear_model()
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=4, max_steps=4),
        train_dataset=(x, y),
        loss="mse",
    )
    with pytest.raises(NonFiniteError):
        trainer.fit()
    before = weights(model)
    trainer.train_dataset = make_data()
    output = trainer.fit()
    assert output.global_step == 4
    assert np.isfinite(output.training_loss)
    assert not same(weights(model), before)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.core
def test_gradient_norm_and_clipping_against_numpy(tmp_path):
    x, y = make_data(8)
    model = linear_model(use_bias=False)
    w = weights(model)[0].astype(np.float64)
    error = x @ w - y
    gradient = 2 * x.T @ error / 8
    norm = np.linalg.norm(gradient)
    trainer = fit(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            max_grad_norm=norm / 3,
            learning_rate=0.5,
            lr_scheduler_type="constant",
        ),
        (x, y),
        optimizers=(keras.optimizers.SGD(0.5), None),
    )
    assert train_logs(trainer, "grad_norm") == [pytest.approx(norm, rel=1e-6)]  # before clipping
    clipped = gradient * (norm / 3) / (norm + 1e-6)
    np.testing.assert_allclose(weights(model)[0], w - 0.5 * clipped, rtol=1e-5)


def test_a_repeated_index_of_an_embedding_counts_every_time(tmp_path):
    x = np.array([[1, 1, 1, 2]], np.int32)
    inputs = keras.Input((4,), dtype="int32")
    table = keras.layers.Embedding(3, 2, embeddings_initializer="zeros")
    model = keras.Model(inputs, keras.ops.sum(table(inputs), axis=1))
    y = np.array([[1.0, 2.0]], np.float32)
    trainer = fit(model, arguments(tmp_path, max_steps=1), (x, y))
    # d loss / d row = count * 2 (0 - y) / 2
    gradient = np.outer([0, 3, 1], -y[0])
    assert train_logs(trainer, "grad_norm") == [pytest.approx(np.linalg.norm(gradient), rel=1e-6)]


def test_a_weight_that_the_loss_does_not_reach_stays(tmp_path):
    inputs = keras.Input((3,))
    used, idle = keras.layers.Dense(1), keras.layers.Dense(1)
    model = keras.Model(inputs, [used(inputs), idle(inputs)])
    x, y = make_data()
    before = weights(idle)
    fit(
        model,
        arguments(tmp_path, max_steps=2),
        (x, (y, y)),
        loss=None,
        compute_loss_func=lambda out, labels: (out[0] - labels[0]) ** 2,
    )
    assert same(weights(idle), before)


@pytest.mark.core
def test_frozen_layers_stay_and_the_rest_learns(tmp_path):
    model = batch_norm_model()
    model.layers[0].trainable = False
    model.layers[1].trainable = False
    before, head = weights(model.layers[0]) + weights(model.layers[1]), weights(model.layers[-1])
    trainer = fit(model, arguments(tmp_path, max_steps=3), make_data())
    # A frozen BatchNormalization is in inference mode, so its statistics stay too.
    assert same(weights(model.layers[0]) + weights(model.layers[1]), before)
    assert not same(weights(model.layers[-1]), head)
    assert trainer.get_num_trainable_parameters() == 5


def test_nothing_to_train_is_an_error(tmp_path):
    model = linear_model()
    model.trainable = False
    with pytest.raises(ConfigurationError, match="trainable"):
        fit(model, arguments(tmp_path), make_data())


@pytest.mark.core
def test_weight_decay_spares_biases_and_norms(tmp_path):
    model = batch_norm_model()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=1,
            learning_rate=0.1,
            weight_decay=0.5,
            lr_scheduler_type="constant",
            per_device_train_batch_size=16,
        ),
        train_dataset=make_data(),
        compute_loss_func=lambda out, labels: keras.ops.sum(out) * 0.0,
    )
    before = [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.trainable_variables]
    trainer.fit()
    for variable, old in zip(model.trainable_variables, before, strict=True):
        new = keras.ops.convert_to_numpy(variable.value)
        factor = 0.95 if variable.name == "kernel" else 1.0
        np.testing.assert_allclose(new, old * factor, rtol=1e-6, err_msg=variable.path)
    decayed = trainer.get_decay_parameter_names()
    assert len(decayed) == 2
    assert all(path.endswith("kernel") for path in decayed)


# --- compiled or not ------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_eager_and_compiled_steps_agree(tmp_path, accumulation):
    results = []
    for jit in ("auto", False):
        model = batch_norm_model()
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=4,
                jit_compile=jit,
                gradient_accumulation_steps=accumulation,
                max_steps=4,
            ),
            make_data(14),
            metrics=["mae"],
            # Adam blows up the rounding of a gradient of zero: a bias before BatchNormalization.
            optimizers=(keras.optimizers.SGD(0.1), None),
        )
        results.append(
            (train_logs(trainer), train_logs(trainer, "mean_absolute_error"), weights(model))
        )
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
