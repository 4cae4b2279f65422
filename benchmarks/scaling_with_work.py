"""Whether cost grows with the amount of work: updates, log, checkpoints, variables, columns, sets.

    KERAS_BACKEND=jax python benchmarks/scaling_with_work.py --json out.json
    KERAS_BACKEND=torch python benchmarks/scaling_with_work.py variables --up-to 10000

All models are tiny, so that what is left is the cost of kbtrain, of Keras and of compiling. Times
are processor time of all threads of the process, which other processes disturb less than wall time.
Each line ends with the exponent of a power law fitted to all sizes, and of one through the two
largest: 0 is flat, 1 linear. Where Keras does the same work its time stands beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.checkpoint.store import CheckpointStore

Found = dict[str, dict[int, float]]
"""What was timed -> size -> seconds."""

clock = time.process_time


def exponent(seconds: dict[int, float]) -> float:
    """The slope of the least-squares line through the logarithms; NaN below two sizes."""
    if len(seconds) < 2:
        return math.nan
    sizes, times = np.log(list(seconds)), np.log(np.maximum(list(seconds.values()), 1e-9))
    centered = sizes - sizes.mean()
    return float(centered @ (times - times.mean()) / (centered @ centered))


def timed(run: Callable[..., Any], *given: Any, **named: Any) -> float:
    start = clock()
    run(*given, **named)
    return clock() - start


def arguments(folder: str, **more: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(output_dir=folder, **(usual | more))


def chain(length: int) -> keras.Model:
    """Dense layers of width 4, one after the other; each has two variables.

    In models of at most 100 layers, one after the other: Keras visits a model's layers recursively.
    """
    if length > 100:
        parts = [chain(min(100, length - start)) for start in range(0, length, 100)]
    else:
        parts = [layers.Dense(4) for _ in range(length)]
    return keras.Sequential([keras.Input((4,)), *parts])


def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(count, 4)).astype("float32")
    return x, x


class Marks(TrainerCallback):
    """Reads the clock when an update is done whose number is a power of ten."""

    def __init__(self, first: int) -> None:
        self.first, self.times = first, dict[int, float]()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.setdefault(state.global_step, clock())

    def per_update(self) -> dict[int, float]:
        """Updates done -> seconds of one between the size before and this one."""
        done = [n for n in self.times if math.log10(n).is_integer() and n >= self.first]
        pairs = zip(done, done[1:], strict=False)
        return {b: (self.times[b] - self.times[a]) / (b - a) for a, b in pairs}


def of_updates(sizes: list[int]) -> Found:
    """One update after more and more of them; 100 logs in all."""
    return {"one update": run_with_logs(sizes[-1], max(1, min(sizes[0], sizes[-1] // 100)))}


def of_log(sizes: list[int]) -> Found:
    """One update with its log, after more and more logs."""
    return {"an update and its log": run_with_logs(sizes[-1], 1)}


def run_with_logs(updates: int, every: int) -> dict[int, float]:
    marks = Marks(first=every)
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(folder, max_steps=updates, logging_strategy="steps", logging_steps=every)
        Trainer(chain(1), given, train_dataset=rows(400), loss="mse", callbacks=[marks]).fit()
    return marks.per_update()


def of_checkpoints(sizes: list[int]) -> Found:
    """A save and a resume in a folder that holds many checkpoints of the same run."""
    found: Found = defaultdict(dict)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            given = {"save_strategy": "steps", "save_steps": 1}
            fit(folder, 1, **given)
            first = Path(folder, "checkpoint-1")
            for step in range(2, size + 1):
                copied(first, Path(folder, f"checkpoint-{step}"))
            store = CheckpointStore(folder)
            held = store.resolve(str(first))  # continues the run that wrote all of them
            if held is None:
                raise SystemExit(f"{first} is damaged.")
            content = held.arrays, held.documents
            found["save"][size] = timed(store.save, size + 1, *content)
            # The first rotation of a run reads who wrote each; later ones know.
            found["first rotation"][size] = timed(store.rotate, size)
            store.save(size + 2, *content)
            found["later rotation"][size] = timed(store.rotate, size)
            found["finding the newest"][size] = timed(CheckpointStore(folder).resolve, True)
    return found


def copied(source: Path, target: Path) -> None:
    """A checkpoint of another step that shares the files, so that 10^4 of them fit on a disk."""
    target.mkdir()
    for path in source.rglob("*"):
        if path.is_dir():
            (target / path.relative_to(source)).mkdir()
        elif path.name == "manifest.json":
            text = json.loads(path.read_text(encoding="utf-8"))
            text["step"] = int(target.name.split("-")[1])
            (target / path.name).write_text(json.dumps(text), encoding="utf-8")
        else:
            (target / path.relative_to(source)).hardlink_to(path)


def fit(folder: str, updates: int, model: Any = None, **more: Any) -> Trainer:
    given = arguments(folder, max_steps=updates, **more)
    trainer = Trainer(model or chain(1), given, train_dataset=rows(8), loss="mse")
    trainer.fit()
    return trainer


def of_variables(sizes: list[int]) -> Found:
    """Building, the first update, a save and a resume of models of many layers."""
    found: Found = defaultdict(dict)
    for size in sizes:
        start = clock()
        model = chain(size)
        found["Keras builds the model"][size] = clock() - start
        model.compile(optimizer="adamw", loss="mse")
        found["keras fit: first update"][size] = timed(model.fit, *rows(4), verbose=0)
        model = chain(size)
        given: dict[str, Any] = {"train_dataset": rows(8), "loss": "mse"}
        with tempfile.TemporaryDirectory() as folder:
            start = clock()
            trainer = Trainer(model, arguments(folder, max_steps=1), **given)
            found["Trainer(...)"][size] = clock() - start
            found["first update"][size] = timed(trainer.fit)
            saves = arguments(folder, max_steps=1, save_strategy="steps", save_steps=1)
            found["an update and a save"][size] = timed(Trainer(model, saves, **given).fit)
            path = str(Path(folder, "checkpoint-1"))
            resumed = Trainer(model, arguments(folder, max_steps=1), **given)
            found["resume, no update"][size] = timed(resumed.fit, resume_from_checkpoint=path)
    return found


def of_columns(sizes: list[int]) -> Found:
    """The first update and later ones of a model with many inputs, one column each."""
    found: Found = defaultdict(dict)
    for size in sizes:
        inputs = {f"c{i}": keras.Input((1,), name=f"c{i}") for i in range(size)}
        values = [*inputs.values()]
        merged = layers.Concatenate()(values) if size > 1 else values[0]
        model = keras.Model(inputs, layers.Dense(1)(merged))
        x = {name: np.ones((400, 1), "float32") for name in inputs}
        y = np.ones((400, 1), "float32")
        with tempfile.TemporaryDirectory() as folder:
            first, later = updates_of(folder, model, (x, y), 200)
        found["first update"][size], found["later update"][size] = first, later
    return found


def updates_of(
    folder: str, model: Any, data: Any, count: int, *callbacks: Any
) -> tuple[float, float]:
    """Seconds of ``fit`` to the first update, and of a later one."""

    class Ends(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(clock())

    times: list[float] = []
    given = arguments(
        folder,
        max_steps=2 * count + 1,
        logging_strategy="steps",
        logging_steps=count,
        logging_first_step=True,
    )
    trainer = Trainer(model, given, train_dataset=data, loss="mse", callbacks=[*callbacks, Ends()])
    start = clock()
    trainer.fit()
    return times[0] - start, (times[2] - times[1]) / count


def of_evaluation_sets(sizes: list[int]) -> Found:
    """An evaluation of many sets of four rows."""
    found: Found = {"evaluate": {}, "evaluate again": {}}
    for size in sizes:
        sets = {f"set{i}": rows(4) for i in range(size)}
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(chain(1), arguments(folder), eval_dataset=sets, loss="mse")
            for name in found:
                found[name][size] = timed(trainer.evaluate)
    return found


class Counts(TrainerCallback):
    """Listens to every update."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


