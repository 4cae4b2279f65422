"""Reports of runs in folders: with a record, without one, from checkpoints and logs."""

import json
import os
import platform
import re
import shutil

import pytest
from helpers import arguments, linear_model, make_data
from helpers_report import Page, run_record

from kbtrain import Trainer
from kbtrain.cli import main
from kbtrain.errors import ConfigurationError
from kbtrain.report.sources import load_run, load_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of four updates with two checkpoints, the best one the first."""
    place = tmp_path_factory.mktemp("run")
    x, y = make_data(16)
    args = arguments(
        place, max_steps=4, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, metric_for_best_model="loss", report_to=["json"],
        weight_decay=0.25,
    )  # fmt: skip
    Trainer(linear_model(), args, train_dataset=(x, y), eval_dataset=(x, y), loss="mse").fit()
    return place


@pytest.fixture
def copy(folder, tmp_path):
    """The same without its record."""
    target = tmp_path / "copied"
    shutil.copytree(folder, target)
    (target / "run.json").unlink()
    return target


def losses(record):
    return [log["loss"] for log in record.logs if "loss" in log]


def test_without_a_record_the_newest_checkpoint_tells(folder, copy):
    expected, found = load_run(folder), load_run(copy)
    assert losses(found) == losses(expected)
    assert found.checkpoints == expected.checkpoints
    assert found.best == expected.best
    assert found.facts["changed"]["weight_decay"] == 0.25
    assert found.facts["versions"]["keras"] == expected.facts["versions"]["keras"]
    assert found.name == "copied"


def test_a_killed_run_has_what_its_newest_checkpoint_knows(folder, tmp_path):
    """Its record is written from time to time only."""
    target = tmp_path / "killed"
    shutil.copytree(folder, target)
    record = load_run(target)
    record.logs, record.checkpoints, record.best = [], [], None
    record.sessions[-1]["ending"] = None
    record.warnings = [{"step": 0, "level": "warning", "text": "once", "count": 1}]
    record.save(target)
    found, expected = load_run(target), load_run(folder)
    assert losses(found) == losses(expected)
    assert found.checkpoints == expected.checkpoints
    assert found.best == expected.best
    assert len(found.warnings) == 1
    assert found.facts["output_dir"] == str(target)


def test_checkpoints_are_those_that_are_there_now(folder, tmp_path):
    target = tmp_path / "thinned"
    shutil.copytree(folder, target)
    shutil.rmtree(target / "checkpoint-2")
    assert [c["name"] for c in load_run(target).checkpoints] == ["checkpoint-4"]


def test_a_damaged_record_or_checkpoint_is_passed_over(copy, caplog):
    (copy / "run.json").write_text("{")
    (copy / "checkpoint-4" / "trainer_state.json").write_text("")
    found = load_run(copy)
    assert losses(found) == losses(load_run(copy / "checkpoint-2"))
    assert "damaged" in caplog.text


@pytest.mark.parametrize("what", ["checkpoint-2", "checkpoint-2/trainer_state.json"])
def test_a_single_checkpoint_is_a_run_up_to_there(copy, what):
    found = load_run(copy / what)
    assert len(losses(found)) == 2
    assert found.name == "copied"


def test_a_log_alone_has_its_curves(folder, tmp_path):
    text = (folder / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text + '{"step": 5, "lo')
    assert losses(load_run(tmp_path)) == losses(load_run(folder))


def test_a_state_of_transformers_has_its_curves(tmp_path):
    state = {"global_step": 2, "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state | {"total_flos": 3e9}))
    assert losses(load_run(tmp_path)) == [2.0, 1.0]


def test_what_is_no_run_is_an_error_in_words(tmp_path, capsys):
    with pytest.raises(ConfigurationError, match="no such file or folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match=r"no run\.json, no checkpoint.*log\.jsonl"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("no JSON")
    with pytest.raises(ConfigurationError, match="damaged, or not the file of a run"):
        load_run(tmp_path / "run.json")
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "elsewhere", "lives"),
    [(True, False, True), (False, False, False), (False, True, True)],
)
def test_a_run_lives_as_long_as_its_process(tmp_path, own, elsewhere, lives):
    record = run_record(end=False, host="another-machine" if elsewhere else platform.node())
    record.live, record.pid = True, os.getpid() if own else 2**22 + 1
    record.save(tmp_path)
    assert load_run(tmp_path).live is lives


def test_runs_of_the_same_name_are_told_apart_by_their_paths(folder, copy):
    found = load_runs([folder, copy / "checkpoint-4", folder])
    assert [record.name for record in found] == [str(folder), "copied", str(folder)]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.core
def test_the_command_writes_the_report_of_a_run(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    text = Page(page.read_text(encoding="utf-8")).text
    assert "All updates are done. 4 of 4 updates" in text
    assert "weight_decay 0.25" in text
    # A report is a source of reports, too.
    assert load_run(page).logs == load_run(folder).logs


def test_the_page_is_in_the_folder_of_the_run_unless_there_are_several(copy, folder, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").is_file()
    assert main(["report", str(copy), str(folder)]) == 0
    text = Page((copy.parent / "report.html").read_text(encoding="utf-8")).text
    assert "that both have logged" in text


@pytest.mark.neutral
def test_an_address_is_refused_with_the_folder_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match=re.escape(str(tmp_path / "kbtrain" / "runs"))):
        load_run("s3://bucket/digits")
