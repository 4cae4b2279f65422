"""Time to write a checkpoint's arrays: as HDF5, as kbtrain does, and as safetensors.

Both are hashed (the manifest has the checksum) and flushed to the disk. safetensors has to be read
again for that, from the page cache. `plain` is the copy of the same bytes into a file, unhashed.

    python benchmarks/checkpoint_formats.py --folder /some/disk
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kbtrain.checkpoint import write_arrays

Arrays = Mapping[str, np.ndarray]


def hdf5(path: Path, arrays: Arrays) -> None:
    write_arrays(path, arrays)


def safetensors(path: Path, arrays: Arrays) -> None:
    save_file(dict(arrays), path)
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())


def safetensors_unhashed(path: Path, arrays: Arrays) -> None:
    save_file(dict(arrays), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def plain(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        for array in arrays.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


WRITERS: tuple[Callable[[Path, Arrays], None], ...] = (
    hdf5,
    safetensors,
    safetensors_unhashed,
    plain,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for megabytes in (50, 500):
            arrays = _arrays(megabytes)
            times: dict[str, list[float]] = {writer.__name__: [] for writer in WRITERS}
            for round_number in range(options.rounds + 1):
                for writer in WRITERS:
                    path = folder / writer.__name__
                    path.unlink(missing_ok=True)
                    begin = time.perf_counter()
                    writer(path, arrays)
                    if round_number:  # the first one warms up
                        times[writer.__name__].append(time.perf_counter() - begin)
            base = statistics.median(times["hdf5"])
            for name, measured in times.items():
                median = statistics.median(measured)
                print(
                    f"{megabytes} MB {name:<22} {median:.3f} s (best {min(measured):.3f}), "
                    f"{base / median:.2f} times as fast as HDF5"
                )
    finally:
        shutil.rmtree(folder)


def _arrays(megabytes: int) -> dict[str, np.ndarray]:
    """Parameters and two slots of an optimizer: 24 large matrices and as many small vectors."""
    generator = np.random.default_rng(0)
    rows = megabytes * 250_000 // 24 // 1024
    large = {f"layer_{i}/kernel": generator.random((rows, 1024), np.float32) for i in range(24)}
    small = {f"layer_{i}/bias": generator.random(1024, np.float32) for i in range(24)}
    return large | small


if __name__ == "__main__":
    main()
