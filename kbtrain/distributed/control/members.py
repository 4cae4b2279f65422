"""What process 0 knows about the processes of a run, and the rules that find a failure in it.

Nothing here touches the network or reads a clock, so the rules can be tested without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kbtrain.distributed.control.reports import Report, machine, needs, process_state, waits_for

HEARTBEAT = 1.0
"""Seconds between two heartbeats of a process."""
GRACE = 1.5
"""Seconds in which a process whose connection has ended can connect again."""
LOST = 5.0
"""Seconds without a sign of life of a process after which it counts as failed."""
STALLED = 300.0
"""The same for one that is still connected: native code may hold its interpreter lock so long."""
LEFT = 3.0
"""Seconds that a process may be at a place that another one never passed before it left."""


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        rank: The process that failed.
        text: A sentence that names the process, its host, its place and the cause.
    """

    rank: int
    text: str


@dataclass
class Member:
    """A process as process 0 sees it; all times are those of process 0.

    Attributes:
        report: Its last report.
        seen: When that came.
        moved: When it last came to another place.
        overtaken: Since when another process may wait for it.
        connections: Open connections that bring its heartbeats.
        disconnected: When the last of them ended.
        cut_off: Whether it ended because nothing came through any more.
        failing: Whether it has reported an exception.
        left: When its program ended.
        told: Whether it knows of the failure.
        left_told: Whether it knows that process 0 has left.
    """

    report: Report
    seen: float
    moved: float
    overtaken: float | None = None
    connections: int = 0
    disconnected: float | None = None
    cut_off: bool = False
    failing: bool = False
    left: float | None = None
    told: bool = False
    left_told: bool = False


