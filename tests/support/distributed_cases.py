"""Small trainings for one process or several: a worker runs cases and writes what they gave.

``python distributed_cases.py OUTPUT CASE...`` in every process; process r writes OUTPUT.r, a JSON
file of case -> name -> numbers. The numbers must not depend on the number of processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import kbtrain
from kbtrain import Trainer, TrainerCallback, TrainingArguments, backends

import keras  # isort: skip: the processes are joined by the first name of kbtrain
import numpy as np  # isort: skip
from keras import ops  # isort: skip

from kbtrain.utils.machine.processes import current

FOLDER = Path()


def arguments(name: str, **given: Any) -> TrainingArguments:
    defaults: dict[str, Any] = dict(
        output_dir=str(FOLDER / name),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        split_batches=True,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level_replica="passive",
    )
    return TrainingArguments(**{**defaults, **given})


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def weights(model: keras.Model) -> dict[str, list[float]]:
    return {
        f"weight {i}": ops.convert_to_numpy(v.value).astype("float64").reshape(-1).tolist()
        for i, v in enumerate(model.variables)
        if "seed" not in v.path
    }


def result(trainer: Trainer, **more: Any) -> dict[str, Any]:
    ignored = ("epoch", "step", "runtime", "per_second", "share", "seconds")
    logs = [
        {n: v for n, v in entry.items() if not any(part in n for part in ignored)}
        for entry in trainer.state.log_history
    ]
    found: dict[str, Any] = {
        f"log {name}": [entry[name] for entry in logs if name in entry]
        for name in sorted({name for entry in logs for name in entry})
    }
    return found | weights(trainer.model) | {"steps": [trainer.state.global_step]} | more


def dense(inputs: int = 4, outputs: int = 3, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(8, activation="tanh", **options),
            keras.layers.Dense(outputs),
        ]
    )


# --- cases ----------------------------------------------------------------------------------------


def line(samples: int) -> dict[str, Any]:
    x = np.linspace(-1, 1, samples, dtype="float32")[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    trainer = Trainer(
        model,
        arguments("line", num_train_epochs=3, learning_rate=0.1, max_grad_norm=0.0),
        train_dataset=(x, 2 * x + 3),
        eval_dataset=(x, 2 * x + 3),
        loss="mse",
    )
    trainer.fit()
    return result(trainer, eval=[trainer.evaluate()["eval_loss"]])


def tokens(**given: Any) -> dict[str, Any]:
    """Labels at -100, unevenly; samples, labels and a tail that leaves a process without a row."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 11, (25, 6)).astype("int32")
    y = rng.integers(0, 11, (25, 6)).astype("int32")
    y[rng.random((25, 6)) < 0.5] = -100
    y[2] = -100
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), keras.layers.Embedding(11, 5), keras.layers.Dense(11)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = Trainer(
        model,
        arguments("tokens", **{"optim": "adamw", "max_grad_norm": 0.5, **given}),
        train_dataset=(x, y),
        eval_dataset=(x[:21], y[:21]),
        loss=loss,
        metrics=["sparse_categorical_accuracy"],
    )
    trainer.fit()
    predicted = trainer.predict(x[:13])
    return result(
        trainer,
        eval=[v for n, v in trainer.evaluate().items() if "loss" in n or "accuracy" in n],
        predictions=predicted.predictions.astype("float64").reshape(-1).tolist(),
    )


def accumulated() -> dict[str, Any]:
    return tokens(per_device_train_batch_size=4, gradient_accumulation_steps=3)


def label_smoothing() -> dict[str, Any]:
    # Compared before each exchange, which changes nothing.
    return tokens(label_smoothing_factor=0.1, debug="collectives")


def divided(**given: Any) -> dict[str, Any]:
    """The optimizer's state is divided, and saved in the background."""
    return tokens(
        fsdp="shard_grad_op", save_strategy="steps", save_steps=2, save_async=True, **given
    )


