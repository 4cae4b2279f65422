"""What has become faster or slower between two trees, or between a tree and ``baseline.json``.

    python -m benchmarks.compare ../before . --backends torch jax
    python -m benchmarks.compare . --parts "train step"
    python -m benchmarks.compare . --record

Runs the quick benchmarks of this folder on the kbtrain and optim of each tree, each in a process of
its own, alternating between the trees. Every figure is a ratio within one process (kbtrain over the
hand-written loop, over Keras, over AdamW), so that the speed of the machine cancels out. Printed
are the ratios whose median over the rounds has changed by more than 5 % and by more than the
spread of the rounds; the exit status is then 1. Times are processor time of all threads, which
other processes disturb less; ``--wall`` measures wall time, on a machine of one's own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "baseline.json"
BACKENDS = ("torch", "tensorflow", "jax")
THRESHOLD = 0.05  # smaller changes are not shown

Ratios = dict[str, float]


class Figure(NamedTuple):
    """A ratio over the rounds: its median, and the range of the rounds relative to it."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        values = list(values)
        median = statistics.median(values)
        return cls(median, (max(values) - min(values)) / median)


class Change(NamedTuple):
    """A ratio that two trees have in common."""

    name: str
    old: Figure
    new: Figure

    @property
    def relative(self) -> float:
        return self.new.median / self.old.median - 1

    @property
    def counts(self) -> bool:
        """Whether it is more than the threshold and than what the rounds differ by."""
        return abs(self.relative) > max(THRESHOLD, self.old.spread, self.new.spread)

    def __str__(self) -> str:
        return (
            f"{self.name:60} {self.old.median:8.3f} {self.new.median:8.3f} {self.relative:+7.1%}"
            f"   ({self.old.spread:.1%}, {self.new.spread:.1%})"
        )


def changes(old: Mapping[str, Figure], new: Mapping[str, Figure]) -> list[Change]:
    """The ratios that both have, in the order of ``new``."""
    return [Change(name, old[name], figure) for name, figure in new.items() if name in old]


def read_baseline(path: Path = BASELINE) -> dict[str, dict[str, Figure]]:
    """Backend -> ratio -> figure."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return {
        backend: {name: Figure(**figure) for name, figure in ratios.items()}
        for backend, ratios in document["ratios"].items()
    }


def baseline_document(
    ratios: Mapping[str, Mapping[str, Figure]], note: str, rounds: int
) -> dict[str, Any]:
    """What ``baseline.json`` holds: ratios only, as times are those of one machine."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {
        "note": note,
        "machine": machine,
        "rounds": rounds,
        "ratios": {
            backend: {name: _rounded(figure) for name, figure in found.items()}
            for backend, found in ratios.items()
        },
    }


def _rounded(figure: Figure) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figure._asdict().items()}


# --- what each benchmark writes, as ratios


def train_step_ratios(found: Any) -> Ratios:
    """kbtrain's time per update over that of each hand-written loop and of keras fit."""
    return {
        f"{workload}: update / {name}": _median_ratio(seconds["kbtrain"], others)
        for workload, seconds in found["seconds_per_step"].items()
        for name, others in seconds.items()
        if name != "kbtrain"
    }


def evaluation_ratios(found: Any) -> Ratios:
    """kbtrain's time over that of Keras' evaluate and predict."""
    return {
        f"{name} / keras": _median_ratio(each["seconds"]["kbtrain"], each["seconds"]["keras"])
        for name, each in found["measured"].items()
    }


