"""One of several processes fails: all end, and name it, its place and the cause."""

import re
import signal
import time

import pytest
from helpers_together import SUPPORT, run_processes

pytestmark = pytest.mark.slow

# Of what is compared or told through the control connection, between two updates, whatever the
# backend is. What a backend has a part in is tested on each.
neutral = pytest.mark.neutral


def ended(folder, what, rank=1):
    script = SUPPORT / "distributed_failures.py"
    return run_processes(2, script, str(folder / "run"), what, str(rank), check=False, timeout=180)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raises", r"process 1 \(host .*\) failed at update \d+: ValueError: no more"),
        ("is killed", r"process 1 \(host .*\) failed: it was killed, or crashed"),
    ],
)
def test_the_other_process_names_the_one_that_failed(tmp_path, what, words):
    other, failed = ended(tmp_path, what)
    assert other.status == 1
    assert failed.status == (-signal.SIGKILL if what == "is killed" else 1)
    assert re.search(words, other.output), other.output
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@neutral
def test_the_first_process_leaves_in_the_middle(tmp_path):
    left, other = ended(tmp_path, "leaves", rank=0)
    now = time.monotonic()
    assert other.status == 1
    words = r"process 0 \(.*\) ended its program at update \d+ after SystemExit: 0, while process 1"
    assert re.search(words, other.output), other.output
    assert now - float(re.search(r"^left at (.*)$", left.output, re.MULTILINE)[1]) < 60


@neutral
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("has other arguments", r"learning_rate=0\.2, process 0 .* has 0\.1"),
        ("has other data", r"number of samples=79, process 0 .* has 80"),
    ],
)
def test_processes_that_differ_end_before_the_first_update(tmp_path, what, words):
    for one in ended(tmp_path, what):
        assert one.status == 1
        assert re.search(words, one.output), one.output
        assert "update 0" in one.output


def test_collectives_that_differ_are_named_before_anything_is_computed_with_them(tmp_path):
    for one in ended(tmp_path, "meets others elsewhere"):
        assert one.status == 1
        assert re.search(
            r"process 1 .* has (collective operation|program) \d+.*process 0 .* has", one.output
        ), one.output
        assert "update 0" in one.output


@neutral
def test_weights_that_a_callback_changes_in_one_process_are_noticed(tmp_path):
    for one in ended(tmp_path, "changes its weights before an evaluation"):
        assert one.status == 1
        assert "The weights of the processes differ after update 8" in one.output, one.output
        assert "bias of process 1" in one.output


@neutral
def test_a_stream_that_ends_earlier_in_one_process_is_named_by_all(tmp_path):
    for one in ended(tmp_path, "has a shorter stream"):
        assert one.status == 1
        assert "train_dataset is not the same on all processes" in one.output, one.output


@neutral
def test_a_signal_to_one_stops_all_at_the_same_update_with_one_checkpoint(tmp_path):
    both = ended(tmp_path, "is asked to stop")
    assert [one.status for one in both] == [128 + signal.SIGTERM] * 2, both[0].output
    updates = [re.findall(r"^update (\d+) ", one.output, re.MULTILINE)[-1] for one in both]
    assert updates[0] == updates[1]
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{updates[0]}"]


def test_a_signal_to_one_ends_an_evaluation_of_all_which_the_resumed_run_makes_up_for(tmp_path):
    both = ended(tmp_path, "is asked to stop in an evaluation")
    assert [one.status for one in both] == [128 + signal.SIGTERM] * 2, both[0].output
    batches = [re.search(r"^update 4 batches (\d+)$", one.output, re.MULTILINE) for one in both]
    assert all(batches), both[0].output
    assert batches[0][1] == batches[1][1]
    assert 3 <= int(batches[0][1]) < 400  # of 400
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    for one in ended(tmp_path, "makes up for the evaluation"):
        assert one.status == 0, one.output
        assert "update 8 batches 800" in one.output
        assert "evaluated at [4, 8]" in one.output
