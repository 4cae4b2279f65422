"""Free ports."""

import socket

import pytest

from kbtrain.errors import DistributedError
from kbtrain.utils.machine import ports
from kbtrain.utils.machine.ports import free_ports

pytestmark = pytest.mark.neutral


def test_ports_that_are_in_use_are_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "PORTS", range(port - 1, port + 1))
        with pytest.raises(DistributedError, match="no 2 consecutive free ports"):
            free_ports(2)


def test_no_outgoing_connection_can_take_them():
    with socket.create_server(("127.0.0.1", 0)) as server:
        clients = [socket.create_connection(server.getsockname()) for _ in range(20)]
        for client in clients:
            assert client.getsockname()[1] not in ports.PORTS
            client.close()
    assert free_ports(3) in ports.PORTS
