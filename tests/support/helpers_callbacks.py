"""A short run with callbacks, and when its events happened."""

from helpers import arguments, linear_model, make_data

from kbtrain import (
    Trainer,
)


def make_trainer(output_dir, callbacks=(), model=None, **changes):
    """Four updates of 4 samples; evaluation on the same data."""
    data = make_data(16)
    args = arguments(
        output_dir,
        **(
            {"per_device_train_batch_size": 4, "num_train_epochs": 1, "jit_compile": False}
            | changes
        ),
    )
    return Trainer(
        model or linear_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        loss="mse",
        callbacks=list(callbacks),
    )


def happened(recorder, event):
    """The steps at which an event happened."""
    return [s for e, s in zip(recorder.events, recorder.steps, strict=True) if e == event]
