"""One of several processes fails: all end, and name it, its place and the cause."""

import re
import signal

import pytest
from helpers_together import SUPPORT, run_processes

pytestmark = pytest.mark.slow


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


def test_a_stream_that_ends_earlier_in_one_process_is_named_by_all(tmp_path):
    for one in ended(tmp_path, "has a shorter stream"):
        assert one.status == 1
        assert "train_dataset is not the same on all processes" in one.output, one.output


def test_a_signal_to_one_stops_all_at_the_same_update_with_one_checkpoint(tmp_path):
    both = ended(tmp_path, "is asked to stop")
    assert [one.status for one in both] == [128 + signal.SIGTERM] * 2, both[0].output
    updates = [re.findall(r"^update (\d+)$", one.output, re.MULTILINE)[-1] for one in both]
    assert updates[0] == updates[1]
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{updates[0]}"]
