"""What process 0 knows about the processes of a run, and the rules that find a failure in it.

Nothing here touches the network or reads a clock, so the rules can be tested without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kbtrain.distributed.control.reports import Report, needs, state_here, waits_for

HEARTBEAT = 1.0
"""Seconds between two heartbeats of a process."""
GRACE = 1.5
"""Seconds in which a process whose connection has ended can connect again."""
LOST = 5.0
"""Seconds without a sign of life of a process after which it counts as failed."""
STALLED = 300.0
"""The same for one that is still connected: native code may hold its interpreter lock so long."""
FROZEN = 6.5
"""The same for one whose watcher does not answer either."""
NOTICE = 8.0
"""Seconds that others wait for a process until it is named; it may hang, or have more to do."""
LEFT = 3.0
"""Seconds that a process may be at a place that another one never passed before it left."""

ENDED = ("", "Z", "X")
SUSPENDED = ("T", "t")
"""States of a process, as Linux names them."""
UNANSWERED = "-"
"""The state of a process whose watcher does not answer, on a machine that can be reached."""


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
        named: How long others had waited for it when it was last named as slow.
        shows: Whether it is asked to show what its main thread does.
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
    named: float = 0.0
    shows: bool = False
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
        state: Gives the state of a process at once, "?" where that is not known (yet).

    Attributes:
        timeout: The argument.
        notice: Seconds that others wait for a process until it is named.
        failure: The first failure.
    """

    def __init__(
        self,
        reports: Iterable[Report],
        timeout: float,
        now: float,
        state: Callable[[Report], str] = state_here,
    ) -> None:
        self._members = {r.rank: Member(r, now, now) for r in reports}
        self.timeout = timeout
        self.notice = NOTICE
        self._state = state
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
            member.moved, member.overtaken, member.named = now, None, 0.0
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
        furthest = _furthest(active)
        for member in active:
            if member.overtaken is None and furthest and waits_for(furthest, member.report):
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
                or self._hanging(active, now, 0.9 * self.timeout, rank)
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
            silent = now - member.seen
            if member.connections == 0 and member.disconnected is not None:
                without = now - member.disconnected
                if member.cut_off and without > (0 if early else HEARTBEAT):
                    return self.cut_off(report)
                # A process that runs will connect again: it may be importing a framework, which
                # holds its interpreter lock for long on a busy machine.
                state = self._state(report)
                gone = state in ENDED or (state == "?" and without > GRACE)
                if gone or (early and without > HEARTBEAT / 4):
                    return self._vanished(report, silent)
            elif silent > LOST / 2:
                state = self._state(report)
                if state in ENDED:  # something else keeps its connection open
                    return self._vanished(report, silent)
                failure = self.standing(report, state, silent)
                if failure is not None:
                    return failure
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

    def _hanging(
        self, active: list[Member], now: float, timeout: float, failing: int | None = None
    ) -> Failure | None:
        for member, waits, furthest in self._waited_for(active, now, failing):
            if waits > timeout:
                report = member.report
                after = f" after {report.ended_by}" if report.ended_by else ""
                return Failure(
                    report.rank,
                    f"{report.name} hangs {report.where}{after}: it has been there for "
                    f"{now - member.moved:.0f} s, and process {furthest.rank} waits for it "
                    f"{furthest.where} for more than {timeout:g} s. The limit is "
                    "TrainingArguments(ddp_timeout=...).",
                )
        return None

    def slow(self, now: float) -> Failure | None:
        """The process that others wait for, for a notice: it may hang, or have more to do.

        It is named after ``notice`` seconds, and again whenever they have waited twice as long.
        """
        active = [m for m in self._members.values() if m.left is None and not m.failing]
        for member, waits, furthest in self._waited_for(active, now)[:1]:
            if waits > max(self.notice, 2 * member.named):
                member.named, member.shows = waits, True
                return Failure(
                    member.report.rank,
                    f"Process {furthest.rank} has waited {waits:.0f} s {furthest.where} for "
                    f"{member.report.name}, which is {member.report.where}. The run ends when it "
                    f"has waited {self.timeout:g} s (ddp_timeout).",
                )
        return None

    def _waited_for(
        self, active: list[Member], now: float, failing: int | None = None
    ) -> list[tuple[Member, float, Report]]:
        """Processes that answer and that others wait for, the last one first.

        Args:
            active: The processes that run.
            now: The present time.
            failing: A process that waited until its collective operation failed, in place of those
                that still wait.

        Returns:
            Each with the seconds, and the process that has waited for it.
        """
        furthest = _furthest(active) if failing is None else self._members[failing].report
        found = [
            (m, now - m.overtaken, furthest)
            for m in active
            if m.overtaken is not None and now - m.seen < 2 * HEARTBEAT
            if furthest is not None and waits_for(furthest, m.report)
        ]
        return sorted(found, key=lambda each: each[0].report.reached)

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
    def standing(report: Report, state: str, silent: float) -> Failure | None:
        """The failure of a process that has been silent for long because it does not run."""
        if state in SUSPENDED and silent > LOST:
            return Members.suspended(report)
        return Members.frozen(report) if state == UNANSWERED and silent > FROZEN else None

    @staticmethod
    def frozen(report: Report) -> Failure:
        """The failure of a process whose machine is reachable and runs nothing of the run."""
        return Failure(
            report.rank,
            f"{report.name} failed: neither it, for {FROZEN:g} s, nor the small process that "
            "watches it has answered, though its host can be reached. Its container or job is "
            "suspended, or its host is short of memory and swaps. It was last seen "
            f"{report.where}.",
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


def _furthest(members: list[Member]) -> Report | None:
    """The process that has come furthest of those inside a call: it waits for all others."""
    inside = [m.report for m in members if m.report.place]
    return max(inside, key=lambda report: report.reached, default=None)
