"""``kbtrain plan``: what it prints and refuses, and the real thing for programs of each backend."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_plan import made_up

from kbtrain import cli
from kbtrain.plan import planner, script
from tests.support.paths import ROOT

PROGRAM = """
import argparse, os
{before}
import keras
import numpy as np

from kbtrain import Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=8)
width = parser.parse_args().width
print("a line of the program")
model = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(width, activation="relu"), keras.layers.Dense(2)],
    name="net",
)
args = TrainingArguments(output_dir="runs", per_device_train_batch_size=4, report_to="json")
data = np.zeros((8, 4), "float32"), np.zeros((8, 2), "float32")
Trainer(model, args, train_dataset=data, loss="mse").fit()
"""


AT_EXIT = "import atexit; atexit.register(open, 'weights', 'w')"
LATER = "import contextlib\nwith contextlib.ExitStack() as s:\n    s.callback(open, 'later', 'w')\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(PROGRAM.format(before=""))
    return "train.py"


@pytest.fixture
def in_this_process(monkeypatch):
    """The program runs here, with made-up results of the compiler."""
    monkeypatch.setattr(planner, "compile_program", made_up)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("kbtrain.cli.plan.environment", dict)

    def run(command, **options):
        assert command[1:3] == ["-m", "kbtrain.plan.script"]
        return SimpleNamespace(returncode=script.main(command[3:]))

    monkeypatch.setattr(subprocess, "run", run)


def test_it_prints_the_plan(program, in_this_process, capsys):
    assert cli.main(["plan", program, "--device", "h100", "--count", "8", "--batch", "4,8"]) == 0
    printed, progress = capsys.readouterr()
    assert "on 8 x NVIDIA H100 SXM" in printed
    assert "batch 8" in printed
    assert "gradient checkpointing" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "compiling for 8 x NVIDIA H100 SXM: per_device_train_batch_size=8" in progress


def test_json_has_every_figure(program, in_this_process, capsys):
    options = ["--device", "v5e", "--count", "4", "--fsdp", "--quick", "--json"]
    assert cli.main(["plan", program, *options, "--", "--width", "16"]) == 0
    printed = capsys.readouterr().out
    plan = json.loads(printed[printed.index("{") :])
    assert plan["device"]["name"] == "v5e"
    assert plan["run"]["roofline"]["bound_by"] in ("compute", "memory", "network")
    assert plan["alternatives"] == []


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h100"], "Name the program"),
        (["nowhere.py", "--device", "h100"], "There is no script 'nowhere.py'"),
        (["train.py", "--device", "h10"], "Did you mean h100?"),
        (["train.py", "--device", "mine.yaml"], "cannot be read"),
        (["train.py", "-m", "train", "--device", "h100"], "not both"),
    ],
)
def test_mistakes_are_said_in_words(program, capsys, words, message):
    assert cli.main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kbtrain plan: ")
    assert message in error


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py"], "--device"),
        (["train.py", "--device", "h100", "--batch", "8,x"], "batch sizes are numbers"),
        (["train.py", "--device", "h100", "--count", "0"], "1 or more"),
        (["train.py", "--device", "h100", "--epochs", "3"], "unrecognized arguments: --epochs"),
    ],
)
def test_the_usage_is_shown(program, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_the_program_is_its_last_line(program, in_this_process, capsys):
    Path(program).write_text("x = 1\n")
    assert cli.main(["plan", program, "--device", "h100"]) == 2
    assert "ended without a call of Trainer.fit()" in capsys.readouterr().err


@pytest.mark.neutral
def test_a_signal_ends_the_program_too(program, monkeypatch):
    ended = []

    class Program:
        """Waits until it is killed, as subprocess.run does for any exception."""

        def __init__(self, command, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            ended.append("never reached")

    monkeypatch.setattr("kbtrain.cli.plan.environment", dict)
    monkeypatch.setattr(subprocess, "Popen", Program)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", program, "--device", "h100"])
    assert caught.value.code == 143
    assert ended == []
    assert signal.getsignal(signal.SIGTERM) is before


def planned(folder, backend, *options):
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kbtrain", "plan", "train.py", "--device", "h100", *options]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, {path.name for path in folder.iterdir()}) == (0, {"train.py"})
    assert "a line of the program" in done.stderr
    return json.loads(done.stdout)


@pytest.mark.cross
@pytest.mark.slow
def test_a_program_of_each_backend_has_the_same_plan(tmp_path):
    found = {}
    for backend in ("jax", "torch", "tensorflow"):
        folder = tmp_path / backend
        folder.mkdir()
        before = 'os.environ["KERAS_BACKEND"] = "tensorflow"' if backend == "tensorflow" else ""
        text = PROGRAM.format(before=f"{before}\n{AT_EXIT}")
        (folder / "train.py").write_text(text.replace("Trainer(model", f"{LATER}    Trainer(model"))
        options = ("--count", "2", "--quick", "--json", "--", "--width", "16")
        found[backend] = planned(folder, "jax" if before else backend, *options)
    weights = 4 * 16 + 16 + 16 * 2 + 2
    for backend, plan in found.items():
        facts = plan["run"]["facts"]
        assert (facts["parameters"], facts["samples"]) == (weights, 8)
        assert facts["parameter_bytes"] == 4 * weights
        assert facts["optimizer_bytes"] >= 2 * 4 * weights
        assert facts["flops"] == found["jax"]["run"]["facts"]["flops"]
        own = {"jax": "", "torch": "PyTorch", "tensorflow": "TensorFlow"}[backend]
        said = [note for note in plan["notes"] if "was compiled with JAX" in note]
        assert [f"runs on {own}" in note for note in said] == [True] * bool(own)
    assert np.isfinite(found["jax"]["run"]["roofline"]["seconds"])


@pytest.mark.neutral
def test_a_file_of_settings_is_no_program(tmp_path, capsys):
    config = tmp_path / "base.yaml"
    config.write_text("data: {}")
    assert cli.main(["plan", str(config), "--device", "h100"]) == 2
    assert f"-m kbtrain --device h100 -- train {config}`" in capsys.readouterr().err
