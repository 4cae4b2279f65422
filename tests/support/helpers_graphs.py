"""Trains on PyTorch with the stand-in for CUDA graphs: `python helpers_graphs.py FOLDER`.

Prints one JSON object: for each case what happened with graphs, and how far the numbers are from
those of the same run without.
"""

import contextlib
import gc
import json
import logging
import os
import sys
from pathlib import Path

import fake_cuda_graphs
import keras
import numpy as np
import torch
from fake_cuda_graphs import machine
from fake_streams import Order
from helpers import make_data, train_logs, weights, with_weights
from keras import layers

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.backends.torch.capture import cuda_graph, graph_checks, step
from kbtrain.errors import NonFiniteError

FOLDER = Path(sys.argv[1])
ON_GPU = torch.cuda.is_available()
messages: list[str] = []


class Listener(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())


logging.getLogger("kbtrain").addHandler(Listener())
logging.getLogger("kbtrain").setLevel(logging.INFO)
fake_cuda_graphs.install()


def model(*extra, outputs=1):
    """Dropout without a seed of its own draws from torch's generator; moving averages."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    h = layers.BatchNormalization()(layers.Dense(6, activation="tanh")(inputs))
    for layer in (layers.Dropout(0.3), *extra, layers.Dense(outputs)):
        h = layer(h)
    return with_weights(keras.Model(inputs, h))


class Moves(TrainerCallback):
    """Gives the first variable other memory, and its former memory to another tensor."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            value = kwargs["model"].trainable_variables[0].value
            old, value.data = value.data, value.data.clone()
            old.fill_(1e30)


def train(name, make=model, data=None, callbacks=(), fit=None, **settings):
    defaults = {
        "output_dir": str(FOLDER / name),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
    }
    trainer = Trainer(
        make(),
        TrainingArguments(**(defaults | settings)),
        train_dataset=make_data(24) if data is None else data,
        eval_dataset=make_data(32, seed=1),
        loss="mse",
        metrics=["mae"],
        callbacks=list(callbacks),
    )
    error = None
    try:
        trainer.fit(**(fit or {}))
    except NonFiniteError as caught:
        error = str(caught).partition(":")[0]
    return trainer, error


def numbers(trainer, whole):
    """What is compared; an evaluation and a prediction besides, if it is the whole of it."""
    logged = [train_logs(trainer, key) for key in ("loss", "grad_norm", "learning_rate", "mae")]
    found = [*weights(trainer.model), *logged]
    if whole:
        found.append(trainer.evaluate()["eval_loss"])
        found.append(trainer.predict(make_data(40, seed=2)).predictions)
    return [np.asarray(x, "float64") for x in found]


def run(name, graphs, whole=False, **arguments):
    """One run: its numbers, and what happened with graphs."""
    cuda_graph.RUNS_BEFORE = 3 if graphs else 10**9
    machine.captures = machine.replays = 0
    messages.clear()
    trainer, error = train(name, **arguments)
    steps, found = trainer.state.global_step, numbers(trainer, whole)
    assert machine.current is machine.default
    return found, {
        "captures": machine.captures,
        "replays": machine.replays,
        "messages": [m for m in messages if "CUDA graph" in m],
        "error": error,
        "steps": steps,
    }


without: dict[str, list[np.ndarray]] = {}


def compare(name, like=None, **arguments):
    """The same run with graphs and without, or with those of an earlier one that had none."""
    found, report = run(f"{name} with", True, **arguments)
    if like is None:
        without[name], nothing = run(f"{name} without", False, **arguments)
        assert nothing["captures"] == 0
    pairs = zip(found, without[like or name], strict=like is None)
    return report | {"equal": all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)}


def seeded():
    """Layers that draw from seeds of their own."""
    return model(layers.Dropout(0.2, seed=3), layers.GaussianNoise(0.1, seed=2))


def reading():
    """A layer that looks at a value, but not in the record."""
    return model(Own(read))


def unfit():
    """A layer whose operation fails in a capture, and says nothing before."""
    return model(Own(refuses))


def operation(name):
    """An operation that a record does not look into, with the gradient of the identity."""

    def define(function):
        op = torch.library.custom_op(f"kbtrain_tests::{name}", function, mutates_args=())
        op.register_fake(lambda x: torch.empty_like(x))
        op.register_autograd(lambda context, gradient: gradient)
        return op

    return define


@operation("read")
def read(x: torch.Tensor) -> torch.Tensor:
    return x * float(bool((x.detach().sum() * 0 == 0).item()))


@operation("refuses")
def refuses(x: torch.Tensor) -> torch.Tensor:
    if machine.capturing:
        raise RuntimeError("this is not for a graph")
    return x.clone()


NOISE = [3, -2, 1]


@operation("noisy")
def noisy(x: torch.Tensor) -> torch.Tensor:
    """As additions in the order of chance are: no two runs are the same."""
    NOISE.append(NOISE.pop(0))
    return x * (1 + 1e-6 * NOISE[0])


