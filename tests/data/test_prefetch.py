"""Reading ahead: the same items, bounded, errors at their place, and no thread that stays."""

import contextlib
import functools
import itertools
import threading
import time
import traceback

import h5py
import numpy as np
import pytest
from helpers import Recorder, StopAt, arguments, fit, linear_model, make_data, same, weights

from kbtrain import Trainer
from kbtrain.data import Batches, DataLoader, prefetch
from kbtrain.data import blocks as blocks_module
from kbtrain.data.prefetch import Prefetched


def threads():
    return [t for t in threading.enumerate() if t.name == "kbtrain-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threads()
    yield
    assert [thread for thread in threads() if thread not in before] == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it: no load makes fast data slow."""
    now = [0.0]

    class Time:
        perf_counter = staticmethod(lambda: now[0])

    monkeypatch.setattr(prefetch, "time", Time)
    return now


@pytest.fixture
def always_ahead(monkeypatch):
    """Arrays are read by a thread from the first block on, however fast they are."""
    monkeypatch.setattr(blocks_module, "Prefetched", functools.partial(Prefetched, patience=0.0))


def until(condition):
    """Wait for another thread; a bug shows as a failure instead of a hang."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ------------------------------------------------------------------------------------- the iterator


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("patience", [0.0, 60.0])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_items_and_order_are_those_of_the_iterator(ahead, patience, count):
    with contextlib.closing(Prefetched(iter(range(count)), ahead, patience)) as items:
        assert list(items) == list(range(count))
        assert next(items, "end") == "end"
        assert items.threaded == (patience == 0.0)


def test_no_more_items_are_made_than_asked_for():
    made = []

    def make():
        for i in itertools.count():
            made.append(i)
            yield i

    with contextlib.closing(Prefetched(make(), ahead=3, patience=0.0)) as items:
        assert next(items) == 0
        until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]
        assert next(items) == 1
        until(lambda: len(made) == 5)
    assert len(made) == 5


def test_a_thread_starts_after_two_slow_items_and_not_for_fast_ones(clock):
    def make(slow):
        for i in range(6):
            clock[0] += 0.02 if i in slow else 0.005
            yield i

    for slow, expected in [((), False), ((0, 2, 4), False), ((0, 1), True), ((3, 4), True)]:
        with contextlib.closing(Prefetched(make(slow), patience=0.01)) as items:
            assert [next(items) for _ in range(6)] == list(range(6))
            assert items.threaded is expected


@pytest.mark.parametrize("patience", [0.0, 60.0])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_error_comes_at_its_place_with_the_traceback_of_the_data(patience, error):
    def code_of_the_user():
        raise error("broken row")

    def make():
        yield 0
        yield 1
        code_of_the_user()

    with contextlib.closing(Prefetched(make(), patience=patience)) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(error, match="broken row") as caught:
            next(items)
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "code_of_the_user" in frames
        assert next(items, "end") == "end"


def test_closing_early_ends_the_thread_and_the_generator():
    ended = []

    def make():
        try:
            yield from itertools.count()
        finally:
            ended.append(True)

    items = Prefetched(make(), patience=0.0)
    assert next(items) == 0
    assert threads()
    items.close()
    items.close()
    assert ended == [True]
    assert next(items, "end") == "end"


def test_closing_waits_for_an_item_in_the_making():
    begun, go_on = threading.Event(), threading.Event()

    def make():
        begun.set()
        go_on.wait(30)
        yield 0

    items = Prefetched(make(), patience=0.0)
    threading.Timer(0.05, go_on.set).start()
    reader = threading.Thread(target=lambda: next(items, None))
    reader.start()
    assert begun.wait(30)
    items.close()
    reader.join(30)
    assert not reader.is_alive()


# ---------------------------------------------------------------------------------------- in blocks


def column(count=40):
    x = np.arange(count, dtype="float32")[:, None]
    return x, x


def contents(block):
    (chunk,) = block.chunks
    return next(iter(chunk.values()))[0][: block.updates].ravel().tolist()


@pytest.mark.usefixtures("always_ahead")
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_blocks_read_ahead_are_the_same(limit):
    loader = DataLoader(column(), 2, strategy="random", seed=1)
    expected = [x.ravel().tolist() for x, _ in loader.epoch(3, 2)]
    with contextlib.closing(Batches(loader).blocks(3, 2, 1, lambda: limit)) as blocks:
        found = [contents(block) for block in blocks]
    assert list(itertools.chain(*found)) == list(itertools.chain(*expected))


@pytest.mark.usefixtures("clock")
def test_fast_arrays_need_no_thread():
    seen = []
    with contextlib.closing(
        Batches(DataLoader(column(4000), 2)).blocks(0, 0, 1, lambda: 64)
    ) as blocks:
        for _ in blocks:
            seen += threads()
    assert seen == []


def test_the_first_reads_of_a_run_are_short():
    """One batch, then four times as many each time: a slow disk does not delay the first step."""
    reads = []

    class Counted(DataLoader):
        def reader(self, epoch):
            read = super().reader(epoch)
            return lambda number, count: (reads.append(count), read(number, count))[1]

    batches = Batches(Counted(column(400), 2))
    for epoch in range(2):
        list(batches.blocks(epoch, 0, 1, lambda: 64))
    assert [count for count in reads if count] == [1, 4, 16, 64, 64, 51, 64, 64, 64, 8]


def test_arrays_on_disk(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        x = file.create_dataset("x", data=column()[0])
        loader = DataLoader((x, x), 2, strategy="random", seed=1)
        found = [contents(block) for block in Batches(loader).blocks(0, 0, 1, lambda: 4)]
    expected = [x.ravel().tolist() for x, _ in DataLoader(column(), 2, strategy="random", seed=1)]
    assert list(itertools.chain(*found)) == list(itertools.chain(*expected))


# -------------------------------------------------------------------------------------- in training


def train(tmp_path, name, callbacks=(), **changes):
    options = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "train_sampling_strategy": "random",
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
    }
    args = arguments(tmp_path / name, **(options | changes))
    return Trainer(
        linear_model(), args, train_dataset=make_data(30), loss="mse", callbacks=list(callbacks)
    )


def test_training_reads_ahead_without_changing_a_number(tmp_path, monkeypatch):
    plain = train(tmp_path, "plain")
    plain.fit()
    started = []
    monkeypatch.setattr(
        blocks_module,
        "Prefetched",
        lambda items: started.append(items) or Prefetched(items, patience=0.0),
    )
    ahead = train(tmp_path, "ahead")
    ahead.fit()
    assert len(started) == 2
    assert same(weights(plain.model), weights(ahead.model))


@pytest.mark.usefixtures("always_ahead")
def test_a_checkpoint_has_the_position_of_what_was_trained_on(tmp_path):
    whole = train(tmp_path, "whole")
    whole.fit()
    stopped = train(
        tmp_path, "stopped", [StopAt(5)], save_strategy="steps", save_steps=5, logging_steps=5
    )
    stopped.fit()
    resumed = train(tmp_path, "stopped", logging_steps=5)
    resumed.fit(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert same(weights(whole.model), weights(resumed.model))


@pytest.mark.usefixtures("always_ahead")
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log"])
def test_no_thread_is_left_when_a_callback_fails(tmp_path, event):
    def fail(*args):
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback") as caught:
        fit(
            linear_model(),
            arguments(tmp_path, per_device_train_batch_size=1),
            make_data(30),
            callbacks=[Recorder({event: fail})],
        )
    assert not threads()  # while the exception, and all its frames, are still alive
    del caught
