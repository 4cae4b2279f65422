"""Processes that meet before a framework connects them, as threads: no framework is needed."""

import concurrent.futures
import json
import re
import socket
import threading
import time

import pytest

from kbtrain.backends import rendezvous
from kbtrain.backends.rendezvous import meet
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.ports import free_ports
from kbtrain.utils.machine.processes import ProcessGroup

pytestmark = pytest.mark.core


def groups(size, known=True):
    """The groups of ``size`` processes, with the addresses of all or of the first alone."""
    first = free_ports(size)
    ports = range(first, first + size)
    addresses = tuple(f"127.0.0.1:{port}" for port in ports) if known else ()
    return [
        ProcessGroup(rank, size, rank, size, "127.0.0.1", ports[0], addresses, "kbtrain launch")
        for rank in range(size)
    ]


def together(members, timeout=20.0):
    """What ``meet`` gives each of them, or the error that it raises."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = [pool.submit(meet, group, timeout) for group in members]
        return [result.exception() or result.result() for result in results]


@pytest.mark.parametrize("size", [2, 3])
def test_all_get_the_addresses_that_the_launcher_gave(size):
    members = groups(size)
    assert together(members) == [members[0].addresses] * size


def test_without_addresses_each_process_chooses_a_free_ports():
    found = together(groups(3, known=False))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 3
    for address in found[0]:
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        socket.create_server((host, int(port))).close()  # it is free


def test_the_ports_are_free_afterwards():
    for address in together(groups(2))[0]:
        host, _, port = address.rpartition(":")
        socket.create_server((host, int(port))).close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_is_taken_is_named(rank):
    members = groups(2)
    host, _, port = members[rank].addresses[rank].rpartition(":")
    with (
        socket.create_server((host, int(port))),
        pytest.raises(DistributedError, match=rf"Process {rank} of 2 .*port {port}.*another prog"),
    ):
        meet(members[rank], 20.0)


def test_missing_processes_are_named():
    members = groups(3)
    found = together(members[:2], timeout=1.0)
    missing = re.escape(f"in vain for process 2 ({members[0].addresses[2]}) of 3")
    assert re.search(missing, str(found[0]))
    assert "did not let process 1 of 3 join" in str(found[1])
    assert all(isinstance(error, DistributedError) for error in found)


def test_process_0_is_waited_for():
    members = groups(2)
    found = []
    late = threading.Timer(0.3, lambda: found.append(meet(members[0], 20.0)))
    late.start()
    assert meet(members[1], 20.0) == members[0].addresses
    late.join()
    assert found == [members[0].addresses]


def test_a_process_0_that_never_comes_is_named():
    members = groups(2)
    address = re.escape(members[0].addresses[0])
    with pytest.raises(DistributedError, match=rf"Process 1 of 2 cannot reach .* at {address}"):
        meet(members[1], 0.3)


def test_a_host_without_an_address_is_named_at_once(monkeypatch):
    monkeypatch.setattr(rendezvous, "UNREACHABLE_SECONDS", 0.2)
    group = ProcessGroup(1, 2, address="no-such-host.invalid", port=free_ports())
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"cannot reach process 0 at no-such-host\.invalid"):
        meet(group, 300.0)
    assert time.monotonic() - started < 60


def test_strangers_and_processes_that_died_do_not_count():
    """Another program's connection, another run's process, and one that is started again."""
    members = groups(3)
    host, _, port = members[0].addresses[0].rpartition(":")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, members[0], 20.0)
        for line in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            json.dumps({"rank": 1, "size": 2, "port": 1}).encode() + b"\n",
            json.dumps({"rank": 1, "size": 3, "port": 1}).encode() + b"\n",
        ):
            while True:
                try:
                    stranger = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
            with stranger:
                stranger.sendall(line)
        others = [pool.submit(meet, group, 20.0) for group in members[1:]]
        results = [result.result() for result in (first, *others)]
    assert results == [members[0].addresses] * 3


def test_waiting_is_said(caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.1)
    members = groups(2)
    with caplog.at_level("WARNING", "kbtrain"), pytest.raises(DistributedError):
        meet(members[0], 0.5)
    assert "Process 0 is waiting for process 1" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "kbtrain"), pytest.raises(DistributedError):
        meet(members[1], 0.5)
    assert "Process 1 is waiting for process 0 at 127.0.0.1" in caplog.text


def test_a_process_that_is_there_learns_who_is_missing(caplog, monkeypatch):
    monkeypatch.setattr(rendezvous, "REMINDER_SECONDS", 0.1)
    members = groups(3)
    with caplog.at_level("WARNING", "kbtrain"):
        assert all(isinstance(each, DistributedError) for each in together(members[:2], 1.0))
    address = members[0].addresses[2]
    for rank in (0, 1):
        assert f"Process {rank} is waiting for process 2 ({address}) to join." in caplog.text
