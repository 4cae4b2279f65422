"""Disks that refuse: limits, full and read-only file systems, logs that survive."""

import contextlib
import csv
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_saving import FULL, At, train


@contextlib.contextmanager
def file_size_limit(size):
    """Let the system refuse what is beyond a size of a file; root is not exempt."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_refusal_of_the_system_while_training(tmp_path, caplog):
    with file_size_limit(8192):
        trainer = train(tmp_path, max_steps=4)
    assert trainer.state.global_step == 4
    assert os.listdir(tmp_path) == ["run.json"]
    assert "File too large" in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB where mounting is allowed; elsewhere the other tests must do."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (
        shutil.which("mount")
        and not subprocess.run(command, capture_output=True, timeout=300).returncode
    ):
        yield tmp_path
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=300)
    else:
        yield None


def test_a_disk_that_is_really_full(small_disk, caplog):
    if small_disk is None:
        return
    filler = small_disk / "filler"

    def fill(trainer):
        trainer.saver.settle()
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(2**20))

    def make_room(trainer):
        trainer.saver.settle()
        filler.unlink()

    trainer = train(
        small_disk / "run",
        [At(3, fill), At(7, make_room)],
        report_to="json",
    )
    assert trainer.state.global_step == 8
    assert "No space left on device" in caplog.text
    left = ["checkpoint-2", "checkpoint-8", "log.jsonl", "run.json"]
    assert sorted(os.listdir(small_disk / "run")) == left
    text = (small_disk / "run" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_folder_that_becomes_read_only(small_disk, caplog):
    """Root, too, is refused by the system itself: a disk that is not writable is laid over it."""
    if small_disk is None:
        return
    folder = small_disk / "run"

    def run(*command):
        def act(trainer):
            trainer.saver.settle()
            subprocess.run([*command, str(folder)], check=True, timeout=300)

        return act

    cover = At(3, run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs"))
    trainer = train(folder, [cover, At(7, run("umount"))], report_to="json")
    assert trainer.state.global_step == 8
    assert "Read-only file system" in caplog.text
    assert "that this process can write to" in caplog.text
    left = ["checkpoint-2", "checkpoint-8", "log.jsonl", "run.json"]
    assert sorted(os.listdir(folder)) == left
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def steps_in_json(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def steps_in_csv(path):
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(
    ("tracker", "steps"), [("json", steps_in_json), ("csv", steps_in_csv)], ids=["json", "csv"]
)
def test_the_log_survives_a_disk_that_refuses(tmp_path, caplog, monkeypatch, tracker, steps):
    """Each line is written once, complete, as soon as there is disk space."""
    opened, full = Path.open, [False]
    file = tmp_path / {"json": "log.jsonl", "csv": "log.csv"}[tracker]

    def refusing(path, *args, **kwargs):
        if full[0] and path.stem == "log":
            raise FULL
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)

    def switch(value):
        return lambda trainer: full.__setitem__(0, value)

    train(tmp_path, [At(3, switch(True)), At(6, switch(False))], report_to=tracker)
    assert steps(file) == list(range(1, 9))
    assert caplog.text.count("Could not write") == 1
