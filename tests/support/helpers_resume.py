"""Runs for the tests of resuming; as a script it does one task, given in JSON, in a new process.

``python helpers_resume.py TASK.json``. A task is a list of jobs: train (and stop), or resume from a
copy of a checkpoint. Results are written as ``.npz`` files beside the task.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from helpers import StopAt, arguments, make_data, weights, with_weights, without_timings

from kbtrain import EarlyStoppingCallback, Trainer


class Noise(keras.layers.Layer):
    """Random numbers from a generator of the layer's own."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(9)

    def call(self, x, training=None):
        if not training:
            return x
        return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


class Augmented:
    """Samples that differ every time: NumPy's, Python's and Keras' global state are in the run."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = np.random.normal() + random.random()
        noise += keras.ops.convert_to_numpy(keras.random.uniform((), minval=-1.0)).item()
        return self.x[index] + np.float32(0.1 * noise), self.y[index]


def model(noise=True):
    """BatchNormalization, and if asked for dropout and noise."""
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4),
        keras.layers.BatchNormalization(momentum=0.8),
        *([keras.layers.Dropout(0.3, seed=5), Noise()] if noise else []),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(1),
    ]
    return with_weights(keras.Sequential(layers), 1)


CASES = {
    # 22 samples: 6 batches of 4 (the last one short).
    "plain": {},
    # 3 updates of 2 micro-batches per epoch.
    "accumulation": {"gradient_accumulation_steps": 2},
    # 2 updates per epoch, of 4 and 2 micro-batches.
    "short group": {"gradient_accumulation_steps": 4},
    "deterministic": {"gradient_accumulation_steps": 2},
    "augmented": {},
    "watched": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "num_train_epochs": 2,
    },
}


def make_trainer(case, output_dir, callbacks=(), **changes):
    """The Trainer of a case; everything about it is fixed but where it writes."""
    x, y = make_data(22, seed=3)
    args = arguments(
        output_dir,
        **(
            {
                "per_device_train_batch_size": 4,
                "num_train_epochs": 3,
                "learning_rate": 0.05,
                "train_sampling_strategy": "random",
                "save_strategy": "steps",
                "save_steps": 1,
                "logging_steps": 2,
                "weight_decay": 0.01,
                "warmup_steps": 2,
            }
            | CASES[case]
            | changes
        ),
    )
    watched = [EarlyStoppingCallback(100)] if case == "watched" else []
    return Trainer(
        model(noise=case != "deterministic"),
        args,
        train_dataset=Augmented(x, y) if case == "augmented" else (x, y),
        eval_dataset=(x[:10], y[:10]),
        loss="mse",
        metrics=["mae"],
        callbacks=[*watched, *callbacks],
    )


def results(trainer):
    """Everything that has to be equal bit for bit at the end, as arrays by name."""
    arrays = {f"model_{i}": w for i, w in enumerate(weights(trainer.model))}
    for i, variable in enumerate(trainer.optimizer.variables):
        arrays[f"optimizer_{i}"] = np.array(keras.ops.convert_to_numpy(variable.value))
    # The next random numbers depend on all of the random state.
    arrays["next_keras"] = keras.ops.convert_to_numpy(keras.random.uniform((3,)))
    arrays["next_numpy"] = np.random.random(3)
    arrays["next_python"] = np.array([random.random()])
    arrays["log"] = np.array(json.dumps(without_timings(trainer.state.log_history), sort_keys=True))
    arrays["state"] = np.array(
        json.dumps(
            [
                trainer.state.best_metric,
                trainer.state.best_global_step,
                trainer.state.global_step,
                trainer.state.epoch,
                trainer.state.stateful_callbacks,
            ]
        )
    )
    return arrays


def run_task(task):
    """Do what a task says; see the functions that make them."""
    for job in task["jobs"]:
        stop = [StopAt(job["stop"])] if job.get("stop") else []
        trainer = make_trainer(job["case"], job["output_dir"], stop, **job.get("changes", {}))
        trainer.fit(resume_from_checkpoint=job.get("resume"))
        np.savez(job["result"], **results(trainer))


def in_new_process(folder, jobs, backend=None):
    """Run jobs in one new process on a backend (this one's by default); return their results.

    A job is a dict: ``case``, ``output_dir``, and maybe ``resume``, ``stop`` and ``changes``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs):
        job["result"] = str(folder / f"result-{number}.npz")
    path = folder / "task.json"
    path.write_text(json.dumps({"jobs": jobs}))
    run_script(Path(__file__), [path], backend)
    return [load(job["result"]) for job in jobs]


def run_script(script, arguments, backend=None, path=(), timeout=540, **environ):
    """Run one of the helper scripts with the Python and the backend of this process.

    Args:
        script: A file.
        arguments: Its arguments.
        backend: Another backend.
        path: Folders from which it may import, besides this one.
        timeout: Seconds after which the test fails.
        environ: Further variables of its environment.

    Returns:
        What it prints.
    """
    folders = [Path(__file__).parent, *path, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend or keras.backend.backend(),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **environ,
    }
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def load(path):
    """The arrays of an ``.npz`` file."""
    with np.load(path) as file:
        return dict(file)


if __name__ == "__main__":
    run_task(json.loads(Path(sys.argv[1]).read_text()))
