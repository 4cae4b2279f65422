"""Data sets of other libraries: what they yield, how they resume, and columns nobody takes."""

import logging
import random
import re

import grain
import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, same, weights, with_weights

from kbtrain import DataCollatorWithPadding, Trainer
from kbtrain.data import (
    BatchLoader,
    ColumnFilter,
    DataLoader,
    StreamLoader,
    as_loader,
    as_source,
)
from kbtrain.data.sources.interop import resume_caveat, yields_batches
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.training.dataloaders import make_loader

X, Y = make_data(20)


class Shuffled(keras.utils.PyDataset):
    """Batches by index, in an order that changes at the end of an epoch."""

    def __init__(self, batches=5):
        super().__init__()
        self.generator, self.order, self.batches = np.random.default_rng(0), np.arange(20), batches

    def __len__(self):
        return self.batches

    def __getitem__(self, number):
        rows = self.order[4 * number : 4 * number + 4]
        return X[rows], Y[rows]

    def on_epoch_end(self):
        self.order = self.generator.permutation(20)


class Plain(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, number):
        return X[4 * number : 4 * number + 4], Y[4 * number : 4 * number + 4]


class TorchLoader:
    """What is asked of torch's DataLoader."""

    batch_size, dataset = 4, X

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        return iter([(X[i : i + 4], Y[i : i + 4]) for i in range(0, 20, 4)])

    def __len__(self):
        return 5


class RandomSampler:
    pass


class SequentialSampler:
    pass


class _InfiniteConstantSampler:
    """What torch gives the loader of a stream."""


class DatasetV2:
    """What is asked of tf.data."""

    __module__ = "tensorflow.python.data.ops.dataset_ops"
    parents = ()

    def _inputs(self):
        return self.parents


class _ShuffleDataset(DatasetV2):
    pass


class _BatchDataset(DatasetV2):
    parents = (_ShuffleDataset(),)


def records():
    return [(X[i], Y[i]) for i in range(20)]


SAMPLES = grain.MapDataset.source(records()).shuffle(seed=1)
BATCHES = SAMPLES.batch(4)
GRAIN_LOADER = {
    "data_source": records(),
    "sampler": grain.samplers.IndexSampler(20, num_epochs=1, seed=0, shuffle=True),
}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (X, False),
        ([X], False),
        (iter([X]), False),
        (Plain(), True),
        (TorchLoader(None), True),
        (DataLoader(X, 2), True),
        (DatasetV2(), True),
        (SAMPLES, False),
        (SAMPLES.to_iter_dataset(), False),
        (BATCHES, True),
        (BATCHES.map(lambda batch: batch), True),
        (BATCHES.to_iter_dataset(), True),
        (SAMPLES.to_iter_dataset().batch(4), True),
        (grain.DataLoader(**GRAIN_LOADER), False),
        (grain.DataLoader(**GRAIN_LOADER, operations=[grain.transforms.Batch(4)]), True),
    ],
)
def test_who_yields_batches(data, expected):
    assert yields_batches(data) is expected


def read(loader, epoch=0, start=0):
    return [[part.tolist() for part in batch] for batch in loader.epoch(epoch, start)]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (SAMPLES, DataLoader),
        (SAMPLES.to_iter_dataset(), StreamLoader),
        (BATCHES, BatchLoader),
        (BATCHES.to_iter_dataset(), BatchLoader),
        (grain.DataLoader(**GRAIN_LOADER), StreamLoader),
        (TorchLoader(SequentialSampler()), BatchLoader),
        (Plain(), BatchLoader),
    ],
)
def test_every_position_can_be_reached(tmp_path, data, kind):
    args = arguments(tmp_path, max_steps=5, per_device_train_batch_size=4)
    loader = make_loader(data, args, None, "train_dataset", train=True)
    assert isinstance(loader, kind)
    assert loader.resume_caveat is None
    whole = read(loader)
    assert len(whole) == 5
    assert np.shape(whole[0][0]) == (4, 3)
    assert sorted(np.ravel([x for x, _ in whole])) == sorted(X.ravel().tolist())
    assert read(loader, 0, 3) == whole[3:]


