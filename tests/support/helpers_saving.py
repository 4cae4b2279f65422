"""A run that saves, and what may happen to its folder on the way."""

import errno
import os

from helpers import arguments, linear_model, make_data

from kbtrain import Trainer, TrainerCallback
from kbtrain.utils.files import filesystem

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(kwargs["trainer"])


def train(folder, callbacks=(), resume=None, **changes):
    args = arguments(
        folder,
        **({"save_strategy": "steps", "save_steps": 2, "max_steps": 8} | changes),
        per_device_train_batch_size=4,
    )
    trainer = Trainer(
        linear_model(), args, train_dataset=make_data(), eval_dataset=make_data(), loss="mse",
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(resume)
    return trainer


def full_disk(monkeypatch, failing_steps, error=FULL):
    """Let the writing of some steps' checkpoints fail, as the disk would."""
    original = filesystem.fsync_directory

    def fail(path):
        if any(path.name.startswith(f".tmp-checkpoint-{step}-") for step in failing_steps):
            raise error
        original(path)

    monkeypatch.setattr(filesystem, "fsync_directory", fail)
