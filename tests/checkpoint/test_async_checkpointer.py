"""Background saves: one at a time, deferred errors, complete checkpoints."""

import os
import threading

import numpy as np
import pytest
from helpers_saving import FULL

from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer, Snapshot
from kbtrain.errors import CheckpointError, FolderInUseError

pytestmark = pytest.mark.core


def snapshot(step, **more):
    return Snapshot(step, {"model": {"w": np.full(3, step)}}, {"trainer_state": {}}, {}, **more)


class GatedStore(CheckpointStore):
    """Writes go through a gate that the test opens."""

    def __init__(self, directory):
        super().__init__(directory)
        self.gate = threading.Event()
        self.fail = None
        self.began = []

    def save(self, step, *rest):
        self.began.append(step)
        assert self.gate.wait(30)
        if self.fail is not None:
            raise self.explain_failure(self.path(step), self.fail) from self.fail
        return super().save(step, *rest)


@pytest.fixture
def store(tmp_path):
    return GatedStore(tmp_path / "run")


def steps(store):
    return [step for step, _ in store.list()]


def test_training_goes_on_while_a_checkpoint_is_written(store):
    saver = AsyncCheckpointer(store)
    with saver.running(True, "warn"):
        assert saver.save(snapshot(1), True, "warn")
        saver.poll()
        assert steps(store) == []
        store.gate.set()
        saver.wait()
        assert steps(store) == [1]


def test_at_most_one_is_in_flight(store):
    saver = AsyncCheckpointer(store)
    with saver.running(True, "warn"):
        saver.save(snapshot(1), True, "warn")
        threading.Timer(0.05, store.gate.set).start()
        saver.save(snapshot(2), True, "warn")
        assert 1 in steps(store)
    assert steps(store) == [1, 2]


def test_the_end_of_a_run_waits(store):
    saver = AsyncCheckpointer(store)
    with saver.running(True, "warn"):
        saver.save(snapshot(1), True, "warn")
        threading.Timer(0.05, store.gate.set).start()
    assert steps(store) == [1]


def test_an_exception_in_training_waits_too_and_comes_through(store, caplog):
    saver = AsyncCheckpointer(store)
    store.fail = FULL

    def run():
        with saver.running(True, "raise"):
            saver.save(snapshot(1), True, "raise")
            threading.Timer(0.05, store.gate.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "No space left" in caplog.text


def test_a_second_interrupt_does_not_wait_and_the_write_still_ends(store):
    saver = AsyncCheckpointer(store)

    def run():
        with saver.running(True, "warn"):
            saver.save(snapshot(1), True, "warn")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert steps(store) == []
    with pytest.raises(FolderInUseError), AsyncCheckpointer(store).running(True, "warn"):
        pass
    store.gate.set()
    saver.settle()
    assert steps(store) == [1]
    with AsyncCheckpointer(store).running(True, "warn"):  # the folder is free again
        pass
    with saver.running(True, "warn"):
        saver.save(snapshot(2), False, "warn")
    assert steps(store) == [1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_warn_logs_the_failure_and_training_continues(store, caplog, background):
    saver, failed = AsyncCheckpointer(store), []
    store.gate.set()
    store.fail = FULL
    with saver.running(True, "warn"):
        saver.save(snapshot(1), background, "warn", lambda: failed.append(1))
        saver.wait()
        assert failed == [1]
        store.fail = None
        assert saver.save(snapshot(2), background, "warn")
    assert steps(store) == [2]
    assert "No space left on device" in caplog.text
    assert "Training continues" in caplog.text


def test_raise_comes_out_at_the_next_look(store):
    saver = AsyncCheckpointer(store)
    store.fail = FULL
    looks = []

    def run():
        with saver.running(True, "raise"):
            saver.save(snapshot(1), True, "raise")
            looks.append(saver.poll())  # not yet
            store.gate.set()
            saver.settle()
            looks.append(saver.poll())

    with pytest.raises(CheckpointError, match="No space left"):
        run()
    assert len(looks) == 1
    with saver.running(True, "raise"):
        pass  # and once only


def test_what_is_no_trouble_of_the_disk_is_raised_in_any_case(tmp_path):
    saver = AsyncCheckpointer(CheckpointStore(tmp_path))
    bad = Snapshot(1, {}, {"trainer_state": {"x": object()}}, {})

    def run():
        with saver.running(True, "warn"):
            saver.save(bad, True, "warn")

    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        run()


def test_old_ones_are_deleted_only_after_the_new_one_is_verified(tmp_path, monkeypatch):
    saver, seen = AsyncCheckpointer(CheckpointStore(tmp_path)), []
    rotate = CheckpointStore.rotate

    def watched(store, *rest):
        seen.append([(step, store.verify(path)) for step, path in store.list()])
        return rotate(store, *rest)

    monkeypatch.setattr(CheckpointStore, "rotate", watched)
    with saver.running(True, "warn"):
        for step in (1, 2):
            saver.save(snapshot(step, keep=1), True, "warn")
    assert seen == [[(1, [])], [(1, []), (2, [])]]
    assert steps(saver.store) == [2]


def test_bytes_that_change_on_their_way_to_the_disk_make_no_checkpoint(
    tmp_path, monkeypatch, caplog
):
    saver, fsync = AsyncCheckpointer(CheckpointStore(tmp_path)), os.fsync
    with saver.running(True, "warn"):
        saver.save(snapshot(1, keep=1), True, "warn")
        saver.wait()

        def rotting(descriptor):
            size = os.fstat(descriptor).st_size
            if size > 1000 and not os.path.isdir(f"/dev/fd/{descriptor}"):
                os.pwrite(descriptor, b"\x55", size // 2)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", rotting)
        saver.save(snapshot(2, keep=1), True, "warn")
    assert "reads back differently" in caplog.text
    assert steps(saver.store) == [1]
    assert saver.store.latest_intact().step == 1


def test_a_reader_never_meets_anything_but_whole_checkpoints(tmp_path):
    """It reads for as long as a run writes, replaces and deletes."""
    seen, stop = [], threading.Event()

    def read():
        store = CheckpointStore(tmp_path)
        while not stop.is_set():
            checkpoint = store.latest_intact(seen.append)
            if checkpoint is not None:
                assert len(set(checkpoint.arrays["model"]["w"])) == 1

    reader = threading.Thread(target=read)
    reader.start()
    saver = AsyncCheckpointer(CheckpointStore(tmp_path))
    try:
        with saver.running(True, "raise"):
            for step in range(40):
                saver.save(snapshot(step, keep=3), True, "raise")
    finally:
        stop.set()
        reader.join()
    # A folder may be deleted while it is read: then it is gone, and a newer one is there.
    assert [message for message in seen if "altered" in message or "bytes instead" in message] == []
