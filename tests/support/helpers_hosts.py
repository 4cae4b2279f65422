"""Two hosts on one machine: network namespaces with a cable between them."""

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

ETC = Path("/etc/netns")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@contextlib.contextmanager
def two_hosts():
    """The names of two network namespaces, at ``ADDRESSES``, and of their ends of the cable."""
    names = [f"kbtrain{os.getpid()}{letter}" for letter in "ab"]
    if shutil.which("ip") is None or ip(f"netns add {names[0]}", check=False).returncode:
        pytest.skip("no network namespaces here")
    try:
        ip(f"netns add {names[1]}")
        ends = " peer ".join(f"name {name} netns {name}" for name in names)
        ip(f"link add {ends.replace(' peer', ' type veth peer')}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip(f"-n {name} addr add {address}/24 dev {name}")
            ip(f"-n {name} link set {name} up")
            ip(f"-n {name} link set lo up")
            # `ip netns exec` shows it as /etc/hosts: this machine's name is that of each host.
            (ETC / name).mkdir(parents=True)
            lines = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (ETC / name / "hosts").write_text(lines)
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}", check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)


def ip(command, check=True):
    """Run a command of iproute2."""
    return subprocess.run(["ip", *command.split()], check=check, capture_output=True, timeout=60)
