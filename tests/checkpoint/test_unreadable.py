"""What cannot be read is not damaged, and what is another program's is not deleted."""

import errno
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest

from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.storage import faults
from kbtrain.checkpoint.storage.lock import RunLock
from kbtrain.cli import main
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointUnreadableError,
    is_storage_error,
)
from kbtrain.utils.files import filesystem

TRANSIENT = ["EIO", "ESTALE", "EMFILE", "ENFILE", "EACCES", "EPERM", "ENOMEM", "ETIMEDOUT"]


def save(store, step):
    arrays = {"model": {"w": np.full(3, step, "float32")}, "optimizer": {}}
    return store.save(step, arrays, {"trainer_state": {"global_step": step}})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints of a former run."""
    store = CheckpointStore(tmp_path / "run")
    for step in (100, 200):
        save(store, step)
    return store.directory


class Refusing(io.FileIO):
    """A file that the system opens and does not read."""

    error = None

    def readinto(self, buffer):
        raise Refusing.error

    def read(self, size=-1):
        raise Refusing.error


def refuse(monkeypatch, error, call, ending):
    """Let one kind of call fail for files with a name that ends like this."""
    if call == "read":
        Refusing.error = error
        real = io.FileIO

        def opened(file, *rest, **more):
            return real(file, *rest, **more)

        def open_regular(path):
            return Refusing(path, "rb") if str(path).endswith(ending) else opened(path, "rb")

        for module in ("format", "manifest", "folder_reader"):
            target = __import__(f"kbtrain.checkpoint.storage.{module}", fromlist=["x"])
            if hasattr(target, "open_regular"):
                monkeypatch.setattr(target, "open_regular", open_regular)
        return
    original = getattr(os, call)

    def failing(path, *rest, **more):
        if isinstance(path, str | os.PathLike) and str(path).endswith(ending):
            raise error
        return original(path, *rest, **more)

    monkeypatch.setattr(os, call, failing)


POINTS = [
    ("listdir", "run"),
    ("stat", "checkpoint-200"),
    ("lstat", "checkpoint-200"),
    ("open", "manifest.json"),
    ("lstat", "manifest.json"),
    ("open", "model.weights.h5"),
    ("lstat", "optimizer.h5"),
    ("open", "trainer_state.json"),
    ("read", "manifest.json"),
    ("read", "model.weights.h5"),
    ("read", "trainer_state.json"),
]


@pytest.mark.parametrize("resume", [True, "auto", "path"])
@pytest.mark.parametrize(("call", "ending"), POINTS)
def test_a_run_is_not_begun_anew_over_what_cannot_be_read(
    folder, monkeypatch, resume, call, ending
):
    before = names(folder)
    for name in TRANSIENT:
        store, said = CheckpointStore(folder), []
        error = OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        asked = folder / "checkpoint-200" if resume == "path" else resume
        if resume == "path" and call == "listdir":
            asked = folder
        with monkeypatch.context() as patch:
            refuse(patch, error, call, ending)
            with pytest.raises(CheckpointUnreadableError, match=error.strerror) as caught:
                store.resolve(asked, said.append)
        assert said == []
        assert "does not mean that it is damaged" in str(caught.value)
        assert is_storage_error(caught.value)
    assert names(folder) == before
    assert CheckpointStore(folder).resolve(resume if resume != "path" else folder).step == 200


def test_too_little_memory_is_no_damage_either(folder, monkeypatch):
    def empty(*arguments, **more):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", empty)
        with pytest.raises(CheckpointUnreadableError, match=r"memory.*Free memory"):
            CheckpointStore(folder).resolve("auto")
    assert CheckpointStore(folder).resolve("auto").step == 200


def test_the_message_says_what_helps(folder, monkeypatch):
    for name, advice in {"EMFILE": "ulimit -n", "EACCES": "chmod", "EIO": "the disk"}.items():
        error = faults.unreadable(
            folder / "checkpoint-200" / "a.h5", OSError(getattr(errno, name), name)
        )
        assert advice in str(error)
        assert f"move {folder / 'checkpoint-200'} elsewhere" in str(error)
    assert "elsewhere" not in str(faults.unreadable(folder, OSError(errno.EIO, "EIO")))


def test_a_file_that_is_missing_is_damage(folder):
    (folder / "checkpoint-200" / "optimizer.h5").unlink()
    with pytest.raises(CheckpointDamagedError):
        CheckpointStore(folder).load(folder / "checkpoint-200")
    assert CheckpointStore(folder).resolve("auto", lambda message: None).step == 100


def test_the_command_line_tells_unreadable_from_damaged(folder, monkeypatch, capsys):
    (folder / "checkpoint-100" / "optimizer.h5").unlink()
    refuse(monkeypatch, OSError(errno.EIO, "Input/output error"), "open", "200/manifest.json")
    assert main(["checkpoint", "ls", str(folder)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert ["DAMAGED" in row for row in rows] == [True, False]
    assert "UNREADABLE" in rows[1]
    assert main(["checkpoint", "verify", str(folder)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint-100: DAMAGED"
    assert "checkpoint-200: UNREADABLE" in lines


def test_a_lock_is_kept_and_taken_once_while_the_disk_does_not_answer(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    lock.acquire()
    with monkeypatch.context() as patch:
        refuse(patch, OSError(errno.ESTALE, "Stale file handle"), "stat", ".kbtrain.lock")
        lock.acquire()
        assert lock.is_held
        other = RunLock(tmp_path / "other")
        with pytest.raises(OSError, match="Stale"):  # and no endless loop
            other.acquire()
    lock.release()
    assert not (tmp_path / ".kbtrain.lock").exists()


# --- what is another's ----------------------------------------------------------------------------


def newer(path):
    """Make a checkpoint one of a later kbtrain."""
    file = path / "manifest.json"
    value = json.loads(file.read_text()) | {"format_version": 4, "checksum": "0" * 64}
    data = json.dumps(value, indent=2, sort_keys=True).encode()
    own = b'"checksum": "' + hashlib.sha256(data).hexdigest().encode()
    file.write_bytes(data.replace(b'"checksum": "' + b"0" * 64, own, 1))


def transformers(path):
    shutil.rmtree(path)
    path.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"theirs")
    (path / "trainer_state.json").write_text("{}")


def strange(path):
    shutil.rmtree(path)
    (path / "variables").mkdir(parents=True)
    (path / "variables" / "data").write_bytes(b"theirs")


OTHERS = {"newer": newer, "transformers": transformers, "strange": strange}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("resume", [True, "auto", "path"])
def test_no_run_begins_over_checkpoints_of_another_program(folder, kind, resume):
    OTHERS[kind](folder / "checkpoint-200")
    before = contents(folder)
    asked = folder / "checkpoint-200" if resume == "path" else resume
    advice = "Update kbtrain" if kind == "newer" else "another output_dir"
    with pytest.raises(CheckpointFormatError, match=advice):
        CheckpointStore(folder).resolve(asked)
    assert contents(folder) == before


@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints_of_another_program_are_never_touched(folder, kind):
    for step in (100, 200):
        OTHERS[kind](folder / f"checkpoint-{step}")
    before = contents(folder)
    store = CheckpointStore(folder)
    assert store.resolve(None) is None
    for step in (1, 2, 3):
        save(store, step)
        store.rotate(1)
    with pytest.raises(CheckpointError, match="Could not write checkpoint-200.*left unchanged"):
        save(store, 200)
    store.keep_only(store.path(3))
    assert {
        n: c for n, c in contents(folder).items() if not n.startswith("checkpoint-3/")
    } == before
    assert "checkpoint-3" in names(folder)
    assert store.resolve(folder / "checkpoint-3").step == 3


def test_a_fresh_run_deletes_nothing_of_a_former_one(folder):
    store = CheckpointStore(folder)
    store.resolve(None)
    for step in (1, 2, 3):
        save(store, step)
        store.rotate(2)
    assert names(folder) == ["checkpoint-100", "checkpoint-2", "checkpoint-200", "checkpoint-3"]
    store.resolve(None)  # and a further one in the same process deletes nothing of this one
    save(store, 4)
    assert store.rotate(1) == []


def test_a_run_that_goes_on_deletes_what_it_wrote_before(folder):
    store = CheckpointStore(folder)
    assert store.resolve("auto").step == 200
    save(store, 300)
    assert [path.name for path in store.rotate(2)] == ["checkpoint-100"]
    again = CheckpointStore(folder)
    again.resolve(True)
    save(again, 400)
    assert [path.name for path in again.rotate(1)] == ["checkpoint-200", "checkpoint-300"]


def test_checkpoints_without_a_run_are_kept_but_the_one_resumed_from(folder):
    """Earlier kbtrains noted no run."""
    for step in (100, 200):
        file = folder / f"checkpoint-{step}" / "manifest.json"
        value = json.loads(file.read_text()) | {"checksum": "0" * 64}
        del value["run"]
        data = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
        own = b'"checksum": "' + hashlib.sha256(data).hexdigest().encode()
        file.write_bytes(data.replace(b'"checksum": "' + b"0" * 64, own, 1))
    store = CheckpointStore(folder)
    store.resolve(True)
    save(store, 300)
    assert [path.name for path in store.rotate(1)] == ["checkpoint-200"]
    assert names(folder) == ["checkpoint-100", "checkpoint-300"]


def test_what_a_dead_process_left_elsewhere_is_removed(tmp_path):
    here = f"0a1b{filesystem._host()}"
    dead, alive = 2**31 - 1, os.getppid()
    gone = tmp_path / f".tmp-{dead}-{here}-model.keras"
    elsewhere = "ffff" if filesystem._host() != "ffff" else "0000"
    stay = [
        tmp_path / f".tmp-{alive}-{here}-model.keras",
        tmp_path / f".tmp-{dead}-0a1b{elsewhere}-model.keras",
        tmp_path / ".tmp-notes",
    ]
    old = tmp_path / f".tmp-{dead}-0a1bffff-old.keras"
    for path in (gone, *stay, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    with filesystem.replacing(tmp_path / "model.keras") as temporary:
        temporary.write_bytes(b"whole")
    assert names(tmp_path) == sorted([*(path.name for path in stay), "model.keras"])
