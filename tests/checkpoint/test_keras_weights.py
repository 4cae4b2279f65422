"""Keras files that claim more than they hold: shapes are compared first, memory is bounded."""

import errno
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from helpers import same, weights

import kbtrain
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointUnreadableError

PLACE = "layers/dense/vars/0"
MEGABYTES = 8 * 2**20


def network():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "w.weights.h5"
    model = network()
    model.save_weights(path)
    return path, weights(model)


def zipped(path):
    """The same as the inner file of a .keras file, compressed."""
    target = path.with_name("model.keras")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "model.weights.h5")
    return target


def refused_in_bounds(path, strict=True):
    model = network()
    before = weights(model)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            kbtrain.load_weights(model, path, strict=strict)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEGABYTES
    assert same(weights(model), before)
    return str(caught.value)


def replaced(path, shape, dtype="float32", **how):
    with h5py.File(path, "r+") as file:
        del file[PLACE]
        return file.create_dataset(PLACE, shape, dtype, **how).id.id


@pytest.mark.parametrize("form", ["h5", "keras"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_no_variable_has_room_for_is_not_read(saved, form, strict):
    path, expected = saved
    with h5py.File(path, "r+") as file:
        for i in range(2):
            file.create_dataset(
                f"layers/x{i}/vars/0", (2**28,), "float32", chunks=(2**20,), compression="gzip"
            )
    path = zipped(path) if form == "keras" else path
    if strict:
        assert "layers/x0/vars/0" in refused_in_bounds(path)
        return
    model = network()
    tracemalloc.start()
    report = kbtrain.load_weights(model, path, strict=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEGABYTES
    assert len(report.unexpected) == 2
    assert same(weights(model), expected)


def test_another_shape_is_not_read(saved):
    path, _ = saved
    replaced(path, (2**28,), chunks=(2**20,), compression="gzip")
    assert "(268435456,) saved, (6, 8) expected" in refused_in_bounds(path)


def test_pieces_that_are_larger_than_the_whole(saved):
    path, _ = saved
    replaced(path, (6, 8), maxshape=(None, None), chunks=(2**13, 2**13), compression="gzip")
    with h5py.File(path, "r+") as file:
        file[PLACE][...] = np.ones((6, 8))
    assert "more than the whole dataset" in refused_in_bounds(path)


@pytest.mark.parametrize("fletcher32", [True, False])
def test_compressed_bytes_that_are_more_than_the_shape_says(saved, fletcher32):
    path, _ = saved
    replaced(path, (6, 8), chunks=(6, 8), compression="gzip", fletcher32=fletcher32)
    bomb = zlib.compress(bytes(2**25), 9)
    if fletcher32:
        bomb += struct.pack("<I", 0)
    with h5py.File(path, "r+") as file:
        file[PLACE].id.write_direct_chunk((0, 0), bomb)
    assert "more bytes than its shape allows" in refused_in_bounds(path)


@pytest.mark.parametrize("how", [{"compression": "lzf"}, {"scaleoffset": 2}], ids=str)
def test_other_compression_is_refused_in_words(saved, how):
    path, _ = saved
    replaced(path, (6, 8), chunks=(6, 8), **how)
    with h5py.File(path, "r+") as file:
        file[PLACE][...] = np.ones((6, 8))
    assert "its compression is not gzip" in refused_in_bounds(path)


def test_values_in_other_files_and_no_values_at_all(saved, tmp_path):
    path, _ = saved
    replaced(path, (6, 8), external=[(str(tmp_path / "secret"), 0, 192)])
    (tmp_path / "secret").write_bytes(bytes(192))
    assert "in other files" in refused_in_bounds(path)
    replaced(path, (6, 8), h5py.string_dtype())
    assert "not numbers" in refused_in_bounds(path)
    replaced(path, (6, 8))
    assert "claims 192 bytes and has 0" in refused_in_bounds(path)


@pytest.mark.parametrize("form", ["h5", "keras"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_values_that_are_compressed_as_usual_are_read(saved, form, shuffle):
    path, expected = saved
    replaced(path, (6, 8), chunks=(3, 8), compression="gzip", shuffle=shuffle, fletcher32=True)
    with h5py.File(path, "r+") as file:
        file[PLACE][...] = expected[0]
    model = network()
    kbtrain.load_weights(model, zipped(path) if form == "keras" else path)
    assert same(weights(model), expected)


def test_a_file_that_cannot_be_read_now_is_not_damaged(saved, monkeypatch):
    path, _ = saved
    opened = Path.open

    class Refusing:
        def __enter__(self):
            return self

        def __exit__(self, *rest):
            return None

        def seek(self, *rest):
            return 0

        def tell(self):
            return 0

        def readinto(self, buffer):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def refusing(given, *rest, **more):
        return Refusing() if given == path else opened(given, *rest, **more)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointUnreadableError, match="Input/output error"):
        kbtrain.load_weights(network(), path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointDamagedError):
        kbtrain.load_weights(network(), path)
