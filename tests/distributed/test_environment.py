"""Which processes train together, from the variables of each launcher."""

import doctest
import json

import pytest

from kbtrain.distributed import environment, slurm
from kbtrain.distributed.environment import detect, endpoint
from kbtrain.errors import ConfigurationError


def torchrun(rank, size, local_rank, local_size, **others):
    numbers = {"RANK": rank, "WORLD_SIZE": size}
    numbers |= {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    found = {name: str(number) for name, number in numbers.items()}
    return found | {"MASTER_ADDR": "node1", "MASTER_PORT": "29400"} | others


def tf_config(index, *workers, kind="worker", **cluster):
    task = {"type": kind, "index": index}
    return {"TF_CONFIG": json.dumps({"cluster": {"worker": workers, **cluster}, "task": task})}


def open_mpi(rank, size, local_rank, local_size, **others):
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = (rank, size, local_rank, local_size)
    found = {
        f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, values, strict=True)
    }
    return found | {"PMIX_NAMESPACE": "1129381889", "PMIX_RANK": str(rank)} | others


def mpich(rank, size, local_rank, local_size, **others):
    found = {"PMI_RANK": rank, "PMI_SIZE": size}
    found |= {"MPI_LOCALRANKID": local_rank, "MPI_LOCALNRANKS": local_size}
    return {name: str(value) for name, value in found.items()} | {"MASTER_PORT": "29400"} | others


def srun(rank, size, node, local_rank, nodes="n[1-2]", tasks="2(x2)", **others):
    found = {"PROCID": rank, "STEP_NUM_TASKS": size, "NODEID": node, "LOCALID": local_rank}
    found |= {"STEP_NODELIST": nodes, "STEP_TASKS_PER_NODE": tasks, "JOB_ID": 77, "STEP_ID": 0}
    return {f"SLURM_{name}": str(value) for name, value in found.items()} | others


ORTE = {"OMPI_MCA_orte_hnp_uri": "11.0;tcp://10.0.0.5,10.1.0.5:47539;tcp6://[fd00::2]:38823"}
ORTE_6 = {"OMPI_MCA_orte_hnp_uri": "11.0;tcp6://[fd00::2,fd01::2]:38823"}
NODE_1 = {"MASTER_ADDR": "node1"}
LAUNCH = {"KBTRAIN_LAUNCHER_PID": "12", "KBTRAIN_ADDRESSES": "node1:4,node1:5,node2:4,node2:5"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
PMI_ONLY = {"PMI_RANK": "3", "PMI_SIZE": "4"}
# Open MPI's mpirun starts its daemons, one per node, as a step of SLURM.
INSIDE_A_STEP = srun(1, 2, 1, 0, tasks="1(x2)")
HOSTS = ["a:2222", "a:2223", "b:2222"]


# environment, then: launcher, rank, size, local rank, local size, address
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (torchrun(3, 4, 1, 2), ("RANK and WORLD_SIZE", 3, 4, 1, 2, "node1")),
        (torchrun(3, 4, 1, 2, **LAUNCH), ("kbtrain launch", 3, 4, 1, 2, "node1")),
        (torchrun(0, 2, 0, 2, **TORCHRUN), ("torchrun", 0, 2, 0, 2, "node1")),
        (torchrun(5, 6, 2, 3, **TORCHRUN), ("torchrun", 5, 6, 2, 3, "node1")),
        (torchrun(1, 2, 0, 1, **INSIDE_A_STEP), ("RANK and WORLD_SIZE", 1, 2, 0, 1, "node1")),
        (tf_config(2, *HOSTS), ("TF_CONFIG", 2, 3, 0, 1, "a")),
        (tf_config(1, *HOSTS), ("TF_CONFIG", 1, 3, 1, 2, "a")),
        (tf_config(0, "b:1", chief=["a:1"]), ("TF_CONFIG", 1, 2, 0, 1, "a")),
        (tf_config(0, "b:1", kind="chief", chief=["a:1"]), ("TF_CONFIG", 0, 2, 0, 1, "a")),
        (tf_config(0, "[::1]:1", "[::1]:2"), ("TF_CONFIG", 0, 2, 0, 2, "::1")),
        (open_mpi(1, 2, 1, 2), ("Open MPI", 1, 2, 1, 2, "127.0.0.1")),
        (open_mpi(1, 2, 0, 1, **ORTE), ("Open MPI", 1, 2, 0, 1, "10.0.0.5")),
        (open_mpi(1, 2, 0, 1, **ORTE_6), ("Open MPI", 1, 2, 0, 1, "fd00::2")),
        (open_mpi(3, 4, 1, 2, **NODE_1), ("Open MPI", 3, 4, 1, 2, "node1")),
        (open_mpi(1, 2, 0, 1, **NODE_1, **INSIDE_A_STEP), ("Open MPI", 1, 2, 0, 1, "node1")),
        (mpich(1, 2, 1, 2), ("MPI", 1, 2, 1, 2, "127.0.0.1")),
        (mpich(3, 4, 1, 2, **NODE_1), ("MPI", 3, 4, 1, 2, "node1")),
        (srun(1, 2, 0, 1, "n7", "2"), ("SLURM", 1, 2, 1, 2, "127.0.0.1")),
        (srun(3, 4, 1, 1), ("SLURM", 3, 4, 1, 2, "n1")),
        (srun(3, 4, 1, 1, **PMI_ONLY), ("SLURM", 3, 4, 1, 2, "n1")),
        (srun(2, 3, 1, 0, tasks="2,1"), ("SLURM", 2, 3, 0, 1, "n1")),
        (srun(3, 4, 1, 1, **NODE_1), ("SLURM", 3, 4, 1, 2, "node1")),
    ],
)
def test_the_group_of_each_launcher(environ, expected):
    group = detect(environ)
    found = (group.launcher, group.rank, group.size, group.local_rank, group.local_size)
    assert (*found, group.address) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        torchrun(0, 1, 0, 1),
        {"TF_CONFIG": ""},
        {"TF_CONFIG": "{}"},
        tf_config(0, "a:1"),
        open_mpi(0, 1, 0, 1),
        mpich(0, 1, 0, 1),
        srun(0, 1, 0, 0, "n7", "1"),
        # A batch script: its own step has a task, the job has four.
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_one_process_is_no_group(environ):
    assert detect(environ) is None


