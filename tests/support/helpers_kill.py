"""A program that trains until it is killed, started again and again; see test_kill.py.

It has imported everything once and forks for every life, so that a life costs its training only.
It reads lives from its input, one JSON object a line: ``folder``, and how the life ends: ``disk``
(the number of the call to the disk in whose middle it kills itself), ``step`` and ``seconds`` (it
is killed so long after so many steps), or neither. It answers with the exit code of each. A life
that is to be killed waits for it a few steps later, however busy the machine is.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
from helpers import arguments, make_data, weights, with_weights
from helpers_deaths import count_calls

from kbtrain import Trainer, TrainerCallback

STEPS = 96


class Tell(TrainerCallback):
    """Tells the killer how far the run is; after its last step it waits for its end."""

    def __init__(self, pipe, last):
        self.pipe, self.left = pipe, last

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, b"%d\n" % state.global_step)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                time.sleep(600)


class Noisy:
    """Samples with noise of NumPy's and Python's global generators."""

    def __init__(self):
        self.x, self.y = make_data(22)

    def __len__(self):
        return 22

    def __getitem__(self, index):
        noise = np.random.normal() + random.random()
        return self.x[index] + np.float32(0.1 * noise), self.y[index]


def train(folder, pipe, last):
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
        callbacks=[Tell(pipe, last)],
    )
    trainer.fit(resume_from_checkpoint="auto")
    arrays = {str(i): w for i, w in enumerate(weights(trainer.model))}
    np.savez(Path(folder) / "final.npz", **arrays, next_numpy=np.random.random(3))


def live(folder, modules, disk=0, step=None, seconds=0.0):
    """One life; returns its status."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        if disk:
            count_calls(disk)
        code = 1
        try:
            train(folder, writing, None if step is None else step + 3)
            modules.write_text(json.dumps(list(sys.modules)))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        if step is not None:
            for _ in zip(range(step), told, strict=False):
                pass
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)  # a dead process remains until it is waited for
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def import_what_lives_import(modules):
    """What a life needs besides; the libraries import much of theirs when it is first used."""
    for name in json.loads(modules.read_text()):
        with contextlib.suppress(Exception):  # names in sys.modules that are no modules
            importlib.import_module(name)
    modules.unlink()


if __name__ == "__main__":
    seen = Path(sys.argv[1])
    for task in sys.stdin:
        print(live(modules=seen, **json.loads(task)), flush=True)
        if seen.exists():
            import_what_lives_import(seen)
