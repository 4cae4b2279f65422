"""Learning rates that answer to a metric, against their definitions and the golden traces."""

import json
import math

import keras
import numpy as np
import pytest

import optim

METRICS = [3.0, 2.0, 2.0, 2.1, 1.0, 1.0, float("nan"), 1.0, 1.0, 0.9999, 0.5, 0.4, 0.4, 0.4, 0.4]


def rates(schedule, metrics):
    """The rate after each metric."""
    seen = []
    for metric in metrics:
        schedule.on_metric(metric)
        seen.append(schedule.rate)
    return seen


def test_rates_are_those_of_the_golden_traces(golden):
    data = golden("schedules")
    made = {
        "greedy factor=.9 patience=1": optim.GreedyLR(0.1, factor=0.9, patience=1),
        "reduce_lr_on_plateau factor=.5 patience=1": optim.ReduceLROnPlateau(
            0.1, factor=0.5, patience=1
        ),
    }
    assert made.keys() == data["metric_schedules"].keys()
    for name, schedule in made.items():
        result = rates(schedule, data["metrics"])
        np.testing.assert_allclose(result, data["metric_schedules"][name], rtol=1e-14)


class TestPlateau:
    """Expected rates follow from torch.optim.lr_scheduler.ReduceLROnPlateau, by hand."""

    def test_patience_and_cooldown(self):
        schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=1, cooldown=2)
        # Better; bad 1, bad 2 -> halve; two evaluations of cooldown; bad 1, bad 2 -> halve.
        assert rates(schedule, [1.0] * 7) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]

    def test_threshold(self):
        # 0.95 is not better than 1 by a tenth; 0.85 is.
        relative = {"threshold": 0.1, "threshold_mode": "rel", "factor": 0.5, "patience": 0}
        assert rates(optim.ReduceLROnPlateau(1.0, **relative), [1.0, 0.95, 0.85]) == [1, 0.5, 0.5]
        # 10 -> 9.5 is not better by one unit, 8.5 is.
        absolute = {**relative, "threshold": 1.0, "threshold_mode": "abs"}
        assert rates(optim.ReduceLROnPlateau(1.0, **absolute), [10, 9.5, 8.5]) == [1, 0.5, 0.5]
        largest = {**relative, "mode": "max"}
        assert rates(optim.ReduceLROnPlateau(1.0, **largest), [1.0, 1.05, 1.2]) == [1, 0.5, 0.5]
        largest = {**absolute, "mode": "max"}
        assert rates(optim.ReduceLROnPlateau(1.0, **largest), [1.0, 1.5, 2.5]) == [1, 0.5, 0.5]

    def test_lowest_rate_and_smallest_change(self):
        schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=0, min_lr=0.3)
        assert rates(schedule, [1.0] * 4) == [1.0, 0.5, 0.3, 0.3]
        schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=0, eps=0.3)
        assert rates(schedule, [1.0] * 4) == [1.0, 0.5, 0.5, 0.5]

    def test_a_nan_is_never_better(self):
        schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=0)
        assert rates(schedule, [math.nan, 1.0, math.nan, 0.5]) == [0.5, 0.5, 0.25, 0.25]


