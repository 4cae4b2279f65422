"""Runs on a terminal, as they are seen at 80 and 120 columns."""

import logging
import os
import re
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from helpers import arguments, linear_model, make_data
from pseudo_terminal import Terminal

from kbtrain import EarlyStoppingCallback, NonFiniteError, Trainer, TrainerCallback

SAVING = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}


def trainer(folder, callbacks=(), data=None, **changes):
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "disable_tqdm": None}
    return Trainer(
        linear_model(),
        arguments(folder, **(defaults | changes)),
        train_dataset=make_data(16) if data is None else data,
        eval_dataset=make_data(16),
        loss="mse",
        metrics=["mae"],
        callbacks=list(callbacks),
    )


@pytest.fixture(autouse=True)
def terminal_settings(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Talks(TrainerCallback):
    """Prints, logs and warns in the middle of a run, and waits until the bar has been drawn."""

    every_step = False

    def __init__(self, step=4):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            drawn()
            print("a line of the program")
            print("first half,", end=" ")
            drawn()
            print("second half")
            text = warnings.formatwarning("it is old", FutureWarning, "program.py", 7)
            sys.stderr.write(text)  # as Python does
            logging.getLogger("elsewhere").warning("a warning of a logger")
            drawn()


def drawn():
    """Wait until the status lines have been redrawn: two intervals."""
    time.sleep(0.25)


@pytest.mark.core
@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_from_start_to_end(tmp_path, columns):
    with Terminal(columns) as screen:
        trainer(tmp_path / "run", learning_rate=0.1, **SAVING).fit()
    lines = screen.lines
    assert "kbtrain run" in lines
    assert "  optimizer  AdamW, learning rate 0.1, linear" in lines
    head = lines.index("  update  epoch      loss  eval_loss  eval_mae")
    rows = [line.split() for line in lines[head + 1 : head + 4]]
    assert [row[0] for row in rows] == ["4", "8", "12"]
    assert [row[-1] for row in rows] == ["saving"] * 3
    assert rows[0][-2] == "best"
    assert "Finished: all updates are done." in lines
    (best,) = [line for line in lines if line.startswith("  best ")]
    assert "eval_loss" in best
    assert any(line.startswith("  weights   the model holds the best, of") for line in lines)
    assert any("samples/s (without compiling, eval, save)" in line for line in lines)
    assert any(line.startswith("  time ") and "% compute" in line for line in lines)
    assert not any("training ━" in line or "compiling..." in line for line in lines), (
        "a bar is left"
    )
    assert not any(len(line) > columns for line in lines)


@pytest.mark.neutral
def test_what_the_program_says_stays_readable_above_the_bar(tmp_path):
    logger = logging.getLogger("elsewhere")
    with Terminal() as screen:
        handler = logging.StreamHandler()  # keeps the stream of this moment
        logger.addHandler(handler)
        try:
            trainer(tmp_path, [Talks()]).fit()
        finally:
            logger.removeHandler(handler)
    warning = "program.py:7: FutureWarning: it is old"
    said = ("a line of the program", "first half, second half", warning, "a warning of a logger")
    assert [screen.lines.count(line) for line in said] == [1, 1, 1, 1]
    raw = screen.raw.decode()
    assert "training" in raw
    assert "grad norm" in raw
    assert "training ━" not in screen.text
    assert "samples/s" in screen.text


@pytest.mark.neutral
def test_streams_and_threads_are_given_back(tmp_path):
    with Terminal():
        before = sys.stdout, sys.stderr
        trainer(tmp_path).fit()
        assert (sys.stdout, sys.stderr) == before
    assert not any(t.name.startswith("kbtrain-") for t in threading.enumerate())


@pytest.mark.neutral
def test_early_stopping_and_where_to_go_on(tmp_path):
    stop = EarlyStoppingCallback(1, early_stopping_threshold=100.0)
    with Terminal() as screen:
        trainer(tmp_path, [stop], **SAVING).fit()
    assert "Finished: early stopping: no better loss for 1 evaluation." in screen.lines
    assert any(line.startswith("  trained   8 of 12 updates") for line in screen.lines)
    assert any("  to go on  from checkpoint-8, with fit(resume" in line for line in screen.lines)


@pytest.mark.neutral
def test_resuming_says_from_where(tmp_path):
    with Terminal():
        trainer(tmp_path, num_train_epochs=1, **SAVING).fit()
    with Terminal(120) as screen:
        trainer(tmp_path, num_train_epochs=2, **SAVING).fit(resume_from_checkpoint="auto")
    (line,) = [line for line in screen.lines if line.startswith("  resumed")]
    assert line.endswith("checkpoint-4, after update 4")


def test_a_run_that_fails(tmp_path):
    x, y = make_data(16)
    y[9] = np.nan
    with Terminal() as screen, pytest.raises(NonFiniteError):
        trainer(tmp_path, data=(x, y), save_strategy="steps", save_steps=1).fit()
    assert "Failed: the loss or the gradient of update 3 was not finite." in screen.lines
    assert "  weights   the model holds the newest, of update 2" in screen.lines
    assert any("from checkpoint-2" in line for line in screen.lines)


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_ctrl_c_is_answered_at_once(tmp_path, saves):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                limit = time.monotonic() + 10
                while "Ctrl-C: stopping" not in screen.text and time.monotonic() < limit:
                    time.sleep(0.01)
                self.seen = screen.text

    interrupt = Interrupt()
    with Terminal() as screen, pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, [interrupt], save_strategy=saves).fit()
    does = "saving" if saves == "steps" else "without saving"
    assert f"Ctrl-C: stopping after this update, {does}. Again = stop" in interrupt.seen
    assert "Stopped: Ctrl-C (SIGINT)." in screen.lines
    assert ("from checkpoint-2" in screen.text) == (saves == "steps")