def _median_ratio(mine: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def first_step_ratios(found: Any) -> Ratios:
    """The time to the first update over that of keras fit."""
    end = ": first step of keras fit, s"
    models = [name.removesuffix(end) for name in found if name.endswith(end)]
    return {
        f"{model}: first step / keras fit": found[f"{model}: first step, s"] / found[model + end]
        for model in models
    }


def save_ratios(found: Any) -> Ratios:
    """What a save in the background holds up, over a copy of the same arrays."""
    ends = "a later save / a plain copy", "the same, processor time"
    return {name: value for name, value in found.items() if name.endswith(ends)}


def optimizer_ratios(found: Any) -> Ratios:
    """An update's time per byte over that of ``optim.AdamW``."""
    return {
        f"{label}: per byte / optim.AdamW": row["relative_per_byte"]
        for rows in found["results"].values()
        for label, row in rows.items()
        if label.startswith("optim ") and row["relative_per_byte"] is not None
    }


def import_ratios(found: Any) -> Ratios:
    """Importing kbtrain, and optim, over importing Keras before them."""
    return {f"import {name} / keras": found[name] / found["keras"] for name in ("kbtrain", "optim")}


class Part(NamedTuple):
    """A benchmark of this folder and its arguments, without ``--json``."""

    arguments: tuple[str, ...]
    ratios: Callable[[Any], Ratios]


OPTIMIZERS = ("lion", "adafactor", "adamw_8bit", "schedule_free_adamw")
PARTS = {
    "import": Part(("compare.py", "--import-times"), import_ratios),
    "train step": Part(
        ("train_step.py", "mlp", "gpt-tiny", "convnet", "--rounds", "5", "--no-trainers"),
        train_step_ratios,
    ),
    "first step": Part(("costs.py", "first"), first_step_ratios),
    "save": Part(("costs.py", "checkpoint50"), save_ratios),
    "evaluation": Part(("evaluation.py", "mlp", "--rounds", "5"), evaluation_ratios),
    "optimizers": Part(
        ("optimizer_update.py", "--layers", "2", "--rounds", "9", "--optimizers", *OPTIMIZERS),
        optimizer_ratios,
    ),
}


def import_times(path: str) -> None:
    """Write the seconds that importing Keras, then kbtrain and optim takes in this process."""
    found = {}
    for name in ("keras", "kbtrain.trainer", "optim"):
        start = time.perf_counter()
        importlib.import_module(name)
        found[name.split(".")[0]] = time.perf_counter() - start
    Path(path).write_text(json.dumps(found), encoding="utf-8")


# --- running them

RUN = """
import runpy, sys, time
wall, script, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv[0] = script
if wall == "no":
    time.perf_counter = time.process_time
sys.path[0] = script.rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""


def run(part: Part, tree: Path, backend: str, wall: bool) -> Ratios:
    """The ratios of one benchmark on the packages of a tree, in a fresh process.

    Raises:
        SystemExit: The benchmark failed; its last lines are shown.
    """
    script, *arguments = part.arguments
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "found.json")
        clock = "yes" if wall else "no"
        command = [sys.executable, "-c", RUN, clock, (HERE / script).as_posix(), *arguments]
        command += ["--json"] * (script != "compare.py") + [str(result)]
        given: Any = {"env": environment, "cwd": folder, "text": True}
        done = subprocess.run(command, capture_output=True, timeout=1800, **given)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()[-15:]
            raise SystemExit("\n".join([f"{script} failed on {backend}, {tree}:", *lines]))
        return part.ratios(json.loads(result.read_text(encoding="utf-8")))


def measure(
    trees: list[Path], backend: str, parts: list[str], rounds: int, wall: bool
) -> list[dict[str, Figure]]:
    """The figures of each tree; in each round the trees take turns, in changing order."""
    values: list[dict[str, list[float]]] = [defaultdict(list) for _ in trees]
    for part in parts:
        for turn in range(rounds):
            order = list(enumerate(trees))
            for i, tree in reversed(order) if turn % 2 else order:
                for name, value in run(PARTS[part], tree, backend, wall).items():
                    values[i][name].append(value)
        print(f"  {backend}: {part} done", file=sys.stderr, flush=True)
    return [{name: Figure.of(each) for name, each in found.items()} for found in values]


def report(found: Mapping[str, list[Change]], show_all: bool) -> Iterator[str]:
    """The lines to print: the changes that count, or all ratios."""
    head = f"{'':60} {'old':>8} {'new':>8} {'change':>7}   (spread of each)"
    for backend, each in found.items():
        shown = [change for change in each if show_all or change.counts]
        more = sum(change.counts for change in each)
        yield f"{backend}: {more} of {len(each)} ratios changed"
        yield from [head, *map(str, shown)] if shown else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, help="OLD NEW, or one against the baseline")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=3, help="processes for each tree and part")
    parser.add_argument("--wall", action="store_true", help="wall time instead of processor time")
    parser.add_argument("--all", action="store_true", help="print unchanged ratios too")
    parser.add_argument("--record", action="store_true", help="write baseline.json instead")
    parser.add_argument("--note", default="", help="for the baseline: what else the machine did")
    parser.add_argument("--import-times", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.import_times:
        return import_times(options.import_times)
    trees = [tree.resolve() for tree in options.trees]
    if not 1 <= len(trees) <= 2 or (options.record and len(trees) != 1):
        parser.error("expected two trees, or one to compare with baseline.json or to --record")
    for tree in trees:
        if not (tree / "kbtrain").is_dir():
            parser.error(f"{tree} has no folder kbtrain")
    if len(trees) == 1 and not options.record and not BASELINE.exists():
        parser.error("there is no baseline.json to compare with: --record writes one")
    before = read_baseline() if len(trees) == 1 and BASELINE.exists() else {}
    found, ratios = {}, dict(before) if options.record else {}
    for backend in options.backends:
        figures = measure(trees, backend, options.parts, options.rounds, options.wall)
        ratios[backend] = before.get(backend, {}) | figures[-1] if options.record else figures[-1]
        old = before.get(backend, {}) if len(trees) == 1 else figures[0]
        found[backend] = changes(old, figures[-1])
    if options.record:
        document = baseline_document(ratios, options.note, options.rounds)
        BASELINE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return None
    print(*report(found, options.all), sep="\n")
    sys.exit(any(change.counts for each in found.values() for change in each))


if __name__ == "__main__":
    main()
