"""``kbtrain launch``: start a training script as several processes that train together."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kbtrain.cli.parser import command_parser
from kbtrain.distributed.environment import endpoint
from kbtrain.distributed.launch.local_processes import STOPPING_SECONDS, run_together
from kbtrain.distributed.launch.rendezvous import Node, Rendezvous
from kbtrain.errors import ConfigurationError
from kbtrain.utils.machine.ports import free_ports

_LOCALHOST = "127.0.0.1"

_EPILOG = """\
examples:
  kbtrain launch -n 2 train.py --learning-rate 3e-4
  kbtrain launch -n 8 --nodes 2 --node-rank 0 --address node1:29400 train.py     # on node1
  kbtrain launch -n 8 --nodes 2 --node-rank 1 --address node1:29400 train.py     # on node2

The first process has this terminal; lines that the others print begin with their [rank]. SIGTERM,
SIGINT, SIGUSR1, SIGUSR2 and SIGHUP go to all processes. When one fails the others are ended, and
its exit status is that of the command.
"""


def run(words: Sequence[str]) -> int:
    """Start the processes, again after a failure if asked to, and wait for them.

    Returns:
        0, or the exit status of the first process that failed (128 + signal number if a signal
        killed it).
    """
    options = _parser().parse_args(words)
    command = _command(options)
    host, port = _check_nodes(options)
    rendezvous = (
        Rendezvous(host, port, options.node_rank, options.nodes) if options.nodes > 1 else None
    )
    try:
        for attempt in range(options.max_restarts + 1):
            if rendezvous is None:
                nodes, base = [Node(_LOCALHOST, options.n)], free_ports(1 + options.n)
            else:
                nodes = rendezvous.meet(attempt, options.n, options.max_restarts)
                base = port + 1
            outcome = run_together(
                command,
                environments(os.environ, nodes, options.node_rank, base),
                grace=options.grace_period,
            )
            if not outcome.may_restart or attempt == options.max_restarts:
                break
            print(
                f"kbtrain launch: starting all processes again ({attempt + 1} of "
                f"{options.max_restarts}).",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:  # while waiting for other machines
        return 128 + signal.SIGINT
    finally:
        if rendezvous is not None:
            rendezvous.close()
    return outcome.status


def environments(
    environ: Mapping[str, str], nodes: Sequence[Node], node_rank: int, port: int
) -> list[dict[str, str]]:
    """The environment variables of each process of this machine.

    Args:
        environ: Those of the launcher.
        nodes: All machines.
        node_rank: Index of this one.
        port: A port for process 0; those above it are for ``KBTRAIN_ADDRESSES``.
    """
    places = [(node, local) for node, each in enumerate(nodes) for local in range(each.processes)]
    first = port + 1
    addresses = [endpoint(nodes[node].host, first + r) for r, (node, _) in enumerate(places)]
    local_size = nodes[node_rank].processes
    inherited = {
        name: value
        for name, value in environ.items()
        # What other launchers have set for the process that this command runs in.
        if name not in ("TF_CONFIG", "KBTRAIN_JOINED_PID") and not name.startswith("TORCHELASTIC_")
    }
    shared = inherited | {
        "WORLD_SIZE": str(len(places)),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": nodes[0].host,
        "MASTER_PORT": str(port),
        "KBTRAIN_ADDRESSES": ",".join(addresses),
        "KBTRAIN_LAUNCHER_PID": str(os.getpid()),
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // local_size)))
    found = []
    for rank, (node, local_rank) in enumerate(places):
        if node == node_rank:
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            if local_rank:
                own.setdefault("PYTHONUNBUFFERED", "1")  # its output goes through a pipe
            found.append(own)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "launch",
        "Start a script as several processes that train together.",
        usage="%(prog)s -n N [options] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        *("-n", "--nproc-per-node"),
        dest="n",
        metavar="N",
        type=int,
        required=True,
        help="number of processes on this machine; with GPUs, one each",
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of machines (default: 1)")
    parser.add_argument(
        "--node-rank", type=int, metavar="R", help="index of this machine; 0 for that of --address"
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="machine 0 and a free port there; as many ports above it as there are processes, and "
        "one more, are used as well",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="K",
        help="start all processes again after a failure, at most K times (default: 0); "
        'fit(resume_from_checkpoint="auto") then continues from the newest checkpoint',
    )
    parser.add_argument(
        "--grace-period",
        type=float,
        default=STOPPING_SECONDS,
        metavar="SECONDS",
        help="how long the processes may take to save and end after SIGTERM, before they are "
        f"killed (default: {STOPPING_SECONDS:g})",
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module in place of a script"
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _command(options: argparse.Namespace) -> list[str]:
    """The program of each process."""
    if not hasattr(signal, "pthread_sigmask"):
        raise ConfigurationError("Processes are started together on Linux and macOS only.")
    for name, low in (("n", 1), ("nodes", 1), ("max_restarts", 0)):
        if getattr(options, name) < low:
            shown = "-n" if name == "n" else "--" + name.replace("_", "-")
            raise ConfigurationError(
                f"{shown} must be at least {low}. Received: {getattr(options, name)}"
            )
    if not options.grace_period >= 0:
        raise ConfigurationError(
            f"--grace-period must not be negative. Received: {options.grace_period:g}"
        )
    if options.module:
        return [sys.executable, "-m", *options.module]
    if not options.script:
        raise ConfigurationError("Name the script to run: `kbtrain launch -n 2 train.py`.")
    if not Path(options.script[0]).is_file():
        raise ConfigurationError(
            f"There is no script {options.script[0]!r}. Options of the launcher come before the "
            "script, those of the script after it."
        )
    return [sys.executable, *options.script]


def _check_nodes(options: argparse.Namespace) -> tuple[str, int]:
    """The address of machine 0."""
    if options.nodes == 1:
        if options.address or options.node_rank:
            raise ConfigurationError(
                "--address and --node-rank are for several machines: give --nodes, too."
            )
        options.node_rank = 0
        return _LOCALHOST, 0
    if options.node_rank is None or not 0 <= options.node_rank < options.nodes:
        raise ConfigurationError(
            f"--node-rank must be from 0 to {options.nodes - 1} with --nodes {options.nodes}, "
            f"another one on each machine. Received: {options.node_rank}"
        )
    host, _, port = (options.address or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65000:
        raise ConfigurationError(
            "With --nodes, --address must be the host name or IP address of machine 0 and a free "
            f"port there, such as node1:29400. Received: {options.address}"
        )
    return host.strip("[]"), int(port)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
