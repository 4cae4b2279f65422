"""Orders by length: definitions written out, positions, and where lengths come from."""

import itertools

import h5py
import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, same, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain import Trainer
from kbtrain.data import DataLoader, as_source, epoch_order
from kbtrain.data.sampling.by_length import group_by_length, rebalance
from kbtrain.errors import ConfigurationError, DataError


def slow_grouping(order, lengths, batch_size):
    """Sorted mega-batches, in Python lists."""
    mega = max(min(len(order) // (batch_size * 4), 50), 1) * batch_size
    parts = [list(order[i : i + mega]) for i in range(0, len(order), mega)]
    parts = [sorted(part, key=lambda i: -lengths[i]) for part in parts]
    tops = [lengths[part[0]] for part in parts]
    best = tops.index(max(tops))
    parts[0][0], parts[best][0] = parts[best][0], parts[0][0]
    return [int(i) for part in parts for i in part]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 5))
def test_grouping_is_what_its_definition_says(count, batch_size, seed):
    lengths = np.random.default_rng(seed).integers(0, 20, count)
    order = epoch_order(count, seed, 1)
    found = group_by_length(order.copy(), lengths, batch_size)
    assert found.tolist() == slow_grouping(order.tolist(), lengths.tolist(), batch_size)


def cost(lengths, group):
    longest = max(lengths[i] for i in group)
    return len(group) * longest + 0.001 * len(group) * longest**2


