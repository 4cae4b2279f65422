"""What rests on private parts fails: the log says so once, and the plain way gives the same."""

import importlib
import logging
import sys
import tomllib

import keras
import numpy as np
import pytest
from paths import ROOT

from kbtrain import Trainer, TrainingArguments, backends
from kbtrain.checkpoint import name_variables
from kbtrain.checkpoint.keras_layout import KerasLayout, keras_layout
from kbtrain.errors import ConfigurationError
from kbtrain.utils import fallback
from kbtrain.utils.fallback import ISSUES, NoFallback, PrivateApi
from kbtrain.utils.packages import keras_private

BACKEND = backends.load()


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(fallback, "_reported", set())


def broken(*args, **kwargs):
    raise AttributeError("moved to another place")


def part(fast, plain=lambda x: x + 1, **options):
    return PrivateApi("Counting", "keras", fast, plain, "It is counted plainly.", **options)


def reports(caplog):
    return [r.getMessage() for r in caplog.records if "does not work with" in r.getMessage()]


# --- the mechanism --------------------------------------------------------------------------------


@pytest.mark.core
def test_a_failure_is_reported_once_with_the_version_and_the_issue_page(caplog):
    calls = []

    def fast(x):
        calls.append(x)
        return broken()

    count = part(fast)
    assert [count(1), count(2), part(fast)(3)] == [2, 3, 4]
    assert calls == [1, 3]  # an object that has failed is not asked again
    (message,) = reports(caplog)
    assert f"keras {keras.__version__} (AttributeError: moved to another place)" in message
    assert "Counting does not work" in message
    assert "It is counted plainly." in message
    assert message.endswith(ISSUES)


def test_what_fails_both_ways_is_no_failure_of_the_private_part(caplog):
    def refuse(x):
        raise ValueError("a layer of the user's does not take it")

    count = part(broken, refuse)
    with pytest.raises(ValueError, match="of the user's"):
        count(1)
    assert reports(caplog) == []
    assert not count.is_broken


@pytest.mark.core
@pytest.mark.parametrize("error", [NoFallback("control"), ConfigurationError("wrong")])
def test_what_is_raised_on_purpose_passes_through(error):
    def fast(x):
        raise error

    with pytest.raises(type(error)):
        part(fast)(1)


def test_who_knows_an_exception_lets_it_pass():
    with pytest.raises(AttributeError):
        part(broken, passes=lambda error: "moved" in str(error))(1)


def test_the_issue_page_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Issues"] == ISSUES


# --- a run with each part broken ------------------------------------------------------------------

ATTRIBUTES = {
    # what breaks: module, attribute, and the backends that use it
    "masks, read": ("keras.src.backend.common.masking", "get_keras_mask", None),
    "scopes": ("kbtrain.model.wrappers.gradient_checkpointing", "stateless_scope", "recompute"),
    "surroundings": ("kbtrain.utils.packages.keras_private", "get_global_attribute", "recompute"),
    "values, read": ("kbtrain.utils.packages.keras_private", "read_values._fast", "recompute"),
    "values, put": ("kbtrain.utils.packages.keras_private", "write_values._fast", "jax"),
    "values, recorded": ("kbtrain.backends.torch.capture.step", "held_values", "torch"),
    "convolutions": ("kbtrain.backends.jax.conv_layout", "_rewritten", "jax"),
    "jaxpr": ("kbtrain.backends.jax.conv_layout", "jaxpr_as_fun", "jax"),
    "recorder": ("kbtrain.backends.torch.capture.step", "record", "torch"),
    "make_fx": ("kbtrain.backends.torch.capture.step", "CapturedStep", "torch"),
    "program": ("kbtrain.backends.torch.capture.step", "make_program", "torch"),
    "native": ("kbtrain.backends.torch.capture.step", "native_operations", "torch"),
    "norms": ("torch", "_foreach_norm", "torch"),
    "products": ("torch", "_foreach_mul_", "torch"),
    "XLA": ("kbtrain.backends.tensorflow.optimizer", "_for_xla._fast", "tensorflow"),
    "determinism": ("kbtrain.backends.tensorflow.device", "_is_determinism_on._fast", "tensorflow"),
}


