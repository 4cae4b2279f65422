"""The optimizer of a run: what of the arguments holds for one that was compiled or given."""

import logging

import keras
import numpy as np
import pytest
from helpers import Recorder, StopAt, linear_model, make_data, same, train_logs, weights

import optim
from kbtrain import ConfigurationError, Trainer, TrainingArguments


def large_data():
    """Gradients far above 1."""
    x, y = make_data(16)
    return x, 100 * y


def quiet(folder, **changes):
    """Arguments in which nothing is chosen but how data comes and that nothing is saved."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "no"}
    settings |= {"train_sampling_strategy": "sequential", "logging_steps": 1, "use_cpu": True}
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, **(settings | changes))


def by_keras(optimizer, data, **compiling):
    model = linear_model()
    model.compile(optimizer, "mse", **compiling)
    model.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model


def lines(caplog, word):
    return [r.getMessage() for r in caplog.records if word in r.getMessage()]


# --- clipping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["compiled", "given"])
def test_an_optimizer_made_elsewhere_is_not_clipped_unless_asked(tmp_path, way, caplog):
    model, optimizer = linear_model(), keras.optimizers.SGD(0.01)
    more = {}
    if way == "compiled":
        model.compile(optimizer, "mse")
    else:
        more = {"optimizers": (optimizer, None), "loss": "mse"}
    with caplog.at_level(logging.INFO, "kbtrain"):
        run = Trainer(model, quiet(tmp_path), train_dataset=large_data(), **more)
        run.fit()
    assert min(train_logs(run, "grad_norm")) > 1.0
    expected = by_keras(keras.optimizers.SGD(0.01), large_data())
    for value, reference in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-5)
    assert len(lines(caplog, "SGD was passed in and does not clip")) == 1


def test_a_norm_that_was_set_holds_for_every_optimizer(tmp_path):
    model = linear_model()
    before = weights(model)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    run = Trainer(
        model, quiet(tmp_path, max_steps=1, max_grad_norm=1.0), train_dataset=large_data()
    )
    run.fit()
    moved = [a - b for a, b in zip(weights(model), before, strict=True)]
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.core
def test_the_default_norm_is_for_optimizers_of_the_arguments(tmp_path):
    model = linear_model()
    before = weights(model)
    args = quiet(
        tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant"
    )
    Trainer(model, args, train_dataset=large_data(), loss="mse").fit()
    moved = [a - b for a, b in zip(weights(model), before, strict=True)]
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(1.0, rel=1e-5)


def test_clipping_of_the_optimizers_own(tmp_path, caplog):
    """It is the only one, unless max_grad_norm was set: then it comes second, with a line."""
    optimizer = {"optim": "sgd", "optim_args": {"global_clipnorm": 3.0}, "max_steps": 1}
    optimizer |= {"learning_rate": 1.0, "lr_scheduler_type": "constant"}
    for changes, norm in (({}, 3.0), ({"max_grad_norm": 2.0}, 2.0)):
        model = linear_model()
        before = weights(model)
        with caplog.at_level(logging.INFO, "kbtrain"):
            args = quiet(tmp_path, **optimizer, **changes)
            Trainer(model, args, train_dataset=large_data(), loss="mse").fit()
        moved = [a - b for a, b in zip(weights(model), before, strict=True)]
        assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(norm, rel=1e-5)
    assert lines(caplog, "clipped by SGD (global_clipnorm=3.0) alone")
    assert lines(caplog, "clipped twice: to max_grad_norm=2.0, then by SGD")


# --- the learning rate of a compiled model --------------------------------------------------------


def compiled(optimizer):
    model = linear_model()
    model.compile(optimizer, "mse")
    return model


def rates(folder, model, **changes):
    run = Trainer(model, quiet(folder, max_steps=4, **changes), train_dataset=make_data(16))
    run.fit()
    return train_logs(run, "learning_rate")


def test_a_compiled_model_keeps_its_rate(tmp_path, caplog):
    model = compiled(keras.optimizers.SGD(0.25))
    assert rates(tmp_path, model) == [0.25] * 4
    assert not lines(caplog, "arguments")


@pytest.mark.core
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.25),
        lambda: optim.AdamW(0.25),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.25)),
    ],
)
def test_a_rate_that_was_set_is_applied(tmp_path, make, caplog):
    assert rates(tmp_path, compiled(make()), learning_rate=0.125) == [0.125] * 4
    assert len(lines(caplog, "uses the learning rate of the arguments: learning_rate=0.125")) == 1


def test_a_schedule_that_was_set_is_applied(tmp_path, caplog):
    chosen = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    expected = [0.0, 0.125, 0.25, 0.125]
    assert rates(tmp_path, compiled(keras.optimizers.SGD(0.25)), **chosen) == expected
    halved = rates(tmp_path, compiled(optim.SGD(1.0)), learning_rate=0.125, **chosen)
    assert halved == [rate / 2 for rate in expected]
    assert lines(caplog, "lr_scheduler_type='linear', warmup_steps=2")


def test_a_schedule_that_was_compiled_stays(tmp_path, caplog):
    def model():
        return compiled(keras.optimizers.SGD(optim.LinearWithWarmup(0.25, 0, 4)))

    assert rates(tmp_path, model(), learning_rate=0.5) == [0.25, 0.1875, 0.125, 0.0625]
    assert lines(caplog, "learning_rate=0.5 in the arguments has no effect")
    with pytest.raises(ConfigurationError, match="ask for another one.*warmup_steps"):
        rates(tmp_path, model(), warmup_steps=2)
    both = {"learning_rate": 0.5, "lr_scheduler_type": "constant"}
    assert rates(tmp_path, model(), **both) == [0.5] * 4


def test_what_cannot_be_applied_is_said(tmp_path, caplog):
    rates(tmp_path, compiled(keras.optimizers.SGD(0.25)), optim="lion", weight_decay=0.1)
    assert lines(caplog, "optim, weight_decay in the arguments have no effect")
    caplog.clear()
    run = Trainer(
        linear_model(),
        quiet(tmp_path, max_steps=1, learning_rate=0.5),
        train_dataset=make_data(16),
        loss="mse",
        optimizers=(keras.optimizers.SGD(0.25), None),
    )
    run.fit()
    assert train_logs(run, "learning_rate") == [0.25]
    assert lines(caplog, "An optimizer was given (SGD), which is used: learning_rate")


def test_a_rate_changed_by_a_callback_lives_on_in_the_next_fit(tmp_path):
    model = compiled(keras.optimizers.SGD(0.25))
    args = quiet(tmp_path, max_steps=2, learning_rate=0.5)
    run = Trainer(model, args, train_dataset=make_data(16))
    run.fit()
    run.optimizer.learning_rate = 0.125
    run.fit()
    assert train_logs(run, "learning_rate")[-1] == 0.125


# --- float16 --------------------------------------------------------------------------------------


def half_model():
    inputs = keras.Input((3,), dtype="float32")
    outputs = keras.layers.Dense(1, dtype="mixed_float16")(inputs)
    model = keras.Model(inputs, outputs)
    model.set_weights([np.full((3, 1), 0.1), np.zeros(1)])
    return model


WAYS = {
    "arguments": {},
    "given": {"optimizers": (lambda: optim.SGD(1e-3), None)},
    "average": {"optimizers": (lambda: optim.EMA(keras.optimizers.SGD(1e-3)), None)},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_float16_is_trained_with_a_loss_scale(tmp_path, way):
    """A gradient of 3e-6 / 2^5 is 0 in float16, and is not with a scale of 2^15."""
    optimizers = WAYS[way].get("optimizers", (None, None))
    if optimizers[0] is not None:
        optimizers = (optimizers[0](), None)
    x, _ = make_data(16)
    model = half_model()
    run = Trainer(
        model,
        quiet(tmp_path, max_steps=2, optim="sgd"),
        train_dataset=(x, x @ np.full((3, 1), 0.1, "float32")),
        eval_dataset=make_data(8),
        compute_loss_func=lambda outputs, y: (
            2.0**-28 * (keras.ops.cast(outputs, "float32") - y + 1.0)
        ),
        optimizers=optimizers,
    )
    run.fit()
    assert isinstance(run.optimizer, keras.optimizers.LossScaleOptimizer)
    assert train_logs(run, "loss_scale") == [2.0**15] * 2
    expected = 2.0**-28 * np.abs(np.append(x[:4].mean(axis=0), 1.0))
    norm = np.sqrt((expected**2).sum())
    assert train_logs(run, "grad_norm")[0] == pytest.approx(norm, rel=1e-2)
    assert np.isfinite(run.evaluate()["eval_loss"])


def test_resuming_a_model_in_float16(tmp_path):
    def run(folder, **changes):
        trainer = Trainer(
            half_model(),
            quiet(folder, save_strategy="steps", save_steps=2, **changes),
            train_dataset=make_data(16),
            loss="mse",
        )
        return trainer

    whole, first, second = (
        run(tmp_path / "a", max_steps=4),
        run(tmp_path / "b", max_steps=4),
        run(tmp_path / "b", max_steps=4),
    )
    whole.fit()
    first.add_callback(StopAt(2))
    first.fit()
    second.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(second.model))


def test_who_scales_already_is_left_alone(tmp_path):
    model = half_model()
    model.compile(keras.optimizers.SGD(1e-3), "mse", auto_scale_loss=False)
    run = Trainer(model, quiet(tmp_path, max_steps=1), train_dataset=make_data(16))
    run.fit()
    assert isinstance(run.optimizer, keras.optimizers.SGD)
    fixed = keras.optimizers.SGD(1e-3, loss_scale_factor=1024.0)
    run = Trainer(
        half_model(),
        quiet(tmp_path, max_steps=1),
        train_dataset=make_data(16),
        loss="mse",
        optimizers=(fixed, None),
    )
    run.fit()
    assert run.optimizer is fixed


def test_a_second_fit_goes_on_with_the_same_scale(tmp_path):
    run = Trainer(
        half_model(),
        quiet(tmp_path, max_steps=1),
        train_dataset=make_data(16),
        loss="mse",
        optimizers=(keras.optimizers.SGD(1e-3), None),
    )
    run.fit()
    first = run.optimizer
    run.fit()
    assert run.optimizer is first
    assert int(first.iterations) == 2


# --- schedule-free optimizers ---------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [2, 0.5])
def test_a_schedule_free_optimizer_warms_up_itself(tmp_path, warmup, caplog):
    args = quiet(
        tmp_path,
        max_steps=4,
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        learning_rate=0.125,
        warmup_steps=warmup,
    )
    run = Trainer(linear_model(), args, train_dataset=make_data(16), loss="mse")
    run.fit()
    assert run.optimizer.warmup_steps == 2
    assert train_logs(run, "learning_rate") == [0.125] * 4
    assert not lines(caplog, "no effect")


# --- data whose length is not known ---------------------------------------------------------------


class Stream:
    """Samples, and no length."""

    def __init__(self, samples=10):
        self.x, self.y = make_data(samples)

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def test_no_total_is_needed_where_nothing_depends_on_it(tmp_path, capsys):
    recorder = Recorder()
    run = Trainer(
        compiled(keras.optimizers.SGD(0.01)),
        quiet(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=Stream(),
        eval_dataset=make_data(4),
        callbacks=[recorder],
    )
    output = run.fit()
    assert (output.global_step, run.state.max_steps, run.state.epoch) == (6, 6, 2.0)
    evaluated = [e["step"] for e in run.state.log_history if "eval_loss" in e]
    assert evaluated == [2, 4, 6]
    x, y = make_data(10)
    expected = by_keras_batches(x, y)
    for value, reference in zip(weights(run.model), expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-5)
    assert "step 1: loss" in capsys.readouterr().err


def by_keras_batches(x, y):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return weights(model)


def test_the_last_update_is_evaluated_and_saved_even_if_it_was_unknown(tmp_path):
    run = Trainer(
        linear_model(),
        quiet(
            tmp_path,
            num_train_epochs=1,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
        ),
        train_dataset=Stream(),
        eval_dataset=make_data(4),
        loss="mse",
    )
    run.fit()
    assert [e["step"] for e in run.state.log_history if "eval_loss" in e] == [2, 3]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "lr_scheduler_type='linear'"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, "warmup_steps=0.1"),
        ({"lr_scheduler_type": "constant", "num_train_epochs": 1.5}, "num_train_epochs=1.5"),
        ({"lr_scheduler_type": "constant", "logging_steps": 0.5}, "logging_steps=0.5"),
    ],
)
def test_what_needs_the_total_says_so(tmp_path, changes, reason):
    with pytest.raises(ConfigurationError, match=f"{reason} needs it.*max_steps"):
        Trainer(
            linear_model(), quiet(tmp_path, **changes), train_dataset=Stream(), loss="mse"
        ).fit()


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [keras.optimizers.SGD, optim.SGD])
def test_an_average_that_overwrites_counts_updates(tmp_path, make):
    def optimizer():
        return make(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)

    model = linear_model()
    run = Trainer(
        model,
        quiet(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        train_dataset=make_data(16),
        loss="mse",
        optimizers=(optimizer(), None),
    )
    run.fit()
    assert run.state.global_step == 8
    expected = by_keras(
        keras.optimizers.SGD(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
        make_data(16),
    )
    for value, reference in zip(weights(model), weights(expected), strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["given", "arguments", "loss scale"])
def test_an_optimizer_that_accumulates_itself_is_refused(tmp_path, way):
    changes, given = {}, keras.optimizers.SGD(0.01, gradient_accumulation_steps=3)
    if way == "arguments":
        changes, given = {"optim_args": {"gradient_accumulation_steps": 3}}, None
    elif way == "loss scale":
        given = keras.optimizers.LossScaleOptimizer(given)
    run = Trainer(
        linear_model(),
        quiet(tmp_path, **changes),
        train_dataset=make_data(16),
        loss="mse",
        optimizers=(given, None),
    )
    with pytest.raises(
        ConfigurationError, match=r"TrainingArguments\(gradient_accumulation_steps=3"
    ):
        run.fit()
