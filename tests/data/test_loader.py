"""Loaders: lengths, seeking, orders, collators, and users' own loaders."""

import itertools
import logging
import re

import keras
import numpy as np
import pytest

from kbtrain.data import (
    BatchLoader,
    DataLoader,
    Loader,
    UnsizedDataError,
    as_loader,
    as_source,
    epoch_order,
)
from kbtrain.errors import ConfigurationError, DataError

pytestmark = pytest.mark.core

X = np.arange(66 * 2, dtype=np.float32).reshape(66, 2)
Y = np.arange(66)


def generate():
    yield from zip(X, Y, strict=True)


class Items:
    """A map-style data set that notes what is read."""

    def __init__(self, length=66):
        self.length, self.read = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        return X[index], index


SOURCES = {
    "arrays": lambda: (X, Y),
    "dict": lambda: {"x": X, "labels": Y},
    "map": Items,
    "list": lambda: list(zip(X, Y, strict=True)),
    "generator function": lambda: generate,
}


def labels(batch):
    return (batch["labels"] if isinstance(batch, dict) else batch[1]).tolist()


# ------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize(
    ("samples", "size", "drop_last", "batches"),
    [
        (66, 16, False, 5),
        (66, 16, True, 4),
        (74, 32, False, 3),
        (74, 32, True, 2),
        (64, 16, False, 4),
        (64, 16, True, 4),
        (3, 8, False, 1),
        (3, 8, True, 0),
    ],
)
@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_number_of_batches(samples, size, drop_last, batches, strategy):
    loader = DataLoader(as_source(np.arange(samples)), size, strategy=strategy, drop_last=drop_last)
    sizes = [len(batch) for batch in loader]
    assert len(loader) == len(sizes) == batches
    assert sum(sizes) == (min(samples, batches * size) if drop_last else samples)
    assert all(count == size for count in sizes[:-1])
    assert loader.num_examples == samples


def test_an_iterable_has_no_length_but_can_be_listed():
    loader = DataLoader(as_source(generate), 16)
    assert (loader.sized, loader.num_examples, loader.batch_size) == (False, None, 16)
    with pytest.raises(UnsizedDataError, match="has no length"):
        len(loader)
    assert [len(y) for _, y in list(loader)] == [16, 16, 16, 16, 2]
    dropping = DataLoader(as_source(generate), 16, drop_last=True)
    assert [len(y) for _, y in dropping] == [16, 16, 16, 16]


def test_the_unsized_error_is_one_of_the_users_errors_and_a_type_error():
    assert issubclass(UnsizedDataError, DataError)
    assert issubclass(UnsizedDataError, TypeError)


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("kind", SOURCES)
def test_sequential_order(kind):
    loader = DataLoader(as_source(SOURCES[kind]()), 16)
    assert list(itertools.chain(*map(labels, loader))) == list(range(66))


@pytest.mark.parametrize("kind", ["arrays", "dict", "map", "list"])
def test_random_order_is_that_of_the_sampler_whatever_the_source(kind):
    loader = DataLoader(as_source(SOURCES[kind]()), 16, strategy="random", seed=5)
    for epoch in (0, 3):
        seen = list(itertools.chain(*map(labels, loader.epoch(epoch))))
        assert seen == epoch_order(66, 5, epoch).tolist()


def test_inputs_and_targets_stay_together():
    for x, y in DataLoader(as_source((X, Y)), 16, strategy="random"):
        np.testing.assert_array_equal(x, X[y])


def test_epochs_are_independent_of_what_was_read_before():
    loader = DataLoader(as_source((X, Y)), 16, strategy="random")
    expected = [labels(batch) for batch in loader.epoch(1)]
    first, second = loader.epoch(0), loader.epoch(1)
    interleaved = []
    for _ in range(5):
        next(first)
        interleaved.append(labels(next(second)))
    assert interleaved == expected


def test_an_iterable_keeps_its_order():
    loader = DataLoader(as_source(generate), 16, strategy="random")
    assert list(itertools.chain(*map(labels, loader.epoch(4)))) == list(range(66))


