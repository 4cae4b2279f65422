"""Files of ``export``, loaded again: by Keras, by kbtrain, and by the programs they are for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, with_weights

import kbtrain
from kbtrain import Trainer, backends, export, load_weights
from kbtrain.checkpoint.formats import deployment, safetensors_file
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigurationError,
    OutputError,
)

X = make_data(4)[0]


def network(seed=0):
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4, activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(2),
    ]
    return with_weights(keras.Sequential(layers, name="net"), seed)


def outputs(model, x=X):
    return keras.ops.convert_to_numpy(model(x))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after some updates, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = Trainer(network(), args, train_dataset=make_data(outputs=2), loss="mse")
    trainer.fit()
    return trainer.model, folder / "checkpoint-2"


@pytest.mark.parametrize("source", ["model", "checkpoint"])
@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.safetensors"])
def test_a_file_holds_the_model(trained, tmp_path, name, source):
    model, checkpoint = trained
    path = export(model if source == "model" else checkpoint, tmp_path / name)
    if name == "a.keras":
        other = keras.saving.load_model(path)
    else:
        other = network(seed=1)
        assert len(load_weights(other, path).missing) == 0
    np.testing.assert_array_equal(outputs(other), outputs(model))
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "a.safetensors"])
def test_bfloat16_is_read_again(tmp_path, name):
    """HDF5 lacks the type: Keras stores the bits, with a note."""
    model, other = (
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16")], name="net")
        for _ in range(2)
    )
    load_weights(other, export(model, tmp_path / name))
    for one, two in zip(model.weights, other.weights, strict=True):
        assert one.dtype == two.dtype == "bfloat16"
        values = [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in (one, two)]
        np.testing.assert_array_equal(*values)


def numbered(first):
    """Layers of one shape, with names as Keras numbers them."""
    layers = [keras.layers.Dense(3, name=f"dense_{first + i}") for i in range(3)]
    return keras.Sequential([keras.Input((3,)), *layers], name="net")


@pytest.mark.parametrize("name", ["a.safetensors", "a.keras", "a.weights.h5"])
def test_the_tenth_layer_follows_the_ninth(tmp_path, name):
    """As text, dense_10 stands before dense_9."""
    model, other = numbered(9), numbered(2)
    load_weights(other, export(model, tmp_path / name))
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.neutral
def test_files_of_other_programs_are_in_the_order_of_their_numbers(tmp_path):
    from safetensors.numpy import save_file

    model, other = numbered(9), numbered(2)
    save_file(
        {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}, tmp_path / "a.safetensors"
    )
    load_weights(other, tmp_path / "a.safetensors")
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_arrays_of_safetensors_have_the_names_of_the_variables(trained, tmp_path):
    from safetensors.numpy import load_file

    arrays = load_file(export(trained[0], tmp_path / "a.safetensors"))
    kernel = trained[0].get_layer(index=0).kernel
    np.testing.assert_array_equal(arrays[kernel.path], keras.ops.convert_to_numpy(kernel))
    with pytest.raises(CheckpointMismatchError, match=r"\(3, 4\) saved, \(3, 5\) expected"):
        load_weights(
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)], name="net"),
            tmp_path / "a.safetensors",
        )


# ------------------------------------------------------------------------ what concerns no backend


@pytest.mark.neutral
def test_types_of_safetensors(tmp_path):
    import ml_dtypes

    path = tmp_path / "a.safetensors"
    arrays = {
        "scalar": np.float32(3),
        "columns": np.arange(6, dtype="float64").reshape(2, 3).T,
        "short": np.ones(2, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), "int8"),
    }
    safetensors_file.write(path, arrays, {"k": "v"})
    read, texts = safetensors_file.read(path)
    assert texts == {"k": "v"}
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, np.shape(array))
        np.testing.assert_array_equal(read[name].astype("float64"), array.astype("float64"))
    with pytest.raises(CheckpointError, match="complex128"):
        safetensors_file.write(path, {"a": np.ones(1, complex)}, {})
    safetensors_file.write(path, {"a": np.ones(1, ml_dtypes.float8_e4m3fn)}, {})
    with pytest.raises(CheckpointFormatError, match="NumPy lacks"):
        safetensors_file.read(path)


@pytest.mark.neutral
def test_damaged_safetensors_are_errors_in_words(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors_file.write(path, {"a": np.ones(8)}, {})
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[:-1], b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(CheckpointDamagedError, match="not a readable safetensors file"):
            load_weights(network(), path)


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("a.pt", {}, "must end in .keras, .weights.h5, .safetensors, .onnx or .tflite"),
        ("folder", {}, "name the format: 'saved_model' or 'transformers'"),
        ("a.keras", {"format": "pickle"}, "format must be one of keras, weights"),
        ("a.keras", {"format": "onnx"}, "the format 'onnx' ends in .onnx"),
        ("a.keras", {"opset_version": 3}, "takes no options. Received: opset_version"),
        ("a.safetensors", {"format": "adapters"}, "has no adapters. Call kbtrain.enable_lora"),
        ("folder", {"format": "transformers"}, "models of KerasHub .* Received: Sequential"),
    ],
)
def test_mistakes(tmp_path, target, options, message):
    with pytest.raises(ConfigurationError, match=message):
        export(network(), tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.neutral
@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
@pytest.mark.parametrize(
    ("name", "installed", "error", "message"),
    [
        (
            "a.onnx",
            False,
            ImportError("Get tf2onnx"),
            r"not installed: Get tf2onnx\. .*'kbtrain\[o",
        ),
        ("a.onnx", False, ValueError("No onnx!"), r"No onnx! Install .*'kbtrain\[onnx\]'"),
        ("a.onnx", True, ValueError("no such op\ngraph\n" * 99), r"op\. Shapes of fixed sizes"),
        ("a.tflite", True, ImportError("Get lite"), "a package that is not installed: Get lite"),
    ],
)
def test_what_a_converter_cannot_do_is_said_in_words(
    tmp_path, monkeypatch, name, installed, error, message, backend
):
    def fails(*args, **options):
        Path(args[0]).write_bytes(b"half")
        raise error

    model = network()
    monkeypatch.setattr(model, "export", fails)
    monkeypatch.setattr(deployment, "find_spec", lambda package: installed or None)
    monkeypatch.setattr("keras.config.backend", lambda: backend)
    with pytest.raises(ConfigurationError, match=message) as info:
        export(model, tmp_path / name)
    elsewhere = "the same command with KERAS_BACKEND=tensorflow" in str(info.value)
    assert elsewhere == (backend == "torch" and installed)
    assert len(str(info.value)) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.neutral
def test_a_divided_model_is_exported_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(backends.load(), "owned_blocks", lambda variable: object())
    with pytest.raises(ConfigurationError, match=r"divided among processes \(net/"):
        export(network(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.neutral
def test_a_folder_is_complete_or_absent(tmp_path):
    def fails():
        with deployment.writing_folder(tmp_path / "a") as place:
            (place / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        with deployment.writing_folder(tmp_path / "a") as place:
            (place / "whole").touch()
        (tmp_path / "a" / "whole").unlink()  # an empty folder is used
    (tmp_path / "a" / "mine").touch()
    with (
        pytest.raises(OutputError, match="is not an empty folder"),
        deployment.writing_folder(tmp_path / "a"),
    ):
        pass
    assert (tmp_path / "a" / "mine").exists()


# ------------------------------------------------------------------------ the programs they are for

SERVED = """
import json, sys
import numpy as np
import onnxruntime
import tensorflow as tf
from kbtrain.cli import main

