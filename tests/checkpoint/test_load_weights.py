"""Weights from checkpoints and Keras files: all of them, or what fits, with a report."""

import dataclasses
import hashlib
import io
import logging
import shutil

import h5py
import keras
import numpy as np
import pytest
from helpers import arguments, make_data
from paths import GOLDEN

from kbtrain import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigurationError,
    Trainer,
    load_weights,
)
from kbtrain.checkpoint.storage.manifest import read_manifest, write_manifest
from kbtrain.utils.files.filesystem import FileEntry

LAYERS = keras.layers


def build(width=4, head="head", outputs=1, more=False):
    layers = [
        keras.Input((3,)),
        LAYERS.Dense(width, name="body"),
        LAYERS.BatchNormalization(name="norm"),
        LAYERS.Dropout(0.1, seed=1),
        *([LAYERS.Dense(width, name="more")] if more else []),
        LAYERS.Dense(outputs, name=head),
    ]
    return keras.Sequential(layers, name="net")


def randomised(seed, **changes):
    model = build(**changes)
    generator = np.random.default_rng(seed)
    model.set_weights([generator.normal(size=w.shape) for w in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as a run, a checkpoint and Keras files; and as arrays."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(
        randomised(0),
        arguments(folder, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=make_data(), loss="mse",
    )  # fmt: skip
    trainer.fit()
    trainer.model.save(folder / "whole.keras")
    trainer.model.save_weights(folder / "plain.weights.h5")
    paths = {
        "run": folder,
        "checkpoint": folder / "checkpoint-1",
        "a checkpoint's file": folder / "checkpoint-1" / "model.weights.h5",
        "weights": folder / "plain.weights.h5",
        "keras": folder / "whole.keras",
    }
    return paths, trainer.model.get_weights()


KINDS = ("run", "checkpoint", "a checkpoint's file", "weights", "keras")


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_loaded_from_every_kind_of_source(sources, kind):
    paths, expected = sources
    model = randomised(1)
    report = load_weights(model, paths[kind])
    assert [w.tobytes() for w in model.get_weights()] == [w.tobytes() for w in expected]
    assert (report.missing, report.unexpected, report.different) == ((), (), ())
    assert len(report.loaded) >= len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_strict_changes_nothing_if_something_does_not_fit(sources, kind):
    model = randomised(1, outputs=2)
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(CheckpointMismatchError, match=r"\(4, 1\) saved, \(4, 2\) expected"):
        load_weights(model, str(sources[0][kind]))
    for first, second in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_not_strict_loads_what_fits_and_reports_the_rest(sources, kind, caplog):
    paths, expected = sources
    model = randomised(1, outputs=2)
    before = [w.copy() for w in model.get_weights()]
    with caplog.at_level(logging.WARNING, logger="kbtrain"):
        report = load_weights(model, paths[kind], strict=False)
    after = model.get_weights()
    for i in range(6):  # body and norm
        np.testing.assert_array_equal(after[i], expected[i])
    for i in (6, 7):  # the head
        np.testing.assert_array_equal(after[i], before[i])
    assert len(report.different) == 2
    assert "(4, 1) saved, (4, 2) expected" in report.different[0]
    assert "2 different" in caplog.text


def test_a_new_head_is_missing_and_the_old_one_unexpected(sources):
    report = load_weights(randomised(1, head="new"), sources[0]["checkpoint"], strict=False)
    assert report.missing == ("net/new/kernel", "net/new/bias")
    assert report.unexpected == ("net/head/kernel", "net/head/bias")
    assert "net/body/kernel" in report.loaded
    assert "2 missing (net/new/kernel, net/new/bias)" in str(report)


def test_nothing_that_fits_is_an_error(sources):
    model = keras.Sequential([keras.Input((7,)), LAYERS.Dense(9, name="other")])
    with pytest.raises(CheckpointMismatchError):
        load_weights(model, sources[0]["checkpoint"], strict=False)


def test_what_cannot_be_loaded(sources, tmp_path):
    model = build()
    with pytest.raises(CheckpointNotFoundError, match="There is no"):
        load_weights(model, tmp_path / "nothing.keras")
    with pytest.raises(CheckpointNotFoundError):
        load_weights(model, tmp_path)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ends in \.weights\.h5, \.keras or"):
        load_weights(model, tmp_path / "x.npz")
    with pytest.raises(ConfigurationError, match="no variables yet"):
        load_weights(keras.Sequential([LAYERS.Dense(1)]), sources[0]["weights"])


@pytest.mark.parametrize("name", ["x.keras", "x.weights.h5"])
@pytest.mark.parametrize("data", [b"", b"PK\3\4garbage", b"\x89HDF\r\n\x1a\n" + bytes(50)])
def test_damaged_files_are_errors_in_words(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="is not a readable Keras file"):
        load_weights(build(), tmp_path / name)


def test_training_begins_with_the_loaded_weights_at_step_zero(sources, tmp_path):
    model = randomised(1)
    load_weights(model, sources[0]["run"])
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=make_data(), loss="mse",
    )  # fmt: skip
    assert trainer.fit().global_step == 1
    np.testing.assert_array_equal(trainer.model.get_weights()[0], sources[1][0])


# --- export ---------------------------------------------------------------------------------------


def test_exported_weights_load_in_plain_keras(sources, tmp_path):
    from kbtrain.checkpoint.export import export

    target = tmp_path / "out.weights.h5"
    export(sources[0]["checkpoint"], target)
    model = randomised(1)
    model.load_weights(target)
    assert [w.tobytes() for w in model.get_weights()] == [w.tobytes() for w in sources[1]]
    with h5py.File(target) as file:
        assert set(file) == {"layers"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.weights.h5"]


def test_an_exported_model_loads_in_plain_keras(sources, tmp_path):
    from kbtrain.cli import main

    target = tmp_path / "out.keras"
    assert main(["checkpoint", "export", str(sources[0]["run"]), str(target)]) == 0
    model = keras.models.load_model(target)
    assert [w.tobytes() for w in model.get_weights()] == [w.tobytes() for w in sources[1]]
    x = np.ones((2, 3), "float32")
    assert model(x).shape == (2, 1)


def forge(source, folder, name, data):
    """A checkpoint with a file that is not kbtrain's, and a manifest that vouches for it."""
    shutil.copytree(source, folder)
    manifest = read_manifest(folder)
    files = dict(manifest.files)
    for file in (name, "manifest.json"):
        (folder / file).unlink()
    (folder / name).write_bytes(data)
    entry = FileEntry(len(data), hashlib.sha256(data).hexdigest(), files[name].group)
    write_manifest(folder, dataclasses.replace(manifest, files={**files, name: entry}))


def strange_file(kind, outside):
    if kind == "garbage":
        return b"\x89HDF\r\n\x1a\n" + bytes(range(256))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if kind == "link":
            file["layers"] = h5py.ExternalLink(str(outside), "/layers")
        else:
            group = file.create_group("layers")
            group["again"] = group
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["garbage", "link", "loop"])
def test_export_of_a_forged_file_of_arrays(sources, tmp_path, capsys, kind):
    from kbtrain.cli import main

    folder, target = tmp_path / "checkpoint-1", tmp_path / "out.weights.h5"
    data = strange_file(kind, sources[0]["checkpoint"] / "model.weights.h5")
    forge(sources[0]["checkpoint"], folder, "model.weights.h5", data)
    assert main(["checkpoint", "export", str(folder), str(target)]) == 2
    assert "model.weights.h5 is not as kbtrain wrote it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_export_of_a_configuration_that_is_no_model(sources, tmp_path, capsys):
    from kbtrain.cli import main

    folder = tmp_path / "checkpoint-1"
    forge(sources[0]["checkpoint"], folder, "model_config.json", b"[1, 2]")
    assert main(["checkpoint", "export", str(folder), str(tmp_path / "x.keras")]) == 2
    assert "does not describe a model. Received: list" in capsys.readouterr().err


def test_export_says_what_is_missing(tmp_path, capsys):

    from kbtrain.cli import main

    old = GOLDEN / "checkpoint_v1"
    for target, words in (("x.keras", "no model_config.json"), ("x.weights.h5", "has format 1")):
        assert main(["checkpoint", "export", str(old), str(tmp_path / target)]) == 2
        assert words in capsys.readouterr().err
    assert main(["checkpoint", "export", str(old), str(tmp_path / "x.pt")]) == 2
    assert (
        "must end in .keras, .weights.h5, .safetensors, .onnx or .tflite" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


# --- copies of a model ---------------------------------------------------------------------------


def sequentials():
    parts = [keras.Sequential([LAYERS.Dense(4), LAYERS.Dense(4)]) for _ in range(2)]
    return keras.Sequential([keras.Input((3,)), *parts, LAYERS.Dense(1)])


def branches():
    x = keras.Input((3,))
    one = keras.Sequential([LAYERS.Dense(4), keras.Sequential([LAYERS.Dense(4)])])(x)
    other = keras.Sequential([LAYERS.Dense(4), LAYERS.BatchNormalization()])(x)
    return keras.Model(x, LAYERS.Dense(1)(LAYERS.Add()([one, other])))


@pytest.fixture(scope="module", params=[sequentials, branches])
def trained(request, tmp_path_factory):
    """A model that was trained, and the folder of its run."""
    folder = tmp_path_factory.mktemp("run")
    LAYERS.Dense(1)  # so that the numbers do not begin at 0
    trainer = Trainer(
        request.param(),
        arguments(folder, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=make_data(), loss="mse",
    )  # fmt: skip
    trainer.fit()
    return trainer.model, folder, request.param


@pytest.mark.parametrize("how", ["clone", "json", "again"])
def test_a_copy_gets_the_weights_whatever_its_layers_are_called(trained, how):
    model, folder, build_again = trained
    copies = {
        "clone": lambda: keras.models.clone_model(model),
        "json": lambda: keras.models.model_from_json(model.to_json()),
        "again": build_again,
    }
    copy = copies[how]()
    generator = np.random.default_rng(5)
    copy.set_weights([generator.normal(size=w.shape) for w in copy.get_weights()])
    report = load_weights(copy, folder)
    assert (report.missing, report.unexpected, report.different) == ((), (), ())
    x = make_data()[0]
    np.testing.assert_allclose(
        copy.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_layers_of_other_names_in_another_order_are_not_paired(tmp_path):
    def towers(*names):
        x = keras.Input((3,))
        return keras.Model(x, [keras.Sequential([LAYERS.Dense(2)], name=n)(x) for n in names])

    left_right = towers("left", "right")
    trainer = Trainer(
        left_right,
        arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=(np.ones((4, 3)), [np.ones((4, 2))] * 2), loss=["mse", "mse"],
    )  # fmt: skip
    trainer.fit()
    swapped = towers("right", "left")
    load_weights(swapped, tmp_path)
    x = np.ones((1, 3), "float32")
    for a, b in zip(left_right(x), reversed(swapped(x)), strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
    with pytest.raises(CheckpointMismatchError):
        load_weights(towers("up", "down"), tmp_path)