def batch_statistics(accumulation: int = 1) -> dict[str, Any]:
    """BatchNorm and dropout, as on one process, also with a tail of one sample."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.Dropout(0.3, seed=11),
            keras.layers.GaussianNoise(0.1, seed=12),
            keras.layers.Dense(1),
        ]
    )
    trainer = Trainer(
        model,
        arguments(
            "statistics",
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=(random(25, 4), random(25, 1, seed=1)),
        loss="mse",
    )
    trainer.fit()
    return result(trainer, eval=[trainer.evaluate((random(9, 4), random(9, 1)))["eval_loss"]])


def outputs() -> dict[str, Any]:
    """Two outputs with a loss each; one has ignored labels."""
    keras.utils.set_random_seed(2)
    x = keras.Input((4,), name="x")
    hidden = keras.layers.Dense(5, activation="tanh", kernel_regularizer="l2")(x)
    model = keras.Model(
        x,
        {
            "a": keras.layers.Dense(1, name="a")(hidden),
            "b": keras.layers.Dense(3, name="b")(hidden),
        },
    )
    b = np.random.default_rng(4).integers(0, 3, 21).astype("int32")
    b[:6] = -100
    y = {"a": random(21, 1), "b": b}
    trainer = Trainer(
        model,
        arguments("outputs", gradient_accumulation_steps=2, per_device_train_batch_size=4),
        train_dataset=(random(21, 4, seed=3), y),
        loss={"a": "mse", "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        loss_weights={"a": 0.3, "b": 1.0},
    )
    trainer.fit()
    return result(trainer, eval=[trainer.evaluate((random(21, 4, seed=3), y))["eval_loss"]])


def one_is_not_finite() -> dict[str, Any]:
    """A NaN in the rows of one process: the update is skipped by all."""
    x, y = random(40, 4), random(40, 1)
    x[13] = np.nan
    trainer = Trainer(
        dense(outputs=1),
        arguments("nan", on_nonfinite="skip", num_train_epochs=1),
        train_dataset=(x, y),
        loss="mse",
        metrics=["mae"],
    )
    trainer.fit()
    return result(trainer, skipped=[trainer.current_run is None])


class Largest(keras.metrics.Metric):
    """The largest output: no sum over samples."""

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.most = self.add_variable((), "zeros", name="most")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.most.assign(ops.maximum(self.most, ops.max(y_pred)))

    def result(self) -> Any:
        return ops.convert_to_tensor(self.most)


def of_the_batch(y_true: Any, y_pred: Any) -> Any:
    """A metric of a whole batch, which is no mean over samples."""
    return ops.sqrt(ops.mean(ops.square(y_true - y_pred)))


def metrics() -> dict[str, Any]:
    trainer = Trainer(
        dense(outputs=1),
        arguments("metrics", num_train_epochs=1),
        train_dataset=(random(21, 4), random(21, 1)),
        loss="mse",
        metrics=["mae", Largest(), of_the_batch],
    )
    trainer.fit()
    found = trainer.evaluate((random(11, 4), random(11, 1)))
    return result(trainer, eval=[found["eval_largest"], found["eval_of_the_batch"]])


def own_loss() -> dict[str, Any]:
    """A loss function that divides by the labels of the update, and logs a value."""

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        errors = ops.square(outputs - labels)
        return ops.sum(errors) / num_items_in_batch, {"spread": ops.mean(ops.abs(outputs))}

    trainer = Trainer(
        dense(outputs=1),
        arguments("own_loss", gradient_accumulation_steps=2, per_device_train_batch_size=3),
        train_dataset=(random(17, 4), random(17, 1)),
        compute_loss_func=loss,
    )
    trainer.fit()
    return result(trainer)


class Adds(keras.layers.Layer):
    """Adds a loss for each sample, which Keras sums."""

    def call(self, x: Any) -> Any:
        self.add_loss(ops.sum(0.01 * ops.square(x), axis=-1))
        return x


def summed_loss(layer: Any = None) -> dict[str, Any]:
    """A loss that is a sum over the samples of a batch, which need not be divided evenly."""
    model = dense()
    summed = layer is None
    if layer is not None:
        model.add(layer)
    trainer = Trainer(
        model,
        arguments("summed", learning_rate=0.01),
        train_dataset=(random(21, 4), random(21, 3)),
        eval_dataset=(random(13, 4, seed=2), random(13, 3, seed=3)),
        loss=keras.losses.MeanSquaredError(reduction="sum") if summed else "mse",
    )
    trainer.fit()
    return result(trainer, eval=[trainer.evaluate()["eval_loss"]])


def weighted() -> dict[str, Any]:
    """Sample weights, and regularizers of weights and activities."""
    trainer = Trainer(
        dense(outputs=1, kernel_regularizer="l2", activity_regularizer="l1"),
        arguments("weighted"),
        train_dataset=(random(21, 4), random(21, 1), np.abs(random(21, seed=9))),
        loss="mse",
        weighted_metrics=["mae"],
    )
    trainer.fit()
    return result(trainer)


def half_precision() -> dict[str, Any]:
    """A dynamic loss scale, with gradients far from the largest float16."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense(outputs=1)
    finally:
        keras.config.set_dtype_policy("float32")
    trainer = Trainer(
        model,
        arguments("half", fp16=True, num_train_epochs=1),
        train_dataset=(random(16, 4), 0.1 * random(16, 1)),
        loss="mse",
    )
    trainer.fit()
    return {"steps": [trainer.state.global_step]} | weights(trainer.model)


