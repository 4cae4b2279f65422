"""A Trainer of four updates, for tests of its smaller methods."""

from helpers import arguments, linear_model, make_data

from kbtrain import (
    Trainer,
)


def make(tmp_path, model=None, data=None, callbacks=(), **changes):
    given = {
        name: changes.pop(name)
        for name in ("processing_class", "data_collator", "metrics", "optimizers", "eval_dataset")
        if name in changes
    }
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "jit_compile": False}
    data = make_data(16) if data is None else data
    given = {"eval_dataset": data} | given
    args = arguments(tmp_path, **(defaults | changes))
    return Trainer(
        model or linear_model(), args, train_dataset=data, loss="mse", callbacks=callbacks, **given
    )
