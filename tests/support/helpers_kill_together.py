"""Two processes save together, and one of them kills itself; see test_kill_together.py.

Each attempt forks both from this program, which needs no framework. They save over a checkpoint
of the same step or beside it. For each attempt it prints what became of both and of the folder.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from helpers_deaths import count_calls
from helpers_peers import connected, cut

from kbtrain.checkpoint import CheckpointStore, distributed
from kbtrain.checkpoint.storage.folder_writer import Contents
from kbtrain.errors import DistributedError

SAVED, ALONE, FAILED = 0, 3, 4
LIMIT = 60  # seconds that a process may live


def state(step):
    """Large enough for some arrays to be written in pieces of their own."""
    return {"w": np.full((200, 300), step, "float32"), "v": np.full((4, 2), step, "float32")}


def save(store, step, peers):
    arrays = {name: cut(value, (2, 1), peers.rank, 2) for name, value in state(step).items()}
    groups = {"model": arrays | {"b": np.full(3, step)}}
    contents = Contents(groups, {"trainer_state": {"global_step": step}}, {}, {}, {})
    distributed.save(store, step, contents, peers, "save")


def attempt(directory, step, deaths):
    """Save with two processes, of which ``deaths`` may name the call at which each dies.

    Returns:
        The exit code of each, and its number of calls.
    """
    everyone, pids, pipes = connected(2), [], []
    for peers in everyone:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = FAILED
            try:
                signal.alarm(LIMIT)
                for other in everyone:
                    if other is not peers:
                        other.close()
                left = count_calls(deaths[peers.rank])
                try:
                    save(CheckpointStore(directory), step, peers)
                    code = SAVED
                except DistributedError:
                    code = ALONE
                os.write(writing, b"%d" % -left[0])
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(writing)
        pids.append(pid)
        pipes.append(reading)
    for peers in everyone:
        peers.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    counts = [int(os.read(pipe, 20) or 0) for pipe in pipes]
    for pipe in pipes:
        os.close(pipe)
    return codes, counts


def look(store):
    """What a later start finds: each checkpoint's step and values, problems and leftovers."""
    found, problems = [], []
    for step, path in store.list():
        problems += store.verify(path)
        with contextlib.suppress(Exception):  # among the problems
            arrays = store.load(path).arrays
            values = {value for g in arrays.values() for a in g.values() for value in np.unique(a)}
            found.append([step, sorted(map(int, values))])
    torn = sum(path.name.startswith(".tmp-") for path in store.directory.iterdir())
    store.clean_leftovers(alone=True)
    left = [path.name for path in store.directory.iterdir() if path.name.startswith(".")]
    return found, problems, torn, left


def main(directory):
    os.fsync = lambda descriptor: None  # what a killed process has written is not lost
    store = CheckpointStore(directory)
    codes, counts = attempt(directory, 5, [0, 0])
    print(json.dumps({"codes": codes, "counts": counts, "look": look(store)}), flush=True)
    _, over = attempt(directory, 5, [0, 0])
    for step, rank, calls in ((5, 0, over[0]), (10, 0, counts[0]), (10, 1, counts[1])):
        for call in range(1, calls + 1):
            store.delete([item for item in store.list() if item[0] == 10])
            deaths = [call if rank == 0 else 0, call if rank == 1 else 0]
            codes, _ = attempt(directory, step, deaths)
            result = {"step": step, "rank": rank, "call": call, "codes": codes}
            print(json.dumps(result | {"look": look(store)}), flush=True)
    codes, _ = attempt(directory, 10, [0, 0])
    print(json.dumps({"codes": codes, "look": look(store)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
