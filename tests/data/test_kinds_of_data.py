"""Every kind of data gives the same run, with weights and labels by name."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    fit,
    linear_model,
    make_data,
    train_logs,
    weights,
    with_weights,
)

from kbtrain import Trainer


def mean_square(model, x, y):
    """The model's mean squared error in inference, in NumPy."""
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    return float(np.mean((outputs.astype(np.float64) - y) ** 2))


class MapDataset:
    """What a torch ``Dataset`` or a ``datasets.Dataset`` looks like from outside."""

    def __init__(self, as_dict):
        self.x, self.y = make_data(16)
        self.as_dict = as_dict

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, y = self.x[index], self.y[index]
        return {"x": x, "label": y} if self.as_dict else (x, y)


def named_model():
    inputs = keras.Input((3,), name="x")
    return with_weights(keras.Model({"x": inputs}, keras.layers.Dense(1)(inputs)))


def sources():
    x, y = make_data(16)
    return {
        "arrays": (x, y),
        "lists": (x.tolist(), y.tolist()),
        "samples": list(zip(x, y, strict=True)),
        "map": MapDataset(False),
        "generator function": lambda: zip(x, y, strict=True),
        "generator": iter(list(zip(x, y, strict=True)) * 2),
        "dict of arrays": {"x": x, "labels": y},
        "map of dicts": MapDataset(True),
        "dicts": [{"x": a, "label_ids": b} for a, b in zip(x, y, strict=True)],
    }


@pytest.mark.parametrize("kind", sources())
def test_every_kind_of_data_gives_the_same_run(tmp_path, kind):
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4)
    reference = fit(linear_model(), args, make_data(16))
    model = named_model() if "dict" in kind else linear_model()
    trainer = fit(model, args, sources()[kind])
    np.testing.assert_allclose(train_logs(trainer), train_logs(reference), rtol=1e-6)
    assert trainer.state.global_step == 8


def test_a_generator_that_ends_ends_the_run(tmp_path, caplog):
    x, y = make_data(8)
    trainer = fit(
        linear_model(),
        arguments(tmp_path, max_steps=8, per_device_train_batch_size=4),
        iter(list(zip(x, y, strict=True))),
    )
    assert trainer.state.global_step == 2
    assert "No data" in caplog.text


def test_sample_weights(tmp_path):
    x, y = make_data(8)
    w = np.linspace(0, 2, 8).astype(np.float32)
    model = linear_model()
    kernel, bias = weights(model)
    square = ((x @ kernel + bias - y) ** 2)[:, 0]
    for data in ((x, y, w), {"x": x, "labels": y, "sample_weight": w}):
        model = named_model() if isinstance(data, dict) else linear_model()
        trainer = fit(
            model,
            arguments(tmp_path, max_steps=1, learning_rate=0.0),
            data,
            metrics=[keras.metrics.MeanSquaredError(name="plain")],
            weighted_metrics=[keras.metrics.MeanSquaredError(name="m")],
        )
        assert train_logs(trainer, "plain") == [pytest.approx(square.mean(), rel=1e-6)]
        assert train_logs(trainer) == [pytest.approx((square * w).sum() / 8, rel=1e-6)]
        assert train_logs(trainer, "m") == [pytest.approx((square * w).sum() / w.sum(), rel=1e-6)]


def test_integer_inputs_of_every_width(tmp_path):
    for dtype in (np.int32, np.int64, np.uint8):
        x = np.arange(8).reshape(8, 1).astype(dtype)
        inputs = keras.Input((1,), dtype="int32")
        hidden = keras.layers.Flatten()(keras.layers.Embedding(8, 2)(inputs))
        model = with_weights(keras.Model(inputs, keras.layers.Dense(1)(hidden)))
        trainer = fit(
            model,
            arguments(tmp_path, max_steps=1, learning_rate=0.0),
            (x, np.zeros((8, 1), np.float32)),
        )
        assert train_logs(trainer) == [
            pytest.approx(mean_square(model, x.astype(np.int32), 0.0), rel=1e-5)
        ]


def test_labels_by_name_for_a_model_that_returns_a_list(tmp_path):
    """As in ``Model.compile``: losses and labels are keyed by the names of the output layers."""

    def make(structure):
        inputs = keras.Input((3,))
        outputs = [keras.layers.Dense(1, name=name)(inputs) for name in ("height", "weight")]
        if structure is dict:
            outputs = dict(zip(("height", "weight"), outputs, strict=True))
        return with_weights(keras.Model(inputs, outputs))

    x, y = make_data(16, outputs=2)
    labels = {"weight": y[:, 1:], "height": y[:, :1]}
    losses = {"height": "mse", "weight": "mae"}
    results = []
    for structure in (list, dict):
        trainer = Trainer(
            make(structure),
            arguments(tmp_path),
            train_dataset=(x, labels),
            loss=losses,
            metrics={"weight": ["mae"]},
        )
        trainer.fit()
        names = ("loss", "weight_loss", "weight_mae")
        results.append([train_logs(trainer, name) for name in names])
    assert results[0] == results[1]
    assert len(results[0][2]) == len(results[0][0]) > 0


@pytest.mark.parametrize("kind", ["sequential", "functional"])
@pytest.mark.parametrize("remove", [True, False])
def test_a_dict_with_the_only_input_and_more(kind, remove, tmp_path, caplog):
    """As tokenizers give it: Keras takes it too, but with a warning at each trace."""
    x, y = make_data(8)
    tokens = keras.Input((3,), name="tokens")
    dense = keras.layers.Dense(1)
    sequential = keras.Sequential([tokens, dense])
    model = sequential if kind == "sequential" else keras.Model(tokens, dense(tokens))
    data = [{"tokens": a, "mask": a, "labels": b} for a, b in zip(x, y, strict=True)]
    settings = arguments(tmp_path, num_train_epochs=1, remove_unused_columns=remove)
    trainer = Trainer(model, settings, train_dataset=data, loss="mse")
    trainer.fit()
    assert ("does not use (it uses tokens): mask" in caplog.text) == remove
    kernel, bias = model.get_weights()
    expected = np.mean((x @ kernel + bias - y) ** 2)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    outputs = trainer.predict([{"tokens": a, "mask": a} for a in x]).predictions
    np.testing.assert_allclose(outputs, x @ kernel + bias, rtol=1e-5)