class TestGreedy:
    def test_up_and_down(self):
        schedule = optim.GreedyLR(0.25, factor=0.5, patience=0, max_lr=1.0, min_lr=0.125)
        metrics = [4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        assert rates(schedule, metrics) == [0.5, 1.0, 1.0, 0.5, 0.25, 0.125, 0.125]

    def test_nothing_is_counted_after_a_change(self):
        up = optim.GreedyLR(0.25, factor=0.5, patience=0, warmup=2)
        assert rates(up, [5, 4, 3, 2, 1]) == [0.5, 0.5, 0.5, 1.0, 1.0]
        down = optim.GreedyLR(0.5, mode="max", factor=0.5, patience=0, cooldown=1, max_lr=0.5)
        assert rates(down, [5, 4, 4, 4, 4]) == [0.5, 0.25, 0.25, 0.125, 0.125]

    def test_the_mean_of_a_window_is_judged(self):
        schedule = optim.GreedyLR(0.5, factor=0.5, patience=0, smooth=True, window_size=2)
        # Means: 4, 5 (worse), 5 (worse), 3 (better).
        assert rates(schedule, [4, 6, 4, 2]) == [1.0, 0.5, 0.25, 0.5]

    def test_it_begins_anew_when_it_was_long_at_the_lowest(self):
        schedule = optim.GreedyLR(1.0, factor=0.5, patience=0, min_lr=0.5, reset_start=2)
        # Better (already at the largest), at the lowest once, twice -> anew: 0 is forgotten.
        assert rates(schedule, [0.0, 1.0, 1.0, 5.0, 5.0]) == [1.0, 0.5, 1.0, 1.0, 0.5]

    def test_the_defaults_of_the_reference_never_reduce_a_small_rate(self):
        schedule = optim.GreedyLR(5e-5, patience=0)
        assert rates(schedule, [1.0, 1.0])[1] == 5e-5 / 0.95


KINDS = [
    lambda: optim.ReduceLROnPlateau(0.1, factor=0.5, patience=1, cooldown=1),
    lambda: optim.GreedyLR(0.1, factor=0.7, patience=0, smooth=True, window_size=3, warmup=1),
]


@pytest.mark.parametrize("make", KINDS)
def test_state_goes_on_exactly_from_anywhere(make):
    whole = rates(make(), METRICS)
    for cut in range(len(METRICS) + 1):
        first = make()
        rates(first, METRICS[:cut])
        # Strict JSON: infinities and NaN are text.
        state = json.loads(json.dumps(first.state(), allow_nan=False))
        second = make()
        second.load_state(state)
        assert second.rate == first.rate
        assert rates(second, METRICS[cut:]) == whole[cut:]
        # The same through a serialized object.
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(first)))
        third = keras.saving.deserialize_keras_object(config)
        assert type(third) is type(first)
        assert rates(third, METRICS[cut:]) == whole[cut:]


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="not the state of a GreedyLR"):
        optim.GreedyLR(0.1).load_state(optim.ReduceLROnPlateau(0.1).state())


