"""A run that fits a line, started by a launcher: ``launched_line.py FOLDER [RANK STEP]``.

Process RANK kills itself after update STEP, once. Each process writes the weights to a file.
"""

import json
import os
import signal
import sys
from pathlib import Path

from kbtrain import Trainer, TrainerCallback, TrainingArguments  # before Keras makes a tensor

import keras  # isort: skip
import numpy as np  # isort: skip


class Die(TrainerCallback):
    def __init__(self, rank, step, marker):
        self.rank, self.step, self.marker = rank, step, marker

    def on_step_end(self, args, state, control, **others):
        here = (args.process_index, state.global_step) == (self.rank, self.step)
        if here and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, rank=-1, step=-1):
    x = np.linspace(-1, 1, 61, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    args = TrainingArguments(
        output_dir=folder / "run",
        num_train_epochs=3,
        per_device_train_batch_size=8,
        split_batches=True,
        learning_rate=0.1,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_steps=4,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=(x, 2 * x + 3),
        loss="mse",
        callbacks=[Die(rank, step, folder / "died")],
    )
    trainer.fit(resume_from_checkpoint="auto")
    weights = [float(value) for weight in model.get_weights() for value in weight.ravel()]
    (folder / f"weights.{args.process_index}").write_text(json.dumps(weights))
    print("done", args.process_index)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
