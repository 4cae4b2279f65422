"""Files that process 0 writes and the others wait for."""

import collections
import logging
import threading

import pytest

from kbtrain.distributed.control.mailbox import FirstProcess, Mailbox
from kbtrain.errors import OutputError
from kbtrain.trainer import first_process
from kbtrain.trainer.first_process import written_by_first

pytestmark = pytest.mark.neutral


class Other:
    """Process 1, in the same program."""

    rank, size = 1, 2

    def __init__(self, mailbox):
        self._mailbox = mailbox

    def announce(self, key, data=b""):
        while (found := self._mailbox.take(key)) is None:
            pass
        return found


@pytest.fixture
def as_process(monkeypatch):
    """Run what follows as one of two processes."""
    mailbox = Mailbox(2, lambda ranks: None)
    peers = [FirstProcess(2, mailbox), Other(mailbox)]
    calls = [collections.Counter(), collections.Counter()]

    def become(rank):
        monkeypatch.setattr(first_process.distributed, "get_peers", lambda: peers[rank])
        monkeypatch.setattr(first_process, "_calls", calls[rank])

    return become


def write(path, error=None):
    with written_by_first(path):
        if error:
            raise error


def test_a_program_that_is_alone_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(first_process.distributed, "get_peers", lambda: None)
    write("model.keras")


def test_the_others_return_when_process_0_has_written(as_process, monkeypatch, caplog):
    monkeypatch.setattr(first_process, "NOTICE", 0.05)
    as_process(1)
    done = threading.Event()
    with caplog.at_level(logging.WARNING, "kbtrain"):
        waiting = threading.Thread(target=lambda: (write("model.keras"), done.set()))
        waiting.start()
        assert not done.wait(0.3)
        as_process(0)
        write("other.keras")  # on process 0 alone
        assert not done.wait(0.1)
        write("model.keras")
        assert done.wait(10)
    waiting.join()
    (record,) = caplog.records
    assert "Waiting for process 0 to write model.keras" in record.getMessage()
    write("model.keras")
    as_process(1)
    write("model.keras")


def test_a_call_of_process_0_alone_is_not_taken_for_a_later_one_of_all(as_process, monkeypatch):
    as_process(0)
    write("model.keras")  # in a callback, on process 0 alone
    monkeypatch.setattr(first_process.distributed, "progress", lambda: (1, 7))
    as_process(1)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (write("model.keras"), done.set()))
    waiting.start()
    assert not done.wait(0.1)
    as_process(0)
    write("model.keras")
    assert done.wait(10)
    waiting.join()


def test_all_fail_where_process_0_could_not_write(as_process):
    as_process(0)
    with pytest.raises(OSError, match="No space left"):
        write("model.keras", OSError(28, "No space left on device"))
    as_process(1)
    with pytest.raises(OutputError, match="Process 0 could not write model.keras.*No space left"):
        write("model.keras")
