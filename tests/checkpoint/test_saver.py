"""The saver: background writes, one at a time, errors that come out, failures of the disk."""

import contextlib
import csv
import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, same, weights

from kbtrain import Trainer, TrainerCallback
from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer, Snapshot
from kbtrain.errors import CheckpointError, FolderInUseError
from kbtrain.training import best_model
from kbtrain.utils import filesystem

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


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
def test_warn_goes_on(store, caplog, background):
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


# --- the Trainer ----------------------------------------------------------------------------------


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(kwargs["trainer"])


def train(folder, callbacks=(), resume=None, **changes):
    args = arguments(
        folder,
        **({"save_strategy": "steps", "save_steps": 2, "max_steps": 8} | changes),
        per_device_train_batch_size=4,
    )
    trainer = Trainer(
        linear_model(), args, train_dataset=make_data(), eval_dataset=make_data(), loss="mse",
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(resume)
    return trainer


def test_saving_in_the_background_changes_nothing(tmp_path):
    kept = []
    for name, background in (("a", True), ("b", False)):
        trainer = train(tmp_path / name, save_async=background, save_total_limit=2)
        checkpoints = trainer.store.list()
        assert [step for step, _ in checkpoints] == [6, 8]
        kept.append([trainer.store.load(path).arrays for _, path in checkpoints])
    for first, second in zip(*kept, strict=True):
        for group in ("model", "optimizer"):
            assert [a.tobytes() for a in first[group].values()] == [
                b.tobytes() for b in second[group].values()
            ]


def test_the_snapshot_is_of_its_step_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    """The write is held back until training is four steps further."""
    held, save = threading.Event(), CheckpointStore.save

    def late(store, step, *rest):
        assert held.wait(30)
        return save(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", late)
    seen = []
    callbacks = [
        At(2, lambda trainer: seen.extend(weights(trainer.model))),
        At(6, lambda trainer: held.set()),
    ]
    trainer = train(tmp_path, callbacks, save_steps=100, max_steps=7, save_strategy="no")
    assert not trainer.store.list()

    class SaveAtTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

    held.clear()
    seen.clear()
    trainer = train(tmp_path, [*callbacks, SaveAtTwo()], max_steps=7, save_strategy="no")
    checkpoint = trainer.store.latest_intact()
    assert checkpoint.step == 2
    saved = list(checkpoint.arrays["model"].values())
    assert [a.tobytes() for a in saved] == [w.tobytes() for w in seen]
    assert [a.tobytes() for a in saved] != [w.tobytes() for w in weights(trainer.model)]
    assert checkpoint.documents["trainer_state"]["global_step"] == 2
    assert checkpoint.documents["progress"]["batch"] == 2
    assert len(checkpoint.documents["trainer_state"]["log_history"]) == 2


def test_on_save_comes_when_the_checkpoint_is_complete(tmp_path):
    found = []

    def look(args, state, control, kwargs):
        store = kwargs["trainer"].store
        found.append((state.global_step, store.verify(store.path(state.global_step))))

    train(tmp_path, [Recorder({"on_save": look})])
    assert found == [(2, []), (4, []), (6, []), (8, [])]


def full_disk(monkeypatch, failing_steps, error=FULL):
    """Let the writing of some steps' checkpoints fail, as the disk would."""
    original = filesystem.fsync_directory

    def fail(path):
        if any(path.name.startswith(f".tmp-checkpoint-{step}-") for step in failing_steps):
            raise error
        original(path)

    monkeypatch.setattr(filesystem, "fsync_directory", fail)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("error", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_trouble_with_the_disk_does_not_end_a_run(tmp_path, monkeypatch, caplog, background, error):
    full_disk(monkeypatch, (4, 6), error)
    trainer = train(tmp_path, save_async=background, save_total_limit=1)
    assert trainer.state.global_step == 8
    assert [step for step, _ in trainer.store.list()] == [8]
    told = [m for m in caplog.messages if m.startswith("Could not write")]
    assert [m.split()[3] for m in told] == ["checkpoint-4", "checkpoint-6"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-8"]


def test_a_full_disk_leaves_the_last_good_one_and_says_what_to_free(tmp_path, monkeypatch, caplog):
    full_disk(monkeypatch, (4, 6, 8))
    train(tmp_path, save_total_limit=1)
    assert CheckpointStore(tmp_path).latest_intact().step == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2"]
    assert "The checkpoints there (checkpoint-2 to checkpoint-2, 1 in all) take" in caplog.text
    assert "MB are free on that disk" in caplog.text
    monkeypatch.undo()
    again = train(tmp_path, resume=True)
    assert again.state.global_step == 8
    expected = train(tmp_path / "whole")
    assert [w.tobytes() for w in weights(again.model)] == [
        w.tobytes() for w in weights(expected.model)
    ]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_stops_a_run_that_wants_it(tmp_path, monkeypatch, background):
    full_disk(monkeypatch, (4,))
    with pytest.raises(CheckpointError, match="checkpoint-4 .*No space left"):
        train(tmp_path, save_async=background, on_save_error="raise")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2"]


def test_the_folder_may_be_deleted_under_the_run(tmp_path):
    folder = tmp_path / "run"

    def delete(trainer):
        trainer.saver.settle()
        shutil.rmtree(folder)

    trainer = train(folder, [At(5, delete)])
    assert trainer.state.global_step == 8
    assert sorted(os.listdir(folder)) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("policy", ["warn", "raise"])
def test_an_output_dir_that_cannot_be_written_to(tmp_path, caplog, policy):
    (tmp_path / "file").write_text("in the way")
    if policy == "raise":
        with pytest.raises(CheckpointError, match="Could not write"):
            train(tmp_path / "file" / "run", on_save_error=policy)
        return
    trainer = train(tmp_path / "file" / "run", on_save_error=policy)
    assert trainer.state.global_step == 8
    assert "Could not write" in caplog.text
    assert "nothing can be saved until this is fixed" in caplog.text


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    def second(trainer):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
            train(tmp_path)

    trainer = train(tmp_path, [At(3, second)])
    assert trainer.state.global_step == 8
    train(tmp_path)


def test_the_best_checkpoint_is_one_that_exists(tmp_path, monkeypatch, caplog):
    """The last step is the best and its save fails: the model has its weights and keeps them."""
    full_disk(monkeypatch, (8,))
    trainer = Trainer(
        linear_model(),
        arguments(
            tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            max_steps=8, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.05,
        ),
        train_dataset=make_data(), eval_dataset=make_data(), loss="mse",
    )  # fmt: skip
    trainer.fit()
    assert trainer.state.best_global_step == 8  # it gets better all the time
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert "the model keeps the weights of step 8" in caplog.text


def test_a_nonfinite_loss_names_a_checkpoint_that_is_complete(tmp_path):
    from kbtrain import NonFiniteError

    x, y = make_data(16)
    x = np.concatenate([x] * 2)
    x[20] = np.nan
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=8,
                  per_device_train_batch_size=4),
        train_dataset=(x, np.concatenate([y] * 2)), loss="mse",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="checkpoint-4"):
        trainer.fit()
    assert [step for step, _ in trainer.store.list()] == [2, 4]
    for _, path in trainer.store.list():
        for array in trainer.store.load(path).arrays["model"].values():
            assert np.isfinite(array).all()


def test_captured_values_share_no_memory_with_the_model(tmp_path):
    from kbtrain.checkpoint import capture, name_variables

    model = linear_model()
    captured = capture(name_variables(model.variables))
    before = {name: array.copy() for name, array in captured.items()}
    for variable in model.variables:
        variable.assign(np.ones(variable.shape))
    for name, array in captured.items():
        np.testing.assert_array_equal(array, before[name])
        assert array.flags.owndata


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with spaces", "größe-尺寸", "linked"])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    folder = tmp_path / name
    if name == "linked":
        (tmp_path / "real").mkdir()
        folder.symlink_to(tmp_path / "real")
    train(folder, save_total_limit=1)
    again = train(folder, resume=True, max_steps=9, save_total_limit=1)
    assert again.state.global_step == 9
    assert os.listdir(folder) == ["checkpoint-9"]


def test_a_program_may_go_elsewhere_meanwhile(tmp_path, monkeypatch):
    (tmp_path / "begin").mkdir()
    (tmp_path / "end").mkdir()
    monkeypatch.chdir(tmp_path / "begin")
    away = [At(3, lambda trainer: os.chdir(tmp_path / "end"))]
    train("run", away, report_to="json", load_best_model_at_end=True, eval_strategy="steps",
          eval_steps=2, save_total_limit=1)  # fmt: skip
    assert os.listdir(tmp_path / "end") == []
    assert sorted(os.listdir(tmp_path / "begin" / "run")) == ["checkpoint-8", "log.jsonl"]
    text = (tmp_path / "begin" / "run" / "log.jsonl").read_text()
    assert [s for line in text.splitlines() if "loss" in (s := json.loads(line))][-1]["step"] == 8


def test_what_bears_a_checkpoints_name_and_is_none(tmp_path, caplog):
    for name in ("checkpoint-00002", "checkpoint-abc", "checkpoint-2 (copy)", "checkpoint-99"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4").write_text("a file where a checkpoint is to be")
    trainer = train(tmp_path, resume="auto", save_total_limit=2)
    assert [step for step, _ in trainer.store.list()] == [6, 8, 99]
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-00002", "checkpoint-2 (copy)", "checkpoint-4", "checkpoint-6", "checkpoint-8",
        "checkpoint-99", "checkpoint-abc",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-4").read_text() == "a file where a checkpoint is to be"
    assert "Could not write checkpoint-4" in caplog.text
    assert "a file has that name" in caplog.text


def test_checkpoints_of_a_former_run_are_pointed_out(tmp_path, caplog):
    train(tmp_path)
    assert "former run" not in caplog.text
    train(tmp_path, resume=True, max_steps=9)
    assert "former run" not in caplog.text
    train(tmp_path, max_steps=4)
    assert "checkpoints of a former run (checkpoint-2 to checkpoint-9)" in caplog.text


@pytest.mark.parametrize("fault", ["deleted", "damaged"])
def test_the_best_checkpoint_may_be_lost_before_it_is_loaded(tmp_path, caplog, fault):
    def lose(trainer):
        trainer.saver.settle()
        best = trainer.store.path(6)
        if fault == "deleted":
            shutil.rmtree(best)
        else:
            (best / "model.weights.h5").write_bytes(b"")

    def degrade(trainer):
        for variable in trainer.model.trainable_variables:
            variable.assign(100 * np.ones(variable.shape))

    trainer = train(
        tmp_path, [At(7, degrade), At(8, lose)], load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=2, learning_rate=0.05,
    )  # fmt: skip
    assert trainer.state.best_global_step == 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert "the best step 6 has no checkpoint; these are the weights of" in caplog.text
    saved = trainer.store.load(tmp_path / "checkpoint-4").arrays["model"]
    assert [a.tobytes() for a in saved.values()] == [w.tobytes() for w in weights(trainer.model)]


def test_all_checkpoints_may_be_lost_before_the_best_is_loaded(tmp_path, caplog):
    def lose(trainer):
        trainer.saver.settle()
        for step in (2, 4, 6):
            shutil.rmtree(trainer.store.path(step))

    trainer = train(
        tmp_path, [At(8, lose)], load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_steps=2, max_steps=8, learning_rate=0.05, save_only_model=True,
    )  # fmt: skip
    before = weights(trainer.model)
    shutil.rmtree(tmp_path / "checkpoint-8")
    best_model.load(trainer)
    assert "the best step 8 has no checkpoint; the model keeps" in caplog.text
    assert same(weights(trainer.model), before)


# --- the system's own refusals --------------------------------------------------------------------


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
    assert os.listdir(tmp_path) == []
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
    assert sorted(os.listdir(small_disk / "run")) == ["checkpoint-2", "checkpoint-8", "log.jsonl"]
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
    assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-8", "log.jsonl"]
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
    """Each line once, whole, as soon as there is room."""
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