def test_evaluations_outside_of_fit(tmp_path):
    one = trainer(tmp_path)
    with Terminal() as screen:
        loss = one.evaluate()["eval_loss"]
        print("between")
        one.predict(make_data(8))
    assert len(screen.lines) == 3
    assert screen.lines[0].startswith(f"eval_loss {loss:.4g}, eval_mae ")
    assert screen.lines[1] == "between"
    assert screen.lines[2].startswith("test_loss ")


@pytest.mark.neutral
def test_a_failing_evaluation_leaves_no_bar(tmp_path):
    def broken(prediction):
        raise RuntimeError("no score")

    one = trainer(tmp_path)
    one.compute_metrics = broken
    with Terminal() as screen, pytest.raises(RuntimeError, match="no score"):
        one.evaluate()
    assert screen.text == ""
    assert not any(t.name.startswith("kbtrain-") for t in threading.enumerate())


@pytest.mark.neutral
def test_no_colour_where_none_is_wanted_and_only_plain_ones_elsewhere(tmp_path, monkeypatch):
    colours = re.compile(rb"\x1b\[([0-9;]*)m")
    with Terminal() as screen:
        trainer(tmp_path / "a", [Talks()], **SAVING).fit()
    used = {int(n) for code in colours.findall(bytes(screen.raw)) for n in code.split(b";") if n}
    # Bold, dim, and the terminal's own green, yellow, red and cyan, which its theme makes readable.
    assert used <= {0, 1, 2, 31, 32, 33, 36}
    assert {1, 2, 32} <= used
    monkeypatch.setenv("NO_COLOR", "1")
    with Terminal() as screen:
        trainer(tmp_path / "b", [Talks()], **SAVING).fit()
    used = {int(n) for code in colours.findall(bytes(screen.raw)) for n in code.split(b";") if n}
    assert used <= {0, 1, 2}
    assert "Finished: all updates are done." in screen.lines


@pytest.mark.neutral
def test_a_narrow_terminal_and_one_that_is_made_narrow(tmp_path):
    class Shrink(Talks):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                drawn()
                screen.resize(50)
            super().on_step_end(args, state, control, **kwargs)

    with Terminal(100) as screen:
        trainer(tmp_path, [Shrink()], **SAVING).fit()
    assert "a line of the program" in screen.text
    assert "Finished: all updates are done." in screen.lines
    with Terminal(12) as screen:
        trainer(tmp_path, [Talks()], save_strategy="no").fit()
    assert "Finished: al" in screen.lines


@pytest.mark.neutral
@pytest.mark.parametrize("error", [OSError(5, "gone"), ValueError("closed")])
def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path, error):
    class Leaves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                drawn()

                def broken(*_):
                    raise error

                screen._slave.write = broken

    with Terminal() as screen:
        one = trainer(tmp_path, [Leaves()])
        one.fit()
    assert one.state.global_step == 12


def test_names_cannot_control_the_terminal(tmp_path):
    class Odd(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            kwargs["metrics"]["eval_\x1b[2Jodd\nname"] = 1.0

    with Terminal() as screen:
        trainer(tmp_path, [Odd()], num_train_epochs=1, eval_strategy="epoch").fit()
    assert "\x1b[2Jodd" not in screen.raw.decode()
    assert "Finished" in screen.text


def test_during_an_evaluation_the_bar_is_at_the_newest_update(tmp_path):
    class Look(TrainerCallback):
        every_step = False

        def on_prediction_step(self, args, state, control, **kwargs):
            drawn()
            self.seen = screen.text

    look = Look()
    with Terminal() as screen:
        trainer(tmp_path, [look], num_train_epochs=1, eval_strategy="epoch").fit()
    assert " 4/4 " in look.seen
