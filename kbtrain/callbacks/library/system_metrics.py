"""What the machine does while it trains: CPU, memory and GPUs, in the logs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.schedule import warn_without_logs
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.config import converters
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.utils.best_effort import best_effort

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

GIB = 1 << 30

Sampler = Callable[[], dict[str, float]]


class SystemMetricsCallback(TrainerCallback):
    """Adds to each log of the training what the machine has done since the last one.

    - ``system_cpu_percent``: the use of all its CPUs.
    - ``system_memory_gib``: the memory of this process.
    - ``system_gpu0_percent``, ``system_gpu0_memory_gib``, ``system_gpu0_power_watts``: of each
      NVIDIA GPU that the process can see (extra ``gpu-metrics``), with the memory of all processes.

    A thread of its own takes them, so that the training never waits for one. A log has the means of
    the values since the last log, or the newest ones if there are none; the first logs of a run may
    come before the first values. With several processes those of the first one are logged.

    Args:
        interval: Seconds between two samples.

    Raises:
        ConfigurationError: The interval is not positive.
    """

    every_step = False
    decides_alike = True

    def __init__(self, interval: float = 5.0) -> None:
        try:
            self.interval = float(converters.real(above=0.0)(interval))
        except converters.InvalidValue:
            raise ConfigurationError(
                f"SystemMetricsCallback needs an interval above 0, in seconds. Received: "
                f"{interval!r}."
            ) from None
        self._thread: _Thread | None = None

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start taking samples."""
        warn_without_logs("SystemMetricsCallback", args, state)
        self.close()
        if state.is_world_process_zero:
            on_gpu = kwargs["trainer"].backend.devices()[0].startswith("gpu")
            self._thread = _Thread(self.interval, _samplers(on_gpu))
            self._thread.start()

    def log_values(self, trainer: Any) -> dict[str, float]:
        """The means since the last log."""
        return {} if self._thread is None else self._thread.take()

    @best_effort
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self.close()

    def close(self) -> None:
        """Stop taking samples."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.end()


class _Thread(threading.Thread):
    """Takes samples until ``end`` is called."""

    def __init__(self, interval: float, samplers: list[Sampler]) -> None:
        super().__init__(name="kbtrain-system-metrics", daemon=True)
        self._interval, self._samplers = interval, samplers
        self._ends, self._lock = threading.Event(), threading.Lock()
        self._samples: list[dict[str, float]] = []
        self._newest: dict[str, float] = {}

    def run(self) -> None:
        while not self._ends.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        """Take one sample; a source that fails is left out from then on."""
        found: dict[str, float] = {}
        for sampler in list(self._samplers):
            try:
                found |= sampler()
            except Exception as error:
                self._samplers.remove(sampler)
                logger.warning(
                    "Some metrics of the system are no longer recorded (%s: %s).",
                    type(error).__name__,
                    first_lines(error, 1),
                )
        with self._lock:
            self._samples.append(found)
            self._newest = found

    def take(self) -> dict[str, float]:
        """The means since the last call; the newest values if there is no sample since then."""
        with self._lock:
            samples, self._samples = self._samples or [self._newest], []
        names = dict.fromkeys(name for sample in samples for name in sample)
        means = {name: [s[name] for s in samples if name in s] for name in names}
        return {name: round(sum(values) / len(values), 3) for name, values in means.items()}

    def end(self) -> None:
        """Stop; a sample that is being taken is finished."""
        self._ends.set()
        self.join(timeout=1.0)


def _samplers(on_gpu: bool) -> list[Sampler]:
    """The sources of metrics on this machine.

    Args:
        on_gpu: Whether the training runs on a GPU, so that its metrics are missed.
    """
    return [each for each in (_host_sampler(), _gpu_sampler(on_gpu)) if each is not None]


def _host_sampler(proc: Path = Path("/proc")) -> Sampler | None:
    """CPU and memory, from the files of Linux or by psutil where it is installed."""
    if (proc / "stat").exists() and (proc / "self" / "statm").exists():
        return _ProcFiles(proc)
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        logger.warning("CPU and memory are not recorded on this system without psutil: install it.")
        return None
    psutil.cpu_percent()  # what follows is measured from here

    def sample() -> dict[str, float]:
        memory = psutil.Process().memory_info().rss
        return {"system_cpu_percent": psutil.cpu_percent(), "system_memory_gib": memory / GIB}

    return sample


class _ProcFiles:
    """CPU and memory from ``/proc``."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._before = self._times()

    def _times(self) -> tuple[int, int]:
        """Idle time and all time of all CPUs, in ticks."""
        line = (self._proc / "stat").read_text().partition("\n")[0]
        user, nice, system, idle, waiting, *more = map(int, line.split()[1:9])
        return idle + waiting, user + nice + system + idle + waiting + sum(more)

    def __call__(self) -> dict[str, float]:
        found = {}
        idle, total = self._times()
        if total > self._before[1]:
            found["system_cpu_percent"] = 100 * (
                1 - (idle - self._before[0]) / (total - self._before[1])
            )
            self._before = idle, total
        pages = int((self._proc / "self" / "statm").read_text().split()[1])
        return found | {"system_memory_gib": pages * self._page / GIB}


def _gpu_sampler(on_gpu: bool) -> Sampler | None:
    """The GPUs that this process can see, by NVIDIA's management library."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        if on_gpu:
            logger.warning(
                "GPU metrics are not recorded: that needs the package nvidia-ml-py. Install it "
                "with: pip install 'kbtrain[gpu-metrics]'."
            )
        return None
    try:
        nvml.nvmlInit()
        gpus = _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except nvml.NVMLError as error:
        level = logging.WARNING if on_gpu else logging.INFO
        logger.log(level, "GPU metrics are not recorded: %s.", error)
        return None

    def sample() -> dict[str, float]:
        found: dict[str, float] = {}
        for number, gpu in enumerate(gpus):
            name = f"system_gpu{number}"
            with contextlib.suppress(nvml.NVMLError_NotSupported):
                found[f"{name}_percent"] = float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
            with contextlib.suppress(nvml.NVMLError_NotSupported):
                found[f"{name}_memory_gib"] = nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB
            with contextlib.suppress(nvml.NVMLError_NotSupported):
                found[f"{name}_power_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
        return found

    return sample


def _visible(nvml: Any, named: str | None) -> list[Any]:
    """The GPUs named by ``CUDA_VISIBLE_DEVICES``, by number or UUID; all if it is not set."""
    if named is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    found = []
    for name in filter(None, map(str.strip, named.split(","))):
        if name.startswith("-"):  # what follows is hidden
            break
        by_number = name.isdigit()
        find = nvml.nvmlDeviceGetHandleByIndex if by_number else nvml.nvmlDeviceGetHandleByUUID
        found.append(find(int(name) if by_number else name))
    return found
