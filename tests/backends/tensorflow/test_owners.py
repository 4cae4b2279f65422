"""Sums that reach their owners, and values that come back, in worlds that are threads."""

import importlib
import threading

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs TensorFlow, whatever Keras runs on

owners_module = "kbtrain.backends.tensorflow.owners"


class World:
    """A meeting point for the members of a pretended run."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._sent = [None] * size

    def meet(self, rank, value):
        self._sent[rank] = value
        self._barrier.wait()
        found = list(self._sent)
        self._barrier.wait()
        return found


class Member:
    """What one of them calls: NumPy does the work."""

    def __init__(self, world, rank):
        self.world, self.rank, self.size = world, rank, world.size

    def reduce(self, flat):
        tensors = self.world.meet(self.rank, flat)
        return sum(tensors[1:], tensors[0])

    def gather(self, flat):
        tf = importlib.import_module("tensorflow")
        return tf.concat(self.world.meet(self.rank, flat), 0)

    def exchange_rows(self, rows):
        tf = importlib.import_module("tensorflow")
        return tf.stack([sent[self.rank] for sent in self.world.meet(self.rank, rows)])


def in_a_world(size, function):
    """What ``function(member)`` gives each of them."""
    world, results = World(size), [None] * size

    def run(rank):
        results[rank] = function(Member(world, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


SHAPES = [(3, 2), (4,), (0, 5), (2, 2), (1,), (6,), (0,)]
DTYPES = ["float32", "float32", "float32", "bfloat16", "float32", "float16", "float16"]


@pytest.mark.parametrize(
    ("size", "owners"),
    [
        (2, [0, 1, 0, 1, 0, 1, 0]),
        (3, [0, 1, 2, 0, 1, 0, 2]),  # process 2 owns nothing that has elements
        (3, [0, 0, 0, 0, 0, 0, 0]),
        (4, [3, 2, 1, 0, 3, 2, 1]),
    ],
)
@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_sums_and_values(size, owners, limit, monkeypatch):
    tf, module = importlib.import_module("tensorflow"), importlib.import_module(owners_module)
    monkeypatch.setattr(module, "BUCKET_BYTES", limit)
    random = np.random.default_rng(1)
    # Small whole numbers, of which sums are exact in every dtype, and a zero that has a sign.
    given = [
        [random.integers(-8, 8, shape).astype("float32") for shape in SHAPES] for _ in range(size)
    ]
    for tensors in given:
        tensors[1][0] = -0.0

    def tensors_of(rank):
        return [tf.cast(x, d) for x, d in zip(given[rank], DTYPES, strict=True)]

    def run(member):
        mine = tensors_of(member.rank)
        sums = module.reduce_to_owners(member, mine, owners)
        return sums, module.values_of_owners(member, mine, owners)

    for rank, (sums, values) in enumerate(in_a_world(size, run)):
        for i, owner in enumerate(owners):
            if owner == rank:
                total = np.sum([tensors[i] for tensors in given], 0)
                np.testing.assert_array_equal(tf.cast(sums[i], "float32"), total)
                assert sums[i].dtype == DTYPES[i]
            else:
                assert sums[i] is None
            expected = tensors_of(owner)[i]
            assert values[i].numpy().tobytes() == expected.numpy().tobytes()