# --------------------------------------------------------------------------------------------- seek


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("strategy", ["sequential", "random"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_seeking_equals_skipping(kind, strategy, drop_last):
    data = SOURCES[kind]()
    loader = DataLoader(as_source(data), 16, strategy=strategy, seed=1, drop_last=drop_last)
    whole = [labels(batch) for batch in loader.epoch(2)]
    for start in range(len(whole) + 2):
        assert [labels(batch) for batch in loader.epoch(2, start)] == whole[start:]


def test_seeking_reads_nothing_before_the_position():
    data = Items()
    loader = DataLoader(as_source(data), 16)
    next(loader.epoch(0, start_batch=3))
    assert data.read == list(range(48, 64))


def test_seeking_in_an_iterable_is_said_once(caplog):
    loader = DataLoader(as_source(generate, name="train_dataset"), 16)
    with caplog.at_level(logging.INFO, logger="kbtrain"):
        for _ in range(2):
            list(loader.epoch(0, 2))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "train_dataset" in messages[0]
    assert "32 samples" in messages[0]


def test_a_used_up_iterator_gives_an_empty_epoch():
    loader = DataLoader(as_source(generate()), 16)
    assert len(list(loader.epoch(0))) == 5
    assert list(loader.epoch(1)) == []


def test_set_epoch_reaches_the_data():
    class Dataset(Items):
        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Dataset()
    list(DataLoader(as_source(data), 16).epoch(7))
    assert data.epoch == 7


# ---------------------------------------------------------------------------------------- collators


@pytest.mark.parametrize("kind", ["arrays", "map", "list", "generator function"])
def test_a_collator_gets_a_list_of_samples(kind):
    def collate(samples):
        assert type(samples) is list
        return {
            "x": keras.ops.convert_to_tensor(np.stack([x for x, _ in samples])),
            "labels": [y for _, y in samples],
            "wide": np.zeros(len(samples)),
        }

    batches = list(DataLoader(as_source(SOURCES[kind]()), 16, collate=collate))
    assert [len(batch["labels"]) for batch in batches] == [16, 16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), X)
    assert all(type(value) is np.ndarray for value in batches[0].values())
    assert batches[0]["wide"].dtype == np.float32


def test_a_collator_may_pad():
    ragged = [{"ids": list(range(n))} for n in (1, 3, 2)]

    def pad(samples):
        width = max(len(sample["ids"]) for sample in samples)
        return {"ids": [s["ids"] + [0] * (width - len(s["ids"])) for s in samples]}

    batch = next(iter(DataLoader(as_source(ragged), 3, collate=pad)))
    assert batch["ids"].tolist() == [[0, 0, 0], [0, 1, 2], [0, 1, 0]]


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "Expected a batch|are missing"),
        (3, "scalar"),
        ({"a": ["text"]}, r"result of the data_collator\['a'\] holds strings"),
        ((np.zeros(2), np.zeros(3)), "same length"),
    ],
)
def test_what_a_collator_returns_is_checked(result, message):
    loader = DataLoader(as_source((X, Y)), 16, collate=lambda samples: result)
    with pytest.raises(DataError, match=message):
        next(iter(loader))


def fail_at(position, error):
    def check(value):
        if value == position:
            raise error
        return value

    return check


def test_a_failing_collator_is_named_with_its_batch():
    check = fail_at(32, KeyError("pad"))
    loader = DataLoader(as_source((X, Y)), 16, collate=lambda rows: [check(rows[0][1])])
    batches = loader.epoch(0)
    next(batches)
    next(batches)
    message = "Batch 2 of train_dataset: the data_collator: .* raised KeyError: 'pad'"
    with pytest.raises(DataError, match=message) as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_failing_item_is_named_with_its_batch():
    class Broken(Items):
        def __getitem__(self, index):
            return fail_at(40, OSError("gone"))(index)

    message = r"Batch 2 of eval_dataset: eval_dataset\[40\].*OSError: gone"
    with pytest.raises(DataError, match=message) as caught:
        list(DataLoader(as_source(Broken(), name="eval_dataset"), 16))
    assert isinstance(caught.value.__cause__, OSError)


def test_ragged_samples_are_named_with_their_batch():
    data = [{"ids": [0] * (1 if i < 20 else i)} for i in range(32)]
    message = r"Batch 1 of train_dataset: sample\['ids'\] differs in shape.*data_collator"
    with pytest.raises(DataError, match=message):
        list(DataLoader(as_source(data), 16))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("kind", ["collator", "generator", "batches"])
