"""Trackers: one contract for all, and what is particular to each.

The packages are stand-ins here (tests/support/fake_trackers.py).
"""

import csv
import doctest
import errno
import json
import logging
import struct
import sys

import numpy as np
import pytest
from fake_trackers import FAKES
from helpers import StopAt, arguments, linear_model, make_data

from kbtrain import Trainer, TrainerCallback, trackers
from kbtrain.errors import ConfigurationError
from kbtrain.optimization import registry
from kbtrain.report import sources
from kbtrain.trackers import TRACKERS, base

X, Y = make_data(16)


def pretend(monkeypatch):
    """Put the stand-ins in place of packages that may or may not be installed."""
    fakes = {name: make() for name, make in FAKES.items()}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return fakes


@pytest.fixture
def packages(monkeypatch):
    return pretend(monkeypatch)


def make_trainer(folder, **changes):
    """3 updates with a log each, and an evaluation after the last one."""
    callbacks = changes.pop("callbacks", [])
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "run_name": "a-run"} | changes
    args = arguments(folder, **settings)
    return Trainer(
        linear_model(), args, train_dataset=(X, Y), eval_dataset=(X, Y), loss="mse",
        callbacks=callbacks,
    )  # fmt: skip


def expected(trainer):
    """Step and value of everything that was logged, by the names trackers use."""
    found = {}
    for entry in trainer.state.log_history:
        step = entry["step"]
        for name, value in entry.items():
            if name != "step":
                new = (
                    name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}"
                )
                found[step, new] = value
    return found


# --- reading back what was written ----------------------------------------------------------------


def read_json(folder, packages):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read_rows(rows)


def read_csv(folder, packages):
    with (folder / "log.csv").open(newline="") as file:
        return read_rows(csv.DictReader(file))


def read_rows(rows):
    found = {}
    for row in rows:
        row = {name: float(value) for name, value in row.items() if value != ""}
        step = row.pop("step")
        found |= {(step, *base.rewrite({n: 0})): v for n, v in row.items()}
    return found


