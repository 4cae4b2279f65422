"""Several processes without a framework, which obey commands; see tests/distributed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

EXCHANGE = """
import atexit, json, os, sys, time
from pathlib import Path
from kbtrain.utils.machine.processes import ProcessGroup

folder, rank, size, timeout, address = sys.argv[1:]
folder, rank, size = Path(folder), int(rank), int(size)
group = ProcessGroup(rank=rank, size=size, address=address)
rounds = 0

def exchange(data):
    global rounds
    rounds += 1
    own = folder / f"{rounds}-{rank}"
    own.with_suffix(".tmp").write_bytes(data)
    own.with_suffix(".tmp").rename(own)
    paths = [folder / f"{rounds}-{r}" for r in range(size)]
    while not all(path.exists() for path in paths):
        time.sleep(0.01)
    return [path.read_bytes() for path in paths]
"""

CHANNEL = (
    EXCHANGE
    + """
from kbtrain.distributed.control.channel import Channel
from kbtrain.distributed.control.ending import ExitHooks

barrier = 0.0
atexit.register(lambda: time.sleep(barrier))  # as JAX waits for the other processes
hooks = ExitHooks()
hooks.channel = channel = Channel.start(group, exchange, float(timeout))
assert not {"keras", "torch", "tensorflow", "jax", "numpy"} & set(sys.modules)
channel.at("update 17")
print("ready", flush=True)
# Between two commands the main thread waits in a system call, as in a collective operation.
for line in iter(sys.stdin.readline, ""):
    exec(line)
    print("done", flush=True)
"""
)


ELSEWHERE = CHANNEL.replace(
    "channel = Channel.start",
    """channel = None
from kbtrain.distributed.control import channel as module, reports
module.machine = reports.machine = lambda: f"machine of {rank}"
hooks.channel = channel = Channel.start""",
).replace("hooks.channel = channel = None", "")
"""``CHANNEL``, whose processes take each other for processes of other machines."""


class Processes:
    """Processes of ``program``, each with standard input as the source of its commands.

    ``prefixes`` are put before the command of each, such as one that enters a namespace.
    """

    def __init__(
        self,
        folder,
        size=3,
        program=CHANNEL,
        timeout=1800.0,
        address="127.0.0.1",
        prefixes=None,
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
        prefixes = prefixes or [[]] * size
        self._processes = [
            subprocess.Popen(
                [*prefix, sys.executable, "-c", program, folder, str(rank), str(size)]
                + [str(timeout), address],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank, prefix in enumerate(prefixes)
        ]
        self.started = 0.0
        self._suspended = []

    def __enter__(self):
        for process in self._processes:
            process.stdout.readline()  # "ready"
        return self

    def __exit__(self, *error):
        for process in self._processes:
            process.kill()
            process.communicate()
        for pid in self._suspended:
            os.kill(pid, signal.SIGCONT)

    def __len__(self):
        return len(self._processes)

    def __getitem__(self, rank):
        return self._processes[rank]

    def tell(self, rank, command):
        """Have a process execute a line of Python."""
        self.started = time.monotonic()
        self._processes[rank].stdin.write(f"{command}\n")
        self._processes[rank].stdin.flush()

    def signal(self, rank, number):
        self.started = time.monotonic()
        self._processes[rank].send_signal(number)

    def suspend_watcher(self, rank):
        pid = self.watcher(rank)
        self._suspended.append(pid)
        os.kill(pid, signal.SIGSTOP)

    def watcher(self, rank):
        """The process id of the watcher of a process, whose standard input is a pipe from it."""
        pipes = {os.readlink(link) for link in Path(f"/proc/{self[rank].pid}/fd").iterdir()}
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                own = os.readlink(command.parent / "fd" / "0") in pipes
                if own and b"control/watcher.py" in command.read_bytes():
                    return int(command.parent.name)
        raise LookupError(f"process {rank} has no watcher")

    def ends(self, ranks=None, limit=20.0):
        """Wait for the end of the processes.

        Returns:
            Seconds since the last command or signal, exit codes (None: it did not end within
            ``limit``), and what each printed as errors.
        """
        end = time.monotonic() + limit
        waiting = self._processes if ranks is None else [self._processes[r] for r in ranks]
        for process in waiting:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        codes = [process.returncode for process in waiting]
        seconds = time.monotonic() - self.started
        for process in waiting:
            process.kill()  # or its output would not end
        return seconds, codes, [process.stderr.read() for process in waiting]
