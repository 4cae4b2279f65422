"""Format 2: files that plain Keras loads, shards, and what format 1 left behind."""

import json
import shutil

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from helpers import arguments, batch_norm_model, make_data, train_logs, weights
from helpers_resume import make_trainer
from paths import GOLDEN

from kbtrain import Trainer
from kbtrain.checkpoint import CheckpointStore, read_arrays, write_arrays
from kbtrain.checkpoint.keras_layout import keras_layout
from kbtrain.checkpoint.run_state import cached_keras_layout, gather_model
from kbtrain.checkpoint.storage import array_writer
from kbtrain.errors import CheckpointError

LAYERS = keras.layers
VERSION_1 = GOLDEN / "checkpoint_v1"


class Own(LAYERS.Layer):
    """Stores something of its own besides its variables."""

    def build(self, shape):
        self.w = self.add_weight(shape=(70, 300), name="w")
        self.note = np.arange(3.0)

    def call(self, x):
        return x

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["note"] = self.note

    def load_own_variables(self, store):
        self.note = np.array(store["note"])
        self.w.assign(store["0"])


def sequential():
    return batch_norm_model(dropout=0.2)


def functional():
    inputs = keras.Input((5,))
    shared = LAYERS.Dense(5, name="shared")
    x = shared(shared(inputs))
    inner = keras.Sequential([keras.Input((5,)), LAYERS.Dense(300), LAYERS.Dense(5)])
    return keras.Model(inputs, LAYERS.Add()([inner(x), x]))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [LAYERS.Dense(4, name="twin"), LAYERS.Dense(4, name="twin")]
        self.by_name = {"a": LAYERS.LayerNormalization()}
        self.arrays = LAYERS.Dense(2)  # the name of a group of ours

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.arrays(self.by_name["a"](x))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


def own():
    return keras.Sequential([keras.Input((3,)), Own(), LAYERS.Dense(2)])


def bfloat16():
    return keras.Sequential(
        [keras.Input((40,)), LAYERS.Dense(900, dtype="bfloat16"), LAYERS.Dense(1)]
    )


def randomise(model, seed):
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(generator.normal(size=variable.shape))


@pytest.mark.parametrize("build", [sequential, functional, own, bfloat16], ids=lambda f: f.__name__)
def test_plain_keras_loads_the_weights(tmp_path, build):
    model, other = build(), build()
    randomise(model, 0)
    randomise(other, 1)
    path = tmp_path / "model.weights.h5"
    layout = cached_keras_layout(model)
    write_arrays(path, gather_model(model), layout.links, layout.values)
    other.load_weights(path)
    for first, second in zip(model.get_weights(), other.get_weights(), strict=True):
        assert first.tobytes() == second.tobytes()
    if build is own:
        np.testing.assert_array_equal(other.layers[0].note, [0, 1, 2])


def test_names_of_ours_are_kept_from_a_model_that_uses_them(tmp_path):
    """Its attribute `arrays` cannot be loaded by Keras; our own reading is not disturbed."""
    model = subclassed()
    randomise(model, 0)
    path = tmp_path / "model.weights.h5"
    layout = cached_keras_layout(model)
    assert any(place.startswith("arrays/") for place in layout.links)
    write_arrays(path, gather_model(model), layout.links, layout.values)
    for first, second in zip(weights(model), read_arrays(path).values(), strict=True):
        assert first.tobytes() == second.tobytes()


def test_the_values_are_there_once(tmp_path):
    model = functional()
    arrays, layout = gather_model(model), cached_keras_layout(model)
    sizes = []
    for name, links in (("with", layout.links), ("without", {})):
        write_arrays(tmp_path / name, arrays, links)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] - sizes[1] < 20_000 < sum(array.nbytes for array in arrays.values()) * 2
    with h5py.File(tmp_path / "with") as file:
        assert len({file[place].id.get_offset() or place for place in layout.links}) >= 2
        assert set(file) == {"arrays", "index", "layers"}


def test_a_layer_that_cannot_be_saved_costs_a_warning_only(caplog):
    class Broken(LAYERS.Dense):
        def save_own_variables(self, store):
            raise RuntimeError("not me")

    model = keras.Sequential([keras.Input((2,)), Broken(1)])
    assert keras_layout(model, {}).links == {}
    assert "not me" in caplog.text


def test_a_checkpoint_of_a_run_is_loaded_by_a_model_that_knows_nothing_of_kbtrain(tmp_path):
    trainer = Trainer(
        sequential(),
        arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4),
        train_dataset=make_data(), loss="mse", metrics=["mae"],
    )  # fmt: skip
    trainer.fit()
    other = sequential()
    other.load_weights(tmp_path / "checkpoint-4" / "model.weights.h5")
    for first, second in zip(trainer.model.get_weights(), other.get_weights(), strict=True):
        assert first.tobytes() == second.tobytes()


