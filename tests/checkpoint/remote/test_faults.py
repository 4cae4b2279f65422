"""Faults at every call of uploads, downloads and deletions: the last complete one, or none."""

import errno
import os

import numpy as np
import pytest
from faulty_files import FaultyFiles, Killed

from kbtrain.checkpoint.remote import files as remote_files
from kbtrain.checkpoint.remote.store import RemoteStore
from kbtrain.errors import CheckpointError, CheckpointUnreadableError

pytestmark = pytest.mark.neutral

ADDRESS = "faulty://bucket/run"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes the run's store on a new machine; the pauses between tries are noted."""
    FaultyFiles.wipe()
    pauses, count = [], iter(range(10**6))
    monkeypatch.setattr(remote_files, "_pause", pauses.append)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here

    def make(name=None):
        name = f"machine-{next(count)}" if name is None else name
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return RemoteStore(ADDRESS)

    make.pauses = pauses
    return make


def save(store, step):
    store.save(
        step,
        {"model": {"w": np.arange(5) / (step + 1)}},
        {"trainer_state": {"global_step": step}},
        other_files={"tokenizer/vocab.txt": b"%d" % step},
    )


def read(store):
    """The step and the bytes of what a reader on another machine finds."""
    FaultyFiles.reset()
    found = store.resolve("auto", log=lambda text: None)
    if found is None:
        return None
    expected = np.arange(5) / (found.step + 1)
    np.testing.assert_array_equal(found.arrays["model"]["w"], expected, strict=True)
    assert found.documents["trainer_state"] == {"global_step": found.step}
    return found.step


def second_save(store):
    """What a run does after its first checkpoint is at the address."""
    save(store, 2)
    store.send()
    store.rotate(1)


def prepared(machine):
    FaultyFiles.wipe()
    store = machine()
    save(store, 1)
    store.send()
    FaultyFiles.reset()
    return store


def calls_of(action, *args):
    """How many calls to the file system an action takes."""
    FaultyFiles.reset()
    action(*args)
    return len(FaultyFiles.calls)


@pytest.mark.core
def test_a_process_that_dies_at_any_call_leaves_the_last_complete_checkpoint(machine):
    total = calls_of(second_save, prepared(machine))
    seen = []
    for number in range(1, total + 1):
        store = prepared(machine)
        FaultyFiles.reset("killed", number)
        with pytest.raises(Killed):
            second_save(store)
        seen.append(read(machine()))
    assert seen == sorted(seen)  # from some call on the new one, and never less
    assert set(seen) == {1, 2}


def test_a_first_upload_that_dies_leaves_nothing(machine):
    def first_save():
        store = machine()
        save(store, 1)
        store.send()

    total = calls_of(first_save)
    seen = []
    for number in range(1, total + 1):
        FaultyFiles.wipe()
        FaultyFiles.reset("killed", number)
        with pytest.raises(Killed):
            first_save()
        seen.append(read(machine()))
    assert seen == sorted(seen, key=lambda step: step or 0)
    assert set(seen) == {None, 1}


@pytest.mark.parametrize("kind", ["error", "late", "truncate"])
@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, RuntimeError])
def test_a_passing_fault_at_any_call_changes_nothing(machine, kind, error):
    if kind == "truncate" and error is not TimeoutError:
        error = OSError  # it raises none; a second row of faults after the first
    length = 1 if error is TimeoutError else 3
    total = calls_of(second_save, prepared(machine))
    for number in range(1, total + 1, 1 if error is TimeoutError else 4):
        store = prepared(machine)
        FaultyFiles.reset(kind, number, number + length - 1, error)
        second_save(store)
        FaultyFiles.reset()
        assert [step for step, _ in store.kept()] == [2], number
        assert read(machine()) == 2, number
        assert not any("uploading" in name for name in FaultyFiles.store), number
    if kind == "error" and length == 3:
        first, second, third = machine.pauses[:3]
        assert 1 <= first <= 1.25
        assert 2 <= second <= 2.5
        assert 4 <= third <= 5


def test_a_network_that_goes_down_at_any_call_and_comes_back(machine):
    total = calls_of(second_save, prepared(machine))
    for number in range(1, total + 1):
        store = prepared(machine)
        FaultyFiles.reset("error", number, 10**6, ConnectionError)
        with pytest.raises((CheckpointError, OSError), match="injected"):
            second_save(store)
        assert read(machine()) in (1, 2)
        save(store, 3)
        store.send()
        store.rotate(1)
        assert [step for step, _ in store.kept()] == [3], number
        assert read(machine()) == 3


