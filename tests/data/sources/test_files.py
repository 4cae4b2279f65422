"""Training on files of several formats: the numbers of the arrays in them, and an exact resume."""

import io
import tarfile

import keras
import numpy as np
import pytest
from helpers import arguments, same, weights, with_weights

from kbtrain import TarShards, Trainer

pytestmark = pytest.mark.neutral

ROWS = 24
X = np.random.default_rng(5).normal(size=(ROWS, 3)).astype("float32")
Y = np.arange(ROWS, dtype="float32")[:, None]


def tar_shards(folder):
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in range(shard * 12, shard * 12 + 12):
                file = io.BytesIO()
                np.save(file, X[row])
                for name, content in (("npy", file.getvalue()), ("cls", str(row).encode())):
                    entry = tarfile.TarInfo(f"{row:05d}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return TarShards(
        str(folder / "{0..1}.tar"), lambda s: (s["npy"], np.array([s["cls"]], "float32"))
    )


def array_records(folder):
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    paths = []
    for shard in range(2):
        paths.append(str(folder / f"{shard}.array_record"))
        writer = ArrayRecordWriter(paths[-1], "group_size:1")
        for row in range(shard * 12, shard * 12 + 12):
            writer.write(np.append(X[row], Y[row]).tobytes())
        writer.close()

    def decode(record):
        values = np.frombuffer(record, "float32")
        return values[:3], values[3:]

    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths)).map(decode)


def parquet_files(folder):
    from datasets import Dataset

    for shard in range(2):
        rows = slice(shard * 12, shard * 12 + 12)
        Dataset.from_dict({"x": X[rows], "labels": Y[rows]}).to_parquet(
            str(folder / f"{shard}.parquet")
        )
    return {"data_files": str(folder / "*.parquet"), "split": "train", "cache_dir": str(folder)}


def parquet(folder):
    from datasets import load_dataset

    return load_dataset("parquet", **parquet_files(folder)).with_format("numpy")


def streamed(folder, shuffled=False):
    from datasets import load_dataset

    data = load_dataset("parquet", streaming=True, **parquet_files(folder)).with_format("numpy")
    return data.shuffle(seed=3, buffer_size=10) if shuffled else data


def run(data, folder, resume=None, order="random"):
    args = arguments(
        folder, save_strategy="steps", save_steps=5, max_steps=9, per_device_train_batch_size=4,
        train_sampling_strategy=order,
    )  # fmt: skip
    layers = [keras.Input((3,), name="x"), keras.layers.Dense(1)]
    trainer = Trainer(with_weights(keras.Sequential(layers)), args, train_dataset=data, loss="mse")
    trainer.fit(resume_from_checkpoint=resume)
    return weights(trainer.model)


@pytest.mark.parametrize(
    "made", [tar_shards, array_records, pytest.param(parquet, marks=pytest.mark.cross)]
)
def test_data_that_is_read_by_index_gives_the_numbers_of_arrays(tmp_path, made):
    data = made(tmp_path)
    expected = run((X, Y), tmp_path / "arrays")
    assert same(run(data, tmp_path / "run"), expected)
    assert same(run(data, tmp_path / "run", str(tmp_path / "run" / "checkpoint-5")), expected)


@pytest.mark.cross
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_stream_resumes_exactly_also_from_within_a_shuffle_buffer(
    tmp_path, shuffled, monkeypatch
):
    # It sleeps where several files have been read in threads.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    whole = run(streamed(tmp_path, shuffled), tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    assert same(run(streamed(tmp_path, shuffled), tmp_path / "run", checkpoint), whole)
    if not shuffled:
        assert same(whole, run((X, Y), tmp_path / "arrays", order="sequential"))
