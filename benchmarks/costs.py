"""Overheads besides the steps: import, construction, first step, memory, logs and checkpoints.

    KERAS_BACKEND=jax python costs.py --json out.json

Import time and peak memory are measured in fresh processes, alternating between contenders. Memory
is the maximum resident set size of a process (Linux).
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 5


def fresh(code: str, *arguments: str) -> float:
    """The last number printed by a fresh process."""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
    return float(result.stdout.split()[-1])


def import_time() -> dict[str, float]:
    """Seconds that the imports take after ``import keras``."""
    code = "import time, keras; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    lines = ("from kbtrain import Trainer, TrainingArguments", "import optim")
    return {
        f"{line}, s": statistics.median(fresh(code.format(line)) for _ in range(REPEATS))
        for line in lines
    }


def settings(folder: str, **more: Any) -> Any:
    from kbtrain import TrainingArguments

    defaults: dict[str, Any] = {
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(output_dir=folder, **(defaults | more))


def construction() -> dict[str, float]:
    from workloads import WORKLOADS, loss

    from kbtrain import Trainer

    workload = WORKLOADS["gpt"]
    model, data, seconds = workload.make(), workload.data(64), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 * REPEATS):
            start = time.perf_counter()
            Trainer(model, settings(folder), train_dataset=data, loss=loss())
            seconds.append(time.perf_counter() - start)
    return {"Trainer(...), ms": statistics.median(seconds) * 1e3}


def timed_steps(name: str, steps: int, rows: int | None = None, **more: Any) -> list[float]:
    """Timestamps: the call of fit, then the end of each step."""
    from workloads import WORKLOADS, loss

    from kbtrain import Trainer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    workload = WORKLOADS[name]
    times: list[float] = []
    data = workload.data(rows or workload.batch * steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(
            folder, per_device_train_batch_size=workload.batch, max_steps=steps, **more
        )
        model = workload.make()
        trainer = Trainer(model, arguments, train_dataset=data, loss=loss(), callbacks=[Clock()])
        times.append(time.perf_counter())
        trainer.fit()
    return times


def first_step() -> dict[str, float]:
    """Time from the call of fit to the end of the first step, also for Keras' fit."""
    from workloads import WORKLOADS, loss

    found = {}
    for name in ("mlp", "gpt"):
        times = timed_steps(name, 2)
        found[f"{name}: first step, s"] = times[1] - times[0]
        workload = WORKLOADS[name]
        model = workload.make()
        model.compile(optimizer="adamw", loss=loss())
        x, y = workload.data(workload.batch)
        start = time.perf_counter()
        model.fit(x, y, batch_size=workload.batch, verbose=0)
        found[f"{name}: first step of keras fit, s"] = time.perf_counter() - start
    times = timed_steps("mlp", 2, rows=10_000_000)
    found["mlp, 10^7 shuffled rows: first step, s"] = times[1] - times[0]
    return found


def logging_cost() -> dict[str, float]:
    """Time of a GPT step that logs each step, relative to no logs; one step per block in both."""
    seconds: dict[int, list[float]] = {1: [], 500: []}
    for _ in range(3):
        for every in seconds:
            times = timed_steps("gpt", 10, logging_steps=every)
            seconds[every].append((times[-1] - times[3]) / (len(times) - 4))
    ratios = [a / b for a, b in zip(seconds[1], seconds[500], strict=True)]
    return {"gpt: a log of every step, ratio": statistics.median(ratios)}


def checkpoint_stall() -> dict[str, float]:
    """The training time lost to a save in the background, at 50 and at 500 MB."""
    return one_checkpoint_stall(1180) | one_checkpoint_stall(3740)


def one_checkpoint_stall(width: int) -> dict[str, float]:
    """Time that saves block the training, relative to a copy of the same arrays, alternating.

    Args:
        width: Width of a model of three square layers, which has 36 x width^2 bytes with AdamW.
    """
    import keras
    import numpy as np

    from kbtrain import Trainer, TrainerCallback
    from kbtrain.training import actions

    class Copy(TrainerCallback):
        """Copies the same arrays after each completed save."""

        every_step = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if saves and not copies or len(copies) < len(saves):
                kwargs["trainer"].saver.settle()
                start = clocks()
                held = [array.copy() for group in arrays() for array in group.values()]
                copies.append(clocks() - start)
                del held

    def clocks() -> Any:
        return np.array([time.perf_counter(), time.thread_time()])

    def save(trainer: Any, run: Any) -> None:
        start = clocks()
        former(trainer, run)
        saves.append(clocks() - start)

    def arrays() -> Any:
        return snapshots[-1].arrays.values()

    def snapshot(trainer: Any, run: Any) -> Any:
        snapshots[:] = [taken(trainer, run)]
        return snapshots[-1]

    saves: list[Any] = []
    copies: list[Any] = []
    snapshots: list[Any] = []
    former, taken = actions.save, actions._snapshot
    layers = [keras.layers.Dense(width) for _ in range(3)]
    model = keras.Sequential([keras.Input((width,)), *layers])
    x = np.random.default_rng(0).normal(size=(16, width)).astype("float32")
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(
            folder,
            per_device_train_batch_size=16,
            max_steps=12 * 4,
            save_strategy="steps",
            save_steps=4,
            save_total_limit=1,
        )
        actions.save, actions._snapshot = save, snapshot
        try:
            Trainer(model, arguments, train_dataset=(x, x), loss="mse", callbacks=[Copy()]).fit()
        finally:
            actions.save, actions._snapshot = former, taken
    size = f"{36 * width**2 / 1e6:.0f} MB checkpoint"
    warm, plain = np.array(saves[1:]) * 1e3, np.array(copies[1:]) * 1e3
    count = min(len(warm), len(plain))
    ratios = warm[:count] / plain[:count]
    return {
        f"{size}: the first save holds up training, ms": saves[0][0] * 1e3,
        f"{size}: later saves, ms (median)": statistics.median(warm[:, 0]),
        f"{size}: a plain copy of the same arrays, ms (median)": statistics.median(plain[:, 0]),
        f"{size}: a later save / a plain copy": statistics.median(ratios[:, 0]),
        f"{size}: the same, processor time": statistics.median(ratios[:, 1]),
    }


