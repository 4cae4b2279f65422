"""Processor time per update on one and several processes or devices, against other trainers.

    python benchmarks/scaling.py --rounds 5 --json out.json

The global batch stays the same, so that two processes have half of the work each: without any cost
of working together an update takes 0.5 of the processor time of one process, in each of two. All
contenders train a GPT of the same shape, each process on one thread and one core (several devices
of a process share all cores); all are started first and then take turns of some updates each.
Wall-clock time is recorded, too, and says little where other work shares the cores.

``pip install ".[torch,jax,bench]"``: the Hugging Face Trainer and Lightning take part if they are
installed, kbtrain on the frameworks that are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Contender(NamedTuple):
    """A trainer on a number of processes, or of devices in one process.

    Attributes:
        name: Name in the table; the same for all numbers.
        trainer: Name in ``scaling_process.TRAINERS``.
        backend: Keras' backend; empty for trainers of PyTorch.
        processes: Number of processes.
        devices: Number of devices in each.
        needs: Packages without which it does not take part.
    """

    name: str
    trainer: str
    backend: str
    processes: int
    devices: int
    needs: tuple[str, ...]

    @property
    def parts(self) -> int:
        return self.processes * self.devices


def contenders(names: Sequence[str], most_devices: int) -> list[Contender]:
    """All contenders whose names contain one of ``names`` and whose packages are installed."""
    found = []
    for count in (1, 2):
        for backend in ("torch", "jax", "tensorflow"):
            found.append(Contender(f"kbtrain {backend}", "kbtrain", backend, count, 1, (backend,)))
        needs = ("torch", "transformers", "accelerate")
        found.append(Contender("HF Trainer", "hf", "", count, 1, needs))
        found.append(Contender("Lightning", "lightning", "", count, 1, ("lightning",)))
    for devices in (1, 2, 4, 8):
        if devices <= most_devices:
            for name, trainer in (("kbtrain", "kbtrain"), ("Keras", "keras")):
                name = f"{name} jax, devices"
                found.append(Contender(name, trainer, "jax", 1, devices, ("jax",)))
    return [
        each
        for each in found
        if any(name in each.name for name in names)
        and all(importlib.util.find_spec(package) for package in each.needs)
    ]


class Group:
    """The processes of a contender."""

    def __init__(self, contender: Contender, steps: int) -> None:
        self.contender = contender
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [sys.executable, str(HERE / "scaling_process.py"), contender.trainer]
        command += ["--devices", str(contender.devices), "--steps", str(steps)]
        command += ["--folder", self._folder.name]
        self._processes = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for environment in _environments(contender)
        ]

    def result(self) -> list[dict[str, Any]]:
        """The measurements of each process in the round that was started."""
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.contender.name}: a process has ended; see its output.")
            found.append(json.loads(line))
        return found

    def start_round(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._folder.cleanup()


def _environments(contender: Contender) -> list[dict[str, str]]:
    """The environment of each process: one thread, and the variables of torchrun."""
    # The one without dashes comes last: XLA reads no flag after it.
    flags = f"--xla_force_host_platform_device_count={contender.devices} "
    flags += "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    common = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    common |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": flags}
    common |= {"TF_NUM_INTRAOP_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    common |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    if contender.backend:
        common["KERAS_BACKEND"] = contender.backend
    size = contender.processes
    if size == 1:
        return [common]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]


def measure(found: Sequence[Contender], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Seconds per update of each contender in each round; they take turns."""
    groups: list[Group] = []
    results = []
    try:
        for contender in found:  # one after the other: each compiles while no other runs
            groups.append(Group(contender, steps))
            first = groups[-1].result()
            results.append(
                contender._asdict() | {"facts": first[0]["facts"], "cpu": [], "wall": []}
            )
            print(f"ready: {contender.name} x {contender.parts}", file=sys.stderr, flush=True)
        for _ in range(rounds):
            for group, result in zip(groups, results, strict=True):
                group.start_round()
                round_ = group.result()
                result["cpu"].append(statistics.mean(each["cpu"] for each in round_))
                result["wall"].append(statistics.mean(each["wall"] for each in round_))
    finally:
        for group in groups:
            group.end()
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Medians, the ratios to one process within a round, and those of kbtrain to others."""
    by_name = {(each["name"], each["processes"] * each["devices"]): each for each in results}
    print(
        f"{'contender':20} {'x':>2} {'CPU ms':>8} {'wall ms':>8}   / one (lowest, highest)   "
        "kbtrain / it"
    )
    for (name, count), each in by_name.items():
        line = f"{name:20} {count:2} {_milliseconds(each['cpu'])} {_milliseconds(each['wall'])}   "
        one = by_name.get((name, 1))
        line += f"{_ratio(each, one) if count > 1 else '':24}"
        rival = {"HF Trainer": "kbtrain torch", "Lightning": "kbtrain torch"}.get(
            name, "kbtrain jax, devices" if name.startswith("Keras") else ""
        )
        print((line + _ratio(by_name.get((rival, count)), each)).rstrip())
    for (name, count), each in by_name.items():
        sent = each["facts"].get("collectives")
        if count > 1 and sent is not None:
            least = 4 * each["facts"]["parameters"]
            print(
                f"{name} x {count}: {len(sent)} collectives of {sum(sent):,} bytes together, "
                f"{sum(sent) / least:.4f} of the float32 parameters"
            )


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:8.1f}"


def _ratio(one: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if one is None or other is None:
        return ""
    ratios = [a / b for a, b in zip(one["cpu"], other["cpu"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", default=[""], help="parts of their names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="updates in a round")
    parser.add_argument("--most-devices", type=int, default=8)
    parser.add_argument("--json", help="write all measurements to this file")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    results = measure(
        contenders(options.contenders, options.most_devices), options.rounds, options.steps
    )
    load.append(os.getloadavg()[0])
    show(results)
    print(f"load average before and after: {load[0]:.1f}, {load[1]:.1f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"load": load, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