def read_tensorboard(folder, packages):
    """Event files as TensorBoard documents them: length, checksum, record, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted((folder / "runs").rglob("events.*")):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[event.step, value.tag] = value.simple_value
    return found


def read_fake(name):
    return lambda folder, packages: {
        key: value
        for run in packages[name].runs
        for key, value in run.values().items()
        if key[1] != "train/global_step"
    }


def read_html(folder, packages):
    """The logs that a report holds."""
    return read_rows(sources.load_run(folder / "report.html").logs)


READERS = {"html": read_html, "json": read_json, "csv": read_csv}
READERS["tensorboard"] = read_tensorboard
READERS |= {name: read_fake(name) for name in FAKES}


def agree(written, logged):
    assert set(written) == set(logged)
    for key, value in logged.items():
        np.testing.assert_allclose(written[key], value, rtol=1e-6)


# --- the contract ---------------------------------------------------------------------------------


def test_every_tracker_is_in_the_contract():
    assert set(READERS) == set(TRACKERS)


ALL = sorted(READERS)


class Scene:
    """Runs that report to all trackers at once, so that each is trained for once only."""

    def __init__(self, folder):
        self.folder = folder
        with pytest.MonkeyPatch.context() as patch:
            self.packages = pretend(patch)
            self.play()

    def read(self, name):
        return READERS[name](self.folder, self.packages)


class Whole(Scene):
    def play(self):
        trainer = make_trainer(
            self.folder, report_to=ALL, eval_strategy="steps", eval_steps=3, project="a-project"
        )
        trainer.fit()
        self.first = {name: self.read(name) for name in ALL}
        self.logged = expected(trainer)
        trainer.evaluate()
        self.logged_afterwards = expected(trainer)


class Resumed(Scene):
    def play(self):
        common = {"report_to": ALL, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        make_trainer(self.folder, callbacks=[StopAt(3)], **common).fit()
        trainer = make_trainer(self.folder, **common)
        trainer.fit(resume_from_checkpoint=True)
        self.losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("in the middle")


class Interrupted(Scene):
    def play(self):
        trainer = make_trainer(self.folder, report_to=ALL, callbacks=[Failing()])
        self.trackers = dict(zip(ALL, trainer.callback_handler.callbacks[1:], strict=False))
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    return Resumed(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    return Interrupted(tmp_path_factory.mktemp("interrupted"))


@pytest.mark.core
@pytest.mark.parametrize("name", READERS)
def test_every_value_arrives_with_its_step(whole, name):
    wanted = {(1, "train/loss"), (3, "train/loss"), (3, "eval/loss"), (3, "train/train_loss")}
    assert wanted <= set(whole.logged)
    agree(whole.first[name], whole.logged)


@pytest.mark.parametrize("name", READERS)
def test_an_evaluation_after_the_training_goes_to_the_same_place(whole, name):
    agree(whole.read(name), whole.logged_afterwards)


@pytest.mark.core
@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_has_every_step_once(resumed, name):
    written = resumed.read(name)
    steps = (1, 2, 3, 4)
    assert sorted(key for key in written if key[1] == "train/loss") == [
        (step, "train/loss") for step in steps
    ]
    np.testing.assert_allclose(
        [written[step, "train/loss"] for step in steps], resumed.losses, rtol=1e-6
    )


@pytest.mark.parametrize("name", FAKES)
def test_a_resumed_run_goes_on_in_the_run_it_had(resumed, name):
    first, second = (run.id for run in resumed.packages[name].runs)
    assert first == second


@pytest.mark.parametrize("name", READERS)
def test_an_error_closes_the_run_and_keeps_what_was_logged(interrupted, name):
    assert (1, "train/loss") in interrupted.read(name)
    assert not getattr(interrupted.trackers[name], "_is_open", False)
    for run in getattr(interrupted.packages.get(name), "runs", []):
        assert run.finished is (name in ("trackio", "comet_ml"))  # which has no word for a failure


@pytest.mark.parametrize("name", FAKES)
def test_settings_and_names_reach_the_tracker(whole, name):
    run = whole.packages[name].runs[0]
    assert run.opened["project"] == "a-project"
    assert run.opened["name"] == "a-run"
    assert float(run.params["learning_rate"]) == 0.01
    assert run.finished


def test_a_second_training_is_another_run_and_an_evaluation_is_not(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Counting()])
    tracker = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Counting))
    trainer.evaluate()
    trainer.fit()
    trainer.evaluate()
    assert tracker.opened == [None, 1]
    trainer.fit()
    assert tracker.opened == [None, 1, None]
    assert tracker.finished == [True, True, True]


@pytest.mark.parametrize("name", ["comet_ml", "wandb", "mlflow"])
def test_a_run_of_the_user_is_used_and_left_open(tmp_path, packages, name):
    fake = packages[name]
    if name == "wandb":
        run = fake.init(project=None, name=None, config={}, dir=".", id=None, resume=None)
    elif name == "comet_ml":
        run = fake.start()
    else:
        run = fake.start_run()
    make_trainer(tmp_path, report_to=name).fit()
    assert fake.runs == [run]
    assert run.finished is None
    assert (1, "train/loss") in run.values()
    assert "learning_rate" in run.params


def test_what_is_not_a_number_is_left_out_with_one_warning(tmp_path, packages, caplog):
    trainer = make_trainer(tmp_path, report_to="wandb")
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        trainer.log({"note": "text", "a": np.float32(2), "b": np.array(3)})
        trainer.log({"note": "text"})
    values = packages["wandb"].runs[0].values()
    assert values[0, "train/a"] == 2.0
    assert values[0, "train/b"] == 3.0
    assert sum("'note'" in record.message for record in caplog.records) == 1


def test_mlflow_gets_names_it_accepts(tmp_path, packages):
    trainer = make_trainer(tmp_path, report_to="mlflow")
    trainer.log({"top@5 (%)": 1.0})
    assert (0, "train/top_5 ___") in packages["mlflow"].runs[0].values()


def test_tensorboard_keeps_the_settings_and_overwrites_no_file(whole):
    files = sorted((whole.folder / "runs" / "a-run").iterdir())
    assert len(files) == 2
    assert b'"learning_rate": 0.01' in files[0].read_bytes()


def test_csv_grows_a_column_for_a_new_name(tmp_path):
    trainer = make_trainer(tmp_path, report_to="csv")
    trainer.fit()
    trainer.log({"late": 1.5})
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["step", "epoch"]
    assert len(rows) == len(trainer.state.log_history)
    assert rows[-1]["late"] == "1.5"
    assert rows[0]["late"] == ""


@pytest.mark.parametrize(("name", "file"), [("json", "log.jsonl"), ("csv", "log.csv")])
def test_an_evaluation_without_a_training_is_in_the_output_directory(
    tmp_path, monkeypatch, name, file
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    output_dir = tmp_path / "output"
    trainer = make_trainer(output_dir, report_to=name)
    loss = trainer.evaluate()["eval_loss"]
    reader = {"json": read_json, "csv": read_csv}[name]
    assert reader(output_dir, {})[0.0, "eval/loss"] == pytest.approx(loss)
    assert [p.name for p in output_dir.iterdir()] == [file]
    assert not list(elsewhere.iterdir())


# --- names and packages ---------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigurationError,
        match="comet_ml, csv, html, json, mlflow, swanlab, tensorboard, trackio, wandb",
    ):
        make_trainer(tmp_path, report_to="nowhere")


@pytest.mark.parametrize(
    ("name", "package"), [(n, p) for n, (_, p) in TRACKERS.items() if p is not None]
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"report_to='{name}'.*kbtrain\[{name}\]"):
        make_trainer(tmp_path, report_to=name)


class Entry:
    def __init__(self, name, value):
        self.name, self.value, self.dist = name, "package:Tracker", None
        self.load = lambda: value


class Collecting(base.Tracker):
    def __init__(self):
        super().__init__()
        self.rows = []

    def open(self, args, trainer):
        self.run = "the run"

    def write(self, values, step):
        self.rows.append((step, values))

    def finish(self, completed):
        self.rows.append(completed)


class Counting(Collecting):
    """Remembers which run it was asked to go on with, and whether runs were completed."""

    def __init__(self):
        super().__init__()
        self.opened, self.finished = [], []

    def open(self, args, trainer):
        self.opened.append(self.run)
        self.run = self.run or len(self.opened)

    def finish(self, completed):
        self.finished.append(completed)


def registered(monkeypatch, name):
    def entry_points(group):
        return [Entry(name, Collecting)] if group == trackers.GROUP else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    registry._entries.cache_clear()


@pytest.fixture(autouse=True)
def _real_entry_points_afterwards():
    yield
    registry._entries.cache_clear()


def test_a_package_can_add_a_tracker(monkeypatch):
    registered(monkeypatch, "theirs")
    (tracker,) = trackers.make_trackers(["theirs"])
    assert isinstance(tracker, Collecting)
    with pytest.raises(ConfigurationError, match="theirs"):
        trackers.make_trackers(["nowhere"])


def test_a_package_cannot_take_the_name_of_ours(monkeypatch):
    registered(monkeypatch, "csv")
    with pytest.raises(ConfigurationError, match="'csv'.*Uninstall"):
        trackers.make_trackers(["csv"])


def test_all_means_those_whose_package_is_installed(monkeypatch):
    registered(monkeypatch, "theirs")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    made = trackers.make_trackers(["all"])
    own = ["CsvCallback", "HtmlCallback", "JsonLinesCallback"]
    assert [type(m).__name__ for m in made] == [*own, "Collecting"]


def test_a_tracker_that_cannot_be_closed_hides_no_error(tmp_path, caplog):
    class Broken(Collecting):
        def finish(self, completed):
            raise OSError("gone")

    trainer = make_trainer(tmp_path, callbacks=[Broken(), Failing(), Collecting()])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit()
    assert trainer.callback_handler.callbacks[-2].rows[-1] is False
    assert "Broken could not be closed" in caplog.text


@pytest.mark.parametrize("module", [base])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_a_disk_that_is_full_for_a_while_does_not_stop_the_training(tmp_path, caplog, monkeypatch):
    from tensorboardX import RecordWriter

    write, calls = RecordWriter.write, []

    def failing(self, data):
        calls.append(None)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", failing)
    trainer = make_trainer(tmp_path, report_to=["tensorboard"])
    trainer.fit()
    assert caplog.text.count("could not write") == 1
    files = list((tmp_path / "runs").glob("*/events*"))
    assert len(files) == 2  # nothing is written behind half a record
