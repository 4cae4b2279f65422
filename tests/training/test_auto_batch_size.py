"""auto_find_batch_size: from the beginning, with smaller micro-batches and the same updates."""

import importlib

import keras
import pytest
from helpers import Recorder, StopAt, arguments, make_data, same, train_logs, weights, with_weights
from keras import ops

from kbtrain import Trainer, backends
from kbtrain.errors import ConfigurationError, OutOfMemoryError
from kbtrain.training.auto_batch_size import smaller

BACKEND = backends.load()


class Greedy(keras.layers.Layer):
    """Asks for 2^48 bytes if there are more than ``limit`` samples, more than any machine has."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)

    def call(self, x):
        if x.shape[0] is None or x.shape[0] <= self.limit:
            return x
        tall = ops.tile(x[:, :2], (2**23 // x.shape[0], 1))
        return x * ops.sort(ops.matmul(tall, ops.transpose(tall)), axis=0)[0, 0]


def model(limit=None, seed=0):
    layers = [
        keras.Input((3,)),
        *([Greedy(limit)] if limit else []),
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.Dropout(0.3, seed=5),
        keras.layers.Dense(1),
    ]
    return with_weights(keras.Sequential(layers), seed)


def the_error():
    """An error of the class, with the text, that the framework raises on a GPU."""
    framework = importlib.import_module(BACKEND.name)
    if BACKEND.name == "torch":
        return framework.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if BACKEND.name == "tensorflow":
        return framework.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes."
    return framework.errors.JaxRuntimeError(text)


def make(path, the_model, size, accumulation=1, callbacks=(), data=None, **changes):
    defaults = {
        "max_steps": 6,
        "train_sampling_strategy": "random",
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
    }
    args = arguments(path, **(defaults | changes))
    data = make_data(24) if data is None else data
    return Trainer(
        the_model, args, train_dataset=data, eval_dataset=data, loss="mse", callbacks=callbacks
    )


def fail_above(monkeypatch, limit, after):
    """Every step of more than ``limit`` samples fails once ``after`` of them were run."""
    compile_steps = BACKEND.compile_steps
    calls = []

    def compile_all(*args):
        step = compile_steps(*args)

        def run(block, count):
            result = step(block, count)
            calls.append(size := keras.tree.flatten(block)[0].shape[-2])
            if size > limit and calls.count(size) > after:
                raise the_error()
            return result

        return run

    monkeypatch.setattr(BACKEND, "compile_steps", compile_all)
    return calls


@pytest.mark.parametrize(
    ("start", "sizes"),
    [
        ((64, 1), [64, 32, 16, 8, 4, 2, 1]),
        ((24, 1), [24, 12, 8, 6, 4, 3, 2, 1]),
        ((6, 4), [6, 4, 3, 2, 1]),
        ((7, 1), [7, 1]),
    ],
)
def test_sizes_divide_the_update(start, sizes):
    found = [start]
    while (following := smaller(*found[-1])) is not None:
        found.append(following)
    assert [size for size, _ in found] == sizes
    assert {size * accumulation for size, accumulation in found} == {start[0] * start[1]}


def test_memory_that_no_machine_has(tmp_path):
    found = make(tmp_path, model(limit=2), 8, auto_find_batch_size=True)
    found.fit()
    assert found.args.per_device_train_batch_size == 2
    assert found.args.gradient_accumulation_steps == 4
    direct = make(tmp_path, model(), 2, 4)
    direct.fit()
    assert same(weights(found.model), weights(direct.model))
    assert train_logs(found) == train_logs(direct)


@pytest.mark.parametrize("from_init", [False, True])
def test_a_failure_in_the_middle_leaves_no_trace(tmp_path, monkeypatch, from_init):
    direct = make(tmp_path / "direct", model(), 2, 4)
    direct.fit()
    begun = []
    recorder = Recorder({"on_step_end": lambda a, s, c, k: begun.append(a.train_batch_size)})
    calls = fail_above(monkeypatch, 2, after=3)
    first = None if from_init else model()
    found = make(tmp_path / "found", first, 8, 1, [recorder], auto_find_batch_size=True,
                 save_strategy="steps", save_steps=2) if first else Trainer(
        None, arguments(tmp_path / "found", per_device_train_batch_size=8, max_steps=6,
                        train_sampling_strategy="random", auto_find_batch_size=True,
                        save_strategy="steps", save_steps=2),
        train_dataset=make_data(24), loss="mse", callbacks=[recorder],
        model_init=model,
    )  # fmt: skip
    found.fit()
    assert calls == [8] * 4 + [4] * 4 + [2] * 6
    assert begun == [8] * 3 + [4] * 3 + [2] * 6
    assert same(weights(found.model), weights(direct.model))
    assert train_logs(found) == train_logs(direct)
    names = sorted(path.name for path in (tmp_path / "found").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_an_optimizer_of_the_users_starts_again_too(tmp_path, monkeypatch):
    def given():
        return keras.optimizers.SGD(0.05, momentum=0.9)

    def trainer(name, size, accumulation, **changes):
        args = arguments(tmp_path / name, per_device_train_batch_size=size, max_steps=5,
                         gradient_accumulation_steps=accumulation, **changes)  # fmt: skip
        return Trainer(
            model(), args, train_dataset=make_data(24), loss="mse", optimizers=(given(), None)
        )

    direct = trainer("direct", 4, 2)
    direct.fit()
    fail_above(monkeypatch, 4, after=2)
    found = trainer("found", 8, 1, auto_find_batch_size=True)
    found.fit()
    assert same(weights(found.model), weights(direct.model))
    assert int(found.optimizer.iterations) == 5


def test_a_resumed_run_begins_with_the_size_that_was_found(tmp_path, monkeypatch):
    calls = fail_above(monkeypatch, 2, after=1)
    saves = {"save_strategy": "steps", "save_steps": 4, "auto_find_batch_size": True}
    whole = make(tmp_path / "whole", model(), 8, **saves)
    whole.fit()
    make(tmp_path / "part", model(), 8, callbacks=[StopAt(4)], **saves).fit()
    calls.clear()
    rest = make(tmp_path / "part", model(seed=9), 8, **saves)
    rest.fit(resume_from_checkpoint=True)
    assert calls == [2, 2]
    assert same(weights(rest.model), weights(whole.model))


def test_one_sample_that_does_not_fit(tmp_path, monkeypatch):
    calls = fail_above(monkeypatch, 0, after=0)
    trainer = make(tmp_path, model(), 4, auto_find_batch_size=True)
    with pytest.raises(OutOfMemoryError, match="Update 1 did not fit into memory"):
        trainer.fit()
    assert calls == [4, 2, 1]


def test_without_it_the_error_says_what_to_do(tmp_path, monkeypatch):
    fail_above(monkeypatch, 0, after=1)
    with pytest.raises(MemoryError, match=r"Update 2 .*auto_find_batch_size=True") as caught:
        make(tmp_path, model(), 4).fit()
    assert type(caught.value.__cause__) is type(the_error())


def test_batches_of_the_users_own(tmp_path, monkeypatch):
    fail_above(monkeypatch, 0, after=0)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return make_data(4)

    trainer = make(tmp_path, model(), 8, data=Batches(), auto_find_batch_size=True)
    with pytest.raises(ConfigurationError, match="cannot make these batches smaller"):
        trainer.fit()


def test_an_evaluation_without_memory_is_not_met_by_smaller_updates(tmp_path):
    trainer = make(
        tmp_path, model(limit=4), 4, auto_find_batch_size=True, per_device_eval_batch_size=8,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    with pytest.raises(OutOfMemoryError, match=r"per_device_eval_batch_size. Received: 8"):
        trainer.fit()
    assert trainer.args.per_device_train_batch_size == 4


def test_what_is_memory_and_what_is_not():
    assert BACKEND.is_oom(the_error())
    assert BACKEND.is_oom(MemoryError("Unable to allocate 4.00 TiB for an array"))
    assert not BACKEND.is_oom(ValueError("out of memory of the past"))
    assert not BACKEND.is_oom(RuntimeError("shapes do not match"))


def test_the_record_of_the_run_is_that_of_the_attempt_that_fits(tmp_path, monkeypatch):
    fail_above(monkeypatch, 4, after=2)
    trainer = make(tmp_path, model(), 8, auto_find_batch_size=True)
    trainer.fit()
    record = trainer.record
    (session,) = record.sessions
    assert session["facts"]["accumulation"] == 2
    assert record.logs == trainer.state.log_history
    assert [step for step, _ in record.throughput] == [1, 2, 3, 4, 5, 6]
    texts = [warning["text"] for warning in record.warnings]
    assert len(texts) == len(set(texts))
    assert any("did not fit" in text or "memory" in text for text in texts)
