"""What ``plan`` says of a step's memory on this processor, and what the process then takes.

    python benchmarks/planned_memory.py mlp resnet gpt

Each model is trained and planned in a process of its own. Measured is the most memory that the
process has during updates, the first of which compiles and does not count, above what it has before
there is a model; one like it has been trained with a single sample then, so that all code is
loaded. Linux only: ``VmHWM`` of /proc/self/status, reset after the first update.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import keras
import numpy as np
from keras import layers
from workloads import GptSize, gpt, loss

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.plan.compile import compile_program

UPDATES = 3


def wide_mlp() -> keras.Model:
    """37.8 million parameters."""
    hidden = [layers.Dense(4096, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((1024,)), *hidden, layers.Dense(4096), layers.Dense(4)])


def resnet() -> keras.Model:
    """Sixteen bottleneck blocks, as in a ResNet-50: activations are nearly all there is.

    A single convolution packs its input in memory of its own, which XLA does not plan; that is the
    smaller a part, the deeper the model.
    """

    def convolved(x: Any, filters: int, size: int) -> Any:
        x = layers.Conv2D(filters, size, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((64, 64, 3))
    x = layers.ReLU()(convolved(inputs, 128, 1))
    for _ in range(16):
        y = layers.ReLU()(convolved(x, 32, 1))
        y = layers.ReLU()(convolved(y, 32, 3))
        x = layers.ReLU()(convolved(y, 128, 1) + x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def _arrays(rows: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, *shape), "float32"), np.zeros(rows, "int32")


def _tokens(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, length), "int32"), np.zeros((rows, length), "int32")


MODELS: dict[str, tuple[Any, int, Any]] = {
    "mlp": (wide_mlp, 64, lambda rows: _arrays(rows, (1024,))),
    "resnet": (resnet, 4, lambda rows: _arrays(rows, (64, 64, 3))),
    "gpt": (
        lambda: gpt(GptSize(depth=4, width=256, length=256, heads=4, vocabulary=4096)),
        16,
        lambda rows: _tokens(rows, 256),
    ),
}
"""Model, batch size, and ``data(rows)``."""


def resident(name: str) -> int:
    """Bytes of memory that the process has, "VmRSS", or had at most, "VmHWM"."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


class ResetPeak(TrainerCallback):
    """Forgets the peak after the first update, which has compiled the step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            kwargs["trainer"].current_run.read()
            Path("/proc/self/clear_refs").write_text("5")


def trainer_of(make: Any, rows: int, data: Any, folder: str, **arguments: Any) -> Trainer:
    return Trainer(
        make(),
        TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=UPDATES,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **{"steps_per_execution": 1, **arguments},
        ),
        train_dataset=data,
        loss=loss(),
        callbacks=[ResetPeak()],
    )


def measure(name: str) -> dict[str, Any]:
    """Plan and train a model here; nothing else may have run in this process."""
    make, rows, data = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(make, 1, data(UPDATES), folder).fit()
        gc.collect()
        arrays = data(rows * UPDATES)
        before = resident("VmRSS")
        trainer = trainer_of(make, rows, arrays, folder)
        trainer.fit()
        measured = resident("VmHWM") - before
        planned = compile_program(trainer)
    return {"model": name, "planned": planned.peak_bytes, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {list(MODELS)}")
    parser.add_argument("--here", action="store_true", help="in this process, as JSON")
    options = parser.parse_args()
    for name in options.models or MODELS:
        if options.here:
            print(json.dumps(measure(name)), flush=True)
            continue
        command = [sys.executable, __file__, name, "--here"]
        result = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=1800).stdout
        )
        planned, measured = result["planned"], result["measured"]
        print(
            f"{name}: planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB "
            f"({100 * (planned / measured - 1):+.1f} %)",
            flush=True,
        )


if __name__ == "__main__":
    main()
