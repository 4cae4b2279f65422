"""One run on a GPU: is kbtrain right there, and how fast is it?

    python benchmarks/gpu_run.py --json gpu.json                  # 390 s at most
    python benchmarks/gpu_run.py --json gpu.json --budget 230     # what matters most
    python benchmarks/gpu_run.py --json gpu.json --device cpu --tiny --budget 3600    # a rehearsal

The run consists of parts (``on_gpu/parts.py``), each in a process of its own with a limit of time:
a part that crashes or hangs ends no other. Checks of correctness come first and run side by side,
benchmarks run alone. The most important parts come first, and one that is not expected to end
within the budget is left out.

The JSON file is replaced as a whole whenever a part ends, so it is complete however the run ends.
The table at the end shows each figure with the target for one H200, if there is one; a rehearsal
judges no target. What needs a framework that is not installed, or one that sees no GPU, is left
out. Nothing is downloaded and no setting of the device is changed; kbtrain may be on
the path without being installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from on_gpu.parts import NO_DEVICE, PARTS, Part, together
from on_gpu.rows import Reporter, Settings, read_rows
from on_gpu.table import table

BENCHMARKS = Path(__file__).resolve().parent
SIDE_BY_SIDE = 4
"""Checks that run at the same time."""

LEAST_SECONDS = 10.0
"""No part is started with less time left."""

REHEARSAL = 6.0
"""How much longer parts may take in a rehearsal, where processors are few and shared."""

TAIL = 2000
"""Characters kept of the output of a part that failed."""


@dataclass
class Running:
    """A part that has been started.

    Attributes:
        part: The part.
        process: Its process, the leader of a session of its own.
        started: When it was started, in seconds of ``time.monotonic``.
        limit: Seconds after which it is ended.
        rows: The file of its rows.
        output: The file of what it prints.
    """

    part: Part
    process: subprocess.Popen[bytes]
    started: float
    limit: float
    rows: Path
    output: Path


@dataclass
class Run:
    """A run of parts.

    Attributes:
        settings: What every part is told.
        folder: A folder for the files of the parts.
        budget: Seconds for the whole run.
        json: The file for the results.
        began: The time of day at the start.
        outcomes: How each part ended.
        rows: What the parts have found.
        unusable: Why parts of a backend cannot run, by backend.
    """

    settings: Settings
    folder: Path
    budget: float
    json: Path
    began: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds left of the budget."""
        return self.budget - (time.monotonic() - self.started)

    def run(self, parts: Sequence[Part]) -> None:
        """Run parts in their order: checks side by side, benchmarks alone."""
        waiting = list(parts)
        try:
            while waiting or self.running:
                while waiting and self._has_room_for(waiting[0]):
                    part = waiting.pop(0)
                    if part.backend in self.unusable:
                        self._ended(part, "left out", self.unusable[part.backend])
                    else:
                        self._start(part)
                self._collect()
                time.sleep(0.05)
        finally:
            for each in self.running:
                end(each.process)

    def _has_room_for(self, part: Part) -> bool:
        if not self.running:
            return True
        crowded = len(self.running) >= SIDE_BY_SIDE
        return not (part.alone or crowded or any(each.part.alone for each in self.running))

    def _start(self, part: Part) -> None:
        limit, expected = part.limit, part.expected
        if self.settings.tiny:
            limit, expected = REHEARSAL * limit, LEAST_SECONDS
        left = self.left()
        if left < max(LEAST_SECONDS, expected):
            self._ended(part, "left out", f"{expected:.0f} s expected, {max(0, left):.0f} s left")
            return
        stem = part.name.replace(" ", "_")
        rows, output = self.folder / f"{stem}.jsonl", self.folder / f"{stem}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command(part, self.settings, rows),
                env=environment(part.backend, self.settings, self.folder),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what it starts itself is ended with it
            )
        now = time.monotonic()
        self.running.append(Running(part, process, now, min(limit, left), rows, output))

    def _collect(self) -> None:
        for each in list(self.running):
            seconds = time.monotonic() - each.started
            status = each.process.poll()
            if status is None and seconds < each.limit:
                continue
            end(each.process)
            self.running.remove(each)
            if status is None:
                how = f"ended at its limit of {each.limit:.0f} s"
            else:
                how = "done" if status == 0 else f"failed with status {status}"
            self.rows += read_rows(each.rows)
            said = each.output.read_text("utf-8", "replace")[-TAIL:]
            if status == NO_DEVICE:
                how, self.unusable[each.part.backend] = "left out", said.strip()
            self._ended(each.part, how, said, seconds)

    def _ended(self, part: Part, how: str, said: str = "", seconds: float = 0.0) -> None:
        outcome = {"how": how, "seconds": round(seconds, 1), "said": said, "parts": part.names}
        self.outcomes[part.name] = outcome
        self.write()
        at = time.monotonic() - self.started
        print(f"[{at:5.0f} s] {part.name}: {how}, {seconds:.0f} s", flush=True)

    def write(self) -> None:
        """Replace the file of results."""
        document = {
            "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.began)),
            "seconds": round(time.monotonic() - self.started, 1),
            "budget": self.budget,
            "settings": asdict(self.settings),
            "parts": self.outcomes,
            "rows": self.rows,
        }
        new = self.json.with_name(self.json.name + ".new")
        new.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
        new.replace(self.json)


