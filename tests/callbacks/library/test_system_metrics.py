"""CPU, memory and GPUs in the logs, taken by a thread that ends with the training."""

import json
import logging
import sys
import threading
import types

import pytest
from helpers_trainer import make

from kbtrain import ConfigurationError, SystemMetricsCallback
from kbtrain.callbacks.library import system_metrics


def threads():
    return [t for t in threading.enumerate() if t.name == "kbtrain-system-metrics"]


class Sampled(SystemMetricsCallback):
    """Takes a sample at every log, on top of those of its thread, which come once an hour."""

    def __init__(self):
        super().__init__(interval=3600)
        self.seen = []

    def log_values(self, trainer):
        self.seen.append(len(threads()))
        self._thread.sample()
        return super().log_values(trainer)


def test_logs_have_cpu_and_memory(tmp_path):
    callback = Sampled()
    trainer = make(tmp_path, callbacks=[callback], report_to="json")
    trainer.fit()
    logs = [log for log in trainer.state.log_history if "system_memory_gib" in log]
    assert len(logs) == 4
    assert callback.seen == [1, 1, 1, 1]
    assert all(0.01 < log["system_memory_gib"] < 1000 for log in logs)
    assert all(0 <= log.get("system_cpu_percent", 0) <= 100 for log in logs)
    (path,) = tmp_path.glob("*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert any("system_memory_gib" in str(line) for line in written)
    assert threads() == []


def test_the_thread_ends_with_a_training_that_fails(tmp_path, monkeypatch):
    trainer = make(tmp_path, callbacks=[SystemMetricsCallback()])
    monkeypatch.setattr(trainer, "log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert threads() == []


def files(proc, stat, pages):
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "stat").write_text(f"cpu  {stat}\ncpu0 1 2 3\n")
    (proc / "self" / "statm").write_text(f"9000 {pages} 100 1 0 900 0\n")


@pytest.mark.neutral
def test_what_the_files_of_linux_say(tmp_path):
    files(tmp_path, "100 0 50 800 50 0 0 0 0 0", 1)
    sampler = system_metrics._host_sampler(tmp_path)
    files(tmp_path, "160 10 60 850 60 5 5 0 7 7", 1 << 18)
    page = system_metrics.os.sysconf("SC_PAGE_SIZE")
    # 150 ticks since, 60 of them idle or waiting for a disk.
    found = sampler()
    assert found == {
        "system_cpu_percent": pytest.approx(60.0),
        "system_memory_gib": page * 2**18 / 2**30,
    }
    assert "system_cpu_percent" not in sampler()  # no tick since


@pytest.mark.neutral
def test_elsewhere_psutil_or_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert system_metrics._host_sampler(tmp_path) is None
    assert "psutil" in caplog.text
    process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(rss=2**31))
    module = types.SimpleNamespace(cpu_percent=lambda: 25.0, Process=lambda: process)
    monkeypatch.setitem(sys.modules, "psutil", module)
    found = system_metrics._host_sampler(tmp_path)()
    assert found == {"system_cpu_percent": 25.0, "system_memory_gib": 2.0}


class Nvml(types.ModuleType):
    """NVIDIA's library with two GPUs, the second of which cannot tell its power."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return types.SimpleNamespace(gpu=90 + gpu)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return types.SimpleNamespace(used=(gpu + 1) * 2**30)

    def nvmlDeviceGetPowerUsage(self, gpu):
        if gpu == 1:
            raise self.NVMLError_NotSupported
        return 350_500


@pytest.mark.neutral
def test_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first = {
        "system_gpu0_percent": 90.0,
        "system_gpu0_memory_gib": 1.0,
        "system_gpu0_power_watts": 350.5,
    }
    second = {"system_gpu1_percent": 91.0, "system_gpu1_memory_gib": 2.0}
    assert system_metrics._gpu_sampler(True)() == first | second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,-1,0")
    found = {name.replace("gpu1", "gpu0"): value for name, value in second.items()}
    assert system_metrics._gpu_sampler(True)() == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert system_metrics._gpu_sampler(True)() == {}


@pytest.mark.neutral
def test_a_source_that_fails_is_left_out(caplog):
    def fails():
        raise OSError("gone")

    thread = system_metrics._Thread(1.0, [fails, lambda: {"a": 1.0}])
    thread.sample()
    thread.sample()
    assert thread.take() == {"a": 1.0}
    assert caplog.text.count("gone") == 1


@pytest.mark.neutral
def test_a_log_has_means_or_the_newest_values():
    values = iter([{"a": 1.0}, {"a": 2.0, "b": 4.0}])
    thread = system_metrics._Thread(1.0, [lambda: next(values)])
    assert thread.take() == {}
    thread.sample()
    thread.sample()
    assert thread.take() == {"a": 1.5, "b": 4.0}
    assert thread.take() == {"a": 2.0, "b": 4.0}


@pytest.mark.neutral
def test_without_the_package_a_training_on_a_gpu_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert system_metrics._gpu_sampler(on_gpu=False) is None
    assert caplog.text == ""
    assert system_metrics._gpu_sampler(on_gpu=True) is None
    assert "kbtrain[gpu-metrics]" in caplog.text


@pytest.mark.neutral
@pytest.mark.parametrize("interval", [0, -1, "a", None])
def test_an_interval_must_be_positive(interval):
    with pytest.raises(ConfigurationError, match="interval above 0"):
        SystemMetricsCallback(interval)


@pytest.mark.cross
def test_the_real_package_without_a_driver(tmp_path, caplog, monkeypatch):
    import pynvml

    def missing(*args):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)  # a machine may have a driver
    with caplog.at_level(logging.INFO, "kbtrain"):
        trainer = make(tmp_path, callbacks=[SystemMetricsCallback(interval=3600)])
        trainer.fit()
    assert caplog.text.count("GPU metrics are not recorded") == 1
    assert "NVML" in caplog.text
    assert trainer.state.global_step == 4
