"""A small process beside one of a run, which tells other machines the state of that one.

A process that is suspended is silent, and so is one whose native code holds Python's interpreter
lock. On its own machine /proc tells which it is; another machine has to ask somebody there. This
file is run as a program, without the packages of the run, so that it takes little memory. Nothing
has to end it: it ends with the process that started it, at whose end ``watch`` wakes up.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""What schedulers send to every process of a job: the process that is watched ends by itself."""
POLL = 1.0
"""Seconds between two looks whether the process lives, where the system does not tell."""
QUESTION = 0.5
"""Seconds for a question, which is shorter than a packet."""


def process_state(pid: int) -> str:
    """The state letter of a process on this machine as Linux gives it; "" if it does not exist.

    Returns:
        "T" (suspended), "Z" (ended), "R", "S" and so on; "?" where the system cannot tell.
    """
    if not os.path.exists("/proc/self/stat"):
        return "?"
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return "?"


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from the field after its name on."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _started(pid: int) -> str:
    """When a process was started; "" if there is none."""
    with contextlib.suppress(OSError):
        return _stat(pid)[19]
    return ""


def watch(pid: int, listening: socket.socket, token: bytes) -> None:
    """Answer questions for the state of a process until it has ended.

    Args:
        pid: The process.
        listening: Where others ask. A question is the token, an answer a letter.
        token: Keeps strangers out.
    """
    started = _started(pid)
    wakes: list[int | socket.socket] = [listening, 0]
    with contextlib.suppress(AttributeError, OSError):  # an older Python or Linux
        wakes.append(os.pidfd_open(pid))
    while started and _started(pid) == started:  # a process id may be given to another process
        ready, _, _ = select.select(wakes, [], [], POLL)
        if set(ready) - {listening}:
            return  # it has closed the pipe, or ended
        if ready:
            with contextlib.suppress(OSError):
                _answer(listening.accept()[0], token, pid)


def _answer(connection: socket.socket, token: bytes, pid: int) -> None:
    with connection:
        connection.settimeout(QUESTION)
        if connection.recv(len(token)) == token:  # in one packet; a stranger's bytes are not
            connection.sendall(process_state(pid).encode())


def main() -> None:
    """Watch the process that started this one, without staying a child that it has to wait for."""
    parent, token = os.getppid(), os.read(0, 1024)
    # As a low number: select takes none from 1024 on.
    listening = socket.socket(fileno=os.dup(int(sys.argv[1])))
    if not token or os.fork():
        os._exit(0)
    os.setsid()  # signals to the group and the terminal of the process are not for this one
    os.chdir("/")
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(parent, listening, token)


if __name__ == "__main__":
    main()
