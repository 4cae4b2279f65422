"""Variables that are divided among processes: saved by blocks, restored by blocks or whole.

Here one process plays two: it says which blocks of its variables each of them would own.
"""

import functools

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, same, weights, with_weights
from helpers_peers import cut, together
from helpers_saving import At

from kbtrain import Trainer, backends, load_weights
from kbtrain.checkpoint import CheckpointStore, distributed, plan_restore
from kbtrain.checkpoint.async_checkpointer import AsyncCheckpointer
from kbtrain.checkpoint.formats.keras_file import save_keras_file
from kbtrain.checkpoint.run_state import gather_model, model_variables, restore_model
from kbtrain.checkpoint.storage import blocks
from kbtrain.checkpoint.storage.folder_writer import Contents
from kbtrain.errors import CheckpointMismatchError
from kbtrain.model.variable_names import name_variables
from kbtrain.training import actions
from kbtrain.utils.array_blocks import OwnedBlocks

pytestmark = pytest.mark.core
SIZE = 2


def build():
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(6, activation="tanh", name="body"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2, seed=5),
        keras.layers.Dense(1, name="head"),
    ]
    return with_weights(keras.Sequential(layers, name="net"), 1)


def owned_by(rank, variable):
    """Matrices are divided along their first axis, vectors have an owner, the rest is whole."""
    value = keras.ops.convert_to_numpy(variable.value)
    if value.ndim == 0 or value.dtype.kind != "f":
        return None
    return cut(value, (2, 1) if value.ndim == 2 else (1,), rank, SIZE)


@pytest.fixture
def as_process(monkeypatch):
    """Become one of the processes."""

    def become(rank):
        monkeypatch.setattr(backends.load(), "owned_blocks", functools.partial(owned_by, rank))
        monkeypatch.setattr(
            backends.load(), "spans_devices", lambda v: owned_by(rank, v) is not None
        )

    yield become
    monkeypatch.undo()


