"""Which keys of a dict are labels where a model has inputs of such names; batches of odd shapes."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data

from kbtrain import Trainer
from kbtrain.data import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    DataLoader,
    LabelKeys,
    count_samples,
    default_collate,
    to_batch,
    unpack,
)
from kbtrain.errors import ConfigurationError, DataError

X, Y = make_data(12, 3)
W = np.linspace(0.5, 2.0, 12, dtype=np.float32)


class SquaredError(keras.layers.Layer):
    """An endpoint layer: it gets the labels as an input and adds the loss itself."""

    def call(self, targets, outputs):
        self.add_loss(keras.ops.mean(keras.ops.square(targets - outputs)))
        return outputs


def endpoint_model(key):
    inputs = {"x": keras.Input((3,), name="x"), key: keras.Input((1,), name=key)}
    hidden = keras.layers.Dense(1, kernel_initializer="ones")(inputs["x"])
    return keras.Model(inputs, SquaredError()(inputs[key], hidden))


ENDPOINT_LOSS = float(np.mean((X.astype(float).sum(axis=1, keepdims=True) - Y) ** 2))


@pytest.mark.parametrize("key", ["label", "labels", "label_ids", "sample_weight"])
@pytest.mark.parametrize("kind", ["arrays", "samples", "batches"])
def test_inputs_of_a_functional_model_stay(tmp_path, key, kind):
    columns = {"x": X, key: Y}
    data = {
        "arrays": columns,
        "samples": [{"x": X[i], key: Y[i]} for i in range(12)],
        "batches": [columns],
    }[kind]
    if kind == "batches":
        data = iter(data)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=12)
    trainer = Trainer(endpoint_model(key), args, train_dataset=data)
    assert trainer.fit().training_loss == pytest.approx(ENDPOINT_LOSS, rel=1e-5)


def test_other_keys_are_labels_still(tmp_path):
    """An input 'label' and targets under 'labels': the two do not get in each other's way."""
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=12)
    data = [{"x": X[i], "label": Y[i], "labels": Y[i]} for i in range(12)]
    trainer = Trainer(endpoint_model("label"), args, train_dataset=data, loss="mse")
    assert trainer.fit().training_loss == pytest.approx(2 * ENDPOINT_LOSS, rel=1e-5)


def test_a_name_in_label_names_is_both(tmp_path):
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=12, label_names=["label"])
    data = {"x": X, "label": Y}
    trainer = Trainer(endpoint_model("label"), args, train_dataset=data, loss="mse")
    assert trainer.fit().training_loss == pytest.approx(2 * ENDPOINT_LOSS, rel=1e-5)


class Reads(keras.Model):
    """A subclass, of which nobody knows what it reads."""

    def __init__(self, key):
        super().__init__()
        self.key = key
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, inputs):
        outputs = self.dense(inputs["x"])
        self.add_loss(keras.ops.mean(keras.ops.square(inputs[self.key] - outputs)))
        return outputs


@pytest.mark.parametrize("key", ["label", "sample_weight"])
@pytest.mark.parametrize("built", [False, True])
def test_a_subclass_that_reads_a_label(tmp_path, key, built):
    model = Reads(key)
    if built:
        model({"x": X, key: Y})
    changes = {"max_steps": 1, "per_device_train_batch_size": 12}
    data = {"x": X, key: Y}
    trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=data)
    with pytest.raises(DataError, match=rf"reads '{key}' from its inputs.*label_names=\[\]"):
        trainer.fit()
    args = arguments(tmp_path, label_names=[], **changes)
    trainer = Trainer(Reads(key), args, train_dataset=data)
    assert trainer.fit().training_loss == pytest.approx(ENDPOINT_LOSS, rel=1e-5)


def test_unpack_with_label_keys():
    batch = {"x": X, "label": Y, "labels": Y[:, 0], "sample_weight": W}
    parts = unpack(batch, LabelKeys(inputs=frozenset({"label", "sample_weight"})))
    assert list(parts.x) == ["x", "label", "sample_weight"]
    assert parts.y is batch["labels"]
    assert parts.sample_weight is None
    assert list(unpack(batch, []).x) == list(batch)
    assert unpack(batch, []).y is None
    both = unpack(batch, LabelKeys(("label", "x"), frozenset({"label"})))
    assert list(both.x) == ["label", "labels"]
    assert list(both.y) == ["label", "x"]
    assert both.sample_weight is W


def test_the_default_collator_leaves_names_alone():
    samples = [{"x": X[0], "label": 1}]
    assert list(default_collate(samples)) == ["x", "labels"]
    assert list(default_collate(samples, ["label", "x"])) == ["x", "label"]
    assert list(default_collate(samples, LabelKeys(inputs=frozenset({"label"})))) == ["x", "label"]
    assert list(default_collate(samples, LabelKeys(inputs=frozenset({"labels"})))) == ["x", "label"]


# ------------------------------------------------------------------------ arrays of other lengths