def of_callbacks(sizes: list[int]) -> Found:
    """An update that many callbacks listen to."""
    found: Found = {"one update": {}}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            many = [type(f"Counts{i}", (Counts,), {})() for i in range(size)]
            found["one update"][size] = updates_of(folder, chain(1), rows(400), 200, *many)[1]
    return found


PARTS: dict[str, tuple[Callable[[list[int]], Found], list[int]]] = {
    "updates": (of_updates, [10**3, 10**4, 10**5, 10**6]),
    "log": (of_log, [10**2, 10**3, 10**4, 10**5]),
    "checkpoints": (of_checkpoints, [10, 100, 1000, 10_000]),
    "variables": (of_variables, [10, 100, 1000]),
    "columns": (of_columns, [10, 100, 1000]),
    "evaluation sets": (of_evaluation_sets, [1, 10, 100, 1000]),
    "callbacks": (of_callbacks, [1, 10, 100, 1000]),
}


def lines(part: str, found: Found) -> Iterator[str]:
    """The rows of the table."""
    for name, seconds in found.items():
        cells = "  ".join(f"{size:,}: {value * 1e3:.3f} ms" for size, value in seconds.items())
        last = exponent(dict([*seconds.items()][-2:]))
        yield f"{part:15} {name:30} {cells}   {exponent(seconds):.2f} {last:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[*PARTS], metavar="PART", help=str([*PARTS]))
    parser.add_argument("--up-to", type=int, help="the largest size, instead of each part's own")
    parser.add_argument("--json", help="write all times and exponents to this file")
    options = parser.parse_args()
    results: dict[str, Any] = {"backend": keras.backend.backend(), "seconds": {}, "exponents": {}}
    for part in options.parts:
        measure, sizes = PARTS[part]
        if options.up_to:
            powers = [10**k for k in range(1, 9)]
            sizes = [n for n in powers if sizes[0] <= n <= options.up_to]
        found = measure(sizes)
        results["seconds"][part] = found
        results["exponents"][part] = {name: exponent(times) for name, times in found.items()}
        print(*lines(part, found), sep="\n", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
