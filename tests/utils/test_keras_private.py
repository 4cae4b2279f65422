"""What rests on attributes of Keras' objects fails: a warning, and what the public way gives."""

import logging

import keras
import numpy as np
import pytest

from kbtrain.model import metrics
from kbtrain.optimization import evaluation_weights
from kbtrain.utils import fallback
from kbtrain.utils.fallback import ISSUES
from kbtrain.utils.packages import keras_private


def broken(*args, **kwargs):
    raise AttributeError("has another name now")


@pytest.fixture
def without(monkeypatch, caplog):
    """Break a private part; the warnings it leads to."""
    monkeypatch.setattr(fallback, "_reported", set())
    caplog.set_level(logging.WARNING, "kbtrain")

    def break_it(part):
        monkeypatch.setattr(part, "_fast", broken)
        monkeypatch.setattr(part, "is_broken", False)
        return lambda: [r.getMessage() for r in caplog.records if ISSUES in r.getMessage()]

    return break_it


def numbers(tensors):
    return [keras.ops.convert_to_numpy(tensor).tolist() for tensor in tensors]


def test_values_are_read_and_assigned(without):
    variables = [keras.Variable(np.full(3, i, "float32")) for i in range(2)]
    warnings = without(keras_private.read_values)
    assert numbers(keras_private.read_values(variables)) == [[0] * 3, [1] * 3]
    without(keras_private.write_values)
    keras_private.write_values(variables, [keras.ops.full((3,), 5.0), keras.ops.full((3,), 6.0)])
    assert numbers(variables) == [[5] * 3, [6] * 3]
    without(keras_private.has_value)
    assert keras_private.has_value(variables[0]) is True
    assert len(warnings()) == 3
    assert f"keras {keras.__version__}" in warnings()[0]


def test_values_under_another_name_are_not_put_where_nobody_reads_them():
    class Renamed:
        """A variable of a Keras to come."""

        def assign(self, value):
            self.new_name = value

    variable = Renamed()
    part = keras_private.write_values
    try:
        part([variable], [3.0])
    finally:
        part.is_broken = False
    assert vars(variable) == {"new_name": 3.0}


def test_averages_of_keras_optimizers(without):
    """Gradients of one, twice: 4, 3, 2; the average begins with the first of them."""
    weights = [keras.Variable(np.full(2, 4.0, "float32")), keras.Variable(np.float32(4.0))]
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    optimizer.build(weights)
    for _ in range(2):
        optimizer.apply([keras.ops.ones((2,)), keras.ops.ones(())], weights)
    warnings = without(evaluation_weights.averages_of)
    with evaluation_weights.swapped_in(optimizer, weights) as there:
        assert there
        assert numbers(weights) == [[2.5, 2.5], 2.5]
    assert numbers(weights) == [[2, 2], 2]
    evaluation_weights.finalize(optimizer, weights)
    assert numbers(weights) == [[2.5, 2.5], 2.5]
    assert len(warnings()) == 1


def test_metric_elements_are_added_without_the_private_part(without):
    """Keras' own mean: of each sample first, then over the samples."""
    warnings = without(metrics._add_elements)
    metric = keras.metrics.MeanSquaredError()
    y_true, y_pred = np.zeros((2, 3), "float32"), np.array([[1, 1, 1], [2, 2, 2]], "float32")
    weight = np.array([[1], [3]], "float32")
    metrics._add_elements(metric, *map(keras.ops.convert_to_tensor, (y_true, y_pred, weight)))
    assert float(metric.result()) == pytest.approx((1 * 1 + 3 * 4) / 4)
    assert len(warnings()) == 1