def test_interrupts_pass_through(error, kind):
    def fail(*args):
        raise error

    loader = {
        "collator": lambda: DataLoader(as_source(X), 2, collate=fail),
        "generator": lambda: DataLoader(as_source(map(fail, [1])), 2),
        "batches": lambda: as_loader(map(fail, [1])),
    }[kind]()
    with pytest.raises(error):
        next(iter(loader))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1. Received: batch_size=0"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"batch_size": 4, "seed": -1}, "seed must be an integer >= 0"),
        ({"batch_size": 4, "strategy": "rnd"}, "strategy='rnd'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        DataLoader(as_source(X), **arguments)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0.5, 0)])
@pytest.mark.parametrize("make", [lambda: DataLoader(X, 4), lambda: as_loader([(X, Y)])])
def test_positions_are_checked_at_once(position, make):
    with pytest.raises(ConfigurationError, match="must be an integer >= 0"):
        make().epoch(*position)


def test_numpy_integers_are_integers():
    loader = DataLoader(X, np.int64(16), seed=np.int64(3), strategy="random")
    assert len(list(loader.epoch(np.int64(0), np.int64(1)))) == 4


# ---------------------------------------------------------------------------------- users' loaders


class OwnLoader:
    """Behaves like a torch DataLoader."""

    batch_size = 16

    def __init__(self):
        self.dataset, self.epochs, self.sampler = range(66), [], self

    def __len__(self):
        return 5

    def __iter__(self):
        for start in range(0, 66, 16):
            x = keras.ops.convert_to_tensor(X[start : start + 16])
            yield [x, Y[start : start + 16].astype(np.float64)]

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_a_loader_is_returned_as_it_is():
    loader = DataLoader(as_source(X), 4)
    assert as_loader(loader) is loader
    wrapped = as_loader([(X, Y)])
    assert as_loader(wrapped) is wrapped
    assert isinstance(loader, Loader)
    assert isinstance(wrapped, Loader)


def test_a_users_loader_is_wrapped():
    own = OwnLoader()
    loader = as_loader(own)
    assert isinstance(loader, BatchLoader)
    assert (len(loader), loader.sized, loader.num_examples, loader.batch_size) == (5, True, 66, 16)
    batches = list(loader.epoch(4))
    assert own.epochs.count(4) >= 1
    assert all(type(batch) is tuple for batch in batches)
    assert {array.dtype for batch in batches for array in batch} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), X)


def test_a_users_loader_is_skipped_through(caplog):
    loader = as_loader(OwnLoader())
    with caplog.at_level(logging.INFO, logger="kbtrain"):
        for start in range(1, 7):
            rest = [batch[1][0] for batch in loader.epoch(0, start)]
            assert rest == list(range(16 * start, 66, 16))
    assert len(caplog.records) == 1


def test_an_unsized_loader():
    loader = as_loader(iter([X, X]))
    assert (loader.sized, loader.num_examples, loader.batch_size) == (False, None, None)
    with pytest.raises(UnsizedDataError, match="the dataloader has no length"):
        len(loader)
    assert len(list(loader)) == 2
    assert list(loader) == []


def test_batches_by_index_are_not_read_before_the_position():
    class Batches(keras.utils.PyDataset):
        def __init__(self):
            super().__init__()
            self.read = []

        def __len__(self):
            return 5

        def __getitem__(self, number):
            self.read.append(number)
            return X[number * 16 :][:16], Y[number * 16 :][:16]

    data = Batches()
    loader = as_loader(data)
    assert [len(y) for _, y in loader.epoch(0, 3)] == [16, 2]
    assert data.read == [3, 4]
    assert len(loader) == 5


def test_what_a_users_loader_yields_is_checked():
    loader = as_loader([(X, Y), (X, Y[:3])], name="get_eval_dataloader()")
    batches = iter(loader)
    next(batches)
    with pytest.raises(DataError, match="same length"):
        next(batches)
    with pytest.raises(DataError, match=r"Batch 0 of the dataloader\[0\] holds strings"):
        next(iter(as_loader([(["a"], Y)])))


def test_a_failing_users_loader_is_named():
    def broken():
        yield X
        raise RuntimeError("worker died")

    message = "Batch 1 of the dataloader: .*RuntimeError: worker died"
    with pytest.raises(DataError, match=message) as caught:
        list(as_loader(broken()))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("obj", [None, 5, "loader", {"a": X}, object()])
def test_what_is_no_loader_is_refused(obj):
    with pytest.raises(DataError, match="must be an iterable of batches"):
        as_loader(obj)
