"""The order of the samples: a pure function of (length, seed, epoch), frozen."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from kbtrain.data import epoch_order
from kbtrain.data.sampling.sampler import STRATEGIES
from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.core


def slow_order(length, seed, epoch):
    """The same definition in Python integers: sort by the high bits of Philox words, then index."""
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(length)
    bits = max(length - 1, 0).bit_length()
    return sorted(range(length), key=lambda i: (int(words[i]) >> bits, i))


# A change of these numbers changes the data order of every run that is resumed: do not edit them.
GOLDEN = {
    (10, 0, 0): [1, 4, 5, 6, 8, 2, 0, 3, 9, 7],
    (10, 0, 1): [7, 8, 6, 2, 9, 3, 1, 0, 4, 5],
    (10, 42, 0): [2, 0, 6, 5, 4, 3, 1, 7, 8, 9],
    (10, 2**40 + 5, 3): [4, 3, 1, 9, 5, 7, 0, 2, 6, 8],
}
GOLDEN_LARGE = [
    216717,
    400394,
    24336,
    769419,
    657176,
    776259,
    221483,
    769310,
]


@pytest.mark.parametrize(("case", "expected"), GOLDEN.items())
def test_the_order_of_an_epoch_never_changes_between_versions(case, expected):
    assert epoch_order(*case).tolist() == expected


def test_frozen_start_of_a_large_order():
    assert epoch_order(1_000_000, 42, 7)[: len(GOLDEN_LARGE)].tolist() == GOLDEN_LARGE


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_order_is_what_its_definition_says(length, seed):
    for epoch in (0, 5):
        order = epoch_order(length, seed, epoch)
        assert order.dtype == np.int64
        assert order.tolist() == slow_order(length, seed, epoch)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 4097])
def test_every_epoch_is_a_permutation(length):
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(epoch_order(length, 3, epoch)), np.arange(length))


def test_repeated_calls_agree_and_other_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(epoch_order(100, seed, epoch))
        for seed, epoch in itertools.product(range(4), range(4))
    }
    assert len(set(orders.values())) == 16
    for (seed, epoch), order in reversed(orders.items()):
        assert tuple(epoch_order(100, seed, epoch)) == order


def test_seed_beyond_32_bits_is_no_other_seed_at_another_epoch():
    assert epoch_order(100, 2**32 + 5, 0).tolist() != epoch_order(100, 5, 1).tolist()


def test_order_does_not_depend_on_or_touch_global_random_state():
    np.random.seed(1)
    first = epoch_order(50, 0, 0)
    drawn = np.random.random()
    np.random.seed(1)
    assert np.random.random() == drawn
    np.testing.assert_array_equal(epoch_order(50, 0, 0), first)


def test_another_process_finds_the_same_order():
    code = (
        "from kbtrain.data.sampling.sampler import epoch_order; "
        "print(epoch_order(30, 9, 2).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.strip().splitlines()[-1] == str(epoch_order(30, 9, 2).tolist())


def test_all_permutations_are_equally_likely():
    epochs = 24 * 200
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(epochs):
        order = tuple(epoch_order(4, 0, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # 99.9th percentile with 23 degrees of freedom


def test_sequential_is_a_range():
    assert epoch_order(5, 7, 3, "sequential") == range(5)


def test_list_of_strategies_is_frozen():
    assert STRATEGIES == ("batch_rebalance", "group_by_length", "random", "sequential")


def test_unknown_strategy_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'random', 'sequential'.*strategy='shuffled'"):
        epoch_order(5, 0, 0, "shuffled")


@pytest.mark.parametrize("case", [(-1, 0, 0), (5, -1, 0), (5, 0, -1)])
def test_negative_numbers_are_refused(case):
    with pytest.raises(ConfigurationError, match="integers >= 0"):
        epoch_order(*case)
