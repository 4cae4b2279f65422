"""report_to="html": a page that is current while the run lives, and final when it is over."""

import logging

import pytest
from helpers import Recorder, arguments, linear_model, make_data
from helpers_report import Page

from kbtrain import ConfigurationError, Trainer
from kbtrain.trackers import html
from kbtrain.utils.timing import SparingPace

X, Y = make_data(16)


def make(folder, callbacks=(), **changes):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "html",
    }
    args = arguments(folder, **(settings | changes))
    data = {"train_dataset": (X, Y), "eval_dataset": (X, Y), "loss": "mse"}
    return Trainer(linear_model(), args, callbacks=list(callbacks), **data)


@pytest.mark.core
def test_the_page_reloads_itself_while_the_run_lives_and_not_afterwards(tmp_path):
    pages = []

    def look(args, state, control, kwargs):
        pages.append((tmp_path / "report.html").read_text(encoding="utf-8"))

    make(tmp_path, [Recorder({"on_step_begin": look, "on_step_end": look})]).fit()
    assert all('http-equiv="refresh"' in page for page in pages)
    assert "Running: 0 of 4 updates" in Page(pages[0]).text
    final = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in final
    assert "All updates are done. 4 of 4 updates" in Page(final).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run.json"]


def test_a_test_set_is_added_afterwards(tmp_path):
    trainer = make(tmp_path)
    trainer.fit()
    loss = trainer.predict((X, Y)).metrics["test_loss"]
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert f"Test set: test_loss {loss:.4g}" in text


def test_a_failed_run_has_a_last_page(tmp_path):
    def fail(args, state, control, kwargs):
        if state.global_step == 3:
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        make(tmp_path, [Recorder({"on_step_end": fail})]).fit()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RuntimeError: in the middle" in Page(page).text
    assert 'http-equiv="refresh"' not in page


def test_a_refused_run_leaves_the_page_of_the_run_before(tmp_path):
    def refuse(args, state, control, kwargs):
        raise ConfigurationError("not like this")

    make(tmp_path).fit()
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ConfigurationError):
        make(tmp_path, [Recorder({"on_train_begin": refuse})]).fit()
    assert (tmp_path / "report.html").read_bytes() == before


def test_pages_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(SparingPace, "SHARE", 1e9)
    monkeypatch.setattr(html, "render", lambda record, refresh: written.append(record) or "page")
    make(tmp_path).fit()
    assert len(written) == 2


def test_a_disk_that_fails_costs_a_warning(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        assert make(tmp_path).fit().global_step == 4
    assert sum("report could not be written" in message for message in caplog.messages) == 1