def best_cost(lengths, groups):
    """The lowest highest cost over all ways to cut the sorted samples."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = itertools.combinations(range(1, len(order)), groups - 1)
    return min(
        max(cost(lengths, order[a:b]) for a, b in itertools.pairwise((0, *cut, len(order))))
        for cut in cuts
    )


def test_rebalancing_of_the_reference():
    """Measured with two devices and two accumulation steps: four groups, costliest first."""
    groups = [group.tolist() for group in rebalance(np.arange(1, 13), 4)]
    assert groups == [[4, 3, 2, 1, 0], [11, 10], [7, 6, 5], [9, 8]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=10), st.integers(1, 5))
def test_no_other_cut_has_a_lower_highest_cost(lengths, groups):
    groups = min(groups, len(lengths))
    found = rebalance(np.array(lengths), groups)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    costs = [cost(lengths, group) for group in found]
    assert len(costs) == groups
    assert costs == sorted(costs, reverse=True)
    assert max(costs) == pytest.approx(best_cost(lengths, groups))


# --------------------------------------------------------------------------------------- in loaders

LENGTHS = np.random.default_rng(0).integers(1, 30, 53)
IDS = [list(range(n)) for n in LENGTHS]


def make(strategy, **kwargs):
    data = [{"input_ids": ids, "i": i} for i, ids in enumerate(IDS)]
    return DataLoader(
        data,
        kwargs.pop("batch_size", 4),
        strategy=strategy,
        collate=lambda samples: {"i": [s["i"] for s in samples]},
        **kwargs,
    )


def read(loader, epoch=0, start=0):
    return [batch["i"].tolist() for batch in loader.epoch(epoch, start)]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_once_and_any_position(strategy, accumulation, drop_last):
    loader = make(strategy, accumulation=accumulation, seed=2, drop_last=drop_last)
    for epoch in (0, 4):
        whole = read(loader, epoch)
        assert len(whole) == len(loader) == (13 if drop_last else 14)
        assert len(set(itertools.chain(*whole))) == (52 if drop_last else 53)
        for start in range(len(whole) + 1):
            assert read(loader, epoch, start) == whole[start:]
    assert read(loader, 0) != read(loader, 4)


def test_grouped_batches_have_less_padding():
    lengths = np.random.default_rng(0).integers(1, 30, 2000)

    def wasted(strategy):
        order = epoch_order(2000, 0, 0, strategy, lengths, 4)
        longest = lengths[order].reshape(-1, 4).max(axis=1)
        return 4 * longest.sum() - lengths.sum()

    assert wasted("group_by_length") < 0.1 * wasted("random")
    assert LENGTHS[read(make("group_by_length"))[0][0]] == LENGTHS.max()


def test_rebalanced_updates_have_the_samples_of_the_random_order():
    loader = make("batch_rebalance", accumulation=3, seed=5)
    order = epoch_order(53, 5, 1)
    batches = read(loader, 1)
    for update in range(5):
        together = sorted(itertools.chain(*batches[3 * update : 3 * update + 3]))
        assert together == sorted(order[12 * update : 12 * update + 12].tolist())
    assert len({len(batch) for batch in batches}) > 1


# ------------------------------------------------------------------------------------- their source


class Table:
    """Columns by name, as a table of the `datasets` library."""

    column_names = ("input_ids", "size")

    def __len__(self):
        return 53

    def __getitem__(self, key):
        if key == "size":
            return LENGTHS.tolist()
        raise AssertionError("a column was asked for")


class WithLengths(Table):
    lengths = LENGTHS
    column_names = None


MASK = np.arange(30) < LENGTHS[:, None]


@pytest.mark.parametrize(
    "data",
    [
        [{"input_ids": ids} for ids in IDS],
        [(ids, 0) for ids in IDS],
        IDS,
        [np.zeros((n, 2)) for n in LENGTHS],
        [{"text": 0, "size": n} for n in LENGTHS],
        Table(),
        WithLengths(),
        {"x": np.zeros((53, 2)), "size": LENGTHS},
        {"x": np.zeros((53, 2)), "attention_mask": MASK.astype("int32")},
    ],
    ids=["ids", "tuples", "lists", "arrays", "column", "table", "attribute", "dict", "mask"],
)
def test_where_lengths_come_from(data):
    np.testing.assert_array_equal(as_source(data).lengths("size"), LENGTHS)


def test_lengths_are_read_from_hdf5_masks(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        data = {"x": file.create_dataset("x", data=MASK), "attention_mask": file["x"]}
        np.testing.assert_array_equal(as_source(data).lengths("size"), LENGTHS)


@pytest.mark.parametrize(
    "data", [np.zeros((5, 3)), (np.zeros((5, 3)), np.zeros(5)), [{"x": [1]}], [1, 2], lambda: 0]
)
def test_data_without_lengths_says_what_to_do(data):
    with pytest.raises(ConfigurationError, match="needs the length.*length_column_name"):
        DataLoader(data, 2, strategy="group_by_length")


@pytest.mark.parametrize("lengths", [[1, 2], np.zeros((3, 1)), [1, -2, 3], ["a", "b", "c"]])
def test_lengths_are_checked(lengths):
    class Data(list):
        pass

    data = Data([0, 1, 2])
    data.lengths = lengths
    with pytest.raises(DataError, match="one length for each|The lengths of train_dataset"):
        as_source(data).lengths("length")


# -------------------------------------------------------------------------------------- in training


class Weighted:
    """Samples whose length plays no part in the model."""

    def __init__(self):
        self.x, self.y = make_data(11)
        self.lengths = np.arange(11) * 7 % 10

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return self.x[index], self.y[index]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_a_run_is_resumed_exactly(tmp_path, strategy):
    def make(folder, *callbacks):
        args = arguments(
            tmp_path / folder,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            train_sampling_strategy=strategy,
            num_train_epochs=1,
            save_strategy="steps",
            save_steps=1,
        )
        return Trainer(
            linear_model(), args, train_dataset=Weighted(), loss="mse", callbacks=list(callbacks)
        )

    whole, stopped, resumed = make("whole"), make("part", StopAt(1)), make("part")
    whole.fit()
    stopped.fit()
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_predictions_come_in_the_order_of_the_data(tmp_path, strategy):
    model, data = linear_model(), Weighted()
    args = arguments(tmp_path, train_sampling_strategy=strategy, per_device_eval_batch_size=4)
    predictions = Trainer(model, args, loss="mse").predict(data).predictions
    kernel, bias = weights(model)
    np.testing.assert_allclose(predictions, data.x @ kernel + bias, rtol=1e-5, atol=1e-6)
