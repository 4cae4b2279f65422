"""``kbtrain plan``: will a training program fit on devices that are not here, and how fast."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.cli.parser import command_parser
from kbtrain.errors import ConfigurationError
from kbtrain.plan.devices import device_named
from kbtrain.plan.process import backend_of, environment, run_process
from kbtrain.utils.machine.devices import known_devices

if TYPE_CHECKING:
    from kbtrain.plan.request import PlanRequest

_EPILOG = """\
examples:
  kbtrain plan train.py --device h100
  kbtrain plan train.py --device h100 --count 8 --fsdp --batch 8,16,32
  kbtrain plan train.py --device v5e --count 256 --json -- --learning-rate 3e-4

The program runs on this machine up to its first fit(), and trains nothing. Its own arguments come
after --. The model is made here, so its weights must fit into this machine's memory.

Exit status: 0 if there is a plan, whether the run fits or not (--json: "fits"); 2 after a mistake.
"""


def run(words: Sequence[str]) -> int:
    """Plan a program.

    Returns:
        0, whether it fits or not.
    """
    words = list(words)
    own = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:own])
    program, is_module = _program(options)
    from kbtrain.plan.request import PlanRequest  # it loads Keras, which --help need not

    device_named(options.device)
    request = PlanRequest(
        device=_absolute(options.device),
        count=options.count,
        batch=options.batch,
        quick=options.quick,
        fsdp=options.fsdp,
        backend=backend_of(os.environ),
    )
    found = _result(program, is_module, words[own + 1 :], request)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    return 0


def _result(
    program: str, is_module: bool, arguments: Sequence[str], request: PlanRequest
) -> dict[str, Any]:
    """Run the program in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="kbtrain-plan-") as folder:
        path = Path(folder) / "result.json"
        task = {
            "program": program,
            "module": is_module,
            "arguments": list(arguments),
            "request": dataclasses.asdict(request),
            "result": str(path),
        }
        with _ended_by_signal():
            done = run_process(
                [sys.executable, "-m", "kbtrain.plan.script", json.dumps(task)],
                environment(os.environ),
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
            )
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            killed = done.returncode == -9
            why = " It was killed: is the model too large for this machine's memory?"
            raise ConfigurationError(
                f"{program} ended with exit status {done.returncode} before there was a plan."
                f"{why if killed else ''}"
            ) from None
    if "error" in result:
        raise ConfigurationError(result["error"])
    return dict(result["plan"])


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Context that SIGTERM ends as Ctrl-C does: the program it waits for is ended, too."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _has_descriptor(stream: Any) -> bool:
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _show(found: Mapping[str, Any]) -> None:
    """Print the plan: with colors on a terminal, as plain lines elsewhere."""
    from kbtrain.plan.plan import Plan

    plan = Plan.from_dict(found)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(plan)
    else:
        print(plan)


def _absolute(device: str) -> str:
    """A file's path, also for a program that changes its folder."""
    is_file = device.lower().endswith((".yaml", ".yml"))
    return str(Path(device).expanduser().resolve()) if is_file else device


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"batch sizes are numbers such as 8,16,32, not {text!r}")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of devices is 1 or more, not {text!r}")
    return int(text)


def _program(options: argparse.Namespace) -> tuple[str, bool]:
    if options.module and options.script:
        raise ConfigurationError(
            "Name a script or a module (-m), not both. Arguments of the program come after --. "
            f"Received: {options.script!r}, -m {options.module}"
        )
    if options.module:
        return options.module, True
    if not options.script:
        raise ConfigurationError("Name the program: `kbtrain plan train.py --device h100`.")
    if not Path(options.script).is_file():
        raise ConfigurationError(f"There is no script {options.script!r}.")
    if Path(options.script).suffix.lower() in (".yaml", ".yml", ".json"):
        raise ConfigurationError(
            f"{options.script} is no program. Of a file of settings: `kbtrain plan -m kbtrain "
            f"--device {options.device} -- train {options.script}`."
        )
    return options.script, False


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(sorted(each.name for each in known_devices()))
    parser = command_parser(
        "plan",
        "Predict memory and speed of a training program on devices that are not here: "
        "its step is compiled for them, and not run.",
        usage="%(prog)s (SCRIPT | -m MODULE) --device NAME [options] [-- ARGUMENT ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", nargs="?", metavar="SCRIPT", help="the program")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="a module in its place")
    parser.add_argument(
        "--device", required=True, metavar="NAME", help=f"{names}; or a YAML file (docs/plan.md)"
    )
    parser.add_argument(
        "--count", type=_count, default=1, metavar="N", help="number of devices (default: 1)"
    )
    parser.add_argument(
        "--batch",
        type=_sizes,
        default=(),
        metavar="B[,B...]",
        help="batch sizes of a device: the first for the plan, the others to compare",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="divide state among the devices: weights only on JAX, the optimizer's state on all",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile this run alone: no alternatives and no search for the largest batch",
    )
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")
    return parser