@pytest.mark.parametrize("make", KINDS)
def test_config_without_a_state_has_none(make):
    assert "state" not in make().get_config()
    assert type(make())(**make().get_config()).get_config() == make().get_config()


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": -1.0},
        {"mode": "less"},
        {"factor": 1.0},
        {"factor": 0.0},
        {"patience": -1},
        {"threshold": -0.1},
        {"threshold_mode": "relative"},
        {"cooldown": 0.5},
        {"min_lr": -1.0},
        {"eps": "small"},
    ],
)
@pytest.mark.parametrize("factory", [optim.ReduceLROnPlateau, optim.GreedyLR])
def test_arguments_are_checked(factory, arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        factory(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        *({"warmup": -1}, {"max_lr": -1.0}, {"window_size": 0}, {"reset_start": 0}),
        *({"max_lr": 1e-9}, {"smooth": "False"}),
    ],
)
def test_arguments_of_greedy_are_checked(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be "):
        optim.GreedyLR(0.1, **arguments)


class Counted(keras.layers.Layer):
    """The input, and how often Python has seen it."""

    calls = 0

    def call(self, x):
        type(self).calls += 1
        return x


def counted_model(optimizer, jit_compile):
    layers = [keras.Input((1,)), Counted(), keras.layers.Dense(1, use_bias=False, name="dot")]
    model = keras.Sequential(layers)
    model.set_weights([np.zeros((1, 1))])
    model.compile(
        optimizer=optimizer,
        loss=lambda y_true, y_pred: keras.ops.mean(y_pred),
        jit_compile=jit_compile,
    )
    return model


class PretendMetric(keras.callbacks.Callback):
    """Puts given numbers into the logs of the epochs, before the schedule's callback reads them."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["pretended"] = self.values[epoch]


def fit(model, metrics, callback, epochs=None):
    x = np.ones((1, 1), "float32")
    return model.fit(
        x,
        x,
        epochs=epochs or len(metrics),
        batch_size=1,
        verbose=0,
        callbacks=[PretendMetric(metrics), callback],
    )


def position(model, tools):
    return float(tools.to_numpy(model.trainable_variables[0]).ravel()[0])


@pytest.mark.parametrize("own", [True, False], ids=["optim", "keras"])
def test_in_a_compiled_model(own, tools, jit_compile):
    schedule = optim.ReduceLROnPlateau(0.5, factor=0.5, patience=0)
    if own:
        optimizer = optim.AdamW(schedule, weight_decay=0.0, epsilon=0.0)
        callback = optim.FeedMetricSchedule("pretended")
    else:
        optimizer = keras.optimizers.SGD(0.5)
        callback = optim.FeedMetricSchedule("pretended", schedule)
    model = counted_model(optimizer, jit_compile)
    fit(model, [1.0], callback)
    traced = Counted.calls
    fit(model, [1.0, 1.0, 1.0], callback)
    # The gradient is 1: each update moves by the learning rate, which is halved after each epoch
    # but the first.
    np.testing.assert_allclose(position(model, tools), -(0.5 + 0.5 + 0.25 + 0.125), rtol=1e-6)
    assert schedule.rate == 0.0625
    np.testing.assert_allclose(float(tools.to_numpy(model.optimizer.learning_rate)), 0.0625)
    if jit_compile:
        assert Counted.calls == traced


def test_keras_file_goes_on_where_it_was(tools, tmp_path):
    def model():
        optimizer = optim.AdamW(optim.ReduceLROnPlateau(0.5, factor=0.5, patience=1), epsilon=0.0)
        model = tools.linear_model(optimizer, [0.0])
        model.compile(optimizer=optimizer, loss="mean_absolute_error")  # a loss that can be saved
        return model

    metrics = [1.0] * 6
    whole, first = model(), model()
    fit(whole, metrics, optim.FeedMetricSchedule("pretended"))
    fit(first, metrics[:2], optim.FeedMetricSchedule("pretended"))
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    assert second.optimizer.metric_schedule.state() == first.optimizer.metric_schedule.state()
    fit(second, metrics[2:], optim.FeedMetricSchedule("pretended"))
    assert position(second, tools) == position(whole, tools)
    assert second.optimizer.metric_schedule.rate == whole.optimizer.metric_schedule.rate == 0.125


def test_a_rate_that_somebody_else_has_assigned_is_the_new_start():
    schedule = optim.ReduceLROnPlateau(0.5, factor=0.5, patience=0)
    optimizer = optim.AdamW(schedule)
    optimizer.learning_rate = 0.25
    assert rates(schedule, [1.0, 1.0]) == [0.25, 0.125]
    assert float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == 0.125


class TestFeedMetricSchedule:
    def test_no_schedule_anywhere(self, tools):
        model = tools.linear_model(optim.AdamW(0.1), [0.0])
        with pytest.raises(ValueError, match="not made with a metric-driven learning rate"):
            fit(model, [1.0], optim.FeedMetricSchedule("pretended"))

    def test_two_schedules(self, tools):
        model = tools.linear_model(optim.AdamW(optim.GreedyLR(0.1)), [0.0])
        with pytest.raises(ValueError, match="Give only one of them"):
            fit(model, [1.0], optim.FeedMetricSchedule("pretended", optim.GreedyLR(0.1)))

    def test_what_is_no_such_schedule(self):
        with pytest.raises(TypeError, match="must be metric-driven.* Received: schedule='greedy'"):
            optim.FeedMetricSchedule("pretended", "greedy")

    def test_a_rate_that_is_a_function_of_the_step(self, tools):
        model = tools.linear_model(optim.AdamW(optim.Constant(0.1)), [0.0])
        with pytest.raises(ValueError, match="with a number as its learning rate"):
            fit(model, [1.0], optim.FeedMetricSchedule("pretended", optim.GreedyLR(0.1)))

    def test_no_such_metric(self, tools):
        model = tools.linear_model(optim.AdamW(optim.GreedyLR(0.1)), [0.0])
        with pytest.raises(ValueError, match="no 'val_loss' among .*loss, pretended"):
            fit(model, [1.0], optim.FeedMetricSchedule())

    def test_inside_a_loss_scale_optimizer(self, tools):
        schedule = optim.ReduceLROnPlateau(0.5, factor=0.5, patience=0)
        optimizer = keras.optimizers.LossScaleOptimizer(optim.AdamW(schedule))
        fit(tools.linear_model(optimizer, [0.0]), [1, 1], optim.FeedMetricSchedule("pretended"))
        assert float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == 0.25