class Graphs(keras.Model):
    """Sums the features of each graph's nodes, and of its edges."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, inputs):
        nodes, edges, node_graph, edge_graph, sizes = inputs
        count = sizes.shape[0]
        sums = keras.ops.segment_sum(nodes, node_graph, count)
        sums = sums + keras.ops.segment_sum(edges, edge_graph, count)
        return self.dense(sums)


def graphs(seed, count=4):
    """A batch of disjoint graphs, and the sums of each."""
    random = np.random.default_rng(seed)
    sizes = np.array([2, 3, 1, 4][:count], np.int32)
    node_graph = np.repeat(np.arange(count, dtype=np.int32), sizes)
    edge_graph = np.repeat(np.arange(count, dtype=np.int32), 2 * sizes)
    nodes = random.normal(size=(len(node_graph), 3)).astype(np.float32)
    edges = random.normal(size=(len(edge_graph), 3)).astype(np.float32)
    sums = np.zeros((count, 3))
    np.add.at(sums, node_graph, nodes)
    np.add.at(sums, edge_graph, edges)
    y = random.normal(size=(count, 1)).astype(np.float32)
    return ((nodes, edges, node_graph, edge_graph, sizes), y), sums


class GraphBatches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        batch, _ = graphs(index, count=4 - index)
        return batch


def test_batches_of_graphs(tmp_path):
    parts = [graphs(index, count=4 - index) for index in range(2)]
    errors = [np.sum((s.sum(axis=1, keepdims=True) - b[1]) ** 2) for b, s in parts]
    model = Graphs()
    args = arguments(tmp_path, max_steps=2, learning_rate=1e-12)
    data = GraphBatches()
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, loss="mse")
    result = trainer.fit()
    assert result.training_loss == pytest.approx((errors[0] / 4 + errors[1] / 3) / 2, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(errors) / 7, rel=1e-5)
    output = trainer.predict(data)
    expected = np.concatenate([s.sum(axis=1, keepdims=True) for _, s in parts])
    np.testing.assert_allclose(output.predictions, expected, rtol=1e-4, atol=1e-5)
    assert len(output.label_ids) == 7
    assert trainer.evaluation_loop(data).num_samples == 7


def test_samples_are_counted_by_labels():
    long, short = np.zeros((7, 2)), np.zeros(3)
    assert count_samples(((long, short), np.zeros(2))) == 2
    assert count_samples(((long, short), None, np.zeros(4))) == 4
    assert count_samples((long, short)[::1] if False else ((long, short),)) == 7
    assert count_samples({"a": long, "b": short, "labels": np.zeros(5)}) == 5
    assert count_samples({"a": long, "b": short, "out": np.zeros(6)}, ["out"]) == 6
    with pytest.raises(DataError, match="labels and weights"):
        to_batch(((long, short), np.zeros(2), np.zeros(3)))
    with pytest.raises(DataError, match=r"same length.*x: \(7, 2\), y: \(3,\)"):
        to_batch((long, short))


# ---------------------------------------------------------------------------- batches of three


def two_inputs():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.subtract(inputs)))


class Pair(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        first, second = inputs
        return self.dense(first - second)


@pytest.mark.parametrize("make", [two_inputs, Pair])
@pytest.mark.parametrize("kind", ["arrays", "samples", "batches"])
def test_two_inputs_and_labels_that_are_not_nested(tmp_path, make, kind):
    three = (X, X[::-1].copy(), Y)
    data = {
        "arrays": three,
        "samples": list(zip(*three, strict=True)),
        "batches": iter([three]),
    }[kind]
    trainer = Trainer(make(), arguments(tmp_path, max_steps=1), train_dataset=data, loss="mse")
    with pytest.raises((DataError, ConfigurationError), match=r"\(\(x1, x2\), y\)"):
        trainer.fit()


def test_a_third_part_that_is_no_weight(tmp_path):
    """Triplets (anchor, positive, negative) for a model with one input."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    data = (X, X + 1, X - 1)
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=data, loss="mse")
    with pytest.raises(ConfigurationError, match=r"of shape \(8, 3\).*\(\(x1, x2\), y\)"):
        trainer.fit()


# ------------------------------------------------------------------- collators that pad sequences

TOKENS = [
    {"input_ids": [1, 2], "label": 3, "labels": 0},
    {"input_ids": [4], "label": 5, "labels": 1},
]


@pytest.mark.parametrize(
    "collate",
    [
        DataCollatorWithPadding(pad_token_id=0),
        DataCollatorForLanguageModeling(pad_token_id=0, mlm=False),
        default_collate,
    ],
)
def test_a_collator_of_ours_leaves_an_input_of_the_model_alone(collate):
    samples = [{**s, "input_ids": [*s["input_ids"], 7][:2]} for s in TOKENS]
    keys = LabelKeys(inputs=frozenset({"input_ids", "label"}))
    loader = DataLoader(samples, 2, collate=collate, label_names=keys)
    (batch,) = loader.epoch(0)
    assert batch["label"].tolist() == [3, 5]
    without = [{k: v for k, v in sample.items() if k != "labels"} for sample in samples]
    (batch,) = DataLoader(without, 2, collate=collate, label_names=keys).epoch(0)
    assert batch["label"].tolist() == [3, 5]


def test_padding_and_a_model_with_an_input_called_label(tmp_path):
    """The batch, and with it the loss, is that of the arrays padded by hand."""
    inputs = {
        "input_ids": keras.Input((2,), name="input_ids"),
        "label": keras.Input((), name="label"),
    }
    outputs = keras.ops.sum(inputs["input_ids"], axis=1) + 10 * inputs["label"]
    model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones")(outputs[:, None]))
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)
    trainer = Trainer(
        model,
        args,
        train_dataset=TOKENS,
        data_collator=DataCollatorWithPadding(pad_token_id=0, return_attention_mask=False),
        loss="mse",
    )
    expected = ((1 + 2 + 30 - 0) ** 2 + (4 + 50 - 1) ** 2) / 2
    assert trainer.fit().training_loss == pytest.approx(expected, rel=1e-5)
