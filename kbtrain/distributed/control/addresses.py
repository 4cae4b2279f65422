"""Sockets that listen, and the addresses at which other machines find them."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

BACKLOG = 1024
"""Connections that may wait while this process does something else."""


def listen(address: str, local: bool) -> tuple[socket.socket, list[str]]:
    """A listening socket at a free port, and the addresses at which others may reach it.

    Args:
        address: What the launcher gives for this host.
        local: Whether the loopback will do.
    """
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG), ["127.0.0.1"]
    try:
        # Not a name: it may stand for another address here than elsewhere, such as a loopback.
        numeric = ipaddress.ip_address(address)
        if not numeric.is_loopback:
            return _server(str(numeric), numeric.version), [_in_url(address)]
    except (ValueError, OSError):
        pass  # a name, or the address of a gateway
    found = dict.fromkeys([address, *_own_addresses()])
    return listen_at(""), [_in_url(each) for each in list(found)[:3]]


def listen_at(address: str) -> socket.socket:
    """A listening socket at a free port of one address of this machine.

    Args:
        address: A number. All addresses if it is empty, or not one of this machine any more.
    """
    if address:
        with contextlib.suppress(OSError):
            return _server(address, 6 if ":" in address else 4)
    return _server("", 6 if socket.has_dualstack_ipv6() else 4)


def _server(address: str, version: int) -> socket.socket:
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    return socket.create_server(
        (address, 0), family=family, backlog=BACKLOG, dualstack_ipv6=version == 6 and not address
    )


def _own_addresses() -> list[str]:
    """Addresses of this host, the one towards other networks first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        for *_, place in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET):
            found.append(str(place[0]))
    return [address for address in found if not ipaddress.ip_address(address).is_loopback]


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