def peak_memory() -> dict[str, float]:
    """The maximum resident set size of a process that trains a model."""
    found: dict[str, float] = {}
    code = "import sys; sys.path.insert(0, '.'); import costs; costs.train_alone(*sys.argv[1:])"
    for name in ("gpt", "convnet", "recommender"):
        sizes = {who: fresh(code, name, who) for who in ("raw", "keras fit", "kbtrain")}
        for who, size in sizes.items():
            found[f"{name}: peak memory, {who}, MB"] = size / 1024
        found[f"{name}: peak memory, kbtrain / raw"] = sizes["kbtrain"] / sizes["raw"]
    return found


def train_alone(name: str, who: str) -> None:
    """Train a model for ten steps and print the process's peak in KiB."""
    import keras
    from workloads import WORKLOADS, loss

    workload = WORKLOADS[name]
    x, y = workload.data(workload.batch * 10)
    if who == "raw":
        native = importlib.import_module(f"native_{keras.backend.backend()}")
        step = next(iter(native.loops(name, workload.make, loss()).values()))
        for i in range(10):
            rows = slice(i * workload.batch, (i + 1) * workload.batch)
            value = step(x[rows], y[rows])
        native.wait(value)
    elif who == "keras fit":
        model = workload.make()
        model.compile(optimizer="adamw", loss=loss())
        model.fit(x, y, batch_size=workload.batch, verbose=0)
    elif who == "kbtrain":
        from kbtrain import Trainer

        with tempfile.TemporaryDirectory() as folder:
            arguments = settings(
                folder, per_device_train_batch_size=workload.batch, num_train_epochs=1
            )
            Trainer(workload.make(), arguments, train_dataset=(x, y), loss=loss()).fit()
    # Not ru_maxrss, which a process inherits from its parent.
    with open("/proc/self/status", encoding="utf-8") as file:
        print(next(line.split()[1] for line in file if line.startswith("VmHWM")))


def long_run(steps: int) -> dict[str, float]:
    """Growth of memory and of the state file over a run of many tiny steps, logging every 100."""
    from workloads import WORKLOADS, loss

    from kbtrain import Trainer, TrainerCallback

    class Memory(TrainerCallback):
        every_step = False

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with open("/proc/self/statm", encoding="utf-8") as file:
                sizes.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)

    sizes: list[float] = []
    workload = WORKLOADS["mlp"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(
            folder, per_device_train_batch_size=32, max_steps=steps, logging_steps=100
        )
        model, data = workload.make(), workload.data(32_000)
        trainer = Trainer(model, arguments, train_dataset=data, loss=loss(), callbacks=[Memory()])
        trainer.fit()
        trainer.save_state()
        state = Path(folder, "trainer_state.json").stat().st_size
    found = {
        f"{steps} steps: memory after {share} %, MB": sizes[len(sizes) * share // 100 - 1]
        for share in (10, 50, 100)
    }
    return {**found, f"{steps} steps: trainer_state.json, KiB": state / 1024}


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "import": import_time,
    "construction": construction,
    "first": first_step,
    "logging": logging_cost,
    "checkpoint": checkpoint_stall,
    "checkpoint50": lambda: one_checkpoint_stall(1180),
    "memory": peak_memory,
    "long": lambda: long_run(100_000),
    "longest": lambda: long_run(1_000_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [part for part in PARTS if part not in ("longest", "checkpoint50")]
    parser.add_argument("parts", nargs="*", default=usual, metavar="PART", help=str([*PARTS]))
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    results: dict[str, float] = {}
    for part in options.parts:
        for name, value in PARTS[part]().items():
            results[name] = value
            print(f"{name:52} {value:10.3f}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
