"""The rules by which process 0 finds a failure, by a clock that the test sets."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from kbtrain.distributed.members import Members, Report, process_state

pytestmark = pytest.mark.core

FAST, TIMEOUT = 0.25, 100.0


class Run:
    """Three processes, of which process 0 checks four times a second."""

    def __init__(self, machines=("here", "here", "there")):
        self.reports = [
            Report(rank, f"host{rank}", 100 + rank, machine, "update 1", 1)
            for rank, machine in enumerate(machines)
        ]
        self.states = {}
        self.now = 1000.0
        self.silent = set()
        self.members = Members(
            self.reports, TIMEOUT, self.now, lambda pid: self.states.get(pid - 100, "S"), "here"
        )
        for rank in (1, 2):
            self.members.connected(rank)

    def at(self, rank, **changes):
        self.reports[rank] = replace(self.reports[rank], **changes)

    def after(self, seconds):
        """The text of the failure found within so many seconds, and when; None if there is none."""
        end = self.now + seconds
        while self.now < end:
            self.now += FAST
            for rank in {0, 1, 2} - self.silent:
                self.members.update(self.reports[rank], self.now)
            if self.members.check(self.now) is not None:
                return self.members.failure.text
        return None

    def lose(self, rank, cut_off=False):
        self.silent.add(rank)
        self.members.disconnected(rank, cut_off, self.now)


def test_processes_that_report_are_well():
    run = Run()
    assert run.after(10 * TIMEOUT) is None


def test_a_process_that_ended_here_is_seen_at_once():
    run = Run()
    run.lose(1)
    run.states[1] = "Z"
    assert "process 1 (host host1, pid 101) failed: it was killed" in run.after(0.5)


def test_a_process_elsewhere_has_time_to_connect_again():
    run = Run()
    run.lose(2)
    assert run.after(1.25) is None
    run.members.connected(2)
    run.silent.clear()
    assert run.after(5) is None
    run.lose(2)
    assert "process 2 (host host2, pid 102) failed: it was killed" in run.after(2)


def test_a_process_here_that_runs_has_a_minute_to_connect_again():
    """Its interpreter lock is held for long while it imports a framework on a busy machine."""
    run = Run()
    run.lose(1)
    assert run.after(50) is None
    assert "has not answered for 60 s" in run.after(11)


def test_a_connection_over_which_nothing_comes_is_a_host_cut_off():
    run = Run()
    run.lose(2, cut_off=True)
    assert "process 2 (host host2, pid 102) failed: it has not been reachable" in run.after(2)


def test_silence_of_a_connected_process_is_judged_by_its_state():
    run = Run()
    run.silent.add(1)  # native code holds the interpreter lock
    assert run.after(30) is None
    run.states[1] = "T"
    assert "suspended" in run.after(1)
    run = Run()
    run.silent.add(1)
    run.states[1] = ""
    assert "killed" in run.after(3)


def test_silence_elsewhere_cannot_be_judged_and_ends_after_a_minute():
    run = Run()
    run.silent.add(2)
    assert run.after(59) is None
    assert "process 2 (host host2, pid 102) failed: it has not answered for 60 s" in run.after(2)


def test_nobody_is_blamed_for_a_pause_of_process_0():
    run = Run()
    run.lose(2)
    run.now += 300  # it was suspended, or native code held its interpreter lock
    assert run.members.check(run.now) is None
    run.members.connected(2)
    run.silent.clear()
    assert run.after(10) is None


def test_a_process_that_stays_behind_for_too_long_hangs():
    run = Run()
    for rank in (0, 2):
        run.at(rank, place="evaluation", count=2)
    assert run.after(TIMEOUT) is None
    text = run.after(1)
    assert "process 1 (host host1, pid 101) hangs at update 1" in text
    assert "process 0 is at evaluation" in text


def test_the_time_of_a_process_that_stays_behind_counts_from_when_it_was_overtaken():
    run = Run()
    assert run.after(2 * TIMEOUT) is None  # a long update
    run.at(0, place="update 2", count=2)
    assert run.after(TIMEOUT / 2) is None
    run.at(1, place="update 2", count=2)
    run.at(2, place="update 2", count=2)
    assert run.after(2 * TIMEOUT) is None


@pytest.mark.parametrize(
    ("changes", "waits_at", "found"),
    [
        ({"place": "", "count": 2}, 1, False),  # it has done all that the others have
        ({"place": "", "count": 2}, 2, False),
        ({"place": "", "count": 2}, 3, True),
        ({}, 1, True),  # in the middle of an update
        ({"place": "", "count": 2, "ended_by": "SystemExit: 3", "ended_at": "update 1"}, 1, True),
        ({"place": "", "count": 0}, 1, True),
    ],
)
def test_a_program_that_ended_is_a_failure_where_another_process_needs_it(changes, waits_at, found):
    run = Run()
    run.at(0, count=waits_at)
    run.at(2, place="", count=waits_at)  # outside: it waits for nobody
    run.at(1, left=True, **changes)
    # The report that comes first has the count 1, so that it cannot go back to 0.
    run.members[1].report = run.reports[1]
    assert run.after(3) is None
    text = run.after(1) or ""
    assert ("process 1 (host host1, pid 101) ended its program" in text) is found
    assert ("while process 0 waits for it at update 1" in text) is found


def test_processes_that_an_exception_ended_at_the_same_place_do_not_need_each_other():
    run = Run()
    broken = {"place": "", "count": 2, "ended_by": "KeyboardInterrupt", "ended_at": "update 1"}
    for rank in range(3):
        run.at(rank, **broken)
    run.at(1, left=True)  # the others have caught it, and save
    assert run.after(60) is None
    assert not run.members.blame_other(2, run.now)
    run.members[2].failing = True
    assert run.members.blame_other(2, run.now)
    assert "ended its program at update 1 after KeyboardInterrupt" in run.members.failure.text


def test_an_exception_is_explained_by_a_process_that_is_gone():
    run = Run()
    run.lose(2)
    run.now += 0.3
    assert run.members.blame_other(1, run.now)
    assert run.members.failure.rank == 2
    run = Run()
    assert not run.members.blame_other(1, run.now)
    run.members.fail(1, "ValueError: bad sample")
    assert run.members.failure.text == (
        "process 1 (host host1, pid 101) failed at update 1: ValueError: bad sample"
    )


def test_the_first_failure_is_kept():
    run = Run()
    run.members.fail(1, "ValueError: bad sample")
    run.lose(1)
    run.states[1] = ""
    assert "bad sample" in run.after(1)


def test_a_report_that_comes_late_is_not_taken_for_news():
    run = Run()
    newer = replace(run.reports[1], place="update 2", count=2, left=True)
    run.members.update(newer, run.now)
    run.members.update(run.reports[1], run.now)
    assert run.members[1].report == newer


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_state_of_a_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_state(child.pid) == "Z"
    child.wait()
    assert process_state(child.pid) == ""
    assert process_state(os.getpid()) == "R"
