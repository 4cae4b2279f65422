"""Programs on a terminal: a debugger, Ctrl-C, and how they end."""

import signal
import sys

import pytest
from pseudo_terminal import record

pytestmark = [pytest.mark.neutral, pytest.mark.slow]

PROGRAM = """\
import sys, time
import keras
import numpy as np
from kbtrain import Trainer, TrainerCallback, TrainingArguments

class Act(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and "debug" in sys.argv:
            number = 6
            breakpoint()
        time.sleep(0.05 if "long" in sys.argv else 0)

    def on_prediction_step(self, args, state, control, **kwargs):
        time.sleep(0.05 if "evaluate" in sys.argv else 0)

x = np.ones((64, 2), "float32")
args = TrainingArguments(
    "run", num_train_epochs=50 if "long" in sys.argv else 1, per_device_train_batch_size=8,
    eval_strategy="epoch", save_strategy="epoch", per_device_eval_batch_size=1,
)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
Trainer(model, args, train_dataset=(x, x[:, :1]), eval_dataset=(x, x[:, :1]), loss="mse",
        callbacks=[Act]).fit()
"""


def run(folder, *words, keys):
    (folder / "train.py").write_text(PROGRAM)
    return record(
        [sys.executable, "train.py", *words], keys=keys, cwd=folder, columns=200, timeout=240
    )


def test_a_debugger_has_the_terminal_to_itself(tmp_path):
    done = run(
        tmp_path, "debug", keys=[("(Pdb)", b"p number * 7\n"), ("42", b"c\n"), ("Finished", b"")]
    )
    assert done.status == 0
    (before, result, _) = done.moments
    assert any("on_step_end" in line for line in before)  # the frame of the program, not of kbtrain
    assert not any("training" in line and "left" in line for line in result)  # no bar
    assert "all updates are done" in done.text


@pytest.mark.parametrize("words", [["long"], ["long", "evaluate"]], ids=["update", "evaluation"])
def test_ctrl_c_ends_a_program_without_a_traceback(tmp_path, words):
    wait = "evaluating" if "evaluate" in words else "epoch 3."
    done = run(tmp_path, *words, keys=[(wait, b"\x03"), ("Stopped", b"")])
    assert done.status == -signal.SIGINT  # a shell reports 130
    assert "Traceback" not in done.text
    assert "stopping after this update, saving" in done.text
    assert list((tmp_path / "run").glob("checkpoint-*"))