def train(tmp_path, **options):
    """Weights and losses of six updates of a small convolutional model."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.DepthwiseConv2D(2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(24, 6, 6, 2)).astype("float32"), np.arange(24) % 2
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, optim="adamw",
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = Trainer(model, arguments, train_dataset=(x, y), loss=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [np.array(w) for w in model.get_weights()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", [n for n, (_, _, b) in ATTRIBUTES.items()
                                  if b in (None, "recompute", BACKEND.name)])  # fmt: skip
def test_a_step_without_a_private_part_gives_the_same(
    name, expected, tmp_path, monkeypatch, caplog
):
    module, attribute, used_by = ATTRIBUTES[name]
    for item in everywhere():
        monkeypatch.setattr(item, "is_broken", False)
    importlib.import_module(module)
    monkeypatch.setattr(f"{module}.{attribute}", broken)
    with caplog.at_level(logging.WARNING, "kbtrain"):
        losses, weights = train(tmp_path, gradient_checkpointing=used_by == "recompute")
    messages = reports(caplog)
    assert len(messages) == 1, messages
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    for weight, other in zip(weights, expected[1], strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-6)


class Refusing(keras.layers.Layer):
    """Takes what builds the model, and no batch."""

    def call(self, x):
        if x.shape[0] == 4:
            raise ArithmeticError("a layer of the user's")
        return x


def test_a_mistake_in_a_layer_is_no_failure_of_a_private_part(tmp_path, caplog):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), Refusing()])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none",
        save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    data = np.ones((4, 2), "float32"), np.ones((4, 2), "float32")
    with pytest.raises(Exception, match="a layer of the user's"):
        Trainer(model, arguments, train_dataset=data, loss="mse").train()
    assert reports(caplog) == []


def everywhere():
    """The private parts that belong to a module, of kbtrain as it is loaded."""
    return [
        value
        for name, module in list(sys.modules.items())
        if name.startswith("kbtrain")
        for value in vars(module).values()
        if isinstance(value, PrivateApi)
    ]


# --- Keras ----------------------------------------------------------------------------------------


def test_layers_are_found_without_keras_walk(monkeypatch, caplog):
    shared = keras.layers.Dense(2)
    inner = keras.Sequential([keras.Input((2,)), shared, keras.layers.Dense(3)])
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inner(shared(inputs)))
    wanted = {id(layer) for layer in (model, inner, *inner.layers, *model.layers)}
    monkeypatch.setattr(keras_private.flatten_layers, "_fast", broken)
    monkeypatch.setattr(keras_private.flatten_layers, "is_broken", False)
    found = keras_private.flatten_layers(model)
    assert {id(layer) for layer in found} == wanted
    assert len(found) == len(wanted)
    assert len(reports(caplog)) == 1


def test_a_checkpoint_is_saved_without_the_places_that_load_weights_looks_at(monkeypatch, caplog):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    named = name_variables(model.variables)
    assert keras_layout(model, named).links
    monkeypatch.delattr("keras.src.saving.saving_lib._save_state")
    assert keras_layout(model, named) == KerasLayout()
    assert len(reports(caplog)) == 1


def test_masks_without_keras_modules(monkeypatch, caplog):
    class Tensor:
        """Takes attributes, as tensors of PyTorch and TensorFlow do."""

    for item in (keras_private.get_keras_mask, keras_private.set_keras_mask):
        monkeypatch.setattr(item, "_fast", broken)
        monkeypatch.setattr(item, "is_broken", False)
    tensor = Tensor()
    assert keras_private.get_keras_mask(tensor) is None
    keras_private.set_keras_mask(tensor, "mask")
    assert keras_private.get_keras_mask(tensor) == "mask"
    assert len(reports(caplog)) == 2


def test_functional_models_and_seeds_are_found_without_keras_modules(monkeypatch, caplog):
    expected = keras_private.functional_class()
    for item in (keras_private.functional_class, keras_private.global_seed_generator):
        monkeypatch.setattr(item, "_fast", broken)
        monkeypatch.setattr(item, "is_broken", False)
    assert keras_private.functional_class() is expected
    assert keras_private.global_seed_generator().state.shape == (2,)
    assert len(reports(caplog)) == 2