class Own(layers.Layer):
    """A layer of one operation."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


@operation("hungry")
def hungry(x: torch.Tensor) -> torch.Tensor:
    """With 8 samples, those of an evaluation, it needs what graphs have."""
    if len(x) == 8 and machine.alive and not machine.capturing:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    return x.clone()


def crowded():
    """A model whose evaluation does not fit beside the graph of its training."""
    return model(Own(hungry))


@contextlib.contextmanager
def short_of_memory(summaries):
    """Memory ends while the first graph and the plain step are compared: so many succeed."""
    summary = graph_checks.summary
    left = [summaries - 1]

    def limited(*tensors):
        left[0] -= 1
        if left[0] == -1:
            raise torch.OutOfMemoryError("out of memory, for a test")
        return summary(*tensors)

    graph_checks.summary = limited
    yield
    graph_checks.summary = summary


def resumed():
    """Half of a run, then the other half; graphs come about in both."""
    cuda_graph.RUNS_BEFORE = 3
    saving = {"save_strategy": "steps", "save_steps": 7}
    whole, _ = train("whole", max_steps=14, **saving)
    train("half", max_steps=14, callbacks=[Stops()], **saving)
    machine.replays = 0
    rest, _ = train("half", max_steps=14, fit={"resume_from_checkpoint": True}, **saving)
    same = zip(weights(whole.model), weights(rest.model), strict=True)
    return {"replays": machine.replays, "equal": all(np.array_equal(a, b) for a, b in same)}


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 7


def with_nan():
    x, y = make_data(48)
    x[41] = np.nan  # in the 11th batch
    return x, y


def left():
    """Graphs that are there after a run, while its Trainer is."""
    cuda_graph.RUNS_BEFORE = 3
    trainer, _ = train("left")
    gc.collect()
    assert trainer.state.global_step == 12
    return len(cuda_graph._ALIVE)


def run_again():
    """What the log says of layers that are run again for gradients: they cannot be captured."""
    messages.clear()
    train("again", max_steps=1, gradient_checkpointing=True)
    return [m for m in messages if "captured" in m]


def normalized():
    """The dtype of what is normalized in a step in bfloat16, by the kind of operation."""
    found = {}
    make_program = step.make_program

    def look(module, *rest):
        for node in module.graph.nodes:
            if "batch_norm" in str(node.target) and node.op == "call_function":
                found[str(node.target)] = str(node.args[0].meta["val"].dtype)
        return make_program(module, *rest)

    step.make_program = look
    train("normalized", max_steps=1, bf16=True)
    step.make_program = make_program
    return found


def main():
    with Order(lambda: machine.current, lambda: machine.capturing) as order:
        reports = runs()
    reports["uses of memory"] = order.checked
    sys.__stdout__.write(json.dumps(reports))
    sys.__stdout__.flush()
    os._exit(0) if ON_GPU else None


def runs():
    """All runs, with what came of them."""
    reports = {
        "normalized": normalized(),
        "left": left(),
        "run again": run_again(),
        "plain": compare("plain", whole=True),
        "blocks": compare("blocks", logging_steps=100),
        "two shapes": compare("two shapes", per_device_train_batch_size=5, max_steps=30),
        "evaluations": compare("evaluations", eval_strategy="steps", eval_steps=5),
        "accumulation": compare("accumulation", gradient_accumulation_steps=3),
        "not finite": compare("not finite", data=with_nan()),
        "moved": compare("moved", callbacks=[Moves({8})], max_steps=16),
        "seeded": compare("seeded", make=seeded),
        "reading": compare("reading", make=reading),
        "unfit": compare("unfit", make=unfit, per_device_train_batch_size=5, max_steps=30),
        "resumed": resumed(),
        "noisy": run("noisy", True, make=lambda: model(Own(noisy)))[1],
    }
    cuda_graph.MOST_BEGINNINGS, most = 1, cuda_graph.MOST_BEGINNINGS
    reports["moving"] = compare("moving", "plain", callbacks=[Moves({6})])
    cuda_graph.MOST_BEGINNINGS = most
    cuda_graph.MOST_GRAPHS, most = 0, cuda_graph.MOST_GRAPHS
    reports["too many"] = compare("too many", "plain")
    cuda_graph.MOST_GRAPHS = most
    cuda_graph.MOST_BYTES, most = 8, cuda_graph.MOST_BYTES
    reports["too large"] = compare("too large", "plain")
    cuda_graph.MOST_BYTES = most
    for name in ("short of memory", "shorter"):
        with short_of_memory(1 if name == "shorter" else 2):
            reports[name] = compare(name, "plain")
    cuda_graph.IS_SUPPORTED = False
    reports["old"] = compare("old", "plain")
    cuda_graph.IS_SUPPORTED = True
    reports["off"] = compare("off", "plain", cuda_graphs=False)
    reports["crowded"] = compare("crowded", make=crowded, eval_strategy="steps", eval_steps=6)
    machine.free, free = int(1.1 * 2 * machine.step), machine.free
    reports["full"] = compare("full", "plain")
    machine.free = free
    machine.wrong = 1e-3
    reports["wrong"] = compare("wrong", "plain")
    return reports


if __name__ == "__main__":
    main()
