"""Time per training step: kbtrain against a hand-written loop of the backend and Keras' fit.

    KERAS_BACKEND=jax python benchmarks/train_step.py mlp gpt convnet --rounds 5 --json out.json

All contenders train the same Keras model (the hand-written torch loop a torch.nn model of the same
shape) in one process, in turns: a round of each, then the next round. Printed are the medians over
the rounds and the medians of the ratios within a round. The hand-written loops do not clip
gradients and check nothing; kbtrain runs with its defaults, which do both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers

from kbtrain import Trainer, TrainerCallback, TrainingArguments

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Positions(layers.Layer):
    """Adds a learned vector to each position."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], initializer="uniform", name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


def mlp() -> keras.Model:
    inputs = keras.Input((16,))
    return keras.Model(inputs, layers.Dense(4)(layers.Dense(64, activation="relu")(inputs)))


def gpt(depth: int = 4, width: int = 256, length: int = 128, heads: int = 8) -> keras.Model:
    tokens = keras.Input((length,), dtype="int32")
    h = Positions()(layers.Embedding(256, width)(tokens))
    for _ in range(depth):
        a = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(heads, width // heads)(a, a, use_causal_mask=True)
        m = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(h))
        h = h + layers.Dense(width)(m)
    return keras.Model(tokens, layers.Dense(256)(layers.LayerNormalization()(h)))


def convnet() -> keras.Model:
    inputs = keras.Input((32, 32, 3))
    h = inputs
    for filters in (32, 64, 128):
        h = layers.Conv2D(filters, 3, padding="same")(h)
        h = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(h)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(h)))


WORKLOADS: dict[str, tuple[Callable[[], keras.Model], int, int, Callable[[int], Any]]] = {
    # name: model, batch size, steps per round, data for n rows
    "mlp": (
        mlp,
        32,
        1000,
        lambda n: (_normal(n, 16), np.random.default_rng(1).integers(0, 4, n)),
    ),
    "gpt": (
        gpt,
        8,
        8,
        lambda n: tuple(np.random.default_rng(s).integers(0, 256, (n, 128)) for s in (0, 1)),
    ),
    "convnet": (
        convnet,
        64,
        12,
        lambda n: (_normal(n, 32, 32, 3), np.random.default_rng(1).integers(0, 10, n)),
    ),
}


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


class Rounds(TrainerCallback):
    """Measures kbtrain between two logs, and lets the others run at each log."""

    every_step = False

    def __init__(self, others: dict[str, Callable[[], None]], steps: int) -> None:
        self.others, self.steps = others, steps
        self.seconds: dict[str, list[float]] = {name: [] for name in ("kbtrain", *others)}
        self.started = 0.0
        self.logs = 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" not in kwargs["logs"]:
            return
        now = time.perf_counter()
        self.logs += 1
        if self.logs > 1:  # the first round compiles
            self.seconds["kbtrain"].append((now - self.started) / self.steps)
        for name, run in self.others.items():
            start = time.perf_counter()
            run()
            if self.logs > 1:
                self.seconds[name].append((time.perf_counter() - start) / self.steps)
        self.started = time.perf_counter()


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    make, size, steps, data = WORKLOADS[name]
    x, y = data(size * steps)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    native = importlib.import_module(f"native_{keras.backend.backend()}")
    others = {
        native_name: _round(step, batches, native.wait)
        for native_name, step in native.loops(name, make, LOSS).items()
    }
    fitted = make()
    fitted.compile(optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01), loss=LOSS)
    others["keras fit"] = lambda: fitted.fit(x, y, batch_size=size, verbose=0)
    callback = Rounds(others, steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            max_steps=steps * (rounds + 1),
            logging_steps=steps,
            save_strategy="no",
            learning_rate=1e-3,
            weight_decay=0.01,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        Trainer(make(), arguments, train_dataset=(x, y), loss=LOSS, callbacks=[callback]).fit()
    return callback.seconds


def _round(
    step: Callable[[Any, Any], Any], batches: list[Any], wait: Callable[[Any], None]
) -> Callable[[], None]:
    def run() -> None:
        result = None
        for x, y in batches:
            result = step(x, y)
        wait(result)

    return run


def rows(seconds: dict[str, list[float]]) -> Iterator[tuple[str, float, float, float, float]]:
    """Name, median seconds, and lowest, median and highest ratio kbtrain / it."""
    mine = seconds["kbtrain"]
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(mine, values, strict=True)]
        yield name, statistics.median(values), min(ratios), statistics.median(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write all measurements to this file")
    options = parser.parse_args()
    backend = keras.backend.backend()
    results = {}
    print(f"{backend}, keras {keras.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'workload':9} {'contender':22} {'us/step':>10}   kbtrain/it (lowest, highest)")
    for workload in options.workloads:
        results[workload] = measure(workload, options.rounds)
        for name, seconds, low, middle, high in rows(results[workload]):
            ratio = "" if name == "kbtrain" else f"{middle:10.2f} ({low:.2f}, {high:.2f})"
            print(f"{workload:9} {name:22} {seconds * 1e6:10.0f} {ratio}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"backend": backend, "seconds_per_step": results}, file, indent=2)


if __name__ == "__main__":
    main()
