"""Random numbers that PyTorch computes on a GPU from a seed that it does not read."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on

MANY = 200_000


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def numbers(torch):
    """The operations as they are on a GPU."""
    module = importlib.import_module("kbtrain.backends.torch.capture.random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_on_gpu", lambda seed: True)
        yield torch.ops.kbtrain_random


@pytest.fixture
def seed(torch):
    return torch.tensor([5, 8], dtype=torch.int32)


def splitmix64(key, count):
    """The sequence in Python's integers, as its authors wrote it."""
    found = []
    for _ in range(count):
        key = (key + 0x9E3779B97F4A7C15) % 2**64
        z = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


@pytest.mark.parametrize("key", [1234567, 0, -1, -(2**63), 2**63 - 1])
def test_the_bits_are_those_of_the_published_generator(key, torch):
    module = importlib.import_module("kbtrain.backends.torch.capture.random")
    found = module.random_bits(torch.tensor(key), (5, 20)).flatten().tolist()
    assert [z % 2**64 for z in found] == splitmix64(key % 2**64, 100)
    if key == 1234567:  # a value that is published for this seed
        assert found[0] == 6457827717110365317


def test_uniform_numbers_are_spread_evenly(torch, numbers, seed):
    for dtype, steps in ((torch.float64, 53), (torch.float32, 24), (torch.float16, 11)):
        x = numbers.rand(seed, [MANY], dtype)
        assert x.dtype is dtype
        x = x.double().numpy()
        assert x.min() >= 0
        assert x.max() < 1
        assert np.array_equal(x * 2**steps, np.round(x * 2**steps))
        counts = np.histogram(x, 20, (0, 1))[0] / MANY
        np.testing.assert_allclose(counts, 0.05, atol=5 * np.sqrt(0.05 * 0.95 / MANY))
        assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 5 / np.sqrt(MANY)


def test_normal_numbers_have_the_moments_of_the_distribution(torch, numbers, seed):
    x = numbers.normal(seed, 2.0, 3.0, [MANY], torch.float32)
    assert x.dtype is torch.float32
    z = (x.double().numpy() - 2) / 3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 5 * np.sqrt(variance / MANY)
    assert 4 < np.abs(z).max() < 7
    assert torch.isfinite(numbers.normal(seed, 0.0, 1.0, [1000], torch.bfloat16)).all()


def test_integers_choices_and_classes_come_as_often_as_they_should(torch, numbers, seed):
    x = numbers.randint(seed, -2, 3, [MANY], torch.int32).numpy()
    values, counts = np.unique(x, return_counts=True)
    assert values.tolist() == [-2, -1, 0, 1, 2]
    np.testing.assert_allclose(counts / MANY, 0.2, atol=5 * np.sqrt(0.16 / MANY))
    p = torch.tensor([0.0, 0.3, 1.0]).repeat(MANY, 1)
    kept = numbers.bernoulli(seed, p).double().mean(0).tolist()
    assert kept == pytest.approx([0, 0.3, 1], abs=5 * np.sqrt(0.21 / MANY))
    assert kept[::2] == [0, 1]
    rates = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    classes = numbers.multinomial(seed, rates, MANY).numpy()
    assert classes.shape == (2, MANY)
    shares = np.bincount(classes[0], minlength=3) / MANY
    np.testing.assert_allclose(shares, [0.75, 0, 0.25], atol=5 * np.sqrt(0.1875 / MANY))
    assert set(classes[1].tolist()) == {2}


def test_a_seed_gives_its_own_numbers_and_always_the_same(torch, numbers):
    def draw(*seed):
        return numbers.rand(torch.tensor(seed, dtype=torch.int32), [10_000], torch.float32).numpy()

    assert np.array_equal(draw(5, 8), draw(5, 8))
    # A layer counts in the second number; sums of both must not be all that matters.
    others = [draw(5, 9), draw(6, 8), draw(6, 7), draw(8, 5), draw(0, 0)]
    for other in others:
        assert abs(np.corrcoef(draw(5, 8), other)[0, 1]) < 0.05
        assert not np.isin(draw(5, 8), other).sum() > 50  # of 10,000 numbers among 2^24
