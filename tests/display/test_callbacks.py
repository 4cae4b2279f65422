"""Which display a run has, and a run as lines of text."""

import sys

import pytest
from helpers import arguments, linear_model, make_data
from helpers_callbacks import make_trainer

from kbtrain import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from kbtrain import TrainingArguments as Arguments
from kbtrain.display import make_display
from kbtrain.display.callbacks import is_terminal
from kbtrain.utils.logging import set_log_level

SAVING = {
    "disable_tqdm": None,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "num_train_epochs": 2,
    "logging_strategy": "epoch",
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


@pytest.mark.core
def test_lines_without_a_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path, learning_rate=0.1, **SAVING)
    trainer.fit()
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    lines = err.splitlines()
    lines = lines[lines.index(f"Run {tmp_path.name}") :]  # after what the logger may have said
    assert lines[0] == f"Run {tmp_path.name}"
    assert lines[1].startswith("  model      sequential")
    assert lines[1].endswith(": 4 parameters (all trained), 16 bytes")
    assert lines[2] == "  data       16 examples, evaluated on 16"
    assert lines[3] == "  training   8 updates in 2 epochs, 4 examples each"
    assert lines[4] == "  optimizer  AdamW, learning rate 0.1, linear"
    first, second = (e for e in trainer.state.log_history if "eval_loss" in e)
    evaluated = [line for line in lines if "eval_loss" in line and line.startswith("step")]
    assert evaluated[0] == (
        f"step 4/8, epoch 1: eval_loss {first['eval_loss']:.4g} (best, saving checkpoint-4)"
    )
    best = second["eval_loss"] < first["eval_loss"]
    assert evaluated[1].endswith("(best, saving checkpoint-8)" if best else "(saving checkpoint-8)")
    logs = [line for line in lines if line.startswith("step 4/8: loss ")]
    assert len(logs) == 1
    assert "Finished: all updates are done." in lines
    assert any(line.startswith("  weights   the model holds the best, of check") for line in lines)
    assert any('with more epochs and fit(resume_from_checkpoint="auto")' in line for line in lines)


def test_the_results_of_all_sets_are_one_line(tmp_path, capsys):
    data = make_data(16)
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, disable_tqdm=None, eval_strategy="epoch", num_train_epochs=1),
        train_dataset=data,
        eval_dataset={"near": data, "far": make_data(8, seed=1)},
        loss="mse",
        metrics=["mae"],
    )
    trainer.fit()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "eval_near_loss" in x]
    names = ("near_loss", "near_mae", "far_loss", "far_mae")
    assert all(f"eval_{name} " in line for name in names)


def test_evaluations_outside_of_fit_are_a_line(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=None)
    loss = trainer.evaluate()["eval_loss"]
    trainer.predict(make_data(8))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"eval_loss {loss:.4g} (")
    assert lines[1].startswith("test_loss ")
    assert len(lines) == 2


def test_a_stop_says_why(tmp_path, capsys):
    stop = EarlyStoppingCallback(1, early_stopping_threshold=100.0)
    make_trainer(tmp_path, [stop], **SAVING | {"num_train_epochs": 4}).fit()
    err = capsys.readouterr().err
    assert "Finished: early stopping: no better loss for 1 evaluation." in err
    assert "  trained   8 of 16 updates, 2 epochs, in " in err


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
    monkeypatch.setenv("TERM", "xterm")
    if notebook:
        monkeypatch.setattr("kbtrain.display.callbacks.is_notebook", lambda: True)
    set_log_level(level)
    displayed = make_display(Arguments(disable_tqdm=disable, log_level=level))
    assert [type(callback).__name__ for callback in displayed] == shown


@pytest.mark.neutral
def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert is_terminal()
    monkeypatch.setattr("sys.stderr", None)
    assert not is_terminal()


def test_a_display_that_is_wanted_without_a_terminal_is_lines(tmp_path, capfd):
    make_trainer(tmp_path, disable_tqdm=False, eval_strategy="epoch").fit()
    _, err = capfd.readouterr()
    assert "step 4/4" in err
    assert "\x1b" not in err


def test_a_display_can_be_removed_or_given(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=True)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(disable=True))
    trainer.fit()
    assert capsys.readouterr().err == ""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PrinterCallback())
    trainer.fit()
    assert "Finished: all updates are done." in capsys.readouterr().err


@pytest.mark.neutral
def test_the_former_places_still_have_the_names(monkeypatch):
    monkeypatch.delitem(sys.modules, "kbtrain.callbacks.progress_bar", raising=False)
    from kbtrain import callbacks

    assert callbacks.ProgressCallback is ProgressCallback
    with pytest.warns(DeprecationWarning, match="kbtrain.display.callbacks"):
        from kbtrain.callbacks.progress_bar import PrinterCallback as former
    assert former is PrinterCallback
