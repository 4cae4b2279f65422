"""Trainings whose optimizer state is divided among the processes.

``python divided_cases.py OUTPUT FOLDER`` in every process; process r writes OUTPUT.r, a JSON file
of case -> name -> numbers. FOLDER has checkpoints of one process, from which runs are resumed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import distributed_cases as cases

from kbtrain import Trainer, TrainerCallback

import numpy as np  # isort: skip

from kbtrain import backends
from kbtrain.utils.machine.processes import current


def options(divided: bool, megabytes: float | None = None) -> dict[str, Any]:
    if not divided:
        return {}
    buckets = {"ddp_bucket_cap_mb": megabytes} if backends.load().name == "torch" else {}
    return {"fsdp": "shard_grad_op", **buckets}


def elements(trainer: Trainer) -> int:
    """Elements of the optimizer's state in this process."""
    return sum(int(np.prod(v.shape)) for v in trainer.optimizer.variables if len(v.shape))


class Freezing(TrainerCallback):
    """Trains the first layer in some updates only."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].layers[0].trainable = state.global_step not in (2, 3, 4)


def averaged(divided: bool, name: str, resume: Path | None = None) -> dict[str, Any]:
    """Averages of the weights are evaluated and saved; layers are frozen on the way."""
    trainer = Trainer(
        cases.dense(),
        cases.arguments(
            name,
            optim="adamw",
            ema=0.9,
            max_steps=7,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            learning_rate=0.02,
            **options(divided),
        ),
        train_dataset=(cases.random(21, 4), cases.random(21, 3)),
        eval_dataset=(cases.random(9, 4), cases.random(9, 3)),
        loss="mse",
        callbacks=[Freezing()],
    )
    trainer.fit(resume_from_checkpoint=None if resume is None else str(resume))
    return cases.result(trainer)


def half_precision(divided: bool) -> dict[str, Any]:
    """The gradients overflow in the second of three updates: no process updates its part."""
    cases.keras.config.set_dtype_policy("mixed_float16")
    try:
        model = cases.dense(outputs=1)
    finally:
        cases.keras.config.set_dtype_policy("float32")
    y = cases.random(24, 1)
    y[9] = 3e4
    trainer = Trainer(
        model,
        cases.arguments("half", fp16=True, num_train_epochs=1, **options(divided)),
        train_dataset=(cases.random(24, 4), y),
        loss="mse",
    )
    trainer.fit()
    updates = trainer.optimizer.inner_optimizer.iterations
    return {
        "updates": [int(cases.ops.convert_to_numpy(updates.value))],
        **cases.weights(trainer.model),
    }


def optimizer(divided: bool, name: str) -> dict[str, Any]:
    trainer = Trainer(
        cases.dense(),
        cases.arguments(
            "optimizer", optim=name, max_steps=3, learning_rate=0.01, **options(divided, 1e-4)
        ),
        train_dataset=(cases.random(21, 4), cases.random(21, 3)),
        loss="mse",
    )
    trainer.fit()
    return cases.result(trainer, elements=[elements(trainer)])


def run(divided: bool) -> dict[str, Any]:
    """The cases that both one process and several run."""
    return {
        "tokens": cases.tokens(**options(divided, 1e-4)),
        "accumulated": cases.tokens(
            per_device_train_batch_size=4, gradient_accumulation_steps=3, **options(divided)
        ),
        "half precision": half_precision(divided),
        "averaged": averaged(divided, "averaged"),
        **{name: optimizer(divided, name) for name in ("adamw", "muon", "adafactor")},
    }


def main(output: str, folder: str) -> None:
    cases.FOLDER = Path(output).parent / f"of {current().size}"
    found = run(divided=True)
    found["resumed"] = averaged(True, "resumed", Path(folder) / "averaged" / "checkpoint-3")
    Path(f"{output}.{current().rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
