"""Which processes train together, read from the environment variables that launchers set.

Every launcher gives a process its rank, the number of processes and a way to find process 0, under
names of its own. The first of these that is present decides:

1. ``RANK`` and ``WORLD_SIZE``: ``kbtrain launch``, torchrun, Ray's TorchTrainer, or set by hand.
2. ``TF_CONFIG``: Ray's TensorflowTrainer, Kubeflow, TensorFlow's own convention.
3. ``OMPI_COMM_WORLD_RANK`` or ``PMI_RANK``: mpirun of Open MPI, MPICH, Intel MPI.
4. ``SLURM_STEP_NUM_TASKS``: a step that srun started. A batch script that runs ``python`` itself is
   one process, whatever ``--ntasks`` says.

``port`` is one at which the launcher says that process 0 may listen. Where it names none, or has
taken that itself, one is derived from what identifies the job, below the ports that Linux gives to
outgoing connections. On one machine the ports above it make up ``addresses``.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence

from kbtrain.distributed.slurm import hosts_of_tasks
from kbtrain.errors import ConfigurationError
from kbtrain.utils.machine.processes import ProcessGroup

_LOCALHOST = "127.0.0.1"

_JOB_NAMES = (
    *("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PMI_KVSNAME", "PALS_APID"),
    *("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"),
)
"""Variables with the same value in all processes of an MPI job, and another one in other jobs."""


def detect(environ: Mapping[str, str] = os.environ) -> ProcessGroup | None:
    """Read the place of this process among those that a launcher started.

    Args:
        environ: Environment variables.

    Returns:
        The group, or None if this process runs alone.

    Raises:
        ConfigurationError: A variable that the launcher should have set is missing, is not a
            number, or contradicts another one.

    Example:
        >>> group = detect({
        ...     "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        ...     "MASTER_ADDR": "node1", "MASTER_PORT": "29400",
        ... })
        >>> group.rank, group.size, group.local_rank, group.address, group.port
        (3, 4, 1, 'node1', 29400)
        >>> detect({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None  # no step: python, not srun
        True
    """
    for read in (_torchrun, _tf_config, _mpi, _slurm):
        group = read(environ)
        if group is not None:
            return group if group.size > 1 else None
    return None


def endpoint(host: str, port: int) -> str:
    """``host:port``, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def derived_port(*identity: str) -> int:
    """A port from 16384 to 32383 that all processes of a job derive alike, and other jobs not."""
    return 16384 + zlib.crc32("/".join(identity).encode()) % 16000


# --- one function per launcher: None if it started nothing, a group of size 1 if one process ------


def _torchrun(environ: Mapping[str, str]) -> ProcessGroup | None:
    """The variables of torchrun, which are also those of ``kbtrain launch``."""
    if "RANK" not in environ and environ.get("WORLD_SIZE", "1") == "1":
        return None
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ
    variables = _Variables(
        environ,
        "torchrun" if by_torchrun else "kbtrain launch",
        "RANK and WORLD_SIZE mean that several processes train together. Start them with "
        "`kbtrain launch` or torchrun, which set it, or unset both to run alone",
    )
    size = variables.number("WORLD_SIZE", 1)
    rank = variables.number("RANK", 0, size, "WORLD_SIZE")
    if size == 1:
        return ProcessGroup()
    local_size = variables.number("LOCAL_WORLD_SIZE", 1, size + 1, "WORLD_SIZE + 1")
    local_rank = variables.number("LOCAL_RANK", 0, local_size, "LOCAL_WORLD_SIZE")
    address = variables.text("MASTER_ADDR")
    port = variables.port()
    if by_torchrun:
        # torchrun's own store listens at MASTER_PORT. Its restart count cannot be part of this: it
        # is counted on each node by itself.
        port = derived_port(address, environ["MASTER_PORT"], environ["TORCHELASTIC_RUN_ID"])
        launcher = "torchrun"
    else:
        launcher = "kbtrain launch" if "KBTRAIN_LAUNCHER_PID" in environ else "RANK and WORLD_SIZE"
    addresses = _addresses(variables, port, size, local_size)
    return ProcessGroup(rank, size, local_rank, local_size, address, port, addresses, launcher)


def _tf_config(environ: Mapping[str, str]) -> ProcessGroup | None:
    """TensorFlow's description of a cluster of workers."""
    if not environ.get("TF_CONFIG"):
        return None
    text = environ["TF_CONFIG"]
    try:
        config = json.loads(text)
        cluster = config.get("cluster", {})
        chiefs, workers = list(cluster.get("chief", [])), list(cluster.get("worker", []))
        addresses = [str(address) for address in (*chiefs, *workers)]
        if len(addresses) < 2:
            return ProcessGroup()
        kind, index = config["task"]["type"], int(config["task"]["index"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            'TF_CONFIG must be JSON such as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}. Ray\'s TensorflowTrainer and Kubeflow '
            f"set it; unset it to run alone. Received: TF_CONFIG={text!r}"
        ) from error
    if kind not in ("chief", "worker") or cluster.get("ps"):
        raise ConfigurationError(
            "The processes that train together must be workers (and a chief) in TF_CONFIG: there "
            f"are no parameter servers or evaluators here. Received: TF_CONFIG={text!r}"
        )
    members = chiefs if kind == "chief" else workers
    if not 0 <= index < len(members):
        raise ConfigurationError(
            f"The index of the task in TF_CONFIG must be from 0 to {len(members) - 1}, as its "
            f"cluster has {len(members)} of type {kind}. Received: TF_CONFIG={text!r}"
        )
    rank = index + (len(chiefs) if kind == "worker" else 0)
    hosts = [_host_of(address, text) for address in addresses]
    return ProcessGroup(
        rank,
        len(addresses),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
        address=hosts[0],
        port=derived_port(*addresses),
        addresses=tuple(addresses),
        launcher="TF_CONFIG",
    )


def _mpi(environ: Mapping[str, str]) -> ProcessGroup | None:
    """Open MPI, and the process managers that set the variables of PMI (MPICH, Intel, Cray)."""
    if "OMPI_COMM_WORLD_SIZE" in environ or "OMPI_COMM_WORLD_RANK" in environ:
        launcher, (rank_name, size_name) = "Open MPI", _names("OMPI_COMM_WORLD_")
        local_names = _names("OMPI_COMM_WORLD_LOCAL_")
    elif "PMI_SIZE" in environ or "PMI_RANK" in environ:
        launcher, (rank_name, size_name) = "MPI", _names("PMI_")
        hydra = ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        local_names = hydra if hydra[0] in environ else _names("PMI_LOCAL_")
        if local_names[0] not in environ and "SLURM_STEP_NUM_TASKS" in environ:
            return None  # srun sets PMI's variables besides its own, which say more
    else:
        return None
    variables = _Variables(environ, launcher, "mpirun sets it")
    size = variables.number(size_name, 1)
    rank = variables.number(rank_name, 0, size, size_name)
    if size == 1:
        return ProcessGroup()
    local_size = variables.number(local_names[1], 1, size + 1, f"{size_name} + 1")
    local_rank = variables.number(local_names[0], 0, local_size, local_names[1])
    address = environ.get("MASTER_ADDR") or (
        _LOCALHOST if local_size == size else _host_of_mpirun(environ, launcher)
    )
    port = _port_of_job(variables, [environ[name] for name in _JOB_NAMES if environ.get(name)])
    addresses = _addresses(variables, port, size, local_size)
    return ProcessGroup(rank, size, local_rank, local_size, address, port, addresses, launcher)


def _slurm(environ: Mapping[str, str]) -> ProcessGroup | None:
    """The tasks of a step of SLURM."""
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    variables = _Variables(environ, "SLURM", "srun sets it for the tasks of a step")
    size = variables.number("SLURM_STEP_NUM_TASKS", 1)
    rank = variables.number("SLURM_PROCID", 0, size, "SLURM_STEP_NUM_TASKS")
    local_rank = variables.number("SLURM_LOCALID", 0, size, "SLURM_STEP_NUM_TASKS")
    node = variables.number("SLURM_NODEID", 0)
    distribution = environ.get("SLURM_DISTRIBUTION", "")
    hosts, places = hosts_of_tasks(
        variables.text("SLURM_STEP_NODELIST"),
        variables.text("SLURM_STEP_TASKS_PER_NODE"),
        distribution,
    )
    local_size = sum(host == node for host, _ in places)
    if len(places) != size or local_rank >= local_size:
        raise ConfigurationError(
            "SLURM's variables contradict each other: SLURM_STEP_TASKS_PER_NODE="
            f"{environ['SLURM_STEP_TASKS_PER_NODE']!r} does not agree with SLURM_STEP_NUM_TASKS="
            f"{size}, SLURM_NODEID={node} and SLURM_LOCALID={local_rank}. srun sets them all: "
            "do not change them in the script."
        )
    one_host = len(hosts) == 1
    address = environ.get("MASTER_ADDR") or (_LOCALHOST if one_host else hosts[0])
    step = environ.get("SLURM_STEP_ID", "")
    port = _port_of_job(variables, [variables.text("SLURM_JOB_ID"), step])
    addresses = _addresses(variables, port, size, local_size)
    described = not distribution.startswith(("plane", "arbitrary"))
    if not addresses and described and places[rank] == (node, local_rank):
        addresses = tuple(endpoint(hosts[host], port + 1 + local) for host, local in places)
    return ProcessGroup(rank, size, local_rank, local_size, address, port, addresses, "SLURM")


# --- what they share ------------------------------------------------------------------------------


class _Variables:
    """Environment variables, with errors that name the variable, its value and what sets it."""

    def __init__(self, environ: Mapping[str, str], launcher: str, advice: str) -> None:
        self.environ, self._launcher, self._advice = environ, launcher, advice

    def text(self, name: str) -> str:
        value = self.environ.get(name, "")
        if not value:
            raise ConfigurationError(
                f"The environment variable {name} is not set, which a process started by "
                f"{self._launcher} needs. {self._advice}."
            )
        return value

    def number(self, name: str, low: int, below: int | None = None, limit: str = "") -> int:
        """A whole number, at least ``low`` and less than ``below``, which is that of ``limit``."""
        text = self.text(name)
        if text.isdecimal() and int(text) >= low and (below is None or int(text) < below):
            return int(text)
        bound = f"of at least {low}" + (f", less than {limit} ({below})" if limit else "")
        raise ConfigurationError(
            f"The environment variable {name} must be a whole number {bound}. {self._advice}. "
            f"Received: {name}={text!r}"
        )

    def port(self) -> int:
        """``MASTER_PORT``."""
        text = self.text("MASTER_PORT")
        if text.isdecimal() and 0 < int(text) < 65536:
            return int(text)
        raise ConfigurationError(
            "The environment variable MASTER_PORT must be the number of a free port on the machine "
            f"of process 0, such as 29400. Received: {text!r}"
        )


def _names(prefix: str) -> tuple[str, str]:
    return f"{prefix}RANK", f"{prefix}SIZE"


def _addresses(variables: _Variables, port: int, size: int, local_size: int) -> tuple[str, ...]:
    """The address of each process, where the launcher gives them or all are on this machine."""
    given = variables.environ.get("KBTRAIN_ADDRESSES", "")
    if given:
        addresses = tuple(given.split(","))
        if len(addresses) != size:
            raise ConfigurationError(
                f"KBTRAIN_ADDRESSES must have one host:port for each of the {size} processes, "
                "divided by commas; `kbtrain launch` sets it. Received: "
                f"KBTRAIN_ADDRESSES={given!r}"
            )
        return addresses
    if local_size < size:
        return ()
    return tuple(endpoint(_LOCALHOST, port + 1 + rank) for rank in range(size))


def _port_of_job(variables: _Variables, identity: Sequence[str]) -> int:
    """``MASTER_PORT``, or a port derived from what identifies the job."""
    if variables.environ.get("MASTER_PORT"):
        return variables.port()
    if not identity:
        raise ConfigurationError(
            "Nothing in the environment tells this job from others, to derive a port from it. Set "
            "MASTER_PORT to a free port on the machine of process 0, for all processes (MPICH: "
            "`mpirun -genv MASTER_PORT 29400 ...`)."
        )
    return derived_port(*identity)


def _host_of(address: str, text: str) -> str:
    """The host of ``host:port``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigurationError(
            f"Addresses in TF_CONFIG must be host:port. Received: {address!r} in TF_CONFIG={text!r}"
        )
    return host.strip("[]")


def _host_of_mpirun(environ: Mapping[str, str], launcher: str) -> str:
    """The host of mpirun, where Open MPI 4 gives it; process 0 runs there unless told otherwise."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")  # 12.0;tcp://10.0.0.1,10.1.0.1:3491
    found = re.search(r"tcp://([^,:;]+)", uri) or re.search(r"tcp6://\[([^],]+)", uri)
    if found:
        return found[1]
    raise ConfigurationError(
        f"{launcher} started processes on several machines without saying where process 0 is. Set "
        "MASTER_ADDR to the name of its machine for all processes (Open MPI: `mpirun -x "
        "MASTER_ADDR=host ...`; MPICH: `mpirun -genv MASTER_ADDR host ...`), and MASTER_PORT to a "
        "free port on it to choose that, too."
    )
