"""run.json: what a run records, across resumes, failures, damage and long logs."""

import json
import logging
import warnings

import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, without_timings
from helpers_report import SAVING_RUN

from kbtrain import DataError, Trainer, TrainerCallback
from kbtrain.errors import ConfigurationError
from kbtrain.report import record as records
from kbtrain.report import recorder
from kbtrain.report.record import RunRecord, thinned_logs
from kbtrain.utils import best_effort
from kbtrain.utils.timing import SparingPace

X, Y = make_data(16)


def make(folder, callbacks=(), data=(X, Y), **changes):
    """Four updates with a log each, evaluated and saved after the second and the last one."""
    args = arguments(folder, **(SAVING_RUN | changes))
    given = {"train_dataset": data, "eval_dataset": (X, Y), "loss": "mse"}
    return Trainer(linear_model(), args, callbacks=list(callbacks), **given)


def load(folder):
    return RunRecord.load(folder / "run.json")


def steps_of(record, name="loss"):
    return [log["step"] for log in record.logs if name in log]


@pytest.mark.core
def test_a_run_leaves_its_record(tmp_path):
    trainer = make(tmp_path)
    trainer.fit()
    record = load(tmp_path)
    assert record.logs == trainer.state.log_history
    assert record.facts["parameters"] == 4
    assert record.layers[0][1:] == ["Dense", "(batch, 1)", 4]
    assert record.arguments == json.loads(json.dumps(trainer.args.to_dict()))
    assert [c["name"] for c in record.checkpoints] == ["checkpoint-2", "checkpoint-4"]
    assert [c["step"] for c in record.checkpoints if c["best"]] == [trainer.state.best_global_step]
    assert record.best["value"] == trainer.state.best_metric
    assert record.metric == "eval_loss"
    assert not record.live
    assert record.ending["reason"] == "all updates are done"
    assert [step for step, _ in record.throughput] == [1, 2, 3, 4]
    trainer.predict((X, Y))
    assert load(tmp_path).tests["test_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_no_file_where_a_run_writes_none(tmp_path):
    trainer = make(tmp_path, save_strategy="no")
    trainer.fit()
    assert list(tmp_path.iterdir()) == []
    page = trainer.report(tmp_path / "elsewhere" / "page.html")
    assert "all updates are done" in page.read_text(encoding="utf-8").lower()


def test_a_log_file_is_reason_enough(tmp_path):
    make(tmp_path, save_strategy="no", report_to="json").fit()
    assert load(tmp_path).ending["completed"]


@pytest.mark.core
def test_a_resumed_run_continues_the_record_from_where_it_resumes(tmp_path):
    make(tmp_path, [StopAt(3)]).fit()
    assert steps_of(load(tmp_path)) == [1, 2, 3]
    trainer = make(tmp_path)
    trainer.fit(resume_from_checkpoint=tmp_path / "checkpoint-2")
    record = load(tmp_path)
    assert steps_of(record) == [1, 2, 3, 4]
    assert without_timings(record.logs) == without_timings(trainer.state.log_history)
    assert [step for step, _ in record.throughput] == [1, 2, 3, 4]
    first, second = record.sessions
    assert first["ending"]["reason"] == "StopAt asked to stop"
    assert second["facts"]["start_step"] == 2
    assert second["ending"]["reason"] == "all updates are done"


def test_a_new_run_in_the_folder_begins_a_new_record(tmp_path):
    make(tmp_path).fit()
    trainer = make(tmp_path, max_steps=2)
    trainer.fit()
    record = load(tmp_path)
    assert steps_of(record) == [1, 2]
    assert len(record.sessions) == 1


def test_the_record_that_is_continued_is_that_of_the_checkpoint(tmp_path):
    make(tmp_path / "a", [StopAt(3)]).fit()
    make(tmp_path / "b", max_steps=1).fit()
    make(tmp_path / "b").fit(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    record = load(tmp_path / "b")
    assert steps_of(record) == [1, 2, 3, 4]
    first, second = record.sessions
    assert first["facts"]["output_dir"] == str(tmp_path / "a")
    assert second["facts"]["output_dir"] == str(tmp_path / "b")


def test_without_a_record_a_resumed_run_begins_with_the_log_of_its_checkpoint(tmp_path):
    make(tmp_path, [StopAt(2)]).fit()
    (tmp_path / "run.json").unlink()
    make(tmp_path).fit(resume_from_checkpoint=True)
    assert steps_of(load(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": 1, "logs": 3}', '{"format": 1, "logs": [3]}']
)
def test_a_damaged_record_is_set_aside(tmp_path, caplog, damage):
    make(tmp_path, [StopAt(2)]).fit()
    (tmp_path / "run.json").write_text(damage)
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        make(tmp_path).fit(resume_from_checkpoint=True)
    assert sum("run.json.damaged" in r.message for r in caplog.records) == 1
    assert (tmp_path / "run.json.damaged").read_text() == damage
    assert steps_of(load(tmp_path)) == [1, 2, 3, 4]


def test_a_failed_run_has_its_error_and_what_it_logged(tmp_path):
    class Failing:
        def __len__(self):
            return 16

        def __getitem__(self, i):
            if i == 9:
                raise OSError("bad sector")
            return X[i], Y[i]

    trainer = make(tmp_path, data=Failing())
    with pytest.raises(DataError):
        trainer.fit()
    record = load(tmp_path)
    assert record.ending["error"].startswith("DataError")
    assert "bad sector" in record.ending["error"]
    assert not record.live
    assert steps_of(record) == [1, 2]


class Refusing(TrainerCallback):
    """A callback whose check of the run fails."""

    def on_train_begin(self, args, state, control, **kwargs):
        raise ConfigurationError("not like this")


def test_a_refused_run_leaves_the_record_of_the_run_before(tmp_path):
    make(tmp_path).fit()
    before = (tmp_path / "run.json").read_bytes()
    refused = make(tmp_path, [Refusing()])
    with pytest.raises(ConfigurationError, match="not like this"):
        refused.fit()
    refused.evaluate()
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(ConfigurationError):
        refused.fit(resume_from_checkpoint=True)
    assert (tmp_path / "run.json").read_bytes() == before
    refused.remove_callback(Refusing)
    refused.fit(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert len(load(tmp_path).sessions) == 2


class Complaining(TrainerCallback):
    """Warns through the logger and through Python."""

    every_step = False

    def on_step_end(self, args, state, control, **kwargs):
        logging.getLogger("kbtrain").warning("step %d is odd", state.global_step % 2)
        warnings.warn("old thing", FutureWarning, stacklevel=1)


def test_warnings_of_the_run_are_recorded_and_counted(tmp_path, caplog):
    shown = []
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "old thing")
        warnings.showwarning = lambda *given, **more: shown.append(given[0])
        mine = warnings.showwarning
        trainer = make(tmp_path, [Complaining()])
        trainer.fit()
        assert warnings.showwarning is mine
    assert len(shown) == 4
    logging.getLogger("kbtrain").warning("after the run")
    found = {w["text"]: w["count"] for w in load(tmp_path).warnings}
    assert found == {"step 1 is odd": 2, "step 0 is odd": 2, "FutureWarning: old thing": 4}


def test_what_resuming_warned_of_is_recorded(tmp_path):
    make(tmp_path, [StopAt(2)]).fit()
    make(tmp_path, learning_rate=0.5).fit(resume_from_checkpoint=True)
    (warning,) = load(tmp_path).warnings
    assert "learning_rate was 0.01 and is 0.5 now" in warning["text"]
    assert warning["step"] == 2


def test_a_warning_is_still_printed_where_no_logging_is_set_up(tmp_path, monkeypatch, capsys):
    """Python prints it only while the logger has no handler at all."""
    logger = logging.getLogger("kbtrain")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(tmp_path, [Complaining()]).fit()
    assert "step 1 is odd" in capsys.readouterr().err


def test_a_callback_shows_something_of_its_own(tmp_path):
    class Samples(TrainerCallback):
        every_step = False

        def on_evaluate(self, args, state, control, **kwargs):
            table = [["input", "output"], [np.float32(1.5), state.global_step]]
            kwargs["trainer"].record.add_section("Samples", table)

    trainer = make(tmp_path, [Samples()])
    trainer.fit()
    (section,) = load(tmp_path).sections
    assert section == {"title": "Samples", "table": [["input", "output"], ["1.5", 4]]}


def test_a_disk_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "save", full)
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        assert make(tmp_path).fit().global_step == 4
    assert sum("record of the run could not be written" in r.message for r in caplog.records) == 1


def test_a_defect_of_the_recorder_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    def defect(trainer):
        raise ZeroDivisionError

    monkeypatch.setattr(recorder, "facts_of", defect)
    with caplog.at_level(logging.WARNING, logger=best_effort.logger.name):
        assert make(tmp_path).fit().global_step == 4


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    writes = []
    monkeypatch.setattr(RunRecord, "save", lambda self, folder: writes.append(len(self.logs)))
    monkeypatch.setattr(SparingPace, "SHARE", 1e9)
    make(tmp_path, eval_steps=1).fit()
    assert writes == [0, 9]  # at the begin and at the end


def test_a_report_before_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="call fit"):
        make(tmp_path).report()


@pytest.mark.parametrize("path", [3, b"x", "s3://bucket/report.html"])
def test_a_report_needs_a_path(tmp_path, path):
    trainer = make(tmp_path, max_steps=1)
    trainer.fit()
    with pytest.raises(ConfigurationError):
        trainer.report(path)


# --- long logs ------------------------------------------------------------------------------------


def test_long_logs_are_thinned_out_evenly_and_keep_their_evaluations():
    logs = [{"step": i, "loss": 1.0} for i in range(1, 50_001)]
    logs += [{"step": i, "eval_loss": 1.0} for i in range(500, 50_001, 500)]
    logs.sort(key=lambda log: log["step"])
    kept = thinned_logs(logs, most=1000)
    steps = [log["step"] for log in kept if "loss" in log]
    assert len(steps) <= 1000
    assert (steps[0], steps[-1]) == (1, 50_000)
    assert set(np.diff(steps)) <= {49, 50, 51}
    assert sum("eval_loss" in log for log in kept) == 100
    assert kept == sorted(kept, key=lambda log: log["step"])


def test_a_record_stays_bounded(monkeypatch):
    monkeypatch.setattr(records, "MAX_LOGS", 50)
    record = RunRecord()
    for step in range(2000):
        record.add_log({"step": step, "loss": 1.0})
        record.add_throughput(step, 1.0)
        record.add_warning("warning", f"warning {step}", step)
    assert len(record.logs) <= 150
    assert len(record.throughput) <= 100
    assert len(record.warnings) == records.MAX_WARNINGS
