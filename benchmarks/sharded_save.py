"""Time of a synchronous save of divided state (JAX, fsdp): two processes against one.

    python benchmarks/sharded_save.py /some/disk --width 2048 --layers 6

One process with two devices and two processes with one device each hold the same state, half of it
on each device, and take turns to save it into the folder that is named. A save ends when all bytes
have been flushed and the checkpoint has its name; of two processes the slower one counts. What the
folder is on says what is measured: on a memory disk such as /dev/shm the work of the processors, on
a disk that both processes share mostly that disk.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"


def environments(processes: int) -> list[dict[str, str]]:
    """The environment of each process, with torchrun's variables for two."""
    common = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    common |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    if processes == 1:
        return [common | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}]
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [common | {"RANK": i, "LOCAL_RANK": i} for i in "01"]


def train(folder: str, processes: int, width: int, layers: int, rounds: int) -> None:
    """Save after each update, when told to by a line; print how long it took."""
    import jax
    import keras
    import numpy as np

    from kbtrain import Trainer, TrainerCallback, TrainingArguments

    class Rounds(TrainerCallback):
        decides_alike = True  # so the processes need not ask each other

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            jax.block_until_ready(jax.live_arrays())  # the update itself does not count
            print("round: ready", flush=True)
            control.should_save = bool(sys.stdin.readline())  # not if the other end is gone
            self.started = time.perf_counter()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print("round:", time.perf_counter() - self.started, flush=True)

    sizes: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": rounds}
    if processes == 1:
        sizes["devices"] = "cpu:0,cpu:1"
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "log_level": "error"}
    saving: dict[str, Any] = {"save_strategy": "no", "save_total_limit": 1, "save_async": False}
    args = TrainingArguments(output_dir=folder, fsdp="full_shard", **sizes, **saving, **quiet)
    x = np.zeros((8 * rounds, width), "float32")
    model = keras.Sequential([keras.Input((width,)), *map(keras.layers.Dense, [width] * layers)])
    Trainer(model, args, train_dataset=(x, x), loss="mse", callbacks=[Rounds()]).fit()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line of a process that is meant for this one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round: "):
            return line.removeprefix("round: ")
    raise SystemExit("A process has ended; see its output.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder on the disk to measure")
    for name, default in (("--width", 2048), ("--layers", 6), ("--rounds", 8)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(*options.train)
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        groups: dict[int, list[subprocess.Popen[str]]] = {}
        for n in times:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            run = [f"{folder}/{n}", n, options.width, options.layers, options.rounds + 1]
            command = [sys.executable, __file__, folder, "--train", json.dumps(run)]
            groups[n] = [subprocess.Popen(command, env=e, **pipes) for e in environments(n)]
        for round_number in range(options.rounds + 1):
            for n, group in groups.items():
                for process in group:
                    answer(process)  # it is ready
                for process in group:
                    print(file=process.stdin, flush=True)
                seconds = max(float(answer(process)) for process in group)
                if round_number:  # the first one warms up
                    times[n].append(seconds)
        for process in [*groups[1], *groups[2]]:
            process.communicate()
        files = (each.stat().st_size for each in Path(folder, "1").rglob("*") if each.is_file())
        print(f"{sum(files) / 1e6:,.0f} MB, {options.rounds} saves each, in turns")
    print("processes   median s   (lowest, highest)   / one")
    for n, found in times.items():
        spread, ratio = f"({min(found):.2f}, {max(found):.2f})", median(found) / median(times[1])
        print(f"{n:9} {median(found):10.3f}   {spread:>17} {ratio:7.2f}")


if __name__ == "__main__":
    main()
