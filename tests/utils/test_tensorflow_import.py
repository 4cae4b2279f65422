"""A run on another backend does not import TensorFlow, also where that is installed."""

import os
import subprocess
import sys

import pytest
from keras.src.utils import module_utils

from kbtrain.utils.packages.tensorflow_import import not_imported


def test_keras_takes_it_for_not_installed_and_only_inside(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    before = module_utils.tensorflow._available
    with not_imported():
        assert not module_utils.tensorflow.available
    assert module_utils.tensorflow._available is before


def test_what_is_imported_stays_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", sys)
    monkeypatch.setattr(module_utils.tensorflow, "_available", True)
    with not_imported():
        assert module_utils.tensorflow.available


def test_an_error_inside_ends_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    before = module_utils.tensorflow._available
    with pytest.raises(KeyError), not_imported():
        raise KeyError
    assert module_utils.tensorflow._available is before


RUN = """
import sys
import keras, numpy as np
from kbtrain import Trainer, TrainingArguments
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=2, save_strategy="steps", save_steps=1
)
x = np.ones((8, 2), "float32")
trainer = Trainer(model, arguments, train_dataset=(x, x[:, :1]), loss="mse")
trainer.fit()
trainer.evaluate((x, x[:, :1]))
trainer.save_model()
print("tensorflow" in sys.modules)
"""


@pytest.mark.cross
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_with_checkpoints_does_not_import_it(tmp_path, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert result.stdout.split()[-1] == "False"
