"""Blocks hold exactly the batches of the loader, in order, whatever the limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.data import Batches, DataLoader, as_loader, as_source
from kbtrain.data.blocks import BLOCK_BYTES, MAX_BLOCK

pytestmark = pytest.mark.core


def rows_of(block):
    """The micro-batches of a block, in order, as lists of first columns."""
    found = []
    for update in range(block.updates):
        for chunk in block.chunks:
            for kind, batch in chunk.items():
                x = batch[0][update]
                found += [x[:, 0].tolist()] if kind == "single" else x[:, :, 0].tolist()
    return found


def data(count):
    x = np.arange(count, dtype="float32")[:, None] * np.ones((1, 3), "float32")
    return x, np.arange(count)


def all_rows(loader, epoch, start, accumulation, limit):
    blocks = list(Batches(loader).blocks(epoch, start, accumulation, limit))
    assert all(1 <= block.updates <= block.capacity for block in blocks)
    return blocks, [rows for block in blocks for rows in rows_of(block)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    start=st.integers(0, 5),
    limits=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    strategy=st.sampled_from(["random", "sequential"]),
    drop_last=st.booleans(),
    vectorised=st.booleans(),
)
def test_blocks_hold_the_batches_of_the_loader(
    count, size, accumulation, start, limits, strategy, drop_last, vectorised
):
    """Arrays are read many batches at a time, everything else one by one: the same result."""
    start *= accumulation
    source = as_source(data(count) if vectorised else list(zip(*data(count), strict=True)))
    loader = DataLoader(source, size, strategy=strategy, seed=3, drop_last=drop_last)
    assert loader.vectorised == vectorised
    given_limits = iter(limits * 100)
    blocks, rows = all_rows(loader, 2, start, accumulation, lambda: next(given_limits))
    expected = [x[:, 0].tolist() for x, _ in loader.epoch(2, start)]
    assert rows == expected
    assert sum(block.samples for block in blocks) == sum(map(len, expected))
    assert sum(block.updates * block.micro_batches for block in blocks) == len(expected)


def test_a_block_never_has_more_updates_than_the_limit():
    loader = DataLoader(as_source(data(100)), 5)
    blocks, _ = all_rows(loader, 0, 0, 2, lambda: 3)
    assert [block.updates for block in blocks] == [3, 3, 3, 1]
    assert {block.capacity for block in blocks} == {MAX_BLOCK}


def test_large_batches_get_no_room_to_spare():
    wide = np.zeros((8, BLOCK_BYTES // 4), "float32")
    loader = DataLoader(as_source((wide, np.zeros(8))), 2)
    blocks, _ = all_rows(loader, 0, 0, 1, lambda: 100)
    assert [(block.capacity, block.updates) for block in blocks] == [(1, 1)] * 4


def test_a_short_last_update_is_a_block_of_its_own():
    loader = DataLoader(as_source(data(22)), 4)
    blocks, _ = all_rows(loader, 0, 0, 2, lambda: 100)
    shapes = [[{k: v[0].shape[1:] for k, v in c.items()} for c in b.chunks] for b in blocks]
    assert shapes == [[{"stacked": (2, 4, 3)}], [{"single": (4, 3)}, {"single": (2, 3)}]]


def test_the_first_batch_of_a_generator_is_given_back():
    x, y = data(10)
    loader = as_loader(iter([(x[:5], y[:5]), (x[5:], y[5:])]))
    batches = Batches(loader)
    assert batches.peek()[0][0, 0] == 0
    rows = [r for block in batches.blocks(0, 0, 1, lambda: 8) for r in rows_of(block)]
    assert rows == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_resumed_epoch_begins_at_its_batch_also_after_peeking(start):
    loader = DataLoader(as_source(data(12)), 2, strategy="random", seed=1)
    batches = Batches(loader)
    batches.peek()
    rows = [r for block in batches.blocks(0, start, 1, lambda: 2) for r in rows_of(block)]
    assert rows == [x[:, 0].tolist() for x, _ in loader.epoch(0, start)]
