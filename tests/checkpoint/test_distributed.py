"""Checkpoints that several processes write together, each its blocks: format 3."""

import errno
import hashlib
import json
import os
import re
import shutil

import h5py
import ml_dtypes
import numpy as np
import pytest
from helpers_peers import cut, together
from helpers_saving import FULL

from kbtrain.checkpoint import CheckpointStore, distributed, read_arrays
from kbtrain.checkpoint.storage import array_writer, blocks, folder_reader
from kbtrain.checkpoint.storage.folder_writer import Contents
from kbtrain.checkpoint.storage.manifest import read_manifest
from kbtrain.cli import main
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
    DistributedError,
    FolderInUseError,
)
from kbtrain.utils.array_blocks import Block, OwnedBlocks

pytestmark = pytest.mark.core

rng = np.random.default_rng(0)
STATE = {
    "model": {
        "net/dense/kernel": rng.normal(size=(12, 8)).astype("float32"),
        "net/dense/bias": rng.normal(size=8).astype("float32"),
        "net/norm/gamma": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "net/dense_1/kernel": rng.normal(size=(8, 6)),
        "net/seed": np.uint32([1, 2]),
    },
    "optimizer": {
        "iteration": np.int64(5),
        "momentum/net/dense/kernel": rng.normal(size=(300, 400)).astype("float32"),
        "mask": np.array([[True, False], [False, True]]),
        "momentum/net/scale": np.float32(2.5),
    },
    "metrics": {"0": np.float32(7)},
}
GRIDS = {
    "net/dense/kernel": (4, 2),
    "net/norm/gamma": (5,),
    "net/dense_1/kernel": (1, 3),
    "momentum/net/dense/kernel": (3, 1),
    "mask": (1, 1),  # one block, as with an optimizer's state that has owners
    "momentum/net/scale": (),
}
DOCUMENTS = {"trainer_state": {"global_step": 5}}


def contents_of(rank, size, state=STATE, grids=GRIDS):
    """What one of several processes has."""
    arrays = {
        group: {
            name: cut(value, grids[name], rank, size) if name in grids else value
            for name, value in values.items()
        }
        for group, values in state.items()
    }
    return Contents(arrays, DOCUMENTS if rank == 0 else {}, {"backend": "any"}, {}, {})


def save(directory, step=5, size=2, state=STATE, change=None, **options):
    """Save with several processes; returns the error of each, or None."""

    def one(peers):
        contents = contents_of(peers.rank, size, state)
        if change is not None:
            contents = change(peers.rank, contents) or contents
        store = CheckpointStore(directory)
        distributed.save(store, step, contents, peers, f"save {step}", **options)

    return together(size, one)


def assert_same(arrays, state=STATE):
    assert arrays.keys() == state.keys()
    for group, values in state.items():
        assert list(arrays[group]) == list(values)
        for name, value in values.items():
            found = np.asarray(arrays[group][name])
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.tobytes() == value.tobytes()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    later = {
        group: {
            name: (value if value.dtype == bool else value + 1) for name, value in group_.items()
        }
        for group, group_ in STATE.items()
    }
    assert save(directory, 5) == [None, None]
    assert save(directory, 10, state=later) == [None, None]
    return directory


@pytest.fixture
def store(tmp_path, template):
    shutil.copytree(template, tmp_path / "run")
    return CheckpointStore(tmp_path / "run")


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_processes_writes_what_one_reads(tmp_path, size):
    assert save(tmp_path / "run", size=size) == [None] * size
    store = CheckpointStore(tmp_path / "run")
    assert [path.name for path in store.directory.iterdir()] == ["checkpoint-5"]
    checkpoint = store.resolve(True)
    assert_same(checkpoint.arrays)
    assert checkpoint.documents == DOCUMENTS
    assert checkpoint.manifest.format_version == 3
    assert store.verify(checkpoint.path) == []


def test_each_process_has_a_file_per_group_with_its_blocks_by_name(store):
    path = store.path(5)
    assert sorted(file.name for file in path.glob("*.h5")) == [
        "metrics.h5", "model-p00000.h5", "model-p00001.h5", "model.h5", "optimizer-p00000.h5",
        "optimizer-p00001.h5", "optimizer.h5",
    ]  # fmt: skip
    kernel = STATE["model"]["net/dense/kernel"]
    found = read_arrays(path / "model-p00001.h5")
    np.testing.assert_array_equal(found["net/dense/kernel@0,4"], kernel[:3, 4:])
    with h5py.File(path / "model-p00000.h5") as file:
        np.testing.assert_array_equal(file["arrays/net/dense/kernel@3,0"][...], kernel[3:6, :4])
    assert read_arrays(path / "model.h5").keys() == {"net/dense/bias", "net/seed"}
    assert read_arrays(path / "optimizer.h5").keys() == {"iteration"}
    [mine] = [e for e in read_manifest(path).arrays["optimizer"] if e.outline.name == "mask"]
    assert [(block.file, block.start) for block in mine.blocks] == [("optimizer-p00000.h5", (0, 0))]