# --- large arrays, and shards ---------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**22])
def test_large_arrays_go_around_libhdf5_and_come_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(array_writer, "DIRECT_BYTES", 16)
    monkeypatch.setattr(array_writer, "CHUNK_BYTES", chunk)
    arrays = {
        "a/b": np.arange(24, dtype="float64").reshape(2, 3, 4).transpose(),
        "scalar": np.float32(3),
        "empty": np.zeros((0, 7)),
        "a/c": np.arange(40).astype(ml_dtypes.bfloat16),
        "flags": np.array([True] * 33),
    }
    entry = write_arrays(tmp_path / "x.h5", arrays)
    read = read_arrays(tmp_path / "x.h5")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert (tmp_path / "x.h5").stat().st_size == entry.size


def shard_names(path):
    return sorted(p.name for p in path.iterdir() if p.suffix == ".h5")


def test_a_group_beyond_the_limit_is_spread_over_files(tmp_path):
    store = CheckpointStore(tmp_path, shard_bytes=100)
    model = {f"net_{i}/w": np.full(5, i, "float64") for i in (2, 10, 1, 9, 3)}  # 40 bytes each
    model["big"] = np.zeros(100)
    path = store.save(1, {"model": model, "optimizer": {}, "rng": {"a": np.zeros(1)}})
    assert shard_names(path) == [
        *(f"model_0000{i}.weights.h5" for i in range(4)), "optimizer.h5", "rng.h5",
    ]  # fmt: skip
    loaded = CheckpointStore(tmp_path).load(path)
    assert list(loaded.arrays["model"]) == list(model)
    for name, array in model.items():
        np.testing.assert_array_equal(loaded.arrays["model"][name], array)
    (path / "model_00001.weights.h5").unlink()
    assert store.verify(path) == ["model_00001.weights.h5: missing"]


@pytest.mark.parametrize("build", [sequential, functional, own, bfloat16], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shard_bytes", [1, 100])
def test_plain_keras_loads_what_is_spread_over_files(tmp_path, build, shard_bytes):
    model, other = build(), build()
    randomise(model, 0)
    randomise(other, 1)
    path = CheckpointStore(tmp_path, shard_bytes).save(
        1, {"model": gather_model(model)}, places={"model": cached_keras_layout(model)}
    )
    assert len(shard_names(path)) > 1
    other.load_weights(path / "model.weights.json")
    for first, second in zip(model.get_weights(), other.get_weights(), strict=True):
        assert first.tobytes() == second.tobytes()
    if build is own:
        np.testing.assert_array_equal(other.layers[0].note, [0, 1, 2])


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002", "x-12345-of-99999", "model_00001.weights", "Model_7.weights"],
)
def test_names_that_look_like_shards_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="Received: "):
        CheckpointStore(tmp_path).save(1, {name: {}})
    with pytest.raises(CheckpointError, match="Received: "):
        CheckpointStore(tmp_path).save(1, {}, {"model.weights": {}})


def test_a_run_in_shards_goes_on_exactly(tmp_path):
    def run(stop, resume=None, shard_bytes=60):
        trainer = Trainer(
            sequential(),
            arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=stop,
                      lr_scheduler_type="constant"),
            train_dataset=make_data(), loss="mse",
        )  # fmt: skip
        trainer.store.shard_bytes = shard_bytes
        trainer.fit(resume)
        return weights(trainer.model)

    expected = run(8, shard_bytes=2**30)
    shutil.rmtree(tmp_path / "checkpoint-8")
    run(4)
    assert len(shard_names(tmp_path / "checkpoint-4")) > 6
    for first, second in zip(run(8, True), expected, strict=True):
        assert first.tobytes() == second.tobytes()


# --- format 1 -------------------------------------------------------------------------------------


def test_a_checkpoint_of_format_1_is_read_and_resumed(tmp_path):
    shutil.copytree(VERSION_1 / "checkpoint-4", tmp_path / "checkpoint-4")
    store = CheckpointStore(tmp_path)
    checkpoint = store.load(tmp_path / "checkpoint-4")
    assert checkpoint.manifest.format_version == 1
    assert sorted(checkpoint.arrays) == ["metrics", "model", "optimizer", "rng"]
    trainer = make_trainer("deterministic", tmp_path)
    trainer.fit(resume_from_checkpoint=True)
    expected = json.loads((VERSION_1 / "expected.json").read_text())
    np.testing.assert_allclose(train_logs(trainer), expected["loss"], rtol=1e-5)
    pairs = list(zip(weights(trainer.model), expected["weights"], strict=True))
    # A bias before BatchNormalization has no gradient but rounding, of which Adam makes steps of
    # full length; it moves the moving mean and nothing else.
    for got, wanted in [pair for i, pair in enumerate(pairs) if i not in (1, 4)]:
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    newest = store.latest_intact()
    assert (newest.step, newest.manifest.format_version) == (9, 2)
