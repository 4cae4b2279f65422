"""A program that trains until it is killed, started again and again; see test_kill.py.

``python helpers_kill.py FOLDER CALL``. CALL is 0, or the number of the flush or rename at which the
program kills itself, which is always in the middle of a save.
"""

import os
import random
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from helpers import arguments, make_data, weights, with_weights

from kbtrain import Trainer, TrainerCallback

STEPS = 24


class Tell(TrainerCallback):
    """Says how far the run is, so that the killer knows that it lives."""

    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def die_at(call):
    """Kill this process at one of its calls of ``os.fsync`` and ``os.rename``."""
    left = [call]
    for name in ("fsync", "rename"):
        original = getattr(os, name)

        def deadly(*arguments, original=original):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, name, deadly)


class Noisy:
    """Samples with noise of NumPy's and Python's global generators."""

    def __init__(self):
        self.x, self.y = make_data(22)

    def __len__(self):
        return 22

    def __getitem__(self, index):
        noise = np.random.normal() + random.random()
        return self.x[index] + np.float32(0.1 * noise), self.y[index]


def train(folder):
    """A run with everything random in it that saves at every other step."""
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.Dropout(0.3, seed=5),
        keras.layers.Dense(1),
    ]
    args = arguments(
        folder,
        learning_rate=0.05,
        per_device_train_batch_size=4,
        train_sampling_strategy="random",
        max_steps=STEPS,
        warmup_steps=5,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        report_to="json",
    )
    trainer = Trainer(
        with_weights(keras.Sequential(layers), 1),
        args,
        train_dataset=Noisy(),
        loss="mse",
        callbacks=[Tell()],
    )
    trainer.fit(resume_from_checkpoint="auto")
    arrays = {str(i): w for i, w in enumerate(weights(trainer.model))}
    np.savez(Path(folder) / "final.npz", **arrays, next_numpy=np.random.random(3))


if __name__ == "__main__":
    directory, call = sys.argv[1], int(sys.argv[2])
    if call:
        die_at(call)
    train(directory)