def command(part: Part, settings: Settings, rows: Path) -> list[str]:
    """The command that runs a part.

    Args:
        part: The part.
        settings: What every part is told.
        rows: The file for what it finds.
    """
    own = [sys.executable, str(BENCHMARKS / "gpu_run.py"), "--run", *part.names]
    return [*own, "--rows", str(rows), *settings.as_arguments()]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait(timeout=30)


def environment(backend: str, settings: Settings, folder: Path) -> dict[str, str]:
    """The environment of a part: backend, paths, and no memory of the device taken in advance."""
    paths = [BENCHMARKS.parent, BENCHMARKS, folder / "installed", os.environ.get("PYTHONPATH")]
    result = dict(
        os.environ,
        KERAS_BACKEND=backend,
        PYTHONPATH=os.pathsep.join(str(path) for path in paths if path),
        PYTHONUNBUFFERED="1",
        TF_CPP_MIN_LOG_LEVEL="3",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
    )
    if settings.device == "cpu":
        result |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return result


def as_if_installed(folder: Path) -> None:
    """Write the entry points of kbtrain into ``folder``, if it is not installed.

    Optimizers are found by their entry points, which an import from the path alone lacks.
    """
    from importlib.metadata import entry_points

    if entry_points(group="kbtrain.optimizers"):
        return
    project = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    info = folder / f"kbtrain-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: kbtrain\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    (info / "top_level.txt").write_text("kbtrain\noptim\n", encoding="utf-8")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chosen(backends: Sequence[str], names: Sequence[str]) -> Iterator[Part]:
    """The parts of these backends; only those that are named, if any are."""
    unknown = set(names) - {part.name for part in PARTS}
    if unknown:
        known = "\n  ".join(part.name for part in PARTS)
        raise SystemExit(f"There is no part {', '.join(sorted(unknown))}. The parts:\n  {known}")
    for part in PARTS:
        if part.backend in backends and (not names or part.name in names):
            yield part


def run_part(report: Reporter) -> None:
    """Run a part in this process."""
    module, _, function = report.part.function.partition(":")
    run = getattr(importlib.import_module(f"on_gpu.{module}"), function)
    run(report, **report.part.arguments)


def run_parts(names: Sequence[str], settings: Settings, rows: Path) -> int:
    """Run parts in this process, one after the other.

    Args:
        names: Their names.
        settings: What every part is told.
        rows: The file for what they find.

    Returns:
        The status for the process to end with.
    """
    from on_gpu.machine import reason_not_to_run

    if (reason := reason_not_to_run(settings)) is not None:
        print(reason)
        return NO_DEVICE
    failed = False
    for part in PARTS:
        if part.name in names:
            report = Reporter(settings, part, rows)
            try:
                run_part(report)
            except Exception as error:
                report.failed(error)
                failed = True
    return int(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for the results")
    parser.add_argument("--budget", type=float, default=390.0, help="seconds for the whole run")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="small models and few updates")
    parser.add_argument("--backends", nargs="+", default=["torch", "jax", "tensorflow"])
    parser.add_argument("--parts", nargs="+", default=[], metavar="PART", help="only these")
    parser.add_argument(
        "--together",
        action="store_true",
        help="one process for all parts of a backend: a quick rehearsal",
    )
    # How the process of a part is started.
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = Settings(options.device, options.tiny)
    if options.run:
        sys.exit(run_parts(options.run, settings, options.rows))
    parts = list(chosen(options.backends, options.parts))
    if options.together:
        parts = together(parts)
    with tempfile.TemporaryDirectory(prefix="kbtrain-gpu-") as folder:
        as_if_installed(Path(folder, "installed"))
        run = Run(settings, Path(folder), options.budget, options.json.resolve())
        for backend in options.backends:
            if importlib.util.find_spec(backend) is None:
                run.unusable[backend] = f"{backend} is not installed"
        run.run(parts)
    for line in table(run.rows, run.outcomes, settings):
        print(line)


if __name__ == "__main__":
    main()
