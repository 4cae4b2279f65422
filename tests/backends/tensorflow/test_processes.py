"""On TensorFlow: sums in branches and loops, lost processes, a cluster that the program made."""

import json
import signal

import pytest
from helpers_together import run_processes

from kbtrain.utils.machine.ports import free_ports

pytestmark = [pytest.mark.cross, pytest.mark.slow]

RUN = """
import json, logging, os, signal, sys, time
import keras, tensorflow as tf
from kbtrain.backends import tensorflow as backend
from kbtrain.backends.tensorflow.collectives import Members, naming_failures
from kbtrain.errors import ConfigurationError, DistributedError
from kbtrain.utils.machine.processes import ProcessGroup

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
port = int(os.environ["MASTER_PORT"])
group = ProcessGroup(rank, size, rank, size, "127.0.0.1", port, launcher="this test")
found = {}
def handler(*_):
    raise SystemExit(9)
signal.signal(signal.SIGTERM, handler)
backend.start_processes(group, timeout=100.0)
found["keeps the handler"] = signal.getsignal(signal.SIGTERM) is handler
signal.signal(signal.SIGTERM, signal.SIG_DFL)
try:
    backend.start_processes(group, timeout=100.0)
except ConfigurationError as error:
    found["tensors exist"] = str(error)

@tf.function(autograph=False)
def nested(x):
    return backend.all_sum([x])[0]

def step(x):
    def one(i, total):
        both = tf.cond(i % 2 == 0, lambda: backend.all_sum([x, x * x]), lambda: [x, x])
        return i + 1, total + both[0] + nested(both[1])
    return tf.while_loop(lambda i, _: i < 3, one, (tf.constant(0), tf.zeros(2)))[1]

run = backend.compile_step(step, [], jit_compile=True)
records = logging.Handler()
records.emit = lambda record: found.update(warning=record.getMessage())
logging.getLogger("kbtrain").addHandler(records)
found["branches"] = run(tf.constant([1.0 + rank, 3.0])).numpy().tolist()
flags = tf.constant([rank == 0, False, True])
found["any"] = backend.all_sum([flags])[0].numpy().tolist()
found["small"] = backend.all_sum([tf.constant([100 + rank], tf.uint8)])[0].numpy().tolist()
unknown = tf.function(
    lambda x: [*backend.all_sum([x, x[0]]), *backend.all_gather([x])],
    input_signature=[tf.TensorSpec([None, 2])], autograph=False,
)
found["unknown shapes"] = [t.numpy().tolist() for t in unknown(tf.ones([1, 2]) * (rank + 1.0))]
try:
    backend.all_gather([tf.constant(["text"])])
except Exception as error:
    found["strings"] = f"{type(error).__name__}: {error}"
backend.exchange(b"")
threads = len(os.listdir("/proc/self/task"))
for _ in range(100):
    backend.exchange(b"")
found["threads"] = len(os.listdir("/proc/self/task")) - threads
with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
    json.dump(found, file)
add = backend.compile_step(lambda x: backend.all_sum([x])[0], [])
add(tf.zeros(1))
if rank == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
try:
    add(tf.zeros(1))
except DistributedError as error:
    found["lost"] = str(error)
try:
    with naming_failures(Members(1, 2, 100.0, "/CPU:0")):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM at node CollectiveReduceV2")
except tf.errors.ResourceExhaustedError:
    found["out of memory"] = True
try:
    with naming_failures(Members(1, 2, 100.0, "/CPU:0")):
        raise tf.errors.DeadlineExceededError(None, None, "Collective has timed out.")
except DistributedError as error:
    found["timeout"] = str(error)
try:
    backend.exchange(b"")
except DistributedError as error:
    found["lost for good"] = str(error)
with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
    json.dump(found, file)
os._exit(0)
"""

OWN_STRATEGY = """
import json, os, sys
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
before = tf.constant(1.0)  # it may have made tensors since
from kbtrain.distributed import initialize
group = initialize()
from kbtrain import backends

backend = backends.load()
found = [group.rank, group.size, [part.decode() for part in backend.exchange(b"%d" % group.rank)],
         backend.all_sum([before + group.rank])[0].numpy().tolist()]
with open(os.path.join(sys.argv[1], f"{group.rank}.json"), "w") as file:
    json.dump(found, file)
"""


def ran(folder, program, more=None, check=True):
    script = folder / "program.py"
    script.write_text(program)
    environment = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    ended = run_processes(2, script, str(folder), more=environment | (more or {}), check=check)
    return ended, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("lost"), RUN, check=False)


def test_sigterm_is_left_to_the_program(lost):
    ended, found = lost
    assert all(each["keeps the handler"] for each in found)
    assert [one.status for one in ended] == [-signal.SIGTERM, 0]


def test_processes_cannot_be_joined_once_tensors_exist(lost):
    assert all("Import kbtrain" in each["tensors exist"] for each in lost[1])


def test_operations_in_branches_loops_and_functions(lost):
    # Twice the sums of x and of the sum of x * x, once x and the sum of x.
    x = [[1.0, 3.0], [2.0, 3.0]]
    for rank, found in enumerate(lost[1]):
        expected = [
            2 * (sum(v) + 2 * sum(a * a for a in v)) + x[rank][i] + sum(v)
            for i, v in enumerate(zip(*x, strict=True))
        ]
        assert found["branches"] == expected


def test_a_request_for_xla_is_answered_with_a_warning(lost):
    for found in lost[1]:
        assert found["warning"] == (
            "The step runs without XLA: sums over several processes would be wrong under it"
        )


def test_other_types_and_unknown_shapes(lost):
    for found in lost[1]:
        assert found["any"] == [True, False, True]
        assert found["small"] == [201]
        assert found["unknown shapes"] == [[[3, 3]], [3, 3], [[[1, 1]], [[2, 2]]]]
        assert found["strings"].startswith("DataError: Tensors of dtype string cannot be sent")


def test_operations_leave_no_threads_behind(lost):
    assert all(found["threads"] < 20 for found in lost[1])  # 100 operations


def test_a_lost_process_is_an_error_in_words(lost):
    found = lost[1][1]
    assert "Process 1 of 2 lost another one" in found["lost"]
    assert "Process 1 of 2 lost another one" in found["lost for good"]
    assert "Process 1 of 2 waited 100 s in vain" in found["timeout"]
    assert found["out of memory"]


def test_a_strategy_that_the_program_made_is_used(tmp_path):
    port = free_ports()
    workers = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"]
    config = [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}})
        for rank in range(2)
    ]
    # The launcher's variables say which of the two this is.
    choose = f"import os\nos.environ['TF_CONFIG'] = {config!r}[int(os.environ.pop('RANK'))]\n"
    forget = "".join(f"del os.environ['{name}']\n" for name in ("WORLD_SIZE", "LOCAL_RANK"))
    _, found = ran(tmp_path, choose + forget + OWN_STRATEGY)
    assert found == [[rank, 2, ["0", "1"], 3.0] for rank in range(2)]
