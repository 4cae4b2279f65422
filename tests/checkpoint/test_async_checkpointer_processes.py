"""Saves of several processes: one writes what is whole, each its blocks; all learn of failures."""

import threading

import numpy as np
import pytest
from helpers_peers import cut, together
from helpers_saving import FULL

from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer, Snapshot
from kbtrain.checkpoint.storage import blocks, folder_writer
from kbtrain.checkpoint.storage.lock import LOCK_NAME, RunLock
from kbtrain.errors import CheckpointError, FolderInUseError

pytestmark = pytest.mark.core

KERNEL = np.arange(12.0).reshape(4, 3)


def snapshot(step, peers, divided=True, **more):
    bias = {"b": np.full(2, step)} if peers.rank == 0 else {}
    kernel = {"w": cut(KERNEL + step, (2, 1), peers.rank, peers.size)} if divided else {}
    return Snapshot(step, {"model": kernel | bias}, {"trainer_state": {}}, {}, **more)


def saver_of(directory, peers):
    return AsyncCheckpointer(CheckpointStore(directory), peers.rank == 0, peers)


def steps(saver):
    return [step for step, _ in saver.store.list()]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("divided", [True, False])
def test_when_the_wait_is_over_any_process_can_read(tmp_path, background, divided):
    def one(peers):
        saver = saver_of(tmp_path / "run", peers)
        with saver.running(True, "raise"):
            for step in (1, 2, 3):
                saver.save(snapshot(step, peers, divided, keep=2), background, "raise")
                saver.poll()
                saver.wait()
                checkpoint = CheckpointStore(tmp_path / "run").load(saver.store.path(step))
                assert saver.store.owns(checkpoint.path)
                if divided:
                    np.testing.assert_array_equal(checkpoint.arrays["model"]["w"], KERNEL + step)
                np.testing.assert_array_equal(checkpoint.arrays["model"]["b"], [step, step])
        return checkpoint.manifest.format_version

    assert together(2, one) == [3 if divided else 2] * 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-2", "checkpoint-3",
    ]  # fmt: skip


def failing_once(monkeypatch, module, file):
    """Let the first write of a file fail, as on a full disk."""
    original, failed = module.write_arrays, []

    def write(path, *rest):
        if path.name == file and not failed:
            failed.append(path)
            raise FULL
        return original(path, *rest)

    monkeypatch.setattr(module, "write_arrays", write)


FAILURES = [
    (True, blocks, "model-p00000.h5"),
    (True, blocks, "model-p00001.h5"),
    (True, folder_writer, "model.h5"),
    (False, folder_writer, "model.weights.h5"),
]


@pytest.mark.parametrize(("divided", "module", "file"), FAILURES)
@pytest.mark.parametrize("background", [True, False])
def test_a_failure_of_one_is_a_warning_of_all(
    tmp_path, monkeypatch, caplog, background, divided, module, file
):
    failing_once(monkeypatch, module, file)
    both = threading.Barrier(2)

    def one(peers):
        saver, failed = saver_of(tmp_path / "run", peers), []
        with saver.running(True, "warn"):
            saved = saver.save(
                snapshot(1, peers, divided), background, "warn", lambda: failed.append(1)
            )
            assert saved == background
            saver.settle()
            both.wait(30)
            if background:
                saver.poll()
                assert failed == [], "until the next save it counts as written on all alike"
            saver.save(snapshot(2, peers, divided), background, "warn", lambda: failed.append(2))
            saver.wait()
        return failed, steps(saver)

    assert together(2, one) == [([1], [2])] * 2
    warnings = [record.message for record in caplog.records if "on_save_error" in record.message]
    assert len(warnings) == 2
    assert all("No space left" in text for text in warnings)


@pytest.mark.parametrize(("divided", "module", "file"), FAILURES)
def test_a_failure_of_one_is_an_error_of_all(tmp_path, monkeypatch, divided, module, file):
    failing_once(monkeypatch, module, file)

    def one(peers):
        saver = saver_of(tmp_path / "run", peers)
        with saver.running(True, "raise"):
            saver.save(snapshot(1, peers, divided), True, "raise")
            saver.settle()
            saver.poll()

    errors = together(2, one)
    assert [isinstance(error, CheckpointError) for error in errors] == [True, True]
    assert ["No space left" in str(error) for error in errors] == [True, True]
    own = 1 if file == "model-p00001.h5" else 0
    assert [str(error).startswith(f"Process {own}: ") for error in errors] == [own == 1, own == 0]


def test_a_folder_that_another_run_has_is_an_error_of_all(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()

    def one(peers):
        with saver_of(tmp_path / "run", peers).running(True, "warn"):
            pass

    errors = together(2, one)
    lock.release()
    assert [type(error) for error in errors] == [FolderInUseError] * 2


def test_process_0_alone_locks_the_folder_and_removes_leftovers(tmp_path, monkeypatch):
    cleaned, directory = [], tmp_path / "run"

    def clean(store, alone):
        cleaned.append(alone)

    monkeypatch.setattr(CheckpointStore, "clean_leftovers", clean)
    both = threading.Barrier(2)

    def one(peers):
        saver = saver_of(directory, peers)
        with saver.running(True, "raise"):
            both.wait(30)
            locked = (directory / LOCK_NAME).exists()
            both.wait(30)
        return locked, saver._lock.is_held

    assert together(2, one) == [(True, False)] * 2
    assert cleaned == [True]


def test_without_peers_the_others_do_nothing(tmp_path):
    saver = AsyncCheckpointer(CheckpointStore(tmp_path / "run"), writes=False)
    with saver.running(True, "raise"):
        arrays = {"model": {"b": np.ones(2)}}
        assert saver.save(Snapshot(1, arrays, {}, {}), True, "raise")
        saver.wait()
    assert not (tmp_path / "run").exists()