checkpoint, folder = sys.argv[1:]
x = np.load(folder + "/x.npy")
for words in (["a.onnx"], ["a.tflite"], ["served", "--format", "saved_model"]):
    target = [f"{folder}/{words[0]}", *words[1:]]
    assert main(["checkpoint", "export", checkpoint, *target]) == 0
session = onnxruntime.InferenceSession(folder + "/a.onnx")
lite = tf.lite.Interpreter(folder + "/a.tflite").get_signature_runner()
served = tf.saved_model.load(folder + "/served")
found = {
    "onnx": session.run(None, {session.get_inputs()[0].name: x})[0],
    "litert": next(iter(lite(**{next(iter(lite.get_input_details())): x}).values())),
    "saved_model": served.serve(x).numpy(),
}
np.savez(folder + "/found.npz", **found)
"""


@pytest.mark.cross
def test_a_checkpoint_of_one_backend_is_served_through_another(trained, tmp_path):
    """Trained here, exported on TensorFlow, computed by three runtimes."""
    model, checkpoint = trained
    np.save(tmp_path / "x.npy", X)
    environ = os.environ | {"KERAS_BACKEND": "tensorflow"}
    environ["PYTHONPATH"] = os.pathsep.join([str(Path(kbtrain.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVED, checkpoint, tmp_path],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "found.npz")
    assert sorted(found) == ["litert", "onnx", "saved_model"]
    for name in found:
        np.testing.assert_allclose(found[name], outputs(model), atol=1e-6, err_msg=name)


@pytest.mark.cross
def test_transformers_reads_what_kerashub_converts(tmp_path):
    import torch
    from keras_hub.models import GPT2Backbone, GPT2CausalLM
    from transformers import GPT2LMHeadModel

    backbone = GPT2Backbone(32, 2, 2, 8, 16, dropout=0.0, max_sequence_length=16)
    model = with_weights(GPT2CausalLM(backbone), scale=0.3)
    export(model, tmp_path / "gpt2", "transformers")
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["n_layer"] == 2
    ids = np.arange(10).reshape(2, 5)
    ours = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()(torch.tensor(ids)).logits
    np.testing.assert_allclose(theirs.detach().numpy(), keras.ops.convert_to_numpy(ours), atol=1e-4)
    shutil.rmtree(tmp_path / "gpt2")