def test_a_grain_data_set_of_samples_gets_our_order(tmp_path):
    loader = make_loader(
        SAMPLES,
        arguments(tmp_path, train_sampling_strategy="random"),
        None,
        "train_dataset",
        train=True,
    )
    assert len(loader) == 3
    assert read(loader, 0) != read(loader, 1)


def test_a_py_dataset_changes_at_the_end_of_each_epoch():
    whole, late = as_loader(Shuffled()), as_loader(Shuffled())
    epochs = [read(whole, epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert read(late, 3, 2) == epochs[3][2:]


def train(folder, data, *callbacks, **changes):
    args = arguments(
        folder, **({"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 7} | changes)
    )
    return Trainer(linear_model(), args, train_dataset=data, loss="mse", callbacks=list(callbacks))


@pytest.mark.parametrize("make", [Shuffled, lambda: BATCHES.to_iter_dataset()])
def test_a_run_is_resumed_exactly(tmp_path, make):
    limit = {} if make is Shuffled else {"max_steps": 10}
    whole, stopped = (
        train(tmp_path / "a", make(), **limit),
        train(tmp_path / "b", make(), StopAt(7)),
    )
    stopped.args = stopped.args.replace(**limit)
    resumed = train(tmp_path / "b", make(), **limit)
    whole.fit()
    stopped.fit()
    resumed.fit(resume_from_checkpoint=True)
    assert whole.state.global_step == resumed.state.global_step == 10
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (TorchLoader(RandomSampler()), "RandomSampler draws a new order.*loader.dataset"),
        (_BatchDataset(), "it shuffles"),
        (Shuffled(), "on_epoch_end"),
        (iter([1]), "it is an iterator"),
        (TorchLoader(SequentialSampler()), None),
        (TorchLoader(_InfiniteConstantSampler()), None),
        (DatasetV2(), None),
        (Plain(), None),
        (BATCHES, None),
        (lambda: iter([1]), None),
        (records(), None),
    ],
)
def test_data_that_may_come_in_another_order(data, reason):
    found = resume_caveat(data)
    assert (found is None) == (reason is None)
    if reason:
        assert re.search(reason, found)


@pytest.mark.parametrize("saving", [True, False])
def test_a_run_that_cannot_be_resumed_exactly_says_so_at_its_start(tmp_path, caplog, saving):
    trainer = train(
        tmp_path,
        TorchLoader(RandomSampler()),
        max_steps=1,
        save_strategy="steps" if saving else "no",
    )
    trainer.fit()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == saving
    if saving:
        assert "train_dataset: a run resumed in the middle" in warnings[0]
        assert "RandomSampler" in warnings[0]


def test_a_collator_has_nothing_to_do_with_batches(tmp_path):
    with pytest.raises(ConfigurationError, match="train_dataset yields batches.*data_collator"):
        make_loader(Plain(), arguments(tmp_path), list, "train_dataset", train=True)


def test_a_loader_of_our_own_is_taken_as_it_is(tmp_path):
    own = DataLoader(X, 2)
    assert make_loader(own, arguments(tmp_path), None, "train_dataset", train=True) is own


def test_a_source_of_samples_cannot_be_made_of_batches():
    with pytest.raises(DataError, match="yields batches, but samples are expected"):
        as_source(TorchLoader(None))


def test_evaluation_and_prediction_take_batches_too(tmp_path):
    trainer = train(tmp_path, None)
    expected = trainer.evaluate((X, Y))["eval_loss"]
    assert trainer.evaluate(Plain())["eval_loss"] == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(
        trainer.predict(BATCHES.to_iter_dataset()).predictions.shape, (20, 1)
    )


# ----------------------------------------------------------------------------------- unused columns


def test_the_filter_drops_columns_the_model_does_not_take(caplog):
    keep = ColumnFilter({"a", "b"})
    batch = {"a": 1, "b": 2, "label": 3, "sample_weight": 4}
    assert keep(batch, "data") is batch
    assert keep(dict(batch, text="t"), "data") == batch
    assert keep(({"a": 1, "text": "t"}, 5), "data") == ({"a": 1}, 5)
    assert keep(({"a": 1}, 5), "data") == ({"a": 1}, 5)
    assert keep({"x": 1, "label": 2}, "data") == {"x": 1, "label": 2}
    assert keep([1, 2], "data") == [1, 2]
    assert len(caplog.records) == 1
    assert "data has columns that the model does not use (it uses a, b): text" in caplog.text


def two_inputs():
    inputs = {name: keras.Input((3,), name=name) for name in ("left", "right")}
    outputs = keras.layers.Dense(1)(keras.layers.Add()(list(inputs.values())))
    return with_weights(keras.Model(inputs, outputs))


ROWS = [
    {"left": x, "text": "no number", "right": x, "length": random.randrange(9), "label": y}
    for x, y in zip(X, Y, strict=True)
]
COLUMNS = {"left": X, "right": X, "length": np.arange(20), "labels": Y}


class ByFive(TorchLoader):
    def __iter__(self):
        return iter([{k: v[i : i + 5] for k, v in COLUMNS.items()} for i in range(0, 20, 5)])


@pytest.mark.parametrize("kind", ["rows", "columns", "batches"])
def test_unused_columns_are_left_out_with_one_warning(tmp_path, caplog, kind):
    data = {"rows": ROWS, "columns": COLUMNS, "batches": ByFive(SequentialSampler())}[kind]
    trainer = Trainer(two_inputs(), arguments(tmp_path, max_steps=2), None, data, data, loss="mse")
    trainer.fit()
    trainer.evaluate()
    trainer.predict(data)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "length" in warnings[0]


def test_a_collator_sees_every_column(tmp_path):
    seen = set()

    def collate(samples):
        seen.update(samples[0])
        return {key: np.array([sample[key] for sample in samples]) for key in samples[0]}

    Trainer(two_inputs(), arguments(tmp_path, max_steps=1), collate, ROWS, loss="mse").fit()
    assert seen == {"left", "right", "text", "length", "label"}


def test_our_collators_get_what_they_look_at_and_what_the_model_takes(tmp_path, caplog):
    """A text that was tokenized is still there in most tables."""
    inputs = keras.Input((None,), name="input_ids", dtype="int32")
    outputs = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(9, 2)(inputs))
    rows = [
        {"input_ids": list(range(1, 2 + n % 3)), "text": "a b", "none": None, "labels": [0.0, 1.0]}
        for n in range(8)
    ]
    collate = DataCollatorWithPadding(pad_token_id=0)
    args = arguments(tmp_path, max_steps=2)
    model = keras.Model({"input_ids": inputs}, outputs)
    Trainer(model, args, collate, rows, loss="mse").fit()
    assert "(it uses input_ids): text, none." in caplog.text
    assert "(it uses input_ids): attention_mask." in caplog.text


# A backend that takes strings hands the column to Keras, which warns before the model refuses it.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_columns_can_be_kept(tmp_path):
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False)
    with pytest.raises(DataError, match="text.*(is a string|Expected: .None, 3.)"):
        Trainer(two_inputs(), args, None, ROWS, loss="mse").fit()


