"""Runs a script in several processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kbtrain.utils.machine.ports import free_ports

SUPPORT = Path(__file__).parent
JOINED = ("KBTRAIN_JOINED_PID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ended(NamedTuple):
    """How a process ended: its status, and what it wrote."""

    status: int
    output: str


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one of several processes on this machine."""
    if size == 1:
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_processes(
    size: int,
    script: str | Path,
    *words: str,
    timeout: float = 240,
    more: Mapping[str, str] | None = None,
    check: bool = True,
) -> list[Ended]:
    """Run a script in several processes, and wait for all of them.

    Args:
        size: The number of processes; with 1 no launcher's variables are set.
        script: A file.
        words: Its arguments.
        timeout: Seconds after which all are killed and the test fails.
        more: Further environment variables.
        check: Whether every process must end with status 0.

    Returns:
        How each ended, in order of rank.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in JOINED}
    inherited |= {
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), inherited.get("PYTHONPATH", "")]),
    }
    port = free_ports()
    command: Sequence[str] = [sys.executable, str(script), *words]
    running = [
        subprocess.Popen(
            command,
            env=inherited | variables(rank, size, port) | dict(more or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    except subprocess.TimeoutExpired:
        for process in running:
            process.kill()
        texts = [process.communicate()[0] for process in running]
        raise AssertionError("\n".join(f"[{i}] {text}" for i, text in enumerate(texts))) from None
    ended = [Ended(p.returncode, text) for p, text in zip(running, outputs, strict=True)]
    if check:
        assert [one.status for one in ended] == [0] * size, "\n".join(one.output for one in ended)
    return ended