def train(folder, callbacks=(), resume=None, **changes):
    trainer = Trainer(
        build(),
        arguments(
            folder, per_device_train_batch_size=4, max_steps=6, learning_rate=0.05,
            train_sampling_strategy="random", **changes,
        ),
        train_dataset=make_data(), loss="mse", metrics=["mae"], callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(resume)
    return trainer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run that was saved as by two processes after 3 of 6 steps, and its result."""
    patch, directory = pytest.MonkeyPatch(), tmp_path_factory.mktemp("run")

    def save(trainer):
        snapshots, own = [], trainer.saver
        for rank in range(SIZE):
            patch.setattr(trainer.backend, "owned_blocks", functools.partial(owned_by, rank))
            trainer.saver = AsyncCheckpointer(trainer.store, writes=rank == 0)
            snapshots.append(actions._snapshot(trainer, trainer.current_run))
        patch.undo()
        trainer.saver = own

        def one(peers):
            s = snapshots[peers.rank]
            contents = Contents(s.arrays, s.documents, s.info, s.places, s.other_files)
            distributed.save(CheckpointStore(directory), s.step, contents, peers, "save")

        assert together(SIZE, one) == [None] * SIZE
        trainer.saved = weights(trainer.model)

    return train(tmp_path_factory.mktemp("whole"), [At(3, save)]), directory / "checkpoint-3"


def test_what_is_whole_is_in_one_process_and_the_rest_in_blocks(source):
    checkpoint = CheckpointStore(source[1].parent).load(source[1])
    divided = {
        group: [entry.outline.name for entry in entries if entry.blocks is not None]
        for group, entries in checkpoint.manifest.arrays.items()
    }
    assert checkpoint.manifest.format_version == 3
    assert divided["model"][:2] == ["net/body/kernel", "net/body/bias"]
    assert "iteration" not in divided["optimizer"]
    assert len(divided["optimizer"]) == 12
    for saved, value in zip(checkpoint.arrays["model"].values(), source[0].saved, strict=False):
        np.testing.assert_array_equal(saved, value)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_run_of_one_process_goes_on_from_the_blocks_bit_for_bit(
    source, tmp_path, monkeypatch, lazy
):
    resolve = CheckpointStore.resolve
    monkeypatch.setattr(
        CheckpointStore, "resolve", lambda store, resume: resolve(store, resume, lazy=lazy)
    )
    resumed = train(tmp_path, resume=str(source[1]))
    assert resumed.state.global_step == 6
    assert same(weights(resumed.model), weights(source[0].model))
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(
        source[0].state.log_history[-1]["train_loss"], abs=0
    )


def test_weights_are_loaded_and_exported(source, tmp_path):
    trainer, path = source
    model = build()
    report = load_weights(model, path)
    assert not report.missing
    assert same(weights(model), trainer.saved)

    from kbtrain.cli import main

    assert main(["checkpoint", "export", str(path), str(tmp_path / "a.weights.h5")]) == 0
    again = build()
    again.load_weights(tmp_path / "a.weights.h5")
    for found, expected in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert main(["checkpoint", "export", str(path), str(tmp_path / "a.keras")]) == 0
    whole = keras.saving.load_model(tmp_path / "a.keras")
    for found, expected in zip(whole.weights, model.weights, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_process_reads_its_own_blocks_only(source, as_process, monkeypatch, rank):
    read, taken = [], {}
    original = blocks.read_stored_block

    def reading(folder, outline, block, verify=True):
        read.append(block.file)
        return original(folder, outline, block, verify)

    def assign_blocks(variable, read_block):
        own = backends.load().owned_blocks(variable)
        taken[variable.path] = [read_block(b.start, b.values.shape) for b in own.blocks]

    model = build()
    as_process(rank)
    monkeypatch.setattr(backends.load(), "assign_blocks", assign_blocks)
    monkeypatch.setattr(blocks, "read_stored_block", reading)
    restore_model(model, CheckpointStore(source[1].parent).follow(source[1].name, lazy=True))
    assert set(read) == {"model.h5", f"model-p0000{rank}.h5"}
    saved = dict(zip((v.path for v in model_variables(model)), source[0].saved, strict=False))
    assert len(taken) == 8
    for name, values in taken.items():
        whole = saved[name]
        expected = cut(whole, (2, 1) if whole.ndim == 2 else (1,), rank, SIZE).blocks
        assert len(values) == len(expected)
        for value, block in zip(values, expected, strict=True):
            np.testing.assert_array_equal(value, block.values)


def test_blocks_are_cut_out_of_whole_arrays_too(source, as_process, monkeypatch):
    """A checkpoint of one process, read into variables that are divided."""
    taken = {}
    model, other = build(), build()
    saved = gather_model(model)
    as_process(1)
    monkeypatch.setattr(
        backends.load(), "assign_blocks",
        lambda variable, read: taken.update({variable.path: read((3, 0), (3, 1))})
        if variable.path == "net/head/kernel" else None,
    )  # fmt: skip
    plan_restore(name_variables(model_variables(other)), saved).apply()
    np.testing.assert_array_equal(taken["net/head/kernel"], saved["net/head/kernel"][3:])


def test_copies_of_blocks_share_no_memory_and_what_is_whole_can_be_left_out(as_process):
    model = build()
    as_process(0)
    found = gather_model(model, divided_only=True)
    assert all(isinstance(value, OwnedBlocks) for value in found.values())
    assert "net/body/kernel" in found
    assert not any("seed" in name for name in found)
    before = np.array(found["net/body/kernel"].blocks[0].values)
    model.set_weights([w * 0 for w in model.get_weights()])
    np.testing.assert_array_equal(found["net/body/kernel"].blocks[0].values, before)


def test_any_variable_takes_its_values_from_blocks(source):
    """One that lies on one device, too."""
    stored = CheckpointStore(source[1].parent).load(source[1], lazy=True).arrays["model"]
    model = build()
    for variable in model.weights:
        assert backends.load().owned_blocks(variable) is None
        backends.load().assign_blocks(variable, stored[variable.path].read_block)
        value = keras.ops.convert_to_numpy(variable.value)
        np.testing.assert_array_equal(value, stored[variable.path])


def test_a_keras_file_has_the_values_that_no_process_has_whole(tmp_path):
    model = build()
    before = weights(model)
    values = [(v, np.full(v.shape, 7, "float32")) for v in model.weights]
    save_keras_file(model, tmp_path / "a.keras", values)
    saved = keras.saving.load_model(tmp_path / "a.keras")
    assert all((value == 7).all() for value in saved.get_weights())
    assert same(weights(model), before)
    for variable in model.weights:
        value = keras.ops.convert_to_numpy(variable.value)
        np.testing.assert_array_equal(backends.load().whole_value(variable), value)


def test_values_are_cast_and_checked_before_any_is_assigned(source):
    checkpoint = CheckpointStore(source[1].parent).load(source[1], lazy=True)
    stored = checkpoint.arrays["model"]
    half = keras.Variable(np.zeros((3, 6)), dtype="float16", name="kernel")
    plan_restore({"net/body/kernel": half}, {"net/body/kernel": stored["net/body/kernel"]}).apply()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(half.value), source[0].saved[0].astype("float16")
    )
    for variable in (
        keras.Variable(np.zeros((6, 3)), dtype="float32"),
        keras.Variable(np.zeros((3, 6)), dtype="int32", trainable=False),
    ):
        with pytest.raises(CheckpointMismatchError, match="net/body/kernel"):
            plan_restore(
                {"net/body/kernel": variable}, {"net/body/kernel": stored["net/body/kernel"]}
            )
