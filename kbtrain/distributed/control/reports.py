"""What a process of a run tells the others about itself, and what its machine knows of it."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kbtrain.distributed.control.watcher import process_state


@dataclass(frozen=True)
class Report:
    """What a process does.

    All processes make the same calls (``fit``, ``evaluate``, ...) and pass the same places in them,
    so their numbers tell who waits for whom.

    Attributes:
        rank: Index of the process.
        host: Name of its machine.
        pid: Its process id there.
        machine: Identifies its machine and pid namespace; empty if unknown.
        place: What it is doing, such as "update 17"; empty outside the calls.
        call: Number of calls that have ended.
        step: Number of the place in the call; 0 outside.
        ended_by: The exception that ended the last call; empty if it ended normally.
        ended_at: The place at which that was.
        ended_step: The number of that place.
        left: Whether the program has ended.
    """

    rank: int
    host: str
    pid: int
    machine: str = ""
    place: str = ""
    call: int = 0
    step: int = 0
    ended_by: str = ""
    ended_at: str = ""
    ended_step: int = 0
    left: bool = False

    def at(self, place: str) -> Report:
        """The report at the next place."""
        return replace(
            self, place=place, step=self.step + 1, ended_by="", ended_at="", ended_step=0
        )

    def done(self, ended_by: str = "") -> Report:
        """The report after the end of the call."""
        at, step = (self.place, self.step) if ended_by else ("", 0)
        return replace(
            self,
            place="",
            call=self.call + 1,
            step=0,
            ended_by=ended_by,
            ended_at=at,
            ended_step=step,
        )

    @property
    def name(self) -> str:
        """The process, as messages name it."""
        return f"process {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        """The place with its preposition, as messages name it."""
        if self.place or self.ended_at:
            return f"at {self.place or self.ended_at}"
        return "outside fit and evaluate" if self.call else "before fit and evaluate"

    @property
    def progress(self) -> tuple[int, int]:
        """It only grows."""
        return self.call, self.step

    @property
    def reached(self) -> tuple[int, int]:
        """The last place, in numbers that can be compared with those of other processes."""
        return (self.call - 1, self.ended_step) if self.ended_by else (self.call, self.step)

    @property
    def passed(self) -> tuple[int, int]:
        """The last place that it has behind it, likewise."""
        call, step = self.reached
        return (call, step - 1) if self.place or self.ended_by else (call, step)

    def to_wire(self) -> dict[str, Any]:
        """A dictionary that XML-RPC can send."""
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of ``to_wire``."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def waits_for(one: Report, other: Report) -> bool:
    """Whether a process may wait for another: that has to come to its place, and has not yet.

    Args:
        one: A process inside a call, or whose call was ended by an exception.
        other: The other one.
    """
    if not one.place and not one.ended_at:
        return False
    return one.reached > (other.passed if other.ended_by else other.reached)


def needs(waiting: Report, gone: Report, failing: bool = False) -> bool:
    """Whether a process is at a place that another never passed before its program ended.

    Args:
        waiting: The process.
        gone: The other one.
        failing: Whether an exception ends the process.
    """
    inside = waiting.place or (failing and waiting.ended_at)
    return bool(inside) and waiting.reached > gone.passed


@functools.cache
def machine() -> str:
    """Identifies this machine and the namespace of its process ids; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def network() -> str:
    """Identifies the network interfaces that this process sees, its loopback included."""
    try:
        return f"{machine()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def state_here(report: Report) -> str:
    """The state letter of a process; "?" for one that does not run on this machine."""
    return process_state(report.pid) if report.machine == machine() != "" else "?"
