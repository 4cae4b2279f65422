"""A run that goes on in other processes, or after one was killed.

As a script, ``helpers_moving.py TASKS`` in each process; TASKS is JSON: a list of the arguments of
``train``. What is complete is not done again.
"""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from helpers import StopAt, arguments, make_data, train_logs, with_weights

from kbtrain import Trainer, TrainerCallback
from kbtrain.utils.machine.processes import current

STEPS = 12


class KillOnce(TrainerCallback):
    """The last process kills itself at an update, unless it has done so before."""

    def __init__(self, step, folder):
        self.step, self.done = step, Path(folder) / "killed"

    def on_step_end(self, args, state, control, **kwargs):
        last = current().rank == current().size - 1
        if last and state.global_step == self.step and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Beginnings(TrainerCallback):
    """Writes down at which step, and in how many processes, the run began each time."""

    def __init__(self, folder):
        self.path = Path(folder) / f"begun.{current().rank}"

    def on_train_begin(self, args, state, control, **kwargs):
        with self.path.open("a") as file:
            file.write(f"{json.dumps([state.global_step, current().size])}\n")


def train(folder, stop=None, kill=None, dropout=0.3, **changes):
    """The run: random order, accumulation, an uneven end of the epoch, dropout, BatchNorm.

    Args:
        folder: For checkpoints and results; it continues from what it finds there.
        stop: The step to stop and save at.
        kill: The step at which the last process dies the first time.
        dropout: A share. Its random numbers depend on the backend.
        changes: Of the arguments.

    Returns:
        The weights and the losses, also in the file ``results.RANK.npz``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(6, use_bias=False),  # with a bias, Adam would amplify rounding errors
        keras.layers.BatchNormalization(momentum=0.8),
        keras.layers.Activation("tanh"),
        *([keras.layers.Dropout(dropout, seed=5)] if dropout else []),
        keras.layers.Dense(1),
    ]
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "split_batches": True,
        "optim": "adamw",
        "learning_rate": 0.02,
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
    }
    callbacks = [Beginnings(folder)]
    callbacks += [] if kill is None else [KillOnce(kill, folder)]
    callbacks += [] if stop is None else [StopAt(stop)]
    trainer = Trainer(
        with_weights(keras.Sequential(layers), 1),
        arguments(folder, **settings | changes),
        train_dataset=make_data(31),
        loss="mse",
        callbacks=callbacks,
    )
    trainer.fit(resume_from_checkpoint="auto")
    found = {f"w{i}": keras.ops.convert_to_numpy(v.value) for i, v in enumerate(weights(trainer))}
    found["loss"] = np.array(train_logs(trainer))
    np.savez(folder / f"results.{current().rank}.npz", **found)
    return found


def weights(trainer):
    return [v for v in trainer.model.variables if "seed" not in v.path]


def results(folder, size):
    """What each process had at the end."""
    found = []
    for rank in range(size):
        with np.load(Path(folder) / f"results.{rank}.npz") as file:
            found.append(dict(file))
    return found


def beginnings(folder, rank=0):
    """(step, number of processes) of each time that the run began."""
    lines = (Path(folder) / f"begun.{rank}").read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


if __name__ == "__main__":
    for task in json.loads(sys.argv[1]):
        folder = Path(task["folder"])
        last = folder / f"checkpoint-{STEPS}"
        if not (last.exists() and (folder / f"results.{current().rank}.npz").exists()):
            train(**task)
