"""The rules by which process 0 finds a failure, by a clock that the test sets."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from kbtrain.distributed.control.members import UNANSWERED, Members
from kbtrain.distributed.control.reports import Report
from kbtrain.distributed.control.watcher import process_state

pytestmark = pytest.mark.core

FAST, TIMEOUT = 0.25, 100.0


class Run:
    """Three processes, of which process 0 checks four times a second."""

    def __init__(self, machines=("here", "here", "there")):
        self.reports = [
            Report(rank, f"host{rank}", 100 + rank, machine).at("update 1")
            for rank, machine in enumerate(machines)
        ]
        self.states = {}
        self.now = 1000.0
        self.silent = set()
        self.members = Members(self.reports, TIMEOUT, self.now, self.state)
        for rank in (1, 2):
            self.members.connected(rank)

    def state(self, report):
        unknown = "S" if report.machine == "here" else "?"
        return self.states.get(report.rank, unknown)

    def at(self, rank, place):
        self.reports[rank] = self.reports[rank].at(place)

    def done(self, rank, ended_by=""):
        self.reports[rank] = self.reports[rank].done(ended_by)

    def leave(self, rank):
        self.reports[rank] = replace(self.reports[rank], left=True)

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


def test_a_process_here_that_runs_has_minutes_to_connect_again():
    """Its interpreter lock is held for long while it imports a framework on a busy machine."""
    run = Run()
    run.lose(1)
    assert run.after(290) is None
    assert "has not answered for 300 s" in run.after(11)


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


@pytest.mark.parametrize(
    ("state", "seconds", "words"),
    [("T", 5.5, "suspended"), (UNANSWERED, 8, "nor the small process that"), ("S", 299, "")],
)
def test_silence_elsewhere_is_judged_by_what_its_watcher_says(state, seconds, words):
    run = Run()
    run.silent.add(2)
    run.states[2] = state
    assert run.after(4.5) is None
    found = run.after(seconds - 4.5)
    assert words in found if words else found is None


def test_a_process_that_lives_elsewhere_has_minutes_to_connect_again():
    run = Run()
    run.lose(2)
    run.states[2] = "R"
    assert run.after(290) is None


def test_silence_elsewhere_cannot_be_judged_and_ends_after_minutes():
    run = Run()
    run.silent.add(2)
    assert run.after(299) is None
    assert "process 2 (host host2, pid 102) failed: it has not answered for 300 s" in run.after(2)


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
        run.at(rank, "evaluation")
    assert run.after(TIMEOUT) is None
    text = run.after(1)
    assert "process 1 (host host1, pid 101) hangs at update 1" in text
    assert "process 0 waits for it at evaluation for more than 100 s" in text


def test_the_time_of_a_process_that_stays_behind_counts_from_when_it_was_overtaken():
    run = Run()
    assert run.after(2 * TIMEOUT) is None  # a long update
    run.at(0, "update 2")
    assert run.after(TIMEOUT / 2) is None
    run.at(1, "update 2")
    run.at(2, "update 2")
    assert run.after(2 * TIMEOUT) is None


def test_a_process_that_others_wait_for_is_named_at_growing_intervals():
    run = Run()
    run.at(0, "update 2")
    run.at(2, "update 2")
    named = {}
    for tick in range(1, 161):
        assert run.after(FAST) is None
        if (slow := run.members.slow(run.now)) is not None:
            named[tick * FAST] = slow
    assert [round(time) for time in named] == [8, 17, 34]
    assert {slow.rank for slow in named.values()} == {1}
    text = next(iter(named.values())).text
    assert "Process 0 has waited 8 s at update 2 for process 1 (host host1, pid 101)" in text
    assert "which is at update 1" in text
    run.at(1, "update 2")
    assert run.after(30) is None
    assert run.members.slow(run.now) is None


def test_a_process_that_catches_its_exception_hangs_for_the_others():
    run = Run()
    run.done(1, "ValueError: bad sample")
    assert run.after(TIMEOUT) is None
    text = run.after(1)
    assert "process 1 (host host1, pid 101) hangs at update 1 after ValueError: bad sample" in text


def test_a_process_that_is_outside_waits_for_nobody():
    run = Run()
    run.done(0)
    run.done(1)
    assert run.after(2 * TIMEOUT) is None  # process 2 writes a checkpoint, for example
    run.done(2)
    for rank in (0, 2):
        run.at(rank, "evaluation")
    assert run.after(TIMEOUT) is None
    assert "hangs outside fit and evaluate" in run.after(1)


def test_places_are_counted_anew_in_each_call():
    run = Run()
    run.at(0, "update 2")
    for rank in range(3):  # interrupted by the user, at different updates
        run.done(rank, "KeyboardInterrupt")
        run.at(rank, "evaluation")
    assert run.after(2 * TIMEOUT) is None


def at_update(run, rank):
    pass


def finished(run, rank):
    run.done(rank)


def broken_off(run, rank):
    run.done(rank, "SystemExit: 3")


@pytest.mark.parametrize(
    ("gone", "waits", "found"),
    [
        (finished, at_update, False),  # it has done all that the others have
        (finished, finished, False),
        (finished, lambda run, rank: (run.done(rank), run.at(rank, "evaluation")), True),
        (at_update, at_update, True),
        (at_update, finished, False),
        (broken_off, at_update, True),
        (broken_off, lambda run, rank: run.at(rank, "update 2"), True),
        (broken_off, broken_off, False),  # the others have caught the exception, and save
    ],
)
def test_a_program_that_ended_is_a_failure_where_another_process_needs_it(gone, waits, found):
    run = Run()
    gone(run, 1)
    run.leave(1)
    waits(run, 0)
    finished(run, 2)
    assert run.after(3) is None
    text = run.after(1) or ""
    assert ("process 1 (host host1, pid 101) ended its program" in text) is found
    assert ("while process 0 waits for it" in text) is found


def test_the_exception_of_a_collective_operation_is_explained_by_a_program_that_ended():
    run = Run()
    run.leave(1)
    run.done(2, "RuntimeError: connection closed by peer")
    run.now += 0.25
    for report in run.reports:
        run.members.update(report, run.now)
    assert not run.members.blame_other(2, run.now)
    run.members[2].failing = True
    assert run.members.blame_other(2, run.now)
    assert "ended its program at update 1, while process 2 waits" in run.members.failure.text


def test_the_exception_of_a_collective_operation_is_explained_by_a_process_that_hangs():
    run = Run()
    run.members[2].failing = True  # so none but process 0 waits
    run.at(0, "update 2")
    assert run.after(0.95 * TIMEOUT) is None
    run.done(0, "RuntimeError: timed out")  # the operation has the same limit
    run.members.update(run.reports[0], run.now)
    run.members[0].failing = True
    assert run.members.blame_other(0, run.now)
    assert "process 1 (host host1, pid 101) hangs at update 1" in run.members.failure.text
    assert "process 0 waits for it at update 2" in run.members.failure.text


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
    newer = replace(run.reports[1].at("update 2"), left=True)
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
