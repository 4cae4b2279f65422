"""Module paths of release 0.1 can still be imported, and the files it saved can be loaded."""

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import pytest

import kbtrain
import kbtrain.moved
import optim
from optim.moved import MOVED

RELEASE = Path(__file__).parent.parent / "golden" / "release_0_1"


OTHERS = {"jax", "tensorflow", "torch"} - {keras.backend.backend()}


def runs_here(module):
    """Whether a module is not that of another framework, which may not be installed."""
    return not OTHERS & set(module.replace("_", ".").split("."))


@pytest.mark.parametrize("old", sorted(filter(runs_here, MOVED)))
def test_old_module_of_optim_has_the_contents_of_the_new_one(old):
    new = importlib.import_module(f"optim.{MOVED[old]}")
    module = importlib.import_module(f"optim.{old}")
    if "." not in old:
        assert getattr(optim, old) is module
    name = next(n for n in vars(new) if not n.startswith("_") and n != "annotations")
    with pytest.warns(DeprecationWarning, match=f"optim.{old} has moved to {new.__name__}"):
        assert getattr(module, name) is vars(new)[name]


def test_old_module_of_optim_has_nothing_else():
    module = importlib.import_module("optim.adamw")
    with pytest.raises(AttributeError, match="no attribute 'AdamX'"):
        _ = module.AdamX
    assert not hasattr(module, "__path__")


def test_schedules_are_still_found_in_optim_schedules():
    assert optim.schedules.LinearWithWarmup is optim.LinearWithWarmup
    assert optim.schedules.Schedule is optim.Schedule


def test_documented_modules_of_kbtrain_are_still_found():
    from kbtrain.callbacks import EarlyStoppingCallback, TrainerCallback
    from kbtrain.data import DataCollatorWithPadding
    from kbtrain.trackers.base import Tracker
    from kbtrain.trainer import Trainer

    assert Trainer is kbtrain.Trainer
    assert TrainerCallback is kbtrain.TrainerCallback
    assert EarlyStoppingCallback is kbtrain.EarlyStoppingCallback
    assert DataCollatorWithPadding is kbtrain.DataCollatorWithPadding
    assert issubclass(Tracker, TrainerCallback)


@pytest.mark.parametrize("old", sorted(filter(runs_here, kbtrain.moved.MOVED)))
def test_old_module_of_kbtrain_is_the_new_one(old):
    sys.modules.pop(old, None)
    new = importlib.import_module(kbtrain.moved.MOVED[old])
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new.__name__}"):
        module = importlib.import_module(old)
    assert module is new
    assert module.__name__ == module.__spec__.name == kbtrain.moved.MOVED[old]


def test_old_modules_of_kbtrain_hide_no_mistake():
    with pytest.raises(ModuleNotFoundError, match="kbtrain.no_such_module"):
        importlib.import_module("kbtrain.no_such_module")


def test_old_module_of_training_arguments_warns():
    sys.modules.pop("kbtrain.training_args", None)
    with pytest.warns(DeprecationWarning, match="from kbtrain import TrainingArguments"):
        old = importlib.import_module("kbtrain.training_args")
    assert old.TrainingArguments is kbtrain.TrainingArguments


def test_old_imports_and_old_files_in_a_fresh_process():
    """Only old paths are imported; the file names ``optim.adamw``, which no longer is a file."""
    path = RELEASE / "adamw.keras"
    with zipfile.ZipFile(path) as archive:
        assert '"module": "optim.adamw"' in archive.read("config.json").decode()
    program = (
        "import optim.adamw, keras, json\n"
        "from optim.optimizer import Optimizer\n"
        "from optim.decay import NO_DECAY_NAMES\n"
        f"model = keras.saving.load_model({str(path)!r})\n"
        "same = type(model.optimizer) is optim.adamw.AdamW\n"
        "steps = int(keras.ops.convert_to_numpy(model.optimizer.iterations))\n"
        "print(json.dumps([same, isinstance(model.optimizer, Optimizer), steps]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [True, True, 3]
