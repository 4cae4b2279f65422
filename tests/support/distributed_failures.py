"""A training in which one process of several does something else than the others.

``python distributed_failures.py FOLDER WHAT RANK``: process RANK does WHAT at update 5.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from kbtrain import Trainer, TrainerCallback, TrainingArguments

import keras  # isort: skip: the processes are joined by the first name of kbtrain
import numpy as np  # isort: skip

from kbtrain.utils.machine.processes import current

folder, what, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
mine = current().rank == rank
evaluated = 0


class Fails(TrainerCallback):
    """Fails in one process; it listens to every update in all of them."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not mine or state.global_step != 5:
            return
        if what == "raises":
            raise ValueError("no more")
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leaves":
            print("left at", time.monotonic(), flush=True)
            sys.exit(0)
        if what == "changes its weights before an evaluation":
            kwargs["model"].weights[-1].assign([0.5])
        if what == "is asked to stop":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        global evaluated
        evaluated += 1
        if what == "is asked to stop in an evaluation":
            time.sleep(0.02)  # else it would be over before the processes agree
            if mine and evaluated == 3:
                os.kill(os.getpid(), signal.SIGTERM)


class Norm(keras.layers.BatchNormalization):
    """In one process it takes the moving statistics, where the others add up those of the batch."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(inputs, training=training and not mine, mask=mask)


different = mine and what == "has other arguments"
args = TrainingArguments(
    output_dir=folder,
    learning_rate=0.2 if different else 0.1,
    num_train_epochs=500,
    save_strategy="steps",
    save_steps=10_000,
    report_to=[],
    disable_tqdm=True,
    log_level="error",
    log_level_replica="error",
    debug="collectives" if what == "meets others elsewhere" else "",
)
x = np.random.default_rng(0).normal(size=(80, 4)).astype("float32")
units = 3 if mine and what == "has another model" else 2
middle = [Norm()] if what == "meets others elsewhere" else []
layers = [keras.layers.Dense(units), *middle, keras.layers.Dense(1)]
model = keras.Sequential([keras.Input((4,)), *layers])
data: Any = (x[1:], x[1:, :1]) if mine and what == "has other data" else (x, x[:, :1])


def stream() -> Iterator[Any]:
    yield from zip(x, x[:, :1], strict=True) if not mine else zip(x[:30], x[:30, :1], strict=True)


if what == "has a shorter stream":
    data, args = stream, args.replace(max_steps=500)
if "evaluation" in what:
    args = args.replace(
        max_steps=8, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=1
    )
trainer = Trainer(
    model,
    args,
    train_dataset=data,
    eval_dataset=(np.tile(x, (10, 1)), np.tile(x[:, :1], (10, 1))),
    loss="mse",
    callbacks=[Fails()],
)
try:
    trainer.fit(resume_from_checkpoint="auto" if what == "makes up for the evaluation" else None)
finally:
    print("update", trainer.state.global_step, "batches", evaluated, flush=True)
    print("evaluated at", [e["step"] for e in trainer.state.log_history if "eval_loss" in e])
