"""The processes meet before their framework connects them.

A framework waits for a missing process for half an hour or more, and does not say which one it is.
TensorFlow does so inside one call that holds Python's lock, and ignores SIGTERM and Ctrl-C. So
every process first reports to process 0, which answers with the addresses of all when they are
there, and says every few seconds who is missing. Nothing else goes this way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time
from typing import IO, Any

from kbtrain.errors import DistributedError
from kbtrain.utils.machine.ports import free_ports
from kbtrain.utils.machine.processes import ProcessGroup

logger = logging.getLogger("kbtrain")

UNREACHABLE_SECONDS = 10.0
"""How long to try a host that has no address or no route. One that refuses may just be starting."""

REMINDER_SECONDS = 8.0
"""Time between two messages that a process is still waiting for others."""

SILENCE_SECONDS = 60.0
"""How long process 0 may say nothing to a process that waits."""

_RETRY = 0.1
_WAITING = "Process %d is waiting for process %s to join."


def meet(group: ProcessGroup, timeout: float) -> tuple[str, ...]:
    """Wait until all processes are there and the port of this one is free.

    Args:
        group: The processes. Those without ``addresses`` choose free ports.
        timeout: Seconds to wait.

    Returns:
        ``host:port`` of each process, in order of rank.

    Raises:
        DistributedError: The port is taken, or a process does not come.
    """
    host, port = group.address, group.port
    own = ("" if group.rank else host, 0)
    if group.addresses:
        host, port = _parse(group.addresses[0])
        own = _parse(group.addresses[group.rank])
    deadline = time.monotonic() + timeout
    if group.rank:
        return _report(group, (host, port), _free_port(group, *own), deadline, timeout)
    return _receive_all(group, (host, port), own, deadline, timeout)


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _text(host: str, port: int) -> str:
    host = host.removeprefix("::ffff:")  # an IPv4 address, as a socket for both kinds sees it
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(group: ProcessGroup, host: str, port: int) -> socket.socket:
    """A socket that listens, on this machine only if the processes are all there."""
    local = host == "localhost" or host.startswith("127.")
    dual = not local and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(
            (host if local else "", port), family=family, dualstack_ipv6=dual
        )
    except OSError as error:
        reason = "another program has it" if error.errno == errno.EADDRINUSE else error.strerror
        raise DistributedError(
            f"Process {group.rank} of {group.size} cannot listen at port {port} of "
            f"{host or socket.gethostname()}: {reason}. It may be a run that has not ended. Give "
            f"{group.launcher} another port."
        ) from None


def check_port(group: ProcessGroup) -> None:
    """Check that process 0 can listen at the port of the group: a framework may share a taken one.

    Raises:
        DistributedError: It cannot.
    """
    _free_port(group, group.address, group.port)


def _free_port(group: ProcessGroup, host: str, port: int) -> int:
    """``port`` if it is free; any free port for 0."""
    with _listen(group, host, port or free_ports()) as server:
        return int(server.getsockname()[1])


# --- process 0 ------------------------------------------------------------------------------------


def _receive_all(
    group: ProcessGroup,
    place: tuple[str, int],
    own: tuple[str, int],
    deadline: float,
    timeout: float,
) -> tuple[str, ...]:
    """Wait for the reports of the others, and answer them."""
    present: dict[int, tuple[socket.socket, str]] = {}
    try:
        with _listen(group, *place) as server:
            remind = time.monotonic() + REMINDER_SECONDS
            while len(present) < group.size - 1:
                now = time.monotonic()
                if now >= deadline:
                    raise DistributedError(
                        f"Process 0 waited {timeout:g} s at {_text(*place)} in vain for process "
                        f"{_missing(group, present)} of {group.size} ({group.launcher}). Check "
                        "that every process was started and has not ended, and that no firewall "
                        "is between the hosts."
                    )
                if now >= remind:
                    remind = now + REMINDER_SECONDS
                    _remind(group, present)
                server.settimeout(max(min(deadline, remind) - now, 1e-3))
                try:
                    connection = server.accept()[0]
                except TimeoutError:
                    continue
                report = _read(connection, min(deadline, time.monotonic() + UNREACHABLE_SECONDS))
                if not isinstance(report, dict) or report.get("size") != group.size:
                    connection.close()  # not one of these processes
                    continue
                address = _text(connection.getpeername()[0], report["port"])
                if report["rank"] in present:  # it was started again
                    present.pop(report["rank"])[0].close()
                present[report["rank"]] = connection, address
                for rank in [r for r, (peer, _) in present.items() if _is_closed(peer)]:
                    present.pop(rank)[0].close()
        first = _text(own[0], own[1] or _free_port(group, *own))
        found = (first, *(present[rank][1] for rank in range(1, group.size)))
        addresses = group.addresses or found
        for connection, _ in present.values():
            connection.sendall(json.dumps(addresses).encode() + b"\n")
        for connection, _ in present.values():
            # The other side closes first, so that the port can be used again at once.
            connection.settimeout(1.0)
            with contextlib.suppress(OSError):
                connection.recv(1)
        return tuple(addresses)
    finally:
        for connection, _ in present.values():
            connection.close()


def _remind(group: ProcessGroup, present: dict[int, tuple[socket.socket, str]]) -> None:
    """Say on all processes that are there which ones are not."""
    missing = _missing(group, present)
    logger.warning(_WAITING, 0, missing)
    for connection, _ in present.values():
        with contextlib.suppress(OSError):  # it has ended, which the next report shows
            connection.sendall(json.dumps({"missing": missing}).encode() + b"\n")


def _missing(group: ProcessGroup, present: dict[int, Any]) -> str:
    missing = [rank for rank in range(1, group.size) if rank not in present]
    if not group.addresses:
        return ", ".join(map(str, missing))
    return ", ".join(f"{rank} ({group.addresses[rank]})" for rank in missing)


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)


# --- the others -----------------------------------------------------------------------------------


def _report(
    group: ProcessGroup, first: tuple[str, int], port: int, deadline: float, timeout: float
) -> tuple[str, ...]:
    """Report to process 0, and wait for its answer."""
    connection = _connect(group, first, deadline)
    with connection:
        report = {"rank": group.rank, "size": group.size, "port": port}
        connection.sendall(json.dumps(report).encode() + b"\n")
        # Process 0 gives up at its own deadline, which may be later.
        with connection.makefile("rb") as lines:
            while True:
                left = deadline + timeout - time.monotonic()
                connection.settimeout(max(min(left, SILENCE_SECONDS), 1e-3))
                answer = _line(lines)
                if not isinstance(answer, dict) or "missing" not in answer:
                    break
                logger.warning(_WAITING, group.rank, answer["missing"])
    if isinstance(answer, list):
        return tuple(answer)
    raise DistributedError(
        f"Process 0 at {_text(*first)} did not let process {group.rank} of {group.size} join "
        f"({group.launcher}): it ended, it expects another number of processes, or another program "
        "listens there. See the output of process 0."
    )


def _connect(group: ProcessGroup, first: tuple[str, int], deadline: float) -> socket.socket:
    start = reminded = time.monotonic()
    while True:
        try:
            return socket.create_connection(first, timeout=2)
        except OSError as error:
            refused, reason = isinstance(error, ConnectionRefusedError), error.strerror or error
        now = time.monotonic()
        if now > (deadline if refused else min(deadline, start + UNREACHABLE_SECONDS)):
            raise DistributedError(
                f"Process {group.rank} of {group.size} cannot reach process 0 at {_text(*first)} "
                f"after {now - start:.0f} s ({group.launcher}): {reason}. Check that process 0 was "
                "started with this address and port, and that no firewall is between the hosts."
            )
        if now - reminded > REMINDER_SECONDS:
            reminded = now
            logger.warning(
                "Process %d is waiting for process 0 at %s: %s.",
                group.rank, _text(*first), reason,
            )  # fmt: skip
        time.sleep(_RETRY)


def _read(connection: socket.socket, deadline: float) -> Any:
    """The JSON value in the first line; None if there is none."""
    connection.settimeout(max(deadline - time.monotonic(), 1e-3))
    with connection.makefile("rb") as lines:
        return _line(lines)


def _line(lines: IO[bytes]) -> Any:
    try:
        return json.loads(lines.readline(1 << 20))
    except (OSError, ValueError):
        return None
