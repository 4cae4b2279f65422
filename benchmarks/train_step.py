"""Time per training step: kbtrain against a hand-written loop of the backend and Keras' fit.

    KERAS_BACKEND=jax python benchmarks/train_step.py mlp gpt convnet --rounds 5 --json out.json

All contenders train the same Keras model (the hand-written torch loop and the other trainers a
torch.nn model of the same shape) in one process, alternating: one round each, then the next round.
The output shows medians over the rounds and medians of the ratios within a round. The hand-written
loops neither clip gradients nor check anything; kbtrain runs with its defaults, which do both. The
Hugging Face Trainer and Lightning take part if they are installed (``pip install ".[bench]"``), on
PyTorch even beside another backend.

On a GPU, with the model FLOPs utilization of a GPT:

    KERAS_BACKEND=torch python benchmarks/train_step.py gpt124m --bf16 --peak-tflops 989
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
from dataclasses import replace
from typing import Any, Literal

import keras
from workloads import WORKLOADS, Workload, loss

from kbtrain import Trainer, TrainerCallback, TrainingArguments


class Rounds(TrainerCallback):
    """Measures kbtrain between two logs, and runs the others at each log."""

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


def measure(
    name: str,
    workload: Workload,
    rounds: int,
    with_trainers: bool,
    jit_compile: bool | Literal["auto"],
) -> dict[str, list[float]]:
    size, steps = workload.batch, workload.steps
    x, y = workload.data(size * steps)
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    native = importlib.import_module(f"native_{keras.backend.backend()}")
    others = {
        native_name: _round(step, batches, native.wait)
        for native_name, step in native.loops(name, workload.make, loss()).items()
    }
    fitted = workload.make()
    fitted.compile(optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01), loss=loss())
    others["keras fit"] = lambda: fitted.fit(x, y, batch_size=size, verbose=0)
    trainers = _trainers(name, workload, x, y) if with_trainers else {}
    others |= {trainer_name: trainer.round for trainer_name, trainer in trainers.items()}
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
            jit_compile=jit_compile,
        )
        model = workload.make()
        Trainer(model, arguments, train_dataset=(x, y), loss=loss(), callbacks=[callback]).fit()
    for trainer in trainers.values():
        trainer.end()
    return callback.seconds


def _trainers(name: str, workload: Workload, x: Any, y: Any) -> dict[str, Any]:
    """The trainers for PyTorch; none if it is not installed."""
    try:
        module = importlib.import_module("trainers_torch")
    except ModuleNotFoundError:
        return {}
    result: dict[str, Any] = module.trainers(name, x, y, workload.batch, workload.steps)
    return result


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
    """Name, median seconds, and minimum, median and maximum of the ratios to kbtrain."""
    mine = seconds["kbtrain"]
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(mine, values, strict=True)]
        yield name, statistics.median(values), min(ratios), statistics.median(ratios), max(ratios)


def flops_per_step(workload: Workload) -> float:
    """Model FLOPs of a step; 0 if they are not counted."""
    if workload.size is None:
        return 0.0
    per_token = workload.size.flops_per_token(workload.make().count_params())
    return workload.batch * workload.size.length * per_token


def plot(results: dict[str, dict[str, list[float]]], path: str) -> None:
    """A bar chart of the time per step, one panel per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(4 * len(results), 3), squeeze=False, layout="constrained"
    )
    for panel, (workload, seconds) in zip(panels[0], results.items(), strict=True):
        times = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        colors = ["tab:orange" if name == "kbtrain" else "tab:gray" for name in times]
        panel.barh(list(times), list(times.values()), color=colors)
        panel.invert_yaxis()
        panel.set(title=workload, xlabel="ms per step")
    figure.suptitle(f"{keras.backend.backend()}, medians")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = ["mlp", "gpt", "convnet", "recommender"]
    parser.add_argument("workloads", nargs="*", default=usual, metavar="WORKLOAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--steps", type=int, help="another number of steps in a round")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, for everybody")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="what the device can do, 10^12 operations per second: prints what share a GPT makes",
    )
    parser.add_argument("--no-trainers", action="store_true", help="leave out HF and Lightning")
    parser.add_argument(
        "--jit-compile",
        action="store_true",
        help="what 'auto' chooses in runs longer than these (XLA on TensorFlow); torch.compile",
    )
    parser.add_argument("--json", help="write all measurements to this file")
    parser.add_argument("--plot", help="draw the medians into this file")
    options = parser.parse_args()
    if options.bf16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    backend = keras.backend.backend()
    results, shares = {}, {}
    print(f"{backend}, keras {keras.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'workload':11} {'contender':22} {'us/step':>10}   kbtrain/it (lowest, highest)   MFU")
    for name in options.workloads:
        given = {"batch": options.batch, "steps": options.steps}
        workload = replace(WORKLOADS[name], **{k: v for k, v in given.items() if v})
        results[name] = measure(
            name, workload, options.rounds, not options.no_trainers, options.jit_compile or "auto"
        )
        flops = flops_per_step(workload) if options.peak_tflops else 0.0
        for contender, seconds, low, middle, high in rows(results[name]):
            line = f"{name:11} {contender:22} {seconds * 1e6:10.0f}"
            ratio = "" if contender == "kbtrain" else f"{middle:10.2f} ({low:.2f}, {high:.2f})"
            line += f" {ratio:30}"
            if flops:
                share = flops / (seconds * options.peak_tflops * 1e12)
                shares[f"{name}, {contender}"] = share
                line += f" {share:.3f}"
            print(line.rstrip(), flush=True)
    if options.json:
        found = {"backend": backend, "bf16": options.bf16, "seconds_per_step": results}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found | {"model_flops_utilisation": shares}, file, indent=2)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
