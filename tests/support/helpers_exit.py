"""A process in which HDF5 files fail in many ways, and which has to end well all the same.

Every error is kept, with its frames, until the process is gone: test runners, debuggers and the
C++ of frameworks do so.
"""

import ctypes
import errno
import io
import os
import resource
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
from paths import GOLDEN

import kbtrain
from kbtrain.checkpoint import write_arrays
from kbtrain.checkpoint.storage import format as array_files

OLD = GOLDEN / "checkpoint_v1" / "checkpoint-4" / "model.h5"


class Failing(io.FileIO):
    """Answers a number of reads, and from then on with an error of the disk."""

    def __init__(self, path, answers):
        super().__init__(path)
        self.answers = answers

    def read(self, *size):
        self.count()
        return super().read(*size)

    def readinto(self, buffer):
        self.count()
        return super().readinto(buffer)

    def count(self):
        self.answers -= 1
        if self.answers < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def kept(call, *arguments):
    """Call what has to fail; print how it did, and keep the error for good."""
    try:
        call(*arguments)
    except Exception as error:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
        print(type(error).__name__)
    else:
        sys.exit(f"{call} did not fail with {arguments}")


@contextmanager
def opening(path, answers):
    """Let ``Path.open`` give a file that fails."""
    usual = Path.open
    Path.open = lambda given, *a, **k: (
        Failing(path, answers) if given == path else usual(given, *a, **k)
    )
    try:
        yield
    finally:
        Path.open = usual


def main(folder):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(400)])
    weights, archive = folder / "w.weights.h5", folder / "m.keras"
    model.save_weights(weights)
    model.save(archive)

    for path, most in ((weights, 6), (archive, 12)):  # the disk fails at each of the first reads
        for answers in range(most):
            with opening(path, answers):
                kept(kbtrain.load_weights, model, path)
    for answers in range(3, 8):
        kept(array_files.read_verified_arrays, Failing(OLD, answers), OLD.name)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:300])  # damaged: first plainly, then inside an archive
    kept(kbtrain.load_weights, model, weights)
    with zipfile.ZipFile(archive, "w") as new:
        new.write(weights, "model.weights.h5")
    kept(kbtrain.load_weights, model, archive)
    with zipfile.ZipFile(archive, "w") as new:
        new.writestr("model.weights.h5", whole)
    data = bytearray(archive.read_bytes())
    data[data.index(whole) + len(whole) // 2] ^= 255  # the archive's checksum tells
    archive.write_bytes(data)
    kept(kbtrain.load_weights, model, archive)

    arrays = {f"layer_{i}/kernel": np.ones(10_000, "float32") for i in range(4)}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in (0, 3000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        kept(write_arrays, folder / f"{limit}.h5", arrays)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
