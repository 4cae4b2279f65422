"""The largest batch that fits, against trying every size."""

import random

import pytest

from kbtrain.plan.fitting import LARGEST, largest_batch

pytestmark = pytest.mark.neutral


def brute_force(peak, limit):
    size = 0
    while size < LARGEST and peak(size + 1) <= limit:
        size += 1
    return size


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_one_that_trying_every_size_finds(seed):
    draw = random.Random(seed)
    fixed, slope, jump = draw.randrange(10**4), draw.randrange(1, 100), draw.choice([0, 500, 5000])
    every = draw.randrange(1, 64)
    limit, start = draw.randrange(1, 10**5), draw.choice([1, 2, 8, 33, 512])

    def peak(size):  # buffers that grow with the batch, and some that grow in steps
        return fixed + slope * size + jump * (size // every)

    best = brute_force(peak, limit)
    found = largest_batch(peak, limit, start, most=40, precision=0)
    assert (found.batch_size, found.too_large) == (best, best + 1)
    assert len(found.tried) <= 18
    sooner = largest_batch(peak, limit, start, most=40)
    assert sooner.batch_size <= best < sooner.too_large
    assert sooner.too_large - sooner.batch_size <= max(1, 0.02 * best)
    assert len(sooner.tried) <= len(found.tried)
    assert found.peak_bytes == (peak(found.batch_size) if found.batch_size else None)


def test_a_straight_line_takes_four_programs():
    found = largest_batch(lambda size: 1000 + 7 * size, 5000, start=8)
    assert list(found.tried) == [8, 16, 571, 572]
    assert (found.batch_size, found.too_large) == (571, 572)


def test_a_program_that_the_compiler_refuses_does_not_fit():
    found = largest_batch(lambda size: 10 * size if size <= 20 else None, 10**6, start=64)
    assert (found.batch_size, found.too_large) == (20, 21)


def test_nothing_fits():
    found = largest_batch(lambda size: 100 + size, 50, start=4)
    assert (found.batch_size, found.too_large, found.peak_bytes) == (0, 1, None)


def test_the_search_ends_at_a_size_that_nobody_needs():
    found = largest_batch(lambda size: size, 10**12, start=8)
    assert (found.batch_size, found.too_large) == (LARGEST, None)
    assert len(found.tried) == 3


def test_the_search_ends_after_so_many_programs():
    found = largest_batch(lambda size: size**3, 10**9, start=1, most=3)
    assert len(found.tried) == 3
    assert found.batch_size**3 <= 10**9
