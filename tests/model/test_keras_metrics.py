"""Every metric of Keras gives the number of `Model.compile`, both ways of giving it."""

import inspect

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data
from keras import ops

from kbtrain import Trainer
from kbtrain.model.metrics import CompiledMetrics, ListedMetrics

NEEDS = {
    "IoU": {"num_classes": 2, "target_class_ids": [0]},
    "MeanIoU": {"num_classes": 2},
    "OneHotIoU": {"num_classes": 4, "target_class_ids": [0]},
    "OneHotMeanIoU": {"num_classes": 4},
    "BinaryIoU": {"target_class_ids": [1]},
    "PrecisionAtRecall": {"recall": 0.5},
    "RecallAtPrecision": {"precision": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
    "TopKCategoricalAccuracy": {"k": 2},
    "SparseTopKCategoricalAccuracy": {"k": 2},
    "MeanMetricWrapper": {"fn": keras.losses.mean_squared_error},
}
CLASSES = sorted(
    n
    for n in dir(keras.metrics)
    if inspect.isclass(getattr(keras.metrics, n)) and n not in ("Metric", "Mean", "Sum")
)
NAMES = ["accuracy", "acc", "mse", "mae", "binary_crossentropy", "hinge", "poisson"]
SHAPES = [((6,), (6, 1)), ((6,), (6, 4)), ((6, 4), (6, 4)), ((6, 5), (6, 5, 1))]


class Echo(keras.Model):
    """Returns its input, so that the outputs are known."""

    def call(self, x):
        return x


def make(name):
    return name if name in NAMES else getattr(keras.metrics, name)(**NEEDS.get(name, {}))


def arrays(labels, outputs):
    generator = np.random.default_rng(len(labels))
    classes = 4 if labels == (6,) and outputs[-1] == 4 else 2
    y = generator.integers(0, classes, labels).astype("float32")
    values = generator.uniform(0.05, 0.95, outputs).astype("float32")
    weight = generator.uniform(0.1, 2.0, 6).astype("float32")
    return [ops.convert_to_tensor(a) for a in (y, values, weight)]


def given(name):
    return {"metrics": [make(name)], "weighted_metrics": [make(name)]}


def keras_results(name, tensors):
    model = Echo()
    model.compile(**given(name))
    try:
        found = model.compute_metrics(None, *tensors)
    except Exception:
        return None  # Keras does not take these shapes
    found.pop("loss", None)
    return [ops.convert_to_numpy(value) for value in found.values()]


def our_results(metrics, tensors):
    metrics.build(None, *tensors, [None])
    metrics.update(None, *tensors, [None])
    return list(metrics.result().values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*CLASSES, *NAMES])
def test_every_metric(name):
    compared = 0
    for shapes in SHAPES:
        tensors = arrays(*shapes)
        expected = keras_results(name, tensors)
        if expected is None:
            continue
        compiled = Echo()
        compiled.compile(**given(name))
        both = [ListedMetrics(Echo(), *given(name).values())]
        if not compared:
            both.append(CompiledMetrics(compiled))
        for metrics in both:
            found = our_results(metrics, tensors)
            assert len(found) == len(expected) == 2
            for value, right in zip(found, expected, strict=True):
                np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-7, err_msg=str(shapes))
        compared += 1
    assert compared


# --- through the Trainer --------------------------------------------------------------------------


class Keeps(keras.layers.Layer):
    """Keeps a metric of its own."""

    def __init__(self):
        super().__init__()
        self.seen = keras.metrics.Sum(name="seen")
        self.unused = keras.metrics.Mean(name="unused")

    def call(self, x):
        self.seen.update_state(ops.ones_like(x[:, 0]))
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_list_gives_the_same_numbers(tmp_path, compiled):
    x, _ = make_data(12)
    y = (x[:, :1] > 0).astype("float32")
    weight = np.linspace(0.0, 3.0, 12, dtype="float32")

    def given():
        return {
            "metrics": [keras.metrics.FalsePositives(name="fp"), "mae"],
            "weighted_metrics": [keras.metrics.FalsePositives(name="weighted_fp"), "mae"],
        }

    inputs = keras.Input((3,))
    plain = linear_model(activation="sigmoid")
    plain.compile(loss="mse", **given())
    expected = plain.evaluate(x, y, sample_weight=weight, batch_size=5, verbose=0, return_dict=True)
    model = keras.Model(inputs, plain.layers[-1](Keeps()(inputs)))
    if compiled:
        model.compile(loss="mse", **given())
    args = arguments(tmp_path, per_device_eval_batch_size=5)
    more = {} if compiled else {"loss": "mse", **given()}
    found = Trainer(model, args, eval_dataset=(x, y, weight), **more).evaluate()
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert found["eval_seen"] == 12.0
    assert "eval_unused" not in found


def test_metrics_of_tokens_do_not_depend_on_what_a_batch_is_padded_to(tmp_path):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, (4, 6)).astype("int32")
    y[0, 2:] = y[1, 2:] = -100
    x = generator.integers(1, 5, (4, 6)).astype("int32")
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Embedding(5, 3)(inputs))
    right = (ops.convert_to_numpy(model(x)).argmax(-1) == y)[y != -100]
    batches = [(x[:2, :2], y[:2, :2]), (x[2:], y[2:])]  # the same, padded to 2 and to 6
    trainer = Trainer(
        model,
        arguments(tmp_path),
        eval_dataset=batches,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    loop = trainer.evaluation_loop(batches, prediction_loss_only=True)
    assert loop.metrics["eval_accuracy"] == pytest.approx(right.mean(), rel=1e-7)
