"""How fast is it? Contenders take turns in one process, a round of updates each."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import keras
from train_step import Rounds, flops_per_step
from workloads import WORKLOADS, Workload, loss

from kbtrain import Trainer, TrainerCallback, TrainingArguments, backends
from on_gpu.correctness import Listener
from on_gpu.rows import Reporter
from on_gpu.table import PEAK_TFLOPS
from on_gpu.turns import Turns

ROUNDS = 4
ENDLESS = 10_000
"""Rounds of a contender that is told when to end."""

IN_A_REHEARSAL = {"mlp": "mlp", "gpt124m": "gpt-tiny", "resnet50": "mlp"}


def chosen(report: Reporter, name: str) -> tuple[str, Workload, int]:
    """The workload, its name and the number of rounds, all smaller in a rehearsal."""
    if not report.settings.tiny:
        return name, WORKLOADS[name], ROUNDS
    other = IN_A_REHEARSAL[name]
    return other, replace(WORKLOADS[other], batch=4, steps=5), 1


@contextlib.contextmanager
def computing_in(bf16: bool) -> Iterator[None]:
    """Context in which models compute in bfloat16, with float32 parameters."""
    before = keras.config.dtype_policy()
    if bf16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def arguments(report: Reporter, folder: str, workload: Workload, **more: Any) -> TrainingArguments:
    """Arguments of a run that logs once a round and does nothing else."""
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": workload.batch,
        "logging_steps": workload.steps,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "use_cpu": not report.settings.on_gpu,
    }
    return TrainingArguments(**(defaults | more))


def in_turns(
    report: Reporter,
    workload: str,
    bf16: bool = False,
    compiled: bool = False,
    target: str | None = None,
) -> None:
    """Time per update of kbtrain, of hand-written loops, of Keras and of other trainers.

    Args:
        report: Takes down the times.
        workload: A key of ``workloads.WORKLOADS``.
        bf16: Whether all compute in bfloat16.
        compiled: Whether ``jit_compile=True`` is held against ``torch.compile``, and nothing else.
        target: The key of the targets.
    """
    name, work, rounds = chosen(report, workload)
    with computing_in(bf16):
        x, y = work.data(work.batch * work.steps)
        others, ends = contenders(report, name, work, x, y, compiled)
        messages, seconds = race(report, work, (x, y), others, rounds, compiled)
        for end in ends:
            end()
        flops = flops_per_step(work)
    mine = seconds["kbtrain"]
    for contender, times in seconds.items():
        middle = statistics.median(times)
        figures: dict[str, Any] = {"ms": middle * 1e3, "samples/s": work.batch / middle}
        if flops and work.size is not None:
            figures["tokens/s"] = work.batch * work.size.length / middle
            figures["MFU"] = flops / middle / PEAK_TFLOPS / 1e12
        if contender == "kbtrain":
            for other, theirs in seconds.items():
                ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
                if other != contender:
                    figures[f"kbtrain / {other}"] = statistics.median(ratios)
            figures["messages"] = messages
        report.row(contender, figures, target=target if contender == "kbtrain" else None)


def race(
    report: Reporter,
    work: Workload,
    data: Any,
    others: dict[str, Callable[[], None]],
    rounds: int,
    compiled: bool,
) -> tuple[list[str], dict[str, list[float]]]:
    """What kbtrain said about its step, and the seconds per update in each round."""
    turns = Rounds({}, work.steps)
    turns.seconds |= {name: [] for name in others}
    turns.others = {name: surviving(report, name, run, turns) for name, run in others.items()}
    with tempfile.TemporaryDirectory() as folder, Listener() as listener:
        args = arguments(
            report,
            folder,
            work,
            max_steps=work.steps * (rounds + 1),
            jit_compile=True if compiled else "auto",
        )
        Trainer(work.make(), args, train_dataset=data, loss=loss(), callbacks=[turns]).fit()
    failed = {name for name, times in turns.seconds.items() if len(times) < rounds}
    failed |= turns.others.keys() & _FAILED
    _FAILED.clear()
    return listener.messages, {k: v for k, v in turns.seconds.items() if k not in failed}


_FAILED: set[str] = set()


def surviving(
    report: Reporter, name: str, run: Callable[[], None], turns: Rounds
) -> Callable[[], None]:
    """A contender whose failure, for lack of memory for example, does not end the others."""

    def round_() -> None:
        if name in _FAILED:
            return
        try:
            run()
        except Exception as error:
            _FAILED.add(name)
            report.row(name, {"error": f"{type(error).__name__}: {str(error)[:300]}"}, False)

    return round_


def contenders(
    report: Reporter, name: str, work: Workload, x: Any, y: Any, compiled: bool
) -> tuple[dict[str, Callable[[], None]], list[Callable[[], None]]]:
    """A round of each contender but kbtrain, and how to end those that run in threads."""
    backend = keras.backend.backend()
    native = importlib.import_module(f"native_{backend}")
    batches = [(x[i : i + work.batch], y[i : i + work.batch]) for i in range(0, len(x), work.batch)]

    def round_of(step: Callable[[Any, Any], Any]) -> Callable[[], None]:
        def run() -> None:
            result = None
            for inputs, labels in batches:
                result = step(inputs, labels)
            native.wait(result)

        return run

    if compiled:
        steps = native.loops(name, work.make, loss(), compiled=True)
        return {key: round_of(step) for key, step in steps.items()}, []
    found = {key: round_of(s) for key, s in native.loops(name, work.make, loss()).items()}
    fitted = work.make()
    fitted.compile(optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01), loss=loss())
    found["keras fit"] = lambda: fitted.fit(x, y, batch_size=work.batch, verbose=0)
    if backend != "torch":
        return found, []
    threads = {"kbtrain, no graph": Turns(without_graph(report, work, (x, y)))}
    peers = importlib.import_module("trainers_torch")
    threads |= peers.trainers(name, x, y, work.batch, work.steps)
    found |= {key: thread.round for key, thread in threads.items()}
    return found, [thread.end for thread in threads.values()]


def without_graph(
    report: Reporter, work: Workload, data: Any
) -> Callable[[Callable[[], bool]], None]:
    """kbtrain once more, with ``cuda_graphs=False``."""
    model = work.make()  # in this thread, whose dtype policy counts

    class Pauses(TrainerCallback):
        every_step = False

        def __init__(self, pause: Callable[[], bool]) -> None:
            self.pause = pause

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                control.should_training_stop = not self.pause()

    def run(pause: Callable[[], bool]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(
                report, folder, work, max_steps=work.steps * ENDLESS, cuda_graphs=False
            )
            callbacks: list[Any] = [Pauses(pause)]
            Trainer(model, args, train_dataset=data, loss=loss(), callbacks=callbacks).fit()

    return run


def memory(report: Reporter, who: str) -> None:
    """The most memory that a process uses which trains GPT-2, 8 x 1024 in bfloat16.

    Args:
        report: Takes down the bytes.
        who: "loop", "kbtrain" or "kbtrain, no graph".
    """
    name, work, _ = chosen(report, "gpt124m")
    updates = 7  # a graph is made in the fourth and compared in the fifth

    def train() -> dict[str, Any]:
        x, y = work.data(work.batch * updates)
        if who == "loop":
            native = importlib.import_module(f"native_{keras.backend.backend()}")
            step = next(iter(native.loops(name, work.make, loss()).values()))
            for i in range(0, len(x), work.batch):
                native.wait(step(x[i : i + work.batch], y[i : i + work.batch]))
        else:
            with tempfile.TemporaryDirectory() as folder:
                graphs = {} if who == "kbtrain" else {"cuda_graphs": False}
                args = arguments(report, folder, work, max_steps=updates, **graphs)
                Trainer(work.make(), args, train_dataset=(x, y), loss=loss()).fit()
        return used()

    with computing_in(True):
        report.attempt(who, train)


def used() -> dict[str, Any]:
    """The peak on the device, by the framework's counters, and that of the process."""
    from optimizer_update import resident

    found: dict[str, Any] = {}
    stats = backends.load().memory_stats()
    if "peak" in stats:
        found["peak GiB"] = stats["peak"] / 2**30
    if keras.backend.backend() == "torch" and stats:
        torch = importlib.import_module("torch")
        found["reserved GiB"] = torch.cuda.max_memory_reserved() / 2**30
    host = resident("VmHWM")
    return found | ({} if host is None else {"host GiB": host / 2**30})