def test_the_column_of_lengths_serves_the_order_alone(tmp_path):
    args = arguments(tmp_path, max_steps=2, train_sampling_strategy="group_by_length")
    Trainer(two_inputs(), args, None, COLUMNS, loss="mse").fit()


# ------------------------------------------------------------------------------ the real libraries


@pytest.mark.cross
def test_the_libraries_themselves(tmp_path, caplog):
    import datasets
    import tensorflow as tf
    import torch

    rows = tf.data.Dataset.from_tensor_slices((X, Y))
    loader = torch.utils.data.DataLoader(records(), batch_size=4, shuffle=True)
    table = datasets.Dataset.from_dict(
        {"left": X.tolist(), "right": X.tolist(), "text": ["a"] * 20, "label": Y.tolist()}
    )
    assert yields_batches(rows)
    assert yields_batches(loader)
    assert not yields_batches(table)
    assert "it shuffles" in str(resume_caveat(rows.shuffle(9).batch(4)))
    assert resume_caveat(rows.batch(4).prefetch(1)) is None
    assert "RandomSampler" in str(resume_caveat(loader))
    with pytest.raises(DataError, match=r"element\[1\]|dataset.batch") as caught:
        as_loader(tf.data.Dataset.range(5))
    assert "scalar" in str(caught.value)
    plain = train(tmp_path, None).evaluate((X, Y))["eval_loss"]
    for data in (rows.batch(3), loader):
        assert train(tmp_path, None).evaluate(data)["eval_loss"] == pytest.approx(plain, rel=1e-5)
        train(tmp_path, data, max_steps=3).fit()
    for data in (table, table.to_iterable_dataset()):
        trainer = Trainer(
            two_inputs(), arguments(tmp_path, max_steps=3), None, data, data, loss="mse"
        )
        trainer.fit()
        trainer.evaluate()
        assert caplog.text.count("columns that the model does not use") == 1
        caplog.clear()
    lengths = table.add_column("length", list(range(20)))
    np.testing.assert_array_equal(as_source(lengths).lengths("length"), np.arange(20))


