"""Samples per second from files of JPEG images: kbtrain, torch's DataLoader, tf.data.

The same images are written as single files, WebDataset tar shards, ArrayRecord and Parquet. Every
contender decodes them to uint8 arrays, in random order, in batches. Each runs in a process of its
own (PyTorch and TensorFlow do not share one), reads one pass to start its workers and to fill the
page cache, then the fastest of the following passes counts.

    python input_files.py --images 2048 --rounds 5 --json input_files.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
SIDE = 160
SHARDS = 4


def decode(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


class ImageFiles:
    """A data set of image files, as it is written for torch and for kbtrain."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        return decode(self.paths[index].read_bytes()), np.int64(index % 10)


class Decoded:
    """A data set of (bytes, label) as one of (array, label)."""

    def __init__(self, data: Any, read: Callable[[Any], tuple[bytes, int]]) -> None:
        self.data, self.read = data, read

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        data, label = self.read(self.data[index])
        return decode(data), np.int64(label)


def from_tar(sample: dict[str, Any]) -> tuple[np.ndarray, np.int64]:
    return sample["jpg"], np.int64(sample["cls"])


def from_record(record: bytes) -> tuple[bytes, int]:
    return record[1:], record[0]


def from_row(row: dict[str, Any]) -> tuple[bytes, int]:
    return row["image"], row["label"]


def write_files(folder: Path, count: int) -> None:
    """Smooth random images, about as large as photographs of this size."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from datasets import Dataset
    from PIL import Image

    generator = np.random.default_rng(0)
    images = []
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype="uint8"))
        file = io.BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
        images.append(file.getvalue())
        (folder / f"{i:06d}.jpg").write_bytes(images[-1])
    for shard in range(SHARDS):
        rows = range(shard, count, SHARDS)
        writer = ArrayRecordWriter(str(folder / f"{shard}.array_record"), "group_size:1")
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in rows:
                writer.write(bytes([i % 10]) + images[i])
                for name, content in (("jpg", images[i]), ("cls", str(i % 10).encode())):
                    entry = tarfile.TarInfo(f"{i:06d}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        writer.close()
        Dataset.from_dict(
            {"image": [images[i] for i in rows], "label": [i % 10 for i in rows]}
        ).to_parquet(str(folder / f"{shard}.parquet"))


def dataset(kind: str, folder: Path) -> object:
    if kind == "files":
        return ImageFiles(folder)
    if kind == "tar":
        from kbtrain import TarShards

        return TarShards(str(folder / "*.tar"), from_tar)
    if kind == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = sorted(str(path) for path in folder.glob("*.array_record"))
        return Decoded(ArrayRecordDataSource(paths), from_record)
    from datasets import load_dataset

    rows = load_dataset(
        "parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=str(folder)
    )
    return Decoded(rows, from_row)


def kbtrain_passes(kind: str, folder: Path, workers: int) -> Iterator[Iterator[Any]]:
    from kbtrain import TrainingArguments
    from kbtrain.training.dataloaders import make_loader

    args = TrainingArguments(
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_drop_last=True,
    )
    loader = make_loader(dataset(kind, folder), args, None, "train_dataset", train=True)
    epoch = 0
    while True:
        yield loader.epoch(epoch)
        epoch += 1


def torch_passes(kind: str, folder: Path, workers: int) -> Iterator[Iterator[Any]]:
    import torch

    loader = torch.utils.data.DataLoader(
        dataset(kind, folder), BATCH, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
        # As in kbtrain; the readers of ArrayRecord end a process that is forked with a fault.
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip
    while True:
        yield iter(loader)


def tf_data_passes(kind: str, folder: Path, workers: int) -> Iterator[Iterator[Any]]:
    import tensorflow as tf

    assert kind == "files"
    paths = [str(path) for path in sorted(folder.glob("*.jpg"))]
    data = tf.data.Dataset.from_tensor_slices((paths, np.arange(len(paths)) % 10))
    data = data.shuffle(len(paths)).map(
        lambda path, label: (tf.io.decode_jpeg(tf.io.read_file(path), 3), label),
        num_parallel_calls=workers or 1,
    )
    data = data.batch(BATCH, drop_remainder=True).prefetch(2)
    while True:
        yield data.as_numpy_iterator()


PASSES = {"kbtrain": kbtrain_passes, "torch": torch_passes, "tf.data": tf_data_passes}
CONTENDERS = [
    *(("kbtrain", kind) for kind in ("files", "tar", "array_record", "parquet")),
    *(("torch", kind) for kind in ("files", "tar", "array_record", "parquet")),
    ("tf.data", "files"),
]


def measure(library: str, kind: str, folder: Path, workers: int, rounds: int) -> float:
    """Samples per second of the fastest pass, which other processes disturbed least."""
    rates = []
    for _, batches in zip(range(rounds + 1), PASSES[library](kind, folder, workers), strict=False):
        start, count = time.perf_counter(), 0
        for x, _ in batches:
            assert x.shape == (BATCH, SIDE, SIDE, 3)
            count += len(x)
        rates.append(count / (time.perf_counter() - start))
    return max(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        library, kind, folder, workers = options.one
        rate = measure(library, kind, Path(folder), int(workers), options.rounds)
        print(json.dumps(rate))
        sys.stdout.flush()
        os._exit(0)  # persistent workers need not be waited for
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), options.images)
        found = {}
        for workers in options.workers:
            for library, kind in CONTENDERS:
                backend = "tensorflow" if library == "tf.data" else "torch"
                done = subprocess.run(
                    [sys.executable, __file__, "--rounds", str(options.rounds), "--one", library,
                     kind, folder, str(workers)],
                    env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3",
                         "OMP_NUM_THREADS": "1"},
                    capture_output=True, text=True, check=True, timeout=600,
                )  # fmt: skip
                rate = json.loads(done.stdout.splitlines()[-1])
                found[f"{library} {kind} {workers}"] = rate
                print(
                    f"{library:8} {kind:13} {workers} workers: {rate:8,.0f} samples/s", flush=True
                )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