def evaluations() -> dict[str, Any]:
    """compute_metrics, several sets, the best model and early stopping agree."""
    calls = []

    def compute(prediction: Any) -> dict[str, float]:
        calls.append(len(prediction.predictions))
        return {"order": float((prediction.predictions[:, 0] * np.arange(calls[-1])).sum())}

    sets = {"a": (random(13, 4, seed=5), random(13, 1)), "b": (random(9, 4), random(9, 1))}
    trainer = Trainer(
        dense(outputs=1),
        arguments(
            "evaluations",
            num_train_epochs=6,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="a_loss",
            learning_rate=0.3,
        ),
        train_dataset=(random(21, 4), random(21, 1)),
        eval_dataset=sets,
        loss="mse",
        compute_metrics=compute,
        callbacks=[kbtrain.EarlyStoppingCallback(2)],
    )
    trainer.fit()
    found = result(trainer)
    return found | {"best": [trainer.state.best_global_step, trainer.state.best_metric]}


def batchwise() -> dict[str, Any]:
    total = [0.0]

    def compute(prediction: Any, compute_result: bool) -> dict[str, float]:
        total[0] += float(np.abs(prediction.predictions).sum())
        return {"sum": total[0]} if compute_result else {}

    trainer = Trainer(
        dense(outputs=1),
        arguments("batchwise", batch_eval_metrics=True),
        eval_dataset=(random(21, 4), random(21, 1)),
        loss="mse",
        compute_metrics=compute,
    )
    return {"eval": [trainer.evaluate()["eval_sum"]]}


def stopped_by_one() -> dict[str, Any]:
    """A callback asks to stop in the last process only: all stop at that update."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if current().rank == current().size - 1 and state.global_step == 3:
                control.should_training_stop = True

    trainer = Trainer(
        dense(outputs=1),
        arguments("stopped"),
        train_dataset=(random(64, 4), random(64, 1)),
        loss="mse",
        callbacks=[Stop()],
    )
    trainer.fit()
    return result(trainer)


def different_models() -> dict[str, Any]:
    """Each process initialises its own model: all start from that of process 0."""
    keras.utils.set_random_seed(20 + current().rank)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    trainer = Trainer(
        model, arguments("different"), train_dataset=(random(16, 4), random(16, 1)), loss="mse"
    )
    trainer.fit()
    return result(trainer)


def optimizer(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"optim": name, "max_steps": 3, "learning_rate": 0.01}
    trainer = Trainer(
        dense(),
        arguments("optimizer", **options),
        train_dataset=(random(21, 4), random(21, 3)),
        loss="mse",
    )
    trainer.fit()
    return result(trainer)


CASES: dict[str, Any] = {
    "line 64": lambda: line(64),
    "line 61": lambda: line(61),
    "line 57": lambda: line(57),
    "tokens": tokens,
    "accumulated": accumulated,
    "label smoothing": label_smoothing,
    "divided": divided,
    # A step of JAX whose state is divided is always compiled.
    "divided, eagerly": lambda: divided(
        jit_compile=False if backends.load().name == "torch" else "auto"
    ),
    "batch statistics": batch_statistics,
    "batch statistics, accumulated": lambda: batch_statistics(2),
    "outputs": outputs,
    "one is not finite": one_is_not_finite,
    "metrics": metrics,
    "own loss": own_loss,
    "summed loss": summed_loss,
    "added losses": lambda: summed_loss(Adds()),
    "weighted": weighted,
    "half precision": half_precision,
    "evaluations": evaluations,
    "batchwise": batchwise,
    "stopped by one": stopped_by_one,
    "different models": different_models,
}


def main(output: str, names: list[str]) -> None:
    global FOLDER
    FOLDER = Path(output).parent / f"of {current().size}"
    found = {}
    for name in names:
        case = CASES.get(name) or (lambda name=name: optimizer(name))
        found[name] = case()
    Path(f"{output}.{current().rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
