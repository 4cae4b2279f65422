"""One run per folder, and no lock outlives its process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from kbtrain.checkpoint.storage.lock import LOCK_NAME, RunLock
from kbtrain.errors import FolderInUseError

HOLDER = """
import sys, time
from kbtrain.checkpoint.storage.lock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_run_is_refused_and_told_about_the_first(other_process, tmp_path):
    with pytest.raises(FolderInUseError) as caught:
        RunLock(tmp_path / "run").acquire()
    message = str(caught.value)
    assert f"process {other_process.pid} on {socket.gethostname()}, since 2" in message
    assert str(tmp_path / "run") in message
    assert "choose another output_dir" in message


def test_a_killed_process_does_not_block(other_process, tmp_path):
    other_process.send_signal(signal.SIGKILL)
    other_process.wait(timeout=60)
    assert (tmp_path / "run" / LOCK_NAME).exists()
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert json.loads((tmp_path / "run" / LOCK_NAME).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_release_leaves_nothing_and_lets_the_next_in(tmp_path):
    lock, next_one = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    lock.acquire()
    lock.acquire()
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "):
        next_one.acquire()
    lock.release()
    assert not (tmp_path / "run").exists()
    next_one.acquire()
    (tmp_path / "run" / "checkpoint-1").mkdir()
    next_one.release()
    next_one.release()
    assert os.listdir(tmp_path / "run") == ["checkpoint-1"]


def test_a_folder_that_was_there_stays(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_deleted_folder_is_locked_anew(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    (tmp_path / "run" / LOCK_NAME).unlink()
    (tmp_path / "run").rmdir()
    lock.acquire()
    with pytest.raises(FolderInUseError):
        RunLock(tmp_path / "run").acquire()
    lock.release()


def test_a_lock_file_of_garbage_is_no_obstacle(tmp_path):
    (tmp_path / LOCK_NAME).write_bytes(b"\xff{")
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK_NAME).write_bytes(b"\xff{")
    with pytest.raises(FolderInUseError, match="an unknown process"):
        RunLock(tmp_path).acquire()
    lock.release()


def test_many_threads_one_owner(tmp_path):
    got, barrier = [], threading.Barrier(8)

    def compete():
        lock = RunLock(tmp_path)
        barrier.wait()
        try:
            lock.acquire()
        except FolderInUseError:
            return
        got.append(lock)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_a_forked_worker_does_not_hold_the_lock(tmp_path):
    """Its parent may be killed while it lives on."""
    program = (
        "import os, sys, time\nfrom kbtrain.checkpoint.storage.lock import RunLock\n"
        "RunLock(sys.argv[1]).acquire()\n"
        "child = os.fork()\n"
        # 0 in the child, once it has forgotten. One write each: two processes share the pipe.
        "os.write(1, b'%d\\n' % child)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = None
        try:
            child = max(int(parent.stdout.readline()) for _ in range(2))
            with pytest.raises(FolderInUseError):
                RunLock(tmp_path).acquire()
            parent.kill()
            parent.wait()
            lock = RunLock(tmp_path)
            lock.acquire()
            lock.release()
        finally:
            parent.kill()
            if child is not None:
                os.kill(child, signal.SIGKILL)


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "has no locks" in caplog.text
    lock.release()
