"""kill -9 of either of two processes, at each of their calls to the disk while they save."""

import json
import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT, SUPPORT

pytestmark = pytest.mark.neutral

SAVED, ALONE, KILLED = 0, 3, -signal.SIGKILL
OLD, NEW = [5, [5]], [10, [10]]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """What ``helpers_kill_together.py`` saw."""
    command = [sys.executable, SUPPORT / "helpers_kill_together.py", tmp_path_factory.mktemp("run")]
    paths = [str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_checkpoint_is_complete_or_absent_whoever_dies_when(attempts):
    for attempt in attempts[1:-1]:
        found, problems, _, left = attempt["look"]
        assert problems == [], attempt
        assert left == [], attempt
        assert found in ([OLD], [OLD, NEW]), attempt
        assert attempt["step"] == 10 or found == [OLD], attempt
    dead = {(attempt["step"], attempt["rank"]) for attempt in attempts[1:-1]}
    assert dead == {(5, 0), (10, 0), (10, 1)}
    torn = [attempt for attempt in attempts[1:-1] if attempt["look"][2]]
    assert len(torn) > len(attempts) // 2, "the deaths do not meet the writes"


def test_the_survivor_learns_of_it(attempts):
    for attempt in attempts[1:-1]:
        expected = [ALONE, ALONE]
        expected[attempt["rank"]] = KILLED
        assert attempt["codes"] == expected, attempt


def test_the_new_checkpoint_is_there_once_it_has_its_name_and_not_before(attempts):
    complete = [a for a in attempts[1:-1] if a["step"] == 10 and NEW in a["look"][0]]
    assert [attempt["rank"] for attempt in complete] == [0]
    last = max(a["call"] for a in attempts[1:-1] if (a["step"], a["rank"]) == (10, 0))
    assert complete[0]["call"] == last, "only its folder's parent was left to be flushed"


def test_the_next_save_succeeds(attempts):
    assert attempts[-1]["codes"] == [SAVED, SAVED]
    assert attempts[-1]["look"] == [[OLD, NEW], [], 0, []]