@pytest.mark.parametrize(
    ("environ", "name", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE", "unset both to run alone"),
        ({"WORLD_SIZE": "2"}, "RANK", "`kbtrain launch` or torchrun"),
        (torchrun(2, 2, 0, 1), "RANK='2'", "less than WORLD_SIZE (2)"),
        (torchrun(-1, 2, 0, 1), "RANK='-1'", "at least 0"),
        (torchrun(1, "two", 0, 1), "WORLD_SIZE='two'", "whole number"),
        (torchrun(1, 0, 0, 1), "WORLD_SIZE='0'", "at least 1"),
        (torchrun(1, 2, 2, 2), "LOCAL_RANK='2'", "less than LOCAL_WORLD_SIZE (2)"),
        (torchrun(1, 2, 1, 3), "LOCAL_WORLD_SIZE='3'", "less than WORLD_SIZE + 1 (3)"),
        (torchrun(1, 2, "", 2), "LOCAL_RANK", "torchrun"),
        (torchrun(1, 2, 1, 2, MASTER_ADDR=""), "MASTER_ADDR", "torchrun"),
        (torchrun(1, 2, 1, 2, MASTER_PORT=""), "MASTER_PORT", "torchrun"),
        (torchrun(1, 2, 1, 2, MASTER_PORT="70000"), "MASTER_PORT", "'70000'"),
        (torchrun(1, 2, 1, 2, **LAUNCH), "KBTRAIN_ADDRESSES", "each of the 2 processes"),
        ({"TF_CONFIG": "{"}, "TF_CONFIG", "JSON"),
        ({"TF_CONFIG": "[1]"}, "TF_CONFIG", "JSON"),
        (tf_config("x", *HOSTS), "TF_CONFIG", "TensorflowTrainer"),
        (tf_config(3, *HOSTS), "TF_CONFIG", "from 0 to 2"),
        (tf_config(0, *HOSTS, kind="evaluator"), "TF_CONFIG", "evaluators"),
        (tf_config(0, *HOSTS, ps=["c:1"]), "TF_CONFIG", "parameter servers"),
        (tf_config(0, "a", "b"), "TF_CONFIG", "host:port"),
        (open_mpi(2, 2, 0, 1), "OMPI_COMM_WORLD_RANK='2'", "mpirun"),
        (open_mpi(1, 2, "", 1), "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun"),
        (open_mpi(1, 2, 0, 1), "MASTER_ADDR", "mpirun -x"),
        (mpich(1, 2, 0, 1), "MASTER_ADDR", "mpirun -genv"),
        (mpich(1, 2, 1, 2, MASTER_PORT=""), "MASTER_PORT", "-genv"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_LOCAL_SIZE", "mpirun"),
        (srun("", 2, 0, 0), "SLURM_PROCID", "srun"),
        (srun(4, 4, 1, 1), "SLURM_PROCID='4'", "SLURM_STEP_NUM_TASKS (4)"),
        (srun(3, 4, 1, 2), "SLURM_LOCALID=2", "contradict"),
        (srun(0, 5, 0, 0), "SLURM_STEP_NUM_TASKS=5", "contradict"),
        (srun(0, 4, 0, 0, "n[1-3]"), "SLURM_STEP_NODELIST='n[1-3]'", "3 hosts"),
        (srun(0, 4, 0, 0, "n[1-"), "SLURM_STEP_NODELIST='n[1-'", "srun"),
        (srun(0, 4, 0, 0, tasks="2(x"), "SLURM_STEP_TASKS_PER_NODE='2(x'", "srun"),
        (srun(0, 4, 0, 0, SLURM_JOB_ID=""), "SLURM_JOB_ID", "srun"),
    ],
)
def test_a_missing_or_contradictory_variable_is_named(environ, name, said):
    with pytest.raises(ConfigurationError) as error:
        detect(environ)
    assert name in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "environs",
    [
        [torchrun(r, 2, r, 2, **TORCHRUN, TORCHELASTIC_RESTART_COUNT=f"{r}") for r in range(2)],
        [tf_config(index, *HOSTS) for index in range(3)],
        [open_mpi(r, 2, r, 2) for r in range(2)],
        [srun(r, 4, r // 2, r % 2) for r in range(4)],
        [srun(r, 4, r % 2, r // 2, SLURM_DISTRIBUTION="cyclic:block") for r in range(4)],
    ],
)
def test_all_processes_agree_where_process_0_listens(environs):
    groups = [detect(environ) for environ in environs]
    assert [group.rank for group in groups] == list(range(len(environs)))
    assert len({(group.address, group.port, group.addresses) for group in groups}) == 1
    listening = {endpoint("127.0.0.1", groups[0].port), *groups[0].addresses}
    assert len(listening) == 1 + len(groups)


def test_port_is_free_of_the_launcher_and_other_jobs():
    agent = torchrun(0, 2, 0, 2, **TORCHRUN)
    ports = {
        detect(agent).port,
        detect(agent | {"MASTER_PORT": "29401"}).port,
        detect(srun(0, 4, 0, 0)).port,
        detect(srun(0, 4, 0, 0, SLURM_STEP_ID="1")).port,
        detect(srun(0, 4, 0, 0, SLURM_JOB_ID="78")).port,
        detect(tf_config(0, *HOSTS)).port,
    }
    assert len(ports) == 6
    assert all(16384 <= port < 32768 for port in ports)
    assert detect(srun(0, 4, 0, 0, MASTER_PORT="29400")).port == 29400


@pytest.mark.parametrize(
    ("environ", "addresses"),
    [
        (torchrun(1, 4, 1, 2, **LAUNCH), ("node1:4", "node1:5", "node2:4", "node2:5")),
        (torchrun(1, 4, 1, 2), ()),
        (torchrun(1, 2, 1, 2), ("127.0.0.1:29401", "127.0.0.1:29402")),
        (tf_config(1, *HOSTS), tuple(HOSTS)),
        (mpich(0, 2, 0, 2), ("127.0.0.1:29401", "127.0.0.1:29402")),
        (mpich(0, 2, 0, 1, **NODE_1), ()),
        (srun(1, 3, 0, 1, tasks="2,1", MASTER_PORT="10"), ("n1:11", "n1:12", "n2:11")),
        (
            srun(1, 4, 1, 0, SLURM_DISTRIBUTION="cyclic", MASTER_PORT="10"),
            ("n1:11", "n2:11", "n1:12", "n2:12"),
        ),
        (srun(0, 4, 0, 0, SLURM_DISTRIBUTION="plane", MASTER_PORT="10"), ()),
        (srun(0, 4, 0, 0, SLURM_DISTRIBUTION="arbitrary", MASTER_PORT="10"), ()),
        (srun(1, 4, 1, 0, MASTER_PORT="10"), ()),  # not where the variables would have it
    ],
)
def test_an_address_for_each_process_where_they_are_known(environ, addresses):
    assert detect(environ).addresses == addresses


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node001", ["node001"]),
        ("a,b", ["a", "b"]),
        ("node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]),
        ("r[1-2]n[08-09]-ib", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib"]),
        ("n[99-101].cluster.org", ["n99.cluster.org", "n100.cluster.org", "n101.cluster.org"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert slurm.expand_hosts(text) == hosts


def test_ipv6_addresses_get_brackets():
    assert endpoint("fd00::2", 5) == "[fd00::2]:5"


def test_examples_in_the_documentation_strings():
    for module in (environment, slurm):
        assert doctest.testmod(module).failed == 0
