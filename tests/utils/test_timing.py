"""Where the time of a run goes: data, host, evaluations apart."""

import time

from helpers import make_data
from helpers_trainer import make

from kbtrain import (
    TrainerCallback,
)
from kbtrain.utils.timing import StepTimes


def test_a_slow_source_is_seen_in_the_data_time(tmp_path):
    x, y = make_data(32)

    def slowly():
        for sample in zip(x, y, strict=True):
            time.sleep(0.01)
            yield sample

    class Source:
        def __iter__(self):
            return slowly()

    metrics = make(tmp_path, data=Source(), eval_dataset=(x, y), max_steps=8).fit().metrics
    assert metrics["train_data_runtime"] >= 8 * 4 * 0.01 * 0.7  # the first batch came before
    parts = [metrics[f"train_{name}_runtime"] for name in ("data", "compute", "host")]
    assert min(parts) >= 0
    assert sum(parts) <= metrics["train_runtime"] + 1e-3


def test_a_slow_callback_is_host_time_and_evaluations_are_none(tmp_path):
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.05)

        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(0.2)

    run = make(tmp_path, callbacks=[Slow()], eval_strategy="steps", eval_steps=2).fit()
    times = run.metrics
    assert times["train_host_runtime"] >= 4 * 0.05
    parts = [times[f"train_{name}_runtime"] for name in ("data", "compute", "host")]
    assert times["train_runtime"] - sum(parts) >= 2 * 0.2


def test_nested_times_count_once(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr("kbtrain.utils.timing.time.perf_counter", lambda: next(now))
    times = StepTimes()
    with times.of("other"), times.of("compute"):
        pass
    assert (times.data, times.compute, times.other) == (0.0, 4.0, 3.0)
    assert times.split(10.0) == {
        "train_data_runtime": 0.0,
        "train_compute_runtime": 4.0,
        "train_host_runtime": 3.0,
    }
