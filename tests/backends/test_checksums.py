"""Checksums of variables, by which processes notice that theirs differ."""

import keras
import numpy as np
import pytest

from kbtrain import backends


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_checksum_changes_with_the_last_bit(dtype):
    values = np.random.default_rng(0).normal(size=(300, 5))
    one, same, other = (keras.Variable(values, dtype=dtype) for _ in range(3))
    changed = np.array(keras.ops.convert_to_numpy(keras.ops.cast(other.value, "float32")))
    changed[7, 3] *= 1 + 2.0 ** (-7 if dtype == "bfloat16" else -10)
    other.assign(changed)
    first, second, third = backends.load().checksums([one, same, other])
    assert first == second != third


def test_a_checksum_is_the_sum_of_the_bits():
    values = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    (found,) = backends.load().checksums([keras.Variable(values, dtype="float32")])
    assert found % 2**32 == int(values.view(np.int32).sum(dtype=np.int64)) % 2**32


def test_without_variables_there_are_none():
    assert backends.load().checksums([]) == []
