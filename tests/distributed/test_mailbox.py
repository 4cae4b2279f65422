"""Messages between processes over the control channel, with threads in place of processes."""

import concurrent.futures
import threading

import pytest

from kbtrain.distributed.control.channel import Channel
from kbtrain.distributed.control.mailbox import Mailbox
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import ProcessGroup

pytestmark = [pytest.mark.core, pytest.mark.neutral]

SIZE = 3


@pytest.fixture
def channels():
    sent = [b""] * SIZE
    barrier = threading.Barrier(SIZE, timeout=10)

    def start(rank):
        def exchange(data):
            sent[rank] = data
            barrier.wait()
            found = list(sent)
            barrier.wait()
            return found

        return Channel.start(ProcessGroup(rank, SIZE), exchange, timeout=1800.0)

    with concurrent.futures.ThreadPoolExecutor(SIZE) as pool:
        channels = list(pool.map(start, range(SIZE)))
        yield channels
        list(pool.map(Channel.close, reversed(channels)))


def together(channels, function):
    """The result of ``function``, called in a thread for each process with its peers."""
    with concurrent.futures.ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(function, [channel.peers() for channel in channels]))


def test_process_0_gathers_and_announces(channels):
    large = bytes(range(256)) * 8192

    def work(peers):
        gathered = [peers.gather(f"blocks {n}", b"%d %d" % (n, peers.rank)) for n in range(3)]
        answer = peers.announce("written", large if peers.rank == 0 else b"")
        return peers.rank, peers.size, gathered, answer == large

    expected = [[b"%d %d" % (n, rank) for rank in range(SIZE)] for n in range(3)]
    assert together(channels, work) == [
        (0, SIZE, expected, True),
        (1, SIZE, [[], [], []], True),
        (2, SIZE, [[], [], []], True),
    ]


def test_all_processes_exchange_messages(channels):
    def work(peers):
        return [peers.exchange(bytes(n * peers.rank)) for n in range(4)]

    expected = [[bytes(n * rank) for rank in range(SIZE)] for n in range(4)]
    assert together(channels, work) == [expected] * SIZE


def test_nothing_is_waited_for_from_a_program_that_has_ended(channels):
    channels[2].leave()

    def work(peers):
        if peers.rank == 0:
            with pytest.raises(DistributedError, match=r"process 2 \(.*\) has ended its program"):
                peers.gather("blocks", b"0")
        if peers.rank == 1:
            assert peers.gather("blocks", b"1") == []

    together(channels, work)


def test_messages_are_kept_until_all_have_them():
    mailbox = Mailbox(3, lambda ranks: None)
    mailbox.announce("a", b"1")
    assert mailbox.take("a") == b"1"
    mailbox.received(1, ["a", "never"])
    assert mailbox.take("a") == b"1"  # the answer to a process may be lost, so it asks again
    mailbox.received(1, ["a"])
    mailbox.received(2, ["a"])
    assert mailbox._announced == {}
    for rank in (0, 2, 2, 1):
        mailbox.put(rank, "b", b"%d" % rank)
    assert mailbox.gathered("b") == [b"0", b"1", b"2"]
    assert mailbox._sent == {}