def test_state_that_is_whole_stays_as_it_was(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(5, STATE, DOCUMENTS)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format_version"] == 2
    assert "arrays" not in manifest
    assert (path / "model.weights.h5").exists()


# --- what is read ---------------------------------------------------------------------------------


def test_a_part_is_read_from_the_blocks_that_meet_it_only(store, monkeypatch):
    read = []
    original = blocks.read_stored_block
    monkeypatch.setattr(
        blocks, "read_stored_block", lambda *a: read.append(a[2].start) or original(*a)
    )
    checkpoint = store.load(store.path(5), lazy=True)
    kernel, stored = STATE["model"]["net/dense/kernel"], checkpoint.arrays["model"]
    assert read == []
    part = stored["net/dense/kernel"].read_block((2, 1), (3, 2))
    np.testing.assert_array_equal(part, kernel[2:5, 1:3])
    assert read == [(0, 0), (3, 0)]
    part = stored["net/dense/kernel"].read_block((9, 4), (3, 4))
    np.testing.assert_array_equal(part, kernel[9:, 4:])
    assert read[2:] == [(9, 4)]
    np.testing.assert_array_equal(stored["net/dense/bias"].read_block((2,), (4,)), kernel_bias())
    assert_same(checkpoint.arrays)


def kernel_bias():
    return STATE["model"]["net/dense/bias"][2:6]


def test_whole_arrays_of_older_checkpoints_can_be_read_in_parts_too(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(5, STATE, DOCUMENTS)
    checkpoint = store.resolve("auto", lazy=True)
    assert_same(checkpoint.arrays)
    large = checkpoint.arrays["optimizer"]["momentum/net/dense/kernel"]
    assert (large.shape, large.dtype) == ((300, 400), np.float32)
    expected = STATE["optimizer"]["momentum/net/dense/kernel"][100:120, 7:9]
    np.testing.assert_array_equal(large.read_block((100, 7), (20, 2)), expected)


# --- damage ---------------------------------------------------------------------------------------


def alter(path, value):
    """Flip a bit in the middle of an array's bytes."""
    data = bytearray(path.read_bytes())
    where = data.index(value.tobytes()) + value.nbytes // 2
    data[where] ^= 1
    path.write_bytes(data)


def test_a_damaged_block_is_named_and_the_older_checkpoint_used(store, capsys):
    path, said = store.path(10), []
    file = path / "optimizer-p00001.h5"
    alter(file, (STATE["optimizer"]["momentum/net/dense/kernel"] + 1)[100:200])
    named = r"optimizer-p00001\.h5: contents altered .*'momentum/net/dense/kernel' at \[100, 0\]"
    with pytest.raises(CheckpointDamagedError, match=named):
        store.load(path)
    assert len(store.verify(path)) == 1
    assert store.latest_intact(said.append).step == 5
    assert "'momentum/net/dense/kernel' at [100, 0]" in said[0]
    assert main(["checkpoint", "verify", str(store.directory)]) == 1
    assert "'momentum/net/dense/kernel' at [100, 0]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), "missing.*'net/dense/kernel' at .*1 more|missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
        (lambda file: file.write_bytes(b""), "0 bytes instead of .*'net/dense/kernel' at"),
    ],
)
def test_a_file_that_is_missing_or_cut_off(store, harm, said):
    harm(store.path(10) / "model-p00001.h5")
    with pytest.raises(CheckpointDamagedError, match=rf"model-p00001\.h5.*({said})"):
        store.resolve(str(store.path(10)))
    assert store.resolve(True).step == 5


def test_a_block_is_verified_when_it_is_read(store):
    checkpoint = store.load(store.path(5), lazy=True)
    kernel = STATE["model"]["net/dense/kernel"]
    file = store.path(5) / "model-p00001.h5"
    alter(file, np.ascontiguousarray(kernel[:3, 4:]))
    stored = checkpoint.arrays["model"]["net/dense/kernel"]
    np.testing.assert_array_equal(stored.read_block((0, 0), (12, 4)), kernel[:, :4])
    named = r"model-p00001\.h5: the block of 'net/dense/kernel' at \[0, 4\]: contents altered"
    with pytest.raises(CheckpointDamagedError, match=named):
        stored.read_block((0, 3), (1, 2))
    os.truncate(file, 100)
    with pytest.raises(
        CheckpointDamagedError, match=r"'net/dense/kernel' at \[0, 4\]: .*too early"
    ):
        stored.read_block((0, 3), (1, 2))
    file.unlink()
    with pytest.raises(CheckpointDamagedError, match=r"'net/dense/kernel' at \[0, 4\]: missing"):
        stored.read_block((0, 3), (1, 2))


