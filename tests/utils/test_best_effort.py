"""Nothing that only talks about a run ends it: streams, handlers, trackers, log lines."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data
from paths import SUPPORT

from kbtrain import ConfigurationError, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.checkpoint import CheckpointStore
from kbtrain.trackers import base
from kbtrain.trackers.csv_table import CsvCallback
from kbtrain.trackers.json_lines import JsonLinesCallback


class Stream(io.TextIOBase):
    """A screen that refuses."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def isatty(self):
        return True

    def write(self, text):
        raise self.error

    flush = write = write


BROKEN = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "gone": OSError(errno.EIO, "Input/output error"),
    "closed pipe": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "closed": ValueError("I/O operation on closed file."),
    "other encoding": UnicodeEncodeError("ascii", "x", 0, 1, "ordinal not in range"),
}


def train(folder, callbacks=(), resume=None, **changes):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": None}
    trainer = Trainer(
        linear_model(), arguments(folder, **(settings | changes)), train_dataset=make_data(),
        eval_dataset=make_data(), loss="mse", callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(resume)
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("bar", [True, False])
def test_a_screen_that_refuses_does_not_end_a_run(tmp_path, monkeypatch, fault, bar):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Stream(BROKEN[fault]))
    monkeypatch.setattr(logging.getLogger("kbtrain"), "level", logging.INFO)
    trainer = train(
        tmp_path, disable_tqdm=not bar, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.log_metrics("train", {"train_loss": 0.5})
    assert trainer.state.global_step == 2


def test_a_program_without_streams(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    trainer = train(tmp_path)
    trainer.log_metrics("train", {"train_loss": 0.5})
    assert trainer.state.global_step == 3


PROGRAM = """
import sys
from helpers import arguments, linear_model, make_data
from kbtrain import Trainer
args = arguments(sys.argv[1], max_steps=2, save_strategy="steps", save_steps=1)
Trainer(linear_model(), args, train_dataset=make_data(), loss="mse").fit()
with open(sys.argv[1] + "/end", "w") as file:
    file.write("reached")
"""


@pytest.mark.neutral
def test_a_disk_that_takes_no_more_output(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(SUPPORT)])}
    with open("/dev/full", "w") as full:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=full, stderr=full,
            env=environment, check=False, timeout=300,
        )  # fmt: skip
    assert (tmp_path / "end").read_text() == "reached"
    assert CheckpointStore(tmp_path).latest_intact().step == 2