# ------------------------------------------------------------- collators that take only so much


class StrictCollator:
    """Stacks every column, as a tokenizer's collator does; texts are beyond it."""

    def __init__(self, make=np.array):
        self.make = make
        self.seen = []

    def __call__(self, samples):
        self.seen.append(sorted(samples[0]))
        label = [sample.pop("label") for sample in samples]
        return {key: self.make([s[key] for s in samples]) for key in samples[0]} | {"labels": label}


def numbers_only(values):
    return np.array(values, np.int64)


def make_texts(count=8):
    return [
        {"text": "one two", "tokens": [[1], [2, 3]], "input_ids": [i, 2], "label": i % 2}
        for i in range(count)
    ]


class Embeds(keras.Model):
    def __init__(self):
        super().__init__()
        self.embed, self.dense = keras.layers.Embedding(10, 2), keras.layers.Dense(2)

    def call(self, x):
        return self.dense(keras.ops.mean(self.embed(x["input_ids"]), axis=1))


def functional():
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    return keras.Model({"input_ids": ids}, Embeds()({"input_ids": ids}))


@pytest.mark.parametrize("make", [numbers_only, np.array])
def test_a_collator_that_cannot_take_a_column_gets_those_of_the_model(tmp_path, caplog, make):
    collate = StrictCollator(make)
    data = make_texts()
    for sample in data:
        del sample["tokens"]
    trainer = Trainer(
        functional(),
        arguments(tmp_path, max_steps=3, per_device_train_batch_size=2),
        train_dataset=data,
        data_collator=lambda samples: collate([dict(s) for s in samples]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer.fit()
    assert caplog.text.count("that the model does not use") == 1
    if make is numbers_only:
        every, used = ["input_ids", "label", "text"], ["input_ids", "label"]
        assert collate.seen == [every, used, used, used]


def test_a_collator_of_a_model_that_is_not_known_gets_no_texts(tmp_path):
    for make in (numbers_only, np.array):
        data = [{k: s[k] for k in ("text", "input_ids", "label")} for s in make_texts()]
        trainer = Trainer(
            Embeds(),
            arguments(tmp_path, max_steps=2),
            train_dataset=data,
            data_collator=lambda samples, make=make: StrictCollator(make)([*map(dict, samples)]),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        assert trainer.fit().global_step == 2


def test_what_a_collator_raises_is_the_first_error(tmp_path):
    """The second attempt is no part of the message."""

    def fails(samples):
        raise KeyError(f"{len(samples[0])} columns")

    trainer = Trainer(
        functional(),
        arguments(tmp_path, max_steps=1),
        train_dataset=make_texts(),
        data_collator=fails,
        loss="mse",
    )
    with pytest.raises(DataError, match="KeyError: '4 columns'"):
        trainer.fit()


@pytest.mark.parametrize("drop", [False, True])
def test_drop_last_holds_in_evaluation_too(tmp_path, drop):
    x = np.arange(10, dtype=np.float32)[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    args = arguments(tmp_path, per_device_eval_batch_size=4, dataloader_drop_last=drop)
    trainer = Trainer(model, args, eval_dataset=(x, 0 * x), loss="mse")
    kept = 8 if drop else 10
    expected = np.mean(np.arange(kept) ** 2.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)
    assert len(trainer.predict(x).predictions) == kept
    if drop:
        with pytest.raises(DataError, match="dataloader_drop_last"):
            trainer.evaluate((x[:3], x[:3]))