def seal(path, change):
    """Rewrite a manifest with a right checksum."""
    file = path / "manifest.json"
    value = json.loads(file.read_text()) | {"checksum": "0" * 64}
    change(value)
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest().encode()
    file.write_bytes(data.replace(b"0" * 64, digest, 1))


def array(value, group, name):
    return next(entry for entry in value["arrays"][group] if entry["name"] == name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: array(m, "model", "net/dense/kernel")["blocks"].pop(), "no block holds"),
        (
            lambda m: array(m, "model", "net/dense/kernel")["blocks"].append(
                array(m, "model", "net/dense/kernel")["blocks"][0]
            ),
            r"two blocks hold its element \[0, 0\]",
        ),
        (lambda m: m["arrays"]["model"].pop(), "'net/seed' of 'model' is not listed"),
        (
            lambda m: m["arrays"]["model"].append({"name": "x", "dtype": "bool", "shape": []}),
            "no file of 'model' holds 'x'",
        ),
        (lambda m: array(m, "model", "net/seed").update(shape=[3]), "holds 'net/seed' of shape"),
    ],
)
def test_a_list_that_does_not_fit_the_files_is_damage(store, change, said):
    seal(store.path(10), change)
    with pytest.raises(CheckpointDamagedError, match=said):
        store.load(store.path(10))
    with pytest.raises(CheckpointDamagedError, match=said):
        store.load(store.path(10), lazy=True)
    assert store.latest_intact(lambda text: None).step == 5


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_processes_use_the_older_checkpoint_if_one_block_is_damaged(store, size, caplog):
    alter(store.path(10) / "model-p00000.h5", STATE["model"]["net/norm/gamma"][2:3] + 1)

    def one(peers):
        own = CheckpointStore(store.directory)
        found = distributed.resolve(own, True, peers, "resume", lazy=True)
        assert_same(found.arrays)
        return found.step, own.owns(own.path(5))

    assert together(size, one) == [(5, True)] * size
    assert "'net/norm/gamma' at [2]" in caplog.text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_processes_share_the_work_of_verifying(store, monkeypatch, size):
    verified = []
    original = folder_reader.open_verified

    def noting(folder, name, entry):
        verified.append(name)
        return original(folder, name, entry)

    monkeypatch.setattr(folder_reader, "open_verified", noting)

    def one(peers):
        distributed.resolve(CheckpointStore(store.directory), True, peers, "resume", lazy=True)

    assert together(size, one) == [None] * size
    blocks = [name for name in verified if "-p0" in name]
    assert sorted(blocks) == sorted(file.name for file in store.path(10).glob("*-p0*.h5"))


def test_a_checkpoint_that_one_process_does_not_see_is_an_error_on_all(store, tmp_path):
    def one(peers):
        here = store.directory if peers.rank == 0 else tmp_path / "another disk"
        return distributed.resolve(CheckpointStore(here), True, peers, "resume", lazy=True)

    for error in together(2, one):
        assert isinstance(error, CheckpointError)
        assert "put output_dir on storage that every machine sees" in str(error)


def test_all_start_from_scratch_or_none(store, tmp_path):
    def fresh(peers):
        return distributed.resolve(CheckpointStore(tmp_path / "none"), "auto", peers, "resume")

    def missing(peers):
        return distributed.resolve(CheckpointStore(tmp_path / "none"), True, peers, "resume")

    assert together(2, fresh) == [None, None]
    first, second = together(2, missing)
    assert isinstance(first, CheckpointNotFoundError)
    assert isinstance(second, CheckpointNotFoundError)
    assert str(second) == f"Process 0: {first}"


def test_a_checkpoint_of_another_folder(store, tmp_path):
    def one(peers):
        own = CheckpointStore(tmp_path / "new")
        return distributed.resolve(own, str(store.path(5)), peers, "resume").step

    assert together(2, one) == [5, 5]


# --- failures -------------------------------------------------------------------------------------


