"""HDF5 through Python file objects: short reads, errors, and how the process ends."""

import errno
import io
import os
import subprocess
import sys
from collections import Counter

import h5py
import numpy as np
import pytest
from paths import SUPPORT

from kbtrain.checkpoint.storage.hdf5_files import open_for_reading

VALUES = np.arange(1, 4001, dtype="int32")


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["values"] = VALUES
    return tmp_path / "a.h5"


class Short(io.FileIO):
    """Gives less than it is asked for, as the system does beyond 2 GiB."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer).cast("B")[:1000])


def test_a_read_that_gives_less_is_gone_on_with(path):
    with Short(path) as file, open_for_reading(file) as h5:
        np.testing.assert_array_equal(h5["values"], VALUES)


def test_what_is_beyond_the_end_is_zero_not_whatever_was_in_memory(path):
    with io.FileIO(path) as file, open_for_reading(file) as h5:
        start = h5["values"].id.get_offset()
        os.truncate(path, start + 40)
        read = np.full(VALUES.shape, 7, "int32")
        h5["values"].read_direct(read)
    np.testing.assert_array_equal(read[:10], VALUES[:10])
    assert not read[10:].any()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "EIO"), KeyboardInterrupt(), EOFError()])
def test_an_error_is_raised_at_the_end_and_nothing_is_read_after_it(path, error):
    calls = []

    class Failing(io.FileIO):
        def readinto(self, buffer):
            calls.append(len(buffer))
            if len(calls) > 3:
                raise error
            return super().readinto(buffer)

    def read_twice():
        with Failing(path) as file, open_for_reading(file) as h5:
            return [h5["values"][...] for _ in range(2)]

    with pytest.raises(type(error)) as caught:
        read_twice()
    assert caught.value is error
    assert len(calls) == 4


def test_a_process_with_errors_that_are_never_freed_ends_well(tmp_path):
    """libhdf5 lets go of its lists when the process exits: then no file object may be in them."""
    helper = SUPPORT / "helpers_exit.py"
    done = subprocess.run(
        [sys.executable, str(helper), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert Counter(done.stdout.split()) == {
        "CheckpointUnreadableError": 18,
        "CheckpointDamagedError": 3,
        "OSError": 8,
    }
