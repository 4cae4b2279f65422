"""A program that runs to be planned: its first ``fit`` ends it, and nothing is written."""

import json
import sys
import textwrap

import keras
import pytest
from helpers_plan import made_up

from kbtrain.errors import ConfigurationError
from kbtrain.plan import planner, request, script
from kbtrain.plan.process import backend_of, chosen_by_program

BEGIN = """
import sys
import keras, numpy as np
from kbtrain import Trainer, TrainingArguments

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="net")
"""
TRAIN = """
args = TrainingArguments(
    output_dir="runs", per_device_train_batch_size=4, report_to=["json", "tensorboard", "csv"],
    max_steps=3, devices="gpu:0" if len(sys.argv) < 2 else sys.argv[1],
)
data = np.zeros((8, 4), "float32"), np.zeros((8, 2), "float32")
trainer = Trainer(model, args, train_dataset=data, loss="mse")
"""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Runs a program in this process, with made-up results of the compiler."""
    monkeypatch.setattr(planner, "compile_program", made_up)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(text, *arguments, name="train.py", module=False, leave=None, **wanted):
        (home / name).write_text(textwrap.dedent(text))
        result = tmp_path / "result.json"
        task = {
            "program": name.removesuffix(".py") if module else name,
            "module": module,
            "arguments": list(arguments),
            "request": {"device": "h100", "batch": [], "quick": True, **wanted},
            "result": str(result),
        }
        status = script.main([json.dumps(task)], leave)
        found = json.loads(result.read_text())
        assert status == (0 if "plan" in found else 2)
        assert not request.pending()
        assert {path.name for path in home.iterdir()} <= {name, "__pycache__"}
        return found

    return run


@pytest.mark.core
def test_the_first_fit_makes_the_plan_and_nothing_is_written(planned):
    found = planned(
        BEGIN
        + TRAIN
        + "try:\n    trainer.fit()\nexcept Exception:\n    pass\nopen('later', 'w')\n",
        count=8,
        batch=[4, 2],
        changes={"bf16": True},
        backend=keras.backend.backend(),
    )
    plan = found["plan"]
    assert (plan["device"]["name"], plan["count"], plan["fits"]) == ("h100", 8, True)
    assert plan["run"]["facts"]["samples"] == 32
    assert plan["run"]["facts"]["temporary_bytes"] == 4 * 2**30  # made up; of bfloat16
    assert [case["name"] for case in plan["batches"]] == ["batch 2"]
    assert plan["notes"][0].startswith("Planned: the first call of fit() in train.py:15. Later")


@pytest.mark.parametrize("raised", [None, ValueError("It runs in Python.")])
@pytest.mark.parametrize("caught", ["except Exception:", "except:"])
def test_no_later_fit_trains_whatever_the_program_catches(planned, monkeypatch, raised, caught):
    if raised is not None:
        monkeypatch.setattr(planner, "compile_program", lambda trainer, **others: _raise(raised))
    loop = f"for _ in range(2):\n    try:\n        trainer.fit()\n    {caught}\n        pass\n"
    found = planned(BEGIN + TRAIN + loop)  # it looks for files, too
    if raised is None:
        assert "plan" in found
    else:
        assert "train.py failed in its first fit()" in found["error"]
        assert "It runs in Python." in found["error"]


def _raise(error):
    raise error


class Left(BaseException):
    pass


def test_the_process_ends_before_anything_else_of_the_program_runs(planned, tmp_path):
    def leave(status):
        assert status == 0
        assert "plan" in json.loads((tmp_path / "result.json").read_text())
        raise Left

    text = "try:\n    trainer.fit()\nexcept Exception:\n    open('weights', 'w')\n"
    assert "plan" in planned(BEGIN + TRAIN + text, leave=leave)


def test_the_program_has_its_own_arguments_and_folder(planned, tmp_path):
    (tmp_path / "home" / "train.py").unlink(missing_ok=True)
    text = BEGIN + "assert sys.argv == ['train.py', 'gpu:3', '--x'], sys.argv\n" + TRAIN
    text += "assert __name__ == '__main__'\nassert sys.path[0].endswith('home')\ntrainer.train()\n"
    assert "plan" in planned(text, "gpu:3", "--x")


def test_a_module(planned):
    assert "plan" in planned(BEGIN + TRAIN + "trainer.fit()\n", name="mine.py", module=True)


@pytest.mark.parametrize(
    ("call", "options"),
    [("find_learning_rate", ""), ("hyperparameter_search", "n_trials=3, n_jobs=2")],
)
def test_other_calls_that_train_are_planned_too(planned, call, options):
    init = "trainer.model_init, trainer.eval_dataset = lambda: model, data\n"
    found = planned(f"{BEGIN}{TRAIN}{init}trainer.{call}({options})\n")
    assert f"first call of {call}() in train.py:15" in found["plan"]["notes"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "train.py ended without a call of Trainer.fit()"),
        ("raise SystemExit(3)\n", "It ended with exit status 3."),
        ("raise KeyboardInterrupt\n", "It was interrupted."),
        ("import kbtrain\nkbtrain.TrainingArguments(batch=8)\n", "batch"),
        ("\nx = {}['a']\n", "failed before its first fit() (train.py:2): KeyError: 'a'"),
    ],
)
def test_a_program_that_never_trains(planned, text, message):
    assert message in planned(text)["error"]


def test_a_program_s_own_mistake_has_its_traceback_and_no_other_frames(planned, capsys):
    planned("def f():\n    return 1 / 0\nf()\n")
    printed = capsys.readouterr().err
    assert "line 2, in f" in printed
    assert "runpy" not in printed
    assert "plan/script" not in printed


@pytest.mark.parametrize(
    ("text", "framework"),
    [
        ("raise TypeError('relu(): input must be Tensor, not torch.Tensor')\n", "PyTorch"),
        ("raise ValueError('tensorflow.python says so')\n", "TensorFlow"),
    ],
)
def test_a_program_that_needs_another_framework(planned, capsys, text, framework):
    error = planned(text, backend="torch")["error"]
    assert f"A model that calls {framework} itself" in error
    assert capsys.readouterr().err == ""  # no traceback of a framework


@pytest.mark.parametrize(
    ("backend", "own"), [("torch", "PyTorch"), ("tensorflow", "TensorFlow"), ("jax", "")]
)
@pytest.mark.parametrize("by_program", [True, False])
def test_a_run_of_another_backend_is_said_to_be_one(planned, monkeypatch, backend, own, by_program):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    set_it = f"import os\nos.environ['KERAS_BACKEND'] = {backend!r}\n" if by_program else ""
    wanted = {} if by_program else {"backend": backend}
    notes = planned(set_it + BEGIN + TRAIN + "trainer.fit()\n", **wanted)["plan"]["notes"]
    assert any(f"runs on {own} and was compiled with JAX" in note for note in notes) == bool(own)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_fsdp_is_what_the_backend_of_the_program_can_divide(planned, monkeypatch, backend):
    asked = []

    def compile_program(trainer, **options):
        asked.append(options["changes"])
        return made_up(trainer, **options)

    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(planner, "compile_program", compile_program)
    found = planned(BEGIN + TRAIN + "trainer.fit()\n", count=8, fsdp=True, backend=backend)
    whole = backend == "torch"
    assert asked == [{"fsdp": "shard_grad_op" if whole else "full_shard"}]
    assert any("keeps weights whole" in note for note in found["plan"]["notes"]) == whole


@pytest.mark.neutral
def test_the_backend_of_a_program(tmp_path):
    assert backend_of({"KERAS_BACKEND": "torch"}) == "torch"
    assert backend_of({"KERAS_HOME": str(tmp_path)}) == "tensorflow"
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert backend_of({"KERAS_HOME": str(tmp_path)}) == "jax"
    assert chosen_by_program({"KERAS_BACKEND": "jax"}, "torch") == "torch"
    assert chosen_by_program({"KERAS_BACKEND": "tensorflow"}, "torch") == "tensorflow"


def test_without_jax_it_is_said_what_to_install(monkeypatch):
    from kbtrain.plan import process

    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kbtrain\[jax\]'"):
        process.environment({})