def launches(report: Reporter) -> None:
    """Kernels of an update as the profiler sees them, and where its time goes."""
    for name, bf16 in (("mlp", False), ("gpt124m", True)):
        report.attempt(name, functools.partial(profiled, report, name, bf16))
        gc.collect()


def profiled(report: Reporter, workload: str, bf16: bool) -> dict[str, Any]:
    torch = importlib.import_module("torch")
    kinds = torch.profiler.ProfilerActivity
    kind = kinds.CUDA if report.settings.on_gpu else kinds.CPU
    _, work, _ = chosen(report, workload)
    work = replace(work, steps=8)
    backend = backends.load()

    class Profile(TrainerCallback):
        """Profiles the third round, after the graph has been made and compared."""

        every_step = False
        rounds = 0

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" not in kwargs["logs"]:
                return
            self.rounds += 1
            backend.synchronize()
            if self.rounds == 2:
                self.profile = torch.profiler.profile(activities=[kind])
                self.profile.__enter__()
            if self.rounds == 3:
                self.profile.__exit__(None, None, None)

    callback = Profile()
    with computing_in(bf16), tempfile.TemporaryDirectory() as folder:
        data = work.data(work.batch * work.steps)
        args = arguments(report, folder, work, max_steps=3 * work.steps)
        Trainer(work.make(), args, train_dataset=data, loss=loss(), callbacks=[callback]).fit()
    device = report.settings.on_gpu
    rows = [
        (e.key, e.count, e.self_device_time_total if device else e.self_cpu_time_total)
        for e in callback.profile.key_averages()
    ]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(row[2] for row in rows)
    per_update = [
        f"{us / work.steps:8.1f} us, {n / work.steps:5.1f} x {key}" for key, n, us in rows
    ]
    return {
        "launches": sum(row[1] for row in rows) / work.steps,
        "us of kernels": total / work.steps,
        "messages": per_update[:12],
    }


def saves(report: Reporter) -> None:
    """How long a save of 500 MB holds up training, against a plain copy of the same arrays."""
    from costs import one_checkpoint_stall

    width = 32 if report.settings.tiny else 3740

    def stall() -> dict[str, Any]:
        start = time.perf_counter()
        found: dict[str, Any] = {
            key.partition(": ")[2]: value for key, value in one_checkpoint_stall(width).items()
        }
        return found | {"s in all": time.perf_counter() - start}

    report.attempt("a checkpoint of 500 MB", stall)