class Members:
    """The processes of a run and the first failure among them.

    Args:
        reports: The first report of each process.
        timeout: Seconds that the others wait for a process that stays at one place.
        now: The present time.
        state: Gives the state of a process on this machine.
        here: Identifies this machine.

    Attributes:
        timeout: The argument.
        failure: The first failure.
    """

    def __init__(
        self,
        reports: Iterable[Report],
        timeout: float,
        now: float,
        state: Callable[[int], str] = process_state,
        here: str | None = None,
    ) -> None:
        self._members = {r.rank: Member(r, now, now) for r in reports}
        self.timeout = timeout
        self._state = state
        self._here = machine() if here is None else here
        self._checked = now
        self.failure: Failure | None = None

    def __getitem__(self, rank: int) -> Member:
        return self._members[rank]

    def others(self, rank: int) -> list[Member]:
        """All processes but one."""
        return [m for m in self._members.values() if m.report.rank != rank]

    def update(self, report: Report, now: float) -> None:
        """Take in a report. An older one may arrive late, over another connection."""
        member = self._members[report.rank]
        member.seen = now
        if (report.progress, report.left) < (member.report.progress, member.report.left):
            return
        if report.progress != member.report.progress:
            member.moved, member.overtaken = now, None
        if report.left and member.left is None:
            member.left = now
        member.report = report

    def connected(self, rank: int) -> None:
        """A connection has brought its first heartbeat of a process."""
        self._members[rank].connections += 1

    def disconnected(self, rank: int, cut_off: bool, now: float) -> None:
        """Such a connection has ended."""
        member = self._members[rank]
        member.connections -= 1
        member.disconnected, member.cut_off = now, cut_off

    def check(self, now: float) -> Failure | None:
        """Apply the rules; the first failure found is kept.

        It is called a few times a second. If that was not possible for a while, this process itself
        stood still, and no other is blamed for the silence of that time.
        """
        pause = now - self._checked
        self._checked = now
        if pause > HEARTBEAT:
            self._forgive(pause)
        active = [m for m in self._members.values() if m.left is None and not m.failing]
        for member in active:
            if member.overtaken is None and any(waits_for(m.report, member.report) for m in active):
                member.overtaken = now
        if self.failure is None:
            self.failure = (
                self._lost(active, now)
                or self._left(active, now, LEFT)
                or self._hanging(active, now, self.timeout)
            )
        return self.failure

    def _forgive(self, pause: float) -> None:
        for member in self._members.values():
            member.seen += pause
            member.moved += pause
            for name in ("disconnected", "overtaken", "left"):
                if (time := getattr(member, name)) is not None:
                    setattr(member, name, time + pause)

    def fail(self, rank: int, cause: str) -> None:
        """A process has reported an exception, and no earlier failure explains it."""
        if self.failure is None:
            report = self._members[rank].report
            self.failure = Failure(rank, f"{report.name} failed {report.where}: {cause}")

    def blame_other(self, rank: int, now: float) -> bool:
        """Whether the failure of another process explains an exception of process ``rank``.

        A collective operation fails in all processes when one of them is gone, often before the
        rules would find that one.
        """
        if self.failure is None:
            active = [m for m in self.others(rank) if m.left is None and not m.failing]
            self.failure = (
                self._lost(active, now, early=True)
                or self._left([self._members[rank]], now, 0.0)
                or self._hanging(active, now, 0.9 * self.timeout)
            )
        return self.failure is not None

    def may_be_lost(self, rank: int, now: float) -> bool:
        """Whether a process other than ``rank`` is silent, but not yet for long enough."""
        return any(
            now - m.seen > 2 * HEARTBEAT
            for m in self.others(rank)
            if m.left is None and not m.failing and m.report.rank != 0
        )

    def _lost(self, active: list[Member], now: float, early: bool = False) -> Failure | None:
        for member in active:
            report = member.report
            if report.rank == 0:
                continue  # it is the one that checks
            local = bool(self._here) and report.machine == self._here
            silent = now - member.seen
            if member.connections == 0 and member.disconnected is not None:
                without = now - member.disconnected
                if member.cut_off and without > (0 if early else HEARTBEAT):
                    return self.cut_off(report)
                # A process that runs here will connect again: it may be importing a framework,
                # which holds its interpreter lock for long on a busy machine.
                gone = self._state(report.pid) in ("", "Z", "X") if local else without > GRACE
                if gone or (early and without > HEARTBEAT / 4):
                    return self._vanished(report, silent)
            elif local and silent > LOST / 2:
                state = self._state(report.pid)
                if state in ("", "Z", "X"):  # something else keeps its connection open
                    return self._vanished(report, silent)
                if state in ("T", "t") and silent > LOST:
                    return self.suspended(report)
            if silent > STALLED:
                return self.stalled(report)
        return None

    def _vanished(self, report: Report, silent: float) -> Failure:
        # A process that is cut off notices it as soon as this one does, and ends.
        return self.cut_off(report) if silent > LOST - HEARTBEAT else self.gone(report)

    def _left(self, active: list[Member], now: float, patience: float) -> Failure | None:
        for gone in self._members.values():
            if gone.left is None:
                continue
            for member in active:
                waits = now - max(member.moved, gone.left)
                if waits >= patience and needs(member.report, gone.report, member.failing):
                    return self.ended(gone.report, member.report)
        return None

    def _hanging(self, active: list[Member], now: float, timeout: float) -> Failure | None:
        behind = [m for m in active if m.overtaken is not None and now - m.seen < 2 * HEARTBEAT]
        for member in sorted(behind, key=lambda m: m.report.reached):
            report = member.report
            others = [m.report for m in active if waits_for(m.report, report)]
            if others and now - (member.overtaken or now) > timeout:
                after = f" after {report.ended_by}" if report.ended_by else ""
                return Failure(
                    report.rank,
                    f"{report.name} hangs {report.where}{after}: it has been there for "
                    f"{now - member.moved:.0f} s, and process {others[0].rank} waits for it "
                    f"{others[0].where} for more than {timeout:g} s. The limit is "
                    "TrainingArguments(ddp_timeout=...).",
                )
        return None

    @staticmethod
    def gone(report: Report) -> Failure:
        """The failure of a process that ended without a word."""
        return Failure(
            report.rank,
            f"{report.name} failed: it was killed, or crashed (memory used up, a signal, a fault "
            f"in native code). It was last seen {report.where}, a second before or less. See its "
            "own output and the logs of its host.",
        )

    @staticmethod
    def cut_off(report: Report) -> Failure:
        """The failure of a process whose host does not answer."""
        return Failure(
            report.rank,
            f"{report.name} failed: it has not been reachable for {LOST:g} s, so its host is down "
            f"or cut off from the network. It was last seen {report.where}.",
        )

    @staticmethod
    def suspended(report: Report) -> Failure:
        """The failure of a process that was stopped by a signal."""
        return Failure(
            report.rank,
            f"{report.name} failed: it has been suspended for {LOST:g} s, by SIGSTOP or in a "
            f"debugger. It was last seen {report.where}.",
        )

    @staticmethod
    def stalled(report: Report) -> Failure:
        """The failure of a process that is connected and does not answer."""
        return Failure(
            report.rank,
            f"{report.name} failed: it has not answered for {STALLED:g} s, so it is suspended, or "
            f"native code holds Python's interpreter lock. It was last seen {report.where}.",
        )

    @staticmethod
    def ended(gone: Report, waiting: Report) -> Failure:
        """The failure of a process whose program ended while another one needs it."""
        after = f" after {gone.ended_by}" if gone.ended_by else ""
        return Failure(
            gone.rank,
            f"{gone.name} ended its program {gone.where}{after}, while process {waiting.rank} "
            f"waits for it {waiting.where}. All processes have to make the same calls.",
        )
