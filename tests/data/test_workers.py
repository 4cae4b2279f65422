"""Worker processes: the same batches in the same order, whoever makes them."""

import contextlib
import gc
import logging
import multiprocessing
import os
import random
import sys
from multiprocessing import synchronize

import numpy as np
import pytest
from helpers import StopAt, arguments, linear_model, make_data, same, weights
from helpers_workers import Fatal, Noisy, Pairs

from kbtrain import Trainer
from kbtrain.data import Batches, DataLoader, StreamLoader
from kbtrain.data.workers import WorkerLoader, make_batch
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.training.dataloaders import make_loader


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    assert not [p for p in multiprocessing.active_children() if p.is_alive()]


def loader(data=None, **changes):
    return DataLoader(data or Noisy(), 4, **({"strategy": "random", "seed": 3} | changes))


def without_process(batch):
    return {name: array.tolist() for name, array in batch.items() if name != "process"}


@pytest.mark.core
def test_workers_make_the_batches_that_one_process_would():
    """Random augmentation included; the position is that of the batches, for any number of them."""
    plain = loader()
    expected = [without_process(make_batch(plain, 1, number)) for number in range(6)]
    with contextlib.closing(WorkerLoader(plain, workers=2)) as workers:
        assert len(workers) == 6
        for start in (0, 3):
            batches = list(workers.epoch(1, start))
            assert [without_process(batch) for batch in batches] == expected[start:]
            processes = {int(p) for batch in batches for p in batch["process"]}
            assert len(processes) == 2
            assert os.getpid() not in processes


def test_workers_that_ended_leave_no_semaphores_to_the_garbage_collector():
    """Python 3.13.0 warned when it came upon them in the middle of the start of other processes."""

    def semaphores():
        # By type: isinstance asks the object too, and among all there are some that then warn.
        return sum(issubclass(type(known), synchronize.SemLock) for known in gc.get_objects())

    gc.collect()
    before = semaphores()
    gc.disable()
    try:
        for persistent in (False, True):
            with contextlib.closing(WorkerLoader(loader(), 1, persistent=persistent)) as workers:
                batches = workers.epoch(0)
                next(batches)
                assert semaphores() > before
                batches.close()
            assert semaphores() == before
    finally:
        gc.enable()


def test_persistent_workers_go_on_to_the_next_epoch_and_can_be_moved():
    plain = loader()
    with contextlib.closing(WorkerLoader(plain, workers=1, persistent=True)) as workers:
        seen = [list(workers.epoch(epoch)) for epoch in (0, 1)]
        for epoch, batches in enumerate(seen):
            expected = [without_process(make_batch(plain, epoch, n)) for n in range(6)]
            assert [without_process(batch) for batch in batches] == expected
        assert seen[0][0]["process"][0] == seen[1][-1]["process"][0]
        (moved,) = workers.epoch(5, 5)
        assert without_process(moved) == without_process(make_batch(plain, 5, 5))


@pytest.mark.core
@pytest.mark.parametrize(
    ("data", "message", "note"),
    [
        (
            Noisy(broken=9),
            r"Batch 2 of train_dataset: .*OSError: a broken file",
            "code_of_the_user",
        ),
        (Fatal(broken=9), r"Batch \d of train_dataset: the worker processes failed", None),
    ],
    ids=["error", "death"],
)
def test_a_failure_in_a_worker_is_one_of_the_data(data, message, note):
    workers = WorkerLoader(loader(data, strategy="sequential"), workers=1, prefetch=1)
    with pytest.raises(DataError, match=message) as caught:
        list(workers.epoch(0))
    assert note is None or note in "".join(caught.value.__notes__)


def test_a_batch_made_in_this_process_leaves_its_generators_alone():
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.random(1)
    np.random.seed(1)
    first = WorkerLoader(loader(), workers=1).peek()
    assert random.getstate() == before[0]
    assert np.random.random(1) == before[1]
    assert without_process(first) == without_process(make_batch(loader(), 0, 0))


def test_a_run_with_workers_is_resumed_exactly(tmp_path):
    """Augmented in the worker: one worker or none that is left over from before decides nothing."""

    def make(folder, *callbacks, **changes):
        args = arguments(
            tmp_path / folder,
            dataloader_num_workers=1,
            per_device_train_batch_size=4,
            max_steps=6,
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=3,
            **changes,
        )
        data = Pairs()
        return Trainer(
            linear_model(), args, train_dataset=data, loss="mse", callbacks=list(callbacks)
        )

    whole, stopped = make("whole", dataloader_persistent_workers=True), make("part", StopAt(3))
    resumed = make("part", dataloader_prefetch_factor=1)
    whole.fit()
    stopped.fit()
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))


# ------------------------------------------------------------------------------------ who gets them


def made(tmp_path, data, collate=None, train=True, **changes):
    changes = {"dataloader_num_workers": 2, "max_steps": 1} | changes
    return make_loader(data, arguments(tmp_path, **changes), collate, "train_dataset", train)


def test_arrays_take_the_fast_path_without_workers(tmp_path):
    assert made(tmp_path, make_data()).vectorised
    assert isinstance(made(tmp_path, make_data(), collate=list), WorkerLoader)
    assert isinstance(made(tmp_path, Noisy(), train=False), WorkerLoader)
    assert isinstance(made(tmp_path, Noisy(), dataloader_num_workers=0), DataLoader)


def test_an_iterable_cannot_be_shared(tmp_path, caplog):
    assert isinstance(made(tmp_path, iter([1])), StreamLoader)
    assert "train_dataset can only be read sequentially" in caplog.text


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ConfigurationError, match=r"dataloader_num_workers needs.*kbtrain\[grain\]"):
        made(tmp_path, Noisy())


# ------------------------------------------------------------------------------- a thread, if asked


class Watched(Noisy):
    def __getitem__(self, index):
        import threading

        return {
            "x": np.full(3, index),
            "thread": int(threading.current_thread().name[:7] == "kbtrain"),
        }


@pytest.mark.parametrize("factor", [None, 1, 3])
def test_a_thread_reads_ahead_where_it_is_asked_for(tmp_path, factor):
    loader = made(tmp_path, Watched(), dataloader_num_workers=0, dataloader_prefetch_factor=factor)
    with contextlib.closing(Batches(loader)) as batches:
        blocks = list(batches.blocks(1, 0, 1, lambda: 4))
    rows = [b.chunks[0]["single"]["x"][i, :, 0] for b in blocks for i in range(b.updates)]
    expected = [batch["x"][:, 0] for batch in loader.epoch(1)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(expected))
    threads = [b.chunks[0]["single"]["thread"][i] for b in blocks for i in range(b.updates)]
    assert np.concatenate(threads).mean() == (0 if factor is None else 1)


def test_what_the_data_raises_in_the_thread_comes_at_its_batch(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    loader = made(
        tmp_path,
        Noisy(broken=9),
        dataloader_num_workers=0,
        dataloader_prefetch_factor=2,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=4,
    )
    blocks = Batches(loader).blocks(0, 0, 1, lambda: 1)
    assert [next(blocks).updates, next(blocks).updates] == [1, 1]
    with pytest.raises(DataError, match="Batch 2 of train_dataset") as caught:
        next(blocks)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_program_without_a_guard_is_told_so(monkeypatch):
    """What a worker sees while it imports a program that goes straight into the training."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with (
        contextlib.closing(WorkerLoader(loader(), workers=1)) as workers,
        pytest.raises(ConfigurationError, match="started the training again.*__main__"),
    ):
        next(workers.epoch(0))