def test_a_line_that_the_screens_encoding_lacks_is_shown_in_ascii(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", screen)
    state = TrainerState(global_step=1, max_steps=2)
    PrinterCallback().on_log(None, state, TrainerControl(), logs={"größe": 1.5})
    screen.flush()
    assert screen.buffer.getvalue() == b"step 1/2: gr\\xf6\\xdfe 1.5\n"


@pytest.mark.parametrize("fault", ["full", "closed"])
def test_a_log_handler_of_the_user_that_fails(tmp_path, fault):
    class Handler(logging.Handler):
        def emit(self, record):
            raise BROKEN[fault]

    handler = Handler()
    logger = logging.getLogger("kbtrain")
    logger.addHandler(handler)
    try:
        trainer = train(tmp_path, max_steps=2)
        logger.warning("something")
    finally:
        logger.removeHandler(handler)
    assert trainer.state.global_step == 2


def test_a_bar_that_fails_is_reported_once(tmp_path, caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no widgets here")

    monkeypatch.setattr(ProgressCallback, "make_view", broken)
    trainer = train(tmp_path, [ProgressCallback(disable=False)])
    assert trainer.state.global_step == 3
    assert caplog.text.count("no widgets here") == 1


class Lost(base.Tracker):
    """A tracker whose package has errors of its own."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def _do(self, what):
        if what == self.where:
            raise RuntimeError("the server is gone")

    def open(self, args, trainer):
        self._do("open")

    def write(self, values, step):
        self._do("write")

    def finish(self, completed):
        self._do("finish")


@pytest.mark.parametrize("where", ["open", "write", "finish"])
def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, caplog, where):
    assert train(tmp_path, [Lost(where)]).state.global_step == 3
    assert "the server is gone" in caplog.text


@pytest.mark.parametrize("event", ["on_log", "on_step_end", "on_evaluate"])
@pytest.mark.parametrize("base", [TrainerCallback, PrinterCallback, ProgressCallback])
def test_what_a_callback_of_the_user_raises_ends_a_run(tmp_path, event, base):
    def raising(self, args, state, control, **kwargs):
        raise OSError(errno.ENOSPC, "mine")

    callback = type("Mine", (base,), {event: raising})()
    with pytest.raises(OSError, match="mine"):
        train(tmp_path, [callback], eval_strategy="steps", eval_steps=1)


def test_a_mistake_is_an_error_wherever_it_is_noticed(tmp_path):
    class Wrong(Lost):
        def open(self, args, trainer):
            raise ConfigurationError("no such project")

    with pytest.raises(ConfigurationError, match="no such project"):
        train(tmp_path, [Wrong("open")])


# --- lines of the log -----------------------------------------------------------------------------


class Quota(io.FileIO):
    """Closing it reports what writing did not, as on network disks."""

    on = False

    def close(self):
        was_open = not self.closed
        super().close()
        if was_open and Quota.on:
            Quota.on = False
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


class Settings:
    def __init__(self, folder):
        self.output_folder = folder


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", [JsonLinesCallback, CsvCallback])
def test_a_line_is_there_once_whatever_closing_its_file_says(tmp_path, monkeypatch, kind):
    opened = Path.open

    def quota(path, mode="r", *rest, **more):
        return Quota(path, "a") if mode == "ab" else opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", quota)
    log, state, args = kind(), TrainerState(max_steps=9), Settings(tmp_path)
    log.on_train_begin(args, state, TrainerControl())
    for step in range(1, 7):
        state.global_step, Quota.on = step, step in (2, 3, 6)
        more = {"late": 1.0} if step == 4 else {}  # a new column while a row is in doubt
        log.on_log(args, state, TrainerControl(), logs={"loss": float(step), **more})
    log.close()
    text = (tmp_path / log.file_name).read_text()
    if kind is JsonLinesCallback:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    else:
        assert [row.split(",")[0] for row in text.splitlines()] == ["step", *"123456"]


@pytest.mark.parametrize("name", ["json", "csv"])
def test_a_log_that_cannot_be_read_at_a_resume_is_cut_back_later(tmp_path, monkeypatch, name):
    settings = {"report_to": name, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    train(tmp_path, **settings)
    file = tmp_path / {"json": "log.jsonl", "csv": "log.csv"}[name]
    expected = len(file.read_text().splitlines())
    read, left = Path.read_bytes, [2]
    opened = Path.open

    def refuse(path):
        if path.stem == "log" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")

    def read_bytes(path):
        refuse(path)
        return read(path)

    def open_(path, mode="r", *rest, **more):
        if mode == "r":
            refuse(path)
        return opened(path, mode, *rest, **more)

    shutil_step = tmp_path / "checkpoint-3"
    for item in shutil_step.iterdir():
        item.unlink()
    shutil_step.rmdir()
    monkeypatch.setattr(
        Path, "read_bytes" if name == "json" else "open", read_bytes if name == "json" else open_
    )
    trainer = train(tmp_path, resume="auto", **settings)
    assert left == [0]
    assert trainer.state.global_step == 3
    assert len(file.read_text().splitlines()) == expected


@pytest.mark.parametrize("name", ["json", "csv"])
def test_a_run_that_is_complete_keeps_its_summary(tmp_path, name):
    settings = {"report_to": name, "save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(linear_model(), arguments(tmp_path, max_steps=2, **settings),
                      train_dataset=make_data(), loss="mse")  # fmt: skip
    trainer.fit()
    file = tmp_path / {"json": "log.jsonl", "csv": "log.csv"}[name]
    before = file.read_text()
    again = Trainer(linear_model(), arguments(tmp_path, max_steps=2, **settings),
                    train_dataset=make_data(), loss="mse")  # fmt: skip
    again.fit(resume_from_checkpoint="auto")
    assert file.read_text() == before
    # Killed between the last checkpoint and the summary: then there is one to write.
    file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    again.fit(resume_from_checkpoint="auto")
    assert len(file.read_text().splitlines()) == len(before.splitlines())
    assert "train_runtime" in file.read_text()


# --- callbacks and the state ----------------------------------------------------------------------


def test_an_event_method_on_an_object_is_called(tmp_path):
    seen = []
    callback = TrainerCallback()
    callback.on_log = lambda args, state, control, **kwargs: seen.append(state.global_step)

    class Late(TrainerCallback):
        pass

    late = Late()
    trainer = Trainer(
        linear_model(), arguments(tmp_path, max_steps=2), train_dataset=make_data(), loss="mse",
        callbacks=[callback, late],
    )  # fmt: skip
    late.on_step_end = lambda args, state, control, **kwargs: seen.append("step")
    trainer.fit()
    assert seen == ["step", 1, "step", 2, 2]
    callback.on_log = None
    seen.clear()
    trainer.fit()
    assert seen == ["step", "step"]


def test_an_event_method_on_an_object_that_cannot_be_called_is_refused(tmp_path):
    callback = TrainerCallback()
    callback.on_log = lambda args, state, control: None
    with pytest.raises(ConfigurationError, match=r"on_log.*\*\*kwargs"):
        Trainer(linear_model(), arguments(tmp_path), train_dataset=make_data(), loss="mse",
                callbacks=[callback])  # fmt: skip


def test_what_a_user_puts_on_the_state_does_not_end_a_run(tmp_path, caplog):
    def put(args, state, control, kwargs):
        state.note = np.array([1.5, 2.5])
        state.seen = {3, 1}
        state.handle = object()

    train(tmp_path, [Recorder({"on_train_begin": put})], save_strategy="steps", save_steps=1)
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert (saved["note"], saved["seen"]) == ([1.5, 2.5], [1, 3])
    assert "handle" not in saved
    assert caplog.text.count("TrainerState.handle cannot be saved") == 1
    assert train(tmp_path, resume=True, save_strategy="steps", save_steps=1, max_steps=4)


class Stateful(TrainerCallback):
    def state(self):
        return {"file": sys.stderr}

    def load_state(self, state):
        raise AssertionError


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_a_callbacks_state_that_is_no_json(tmp_path, caplog, policy):
    settings = {"save_strategy": "steps", "save_steps": 1, "on_save_error": policy}
    if policy == "raise":
        with pytest.raises(RuntimeError, match="state of the callback Stateful"):
            train(tmp_path, [Stateful()], **settings)
        return
    train(tmp_path, [Stateful()], **settings)
    assert "The state of the callback Stateful cannot be saved" in caplog.text
    assert train(tmp_path, [Stateful()], resume=True, max_steps=4, **settings)