def assert_nothing_changed(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert_same(CheckpointStore(directory).load(directory / "checkpoint-5").arrays)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_process_is_an_error_on_all(store, monkeypatch, failing):
    original = array_writer.write_arrays

    def fail(path, *rest, **options):
        if path.name == f"optimizer-p0000{failing}.h5":
            raise FULL
        return original(path, *rest, **options)

    monkeypatch.setattr(blocks, "write_arrays", fail)
    errors = save(store.directory, 5)
    for rank, error in enumerate(errors):
        assert isinstance(error, CheckpointError)
        assert error.__cause__.errno == errno.ENOSPC
        assert "Could not write checkpoint-5" in str(error)
        assert str(error).startswith(f"Process {failing}: ") == (rank != failing)
    assert_nothing_changed(store.directory)


def test_errors_before_anything_is_written(store):
    def taken():
        raise FolderInUseError("Another run is writing.")

    errors = save(store.directory, 5, begin=taken)
    assert [type(error) for error in errors] == [FolderInUseError] * 2
    (store.directory / "checkpoint-7").write_text("not a folder")
    errors = save(store.directory, 7)
    assert ["a file has that name" in str(error) for error in errors] == [True, True]


def test_a_disk_that_is_not_shared(tmp_path):
    def one(peers):
        store = CheckpointStore(tmp_path / str(peers.rank))
        distributed.save(store, 5, contents_of(peers.rank, 2), peers, "save")

    errors = together(2, one)
    assert ["on a disk that all processes share" in str(error) for error in errors] == [True] * 2
    assert list((tmp_path / "0").iterdir()) == []


def without(blocks_of, number):
    owned = list(blocks_of.blocks)
    del owned[number]
    return OwnedBlocks(blocks_of.shape, blocks_of.dtype, owned)


CHANGES = {
    "a block is missing": (
        lambda v: without(v, 1), r"no block holds its element \[3, 0\]",
    ),
    "a block is double": (
        lambda v: OwnedBlocks(v.shape, v.dtype, [*v.blocks, Block((0, 0), np.zeros((1, 1), "f4"))]),
        r"two blocks hold its element \[0, 0\]",
    ),
    "another shape": (lambda v: OwnedBlocks((12, 9), v.dtype, v.blocks), r"\[12, 9\] on process"),
    "another dtype": (lambda v: OwnedBlocks(v.shape, np.dtype("f8"), v.blocks), "float64"),
    "whole": (lambda v: np.zeros(v.shape, "f4"), "is not divided on process"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_processes_whose_state_does_not_fit_together(store, what):
    action, said = CHANGES[what]

    def change(rank, contents):
        if rank == (0 if what == "a block is missing" else 1):
            model = dict(contents.arrays["model"])
            model["net/dense/kernel"] = action(model["net/dense/kernel"])
            return contents._replace(arrays={**contents.arrays, "model": model})
        return None

    errors = save(store.directory, 5, change=change)
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert re.search(said, str(error))
        assert "net/dense/kernel" in str(error)
    assert_nothing_changed(store.directory)


def test_a_process_that_dies_ends_the_save_on_the_others(store):
    def one(peers):
        if peers.rank == 1:
            peers.announce("save/folder")
            return  # its end of the connection is closed
        distributed.save(CheckpointStore(store.directory), 5, contents_of(0, 2), peers, "save")

    assert isinstance(together(2, one)[0], DistributedError)
    assert_nothing_changed(store.directory)


def test_what_reads_back_differently_is_not_published(store, monkeypatch):
    original = array_writer.write_arrays

    def write(path, *rest, **options):
        entry = original(path, *rest, **options)
        if path.name == "model-p00001.h5":
            alter(path, STATE["model"]["net/norm/gamma"][1:2])
        return entry

    monkeypatch.setattr(blocks, "write_arrays", write)
    for error in save(store.directory, 5):
        assert isinstance(error, CheckpointDamagedError)
        assert "model-p00001.h5: contents altered" in str(error)
    assert_nothing_changed(store.directory)


def test_a_file_that_cannot_be_read_now_is_no_damage(store, monkeypatch):
    checkpoint = store.load(store.path(5), lazy=True)

    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(blocks, "open_regular", fail)
    with pytest.raises(CheckpointUnreadableError, match="cannot be read at the moment"):
        np.asarray(checkpoint.arrays["model"]["net/norm/gamma"])


# --- the command line -----------------------------------------------------------------------------


def test_ls_and_show_know_blocks(store, capsys):
    assert main(["checkpoint", "ls", str(store.directory)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    assert main(["checkpoint", "show", str(store.path(5))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["format", "version:", "3"] for line in lines)
    kernel, bias = (
        next(line for line in lines if name in line)
        for name in ("  net/dense/kernel", "  net/dense/bias")
    )
    assert kernel.split() == ["net/dense/kernel", "float32", "(12,", "8)", "blocks:", "8"]
    assert bias.split() == ["net/dense/bias", "float32", "(8,)"]
    size = sum(value.nbytes for value in STATE["model"].values())
    assert f"model: 5 arrays, {size:,} bytes, 3 of them in blocks of several processes" in lines