def test_an_upload_that_fails_is_a_storage_error_and_is_made_up_for(machine, caplog):
    store = prepared(machine)
    FaultyFiles.reset("error", 1, 10**6, TimeoutError)
    save(store, 2)
    with pytest.raises(CheckpointError, match="Could not upload checkpoint-2 to faulty://") as info:
        store.send()
    assert isinstance(info.value.__cause__, OSError)
    assert len(machine.pauses) == remote_files.ATTEMPTS - 1
    store.rotate(1)  # what is at the address stays until there is a newer one
    FaultyFiles.reset()
    assert read(machine()) == 1
    save(store, 3)
    order = []
    store.files.put = lambda local, path, put=store.files.put: (
        order.append(path),
        put(local, path),
    )
    store.send()
    assert [path.partition("/")[0] for path in order] == sorted(p.partition("/")[0] for p in order)
    assert [step for step, _ in store.kept()][-1] == 3


def test_what_was_not_uploaded_is_found_by_the_same_machine(machine, caplog):
    store = prepared(machine)
    name = store.directory.parents[2].name
    FaultyFiles.reset("error", 1, 10**6, TimeoutError)
    save(store, 2)
    with pytest.raises(CheckpointError):
        store.send()
    assert read(machine()) == 1
    again = machine(name)
    assert read(again) == 2
    assert "checkpoint-2 was not uploaded when its process ended" in caplog.text
    assert read(machine()) == 2  # and it is there now


def test_what_another_run_did_not_upload_is_left_alone(machine):
    store = prepared(machine)
    name = store.directory.parents[2].name
    other = machine(name)
    save(other, 5)  # a fresh run at the same address, killed before its first upload
    again = machine(name)
    assert read(again) == 1
    again.send()
    assert [step for step, _ in again.kept()] == [1]
    assert (again.directory / "checkpoint-5").is_dir()


def test_a_copy_that_was_deleted_at_the_address_does_not_come_back(machine):
    store = prepared(machine)
    name = store.directory.parents[2].name
    FaultyFiles.store.clear()
    assert read(machine(name)) is None


def test_another_machine_of_the_run_brings_what_process_0_has_found(machine):
    prepared(machine)
    other = machine()
    other.bring("checkpoint-1")
    FaultyFiles.reset()
    np.testing.assert_array_equal(
        other.follow("checkpoint-1").arrays["model"]["w"], np.arange(5) / 2
    )
    other.bring("checkpoint-1")  # it is there, and nothing is asked for
    assert FaultyFiles.calls == []


# --- reading --------------------------------------------------------------------------------------


def two_checkpoints(machine):
    store = prepared(machine)
    save(store, 2)
    store.send()


@pytest.mark.parametrize("kind", ["error", "truncate"])
def test_a_passing_fault_while_reading(machine, kind):
    two_checkpoints(machine)
    total = calls_of(lambda: machine().resolve("auto"))
    for number in range(1, total + 1):
        reader = machine()
        FaultyFiles.reset(kind, number)
        assert reader.resolve("auto").step == 2


def test_a_network_that_is_down_is_no_damage(machine):
    two_checkpoints(machine)
    total = calls_of(lambda: machine().resolve("auto"))
    for number in range(1, total + 1):
        reader = machine()
        FaultyFiles.reset("error", number, 10**6)
        with pytest.raises(CheckpointUnreadableError, match="training does not start over"):
            reader.resolve("auto")


@pytest.mark.parametrize("damage", ["missing", "shorter", "altered", "manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(machine, damage):
    two_checkpoints(machine)
    file = "manifest.json" if damage == "manifest" else "model.weights.h5"
    stored = FaultyFiles.store[f"/bucket/run/checkpoint-2/{file}"]
    data = bytearray(stored.getvalue())
    if damage == "missing":
        del FaultyFiles.store[f"/bucket/run/checkpoint-2/{file}"]
    else:
        data[len(data) // 2] ^= 1
        stored.seek(0)
        stored.truncate()
        stored.write(data[:-1] if damage == "shorter" else data)
    reports = []
    reader = machine()
    assert reader.resolve(True, log=reports.append).step == 1
    assert len(reports) == 1
    assert f"{ADDRESS}/checkpoint-2 is damaged: {file}" in reports[0]
    assert "Trying the next older one" in reports[0]
    save(reader, 2)  # the resumed run comes to this step again
    reader.send()
    assert read(machine()) == 2


def test_denied_is_said_at_once(machine):
    store = machine()
    FaultyFiles.reset("error", 1, 10**6, PermissionError)
    with pytest.raises(CheckpointError, match="Could not write to faulty.*credentials") as info:
        store.check_access()
    assert isinstance(info.value.__cause__, PermissionError)
    assert machine.pauses == []
    assert info.value.__cause__.errno != errno.EIO
