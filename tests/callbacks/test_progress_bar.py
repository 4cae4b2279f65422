"""The progress bar, and lines in place of it."""

import logging
import sys

import pytest
from helpers_callbacks import make_trainer

from kbtrain import (
    TrainingArguments,
)
from kbtrain.callbacks.progress_bar import display
from kbtrain.utils.logging import set_log_level


def test_lines_without_a_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=None, eval_strategy="epoch")
    trainer.fit()
    out, err = capsys.readouterr()
    assert out == ""
    assert "it/s" not in err
    lines = err.splitlines()
    assert len(lines) == len(trainer.state.log_history) == 6
    loss = trainer.state.log_history[3]["loss"]
    assert lines[3].startswith(f"step 4/4: loss {loss:.4g}, grad_norm ")
    assert lines[4].startswith("step 4/4: eval_loss ")


@pytest.mark.parametrize(
    ("disable", "level", "terminal", "notebook", "shown"),
    [
        (None, "passive", False, False, ["PrinterCallback"]),
        (None, "passive", True, False, ["ProgressCallback"]),
        (None, "passive", False, True, ["ProgressCallback"]),
        (True, "passive", True, True, ["PrinterCallback"]),
        (None, "error", True, False, []),
        (True, "error", False, False, []),
        (False, "error", False, False, ["ProgressCallback"]),
    ],
)
def test_the_display_follows_the_level_the_terminal_and_notebooks(
    monkeypatch, kbtrain_logger, disable, level, terminal, notebook, shown
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    set_log_level(level)
    displayed = display(TrainingArguments(disable_tqdm=disable, log_level=level))
    assert [type(callback).__name__ for callback in displayed] == shown


def test_a_bar_where_it_is_wanted(tmp_path, capfd):
    make_trainer(tmp_path, disable_tqdm=False, eval_strategy="epoch").fit()
    _, err = capfd.readouterr()
    assert "4/4" in err
    assert "loss" in err


@pytest.fixture
def kbtrain_logger():
    """The logger as it was before the test."""
    logger = logging.getLogger("kbtrain")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers
