"""Orders that are not stored: permutations, uniform, the same in every part."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.data import DataLoader, epoch_order
from kbtrain.data.sampling.permutation import FeistelPermutation
from kbtrain.data.sampling.sampler import MAX_STORED


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 100))
def test_every_number_comes_once(length, seed, epoch):
    order = FeistelPermutation(length, seed, epoch)
    assert len(order) == length
    np.testing.assert_array_equal(np.sort(order[:]), np.arange(length))


@pytest.mark.parametrize("length", [MAX_STORED + 1, 5_000_011])
def test_every_number_comes_once_in_a_long_order(length):
    seen = np.zeros(length, bool)
    order = epoch_order(length, 3, 1)
    assert isinstance(order, FeistelPermutation)
    seen[order[:]] = True
    assert seen.all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**10), st.data())
def test_a_part_is_the_same_wherever_the_reading_begins(length, data):
    start = data.draw(st.integers(0, length))
    count = data.draw(st.integers(0, 200))
    cut = data.draw(st.integers(0, count))
    order = FeistelPermutation(length, 7, 2)
    whole = order[start : start + count]
    parts = [order[start : start + cut], order[start + cut : start + count]]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(whole) == min(count, length - start)
    assert len(np.unique(whole)) == len(whole)
    assert ((whole >= 0) & (whole < length)).all()


def slow_permutation(length, seed, epoch, count=None):
    """The definition in Python integers."""
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    tables = []
    for i in range(8):
        modulus, size = (a, b) if i % 2 == 0 else (b, a)
        tables.append([((int(w) >> 32) * modulus) >> 32 for w in words.random_raw(size)])

    def once(number):
        left, right = divmod(number, b)
        for i, table in enumerate(tables):
            if i % 2 == 0:
                left = (left + table[right]) % a
            else:
                right = (right + table[left]) % b
        return left * b + right

    result = []
    for number in range(count or length):
        number = once(number)
        while number >= length:
            number = once(number)
        result.append(number)
    return result


@pytest.mark.parametrize("length", [1, 2, 3, 7, 26, 100, 1001])
def test_the_order_is_what_its_definition_says(length):
    for seed, epoch in [(0, 0), (5, 3), (2**40, 1)]:
        expected = slow_permutation(length, seed, epoch)
        assert FeistelPermutation(length, seed, epoch)[:].tolist() == expected


# A change of these numbers changes the data order of every run that is resumed: do not edit them.
FROZEN = [830861, 41809020, 23171111, 38311746, 81648749, 75605578]


def test_frozen_start_of_an_order_of_ten_to_the_eight():
    assert epoch_order(10**8, 42, 7)[: len(FROZEN)].tolist() == FROZEN
    assert slow_permutation(10**8, 42, 7, len(FROZEN)) == FROZEN


def test_seeds_and_epochs_give_unrelated_orders():
    first = FeistelPermutation(10**8, 1, 1)[:1000]
    for seed, epoch in [(1, 2), (2, 1), (2**32 + 1, 1)]:
        assert (FeistelPermutation(10**8, seed, epoch)[:1000] == first).mean() < 0.01


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_where_a_number_goes_is_uniform():
    """100 numbers x 100 places over 4000 seeds: no place is preferred."""
    counts = np.zeros((100, 100), int)
    for seed in range(4000):
        counts[np.arange(100), FeistelPermutation(100, seed, 0)[:]] += 1
    freedom = 99 * 99
    assert abs(chi_square(counts) - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("length", [5_000_011, 10**8])
def test_a_batch_is_spread_over_the_whole_data(length):
    """Means, neighbours and repeated strides, in units of what independent draws would show."""
    order = FeistelPermutation(length, 11, 0)
    sample = order[123_456 : 123_456 + 200_000] / length
    assert abs(sample.mean() - 0.5) < 5 / math.sqrt(12 * len(sample))
    counts = np.histogram(sample, 1000, (0, 1))[0]
    assert abs(chi_square(counts) - 999) < 5 * math.sqrt(2 * 999)
    side = math.isqrt(length - 1) + 1
    for lag in (1, 2, 64, side, 2 * side):  # rows of the square the rounds work on
        x, y = sample[:-lag], sample[lag:]
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(x))
        steps = np.histogram((y - x) % 1.0, 100, (0, 1))[0]
        assert abs(chi_square(steps) - 99) < 6 * math.sqrt(2 * 99)


def test_runs_up_are_as_long_as_in_a_random_order():
    """The number of ascents of a random order has mean (n-1)/2 and variance (n+1)/12."""
    values = FeistelPermutation(10**8, 0, 0)[:100_001]
    ascents = (np.diff(values) > 0).sum()
    assert abs(ascents - 50_000) < 5 * math.sqrt(100_002 / 12)


def test_the_order_of_ten_to_the_eight_rows_takes_less_than_a_megabyte():
    tracemalloc.start()
    order = epoch_order(10**8, 0, 0)
    order[99_990_000:99_992_048]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_loader_reads_a_long_shuffled_data_set(tmp_path):
    """Rows from a memory map, which stays on disk; the last batch and any position as well."""
    length = MAX_STORED + 3
    x = np.memmap(tmp_path / "x.npy", np.int32, "w+", shape=(length, 1))
    x[:, 0] = np.arange(length)
    loader = DataLoader((x, x), 1000, strategy="random", seed=4)
    order = epoch_order(length, 4, 2)
    for start in (0, 4000, len(loader) - 1):
        rows, labels = next(loader.epoch(2, start))
        np.testing.assert_array_equal(rows[:, 0], order[start * 1000 : (start + 1) * 1000])
        np.testing.assert_array_equal(labels, rows)
    assert len(list(loader.epoch(2, len(loader) - 1))[0][0]) == length % 1000
