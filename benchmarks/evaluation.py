"""Time of evaluation and prediction: kbtrain against Keras' evaluate and predict.

    KERAS_BACKEND=jax python benchmarks/evaluation.py mlp convnet gpt --rounds 5 --json out.json

All contenders run the same Keras model over the same arrays with the same batch size, in one
process, alternating: one round each, then the next round. The output shows medians over the rounds,
and the minimum, median and maximum of the ratios within a round. Both compute the loss and an
accuracy in ``evaluate``, and return all outputs as one NumPy array in ``predict``. Compilation
happens in a first round, which is not counted; ``first`` is its time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from workloads import WORKLOADS, loss

from kbtrain import Trainer, TrainingArguments

ROWS = {"mlp": 100_000, "convnet": 2_000, "gpt": 64}
"""Rows of data; the larger models get a fraction of a real data set."""


def contenders(
    name: str, rows: int, batch_size: int, folder: str
) -> dict[str, dict[str, Callable[[], Any]]]:
    """One round of each contender, for "evaluate" and "predict"."""
    model = WORKLOADS[name].make()
    x, y = WORKLOADS[name].data(rows)
    arguments = TrainingArguments(
        output_dir=folder, per_device_eval_batch_size=batch_size, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, loss=loss(), metrics=["accuracy"])
    fitted = keras.models.clone_model(model)
    fitted.set_weights(model.get_weights())
    fitted.compile(loss=loss(), metrics=["accuracy"])
    return {
        "evaluate": {
            "kbtrain": lambda: trainer.evaluate((x, y))["eval_loss"],
            "keras": lambda: fitted.evaluate(x, y, batch_size=batch_size, verbose=0)[0],
        },
        "predict": {
            "kbtrain": lambda: trainer.predict(x).predictions,
            "keras": lambda: fitted.predict(x, batch_size=batch_size, verbose=0),
        },
    }


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Seconds of the first round and of each later one, by contender."""
    first, results = {}, {}
    for name, run in runs.items():
        start = time.perf_counter()
        results[name] = run()
        first[name] = time.perf_counter() - start
    np.testing.assert_allclose(results["kbtrain"], results["keras"], rtol=1e-4, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {"first": first, "seconds": seconds}


def table(measured: dict[str, Any]) -> Iterator[tuple[str, float, float, list[float]]]:
    """Name, first round, median of the others, and the ratios to kbtrain."""
    mine = measured["seconds"]["kbtrain"]
    for name, values in measured["seconds"].items():
        ratios = [a / b for a, b in zip(mine, values, strict=True)]
        yield name, measured["first"][name], statistics.median(values), ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=["mlp", "convnet"], metavar="WORKLOAD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, help="rows of data instead of the workload's own")
    parser.add_argument("--batch-size", type=int, help="instead of the workload's own")
    parser.add_argument("--json", help="write all measurements to this file")
    options = parser.parse_args()
    backend = keras.backend.backend()
    found: dict[str, Any] = {}
    print(f"{backend}, keras {keras.__version__}, {platform.processor() or platform.machine()}")
    print(f"{'workload':9} {'task':9} {'contender':9} {'first ms':>9} {'ms':>9}   kbtrain/it")
    for workload in options.workloads:
        rows = options.rows or ROWS[workload]
        size = options.batch_size or WORKLOADS[workload].batch
        with tempfile.TemporaryDirectory() as folder:
            for task, runs in contenders(workload, rows, size, folder).items():
                result = measure(runs, options.rounds)
                found[f"{workload} {task}"] = {"rows": rows, "batch_size": size, **result}
                for name, first, seconds, ratios in table(result):
                    line = f"{workload:9} {task:9} {name:9} {first * 1e3:9.0f} {seconds * 1e3:9.1f}"
                    if name != "kbtrain":
                        middle = statistics.median(ratios)
                        line += f"   {middle:.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
                    print(line, flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"backend": backend, "measured": found}, file, indent=2)


if __name__ == "__main__":
    main()
