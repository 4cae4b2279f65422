"""LoRA through ``enable_lora``: what is trained, what checkpoints hold, and merging."""

import json
import re
import shutil

import keras
import numpy as np
import pytest
from helpers import arguments, same, weights, with_weights

from kbtrain import (
    Trainer,
    TrainerCallback,
    backends,
    enable_lora,
    export,
    load_adapters,
    load_weights,
    merge_lora,
    save_adapters,
)
from kbtrain.checkpoint import read_arrays
from kbtrain.checkpoint.formats.keras_file import save_keras_file
from kbtrain.errors import CheckpointMismatchError, ConfigurationError
from kbtrain.utils.array_blocks import Block, OwnedBlocks

TOKENS = np.random.default_rng(0).integers(0, 12, (8, 4)).astype("int32")


def language_model(seed=0):
    """A layer of each kind that can be adapted, and batch statistics, which are never frozen."""
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(12, 4, name="tokens")(inputs)
    x = keras.layers.EinsumDense("btc,cd->btd", (None, 4), name="value")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(6, activation="gelu", name="up")(x)
    outputs = keras.layers.Dense(12, name="head")(x)
    return with_weights(keras.Model(inputs, outputs, name="lm"), seed)


def trainer_of(folder, model, *callbacks, **options):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options
    return Trainer(
        model,
        arguments(folder, learning_rate=0.1, **options),
        train_dataset=(TOKENS, TOKENS),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        callbacks=list(callbacks),
    )


def adapted(seed=0, quantized=False):
    keras.utils.set_random_seed(0)  # for the values that Keras draws for the adapters
    model = language_model(seed)
    if quantized:
        model.get_layer("value").quantize("int4")
        model.get_layer("up").quantize("int8")
    enable_lora(model, 2, ["value", "up"], alpha=4, train="head")
    return model


def outputs(model):
    return keras.ops.convert_to_numpy(model(TOKENS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with adapters, its folder, and the weights before it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of(folder, adapted())
    before = weights(trainer.model)
    trainer.fit()
    return trainer, folder, before


@pytest.mark.core
def test_only_adapters_are_trained_and_saved(run):
    trainer, folder, before = run
    kept = {"head/kernel", "head/bias"}
    changed = {
        variable.path
        for variable, old in zip(trainer.model.variables, before, strict=True)
        if not np.array_equal(keras.ops.convert_to_numpy(variable), old)
    }
    added = {v.path for v in trainer.model.variables if "lora" in v.path}
    assert len(added) == 4
    assert changed == added | kept
    saved = read_arrays(folder / "checkpoint-2" / "model.weights.h5")
    assert set(saved) == added | kept | {"norm/moving_mean", "norm/moving_variance"}
    document = json.loads((folder / "checkpoint-2" / "frozen_base.json").read_text())
    assert set(saved).isdisjoint(document["arrays"])
    assert len(saved) + len(document["arrays"]) == len(trainer.model.variables)


def test_the_adapters_are_those_of_the_paper(run):
    """W + alpha / r * A B, computed by hand for a dense layer."""
    layer = run[0].model.get_layer("up")
    x = np.ones((1, 4), "float32")
    kernel, bias, a, b = (
        keras.ops.convert_to_numpy(v).astype("float64")
        for v in (layer._kernel, layer.bias, layer.lora_kernel_a, layer.lora_kernel_b)
    )
    linear = x @ (kernel + 4 / 2 * a @ b) + bias
    expected = keras.ops.convert_to_numpy(keras.activations.gelu(linear.astype("float32")))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), expected, atol=1e-5)


def test_a_run_with_adapters_resumes_exactly(run, tmp_path):
    trainer, folder, _ = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = trainer_of(tmp_path, adapted())
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(trainer.model), weights(resumed.model))


def test_the_base_may_be_quantized(tmp_path):
    """To 4 bits in one layer and 8 in another: only what is in float32 is trained and saved."""
    model = adapted(quantized=True)
    trainer_of(tmp_path, model, max_steps=2).fit()
    saved = read_arrays(tmp_path / "checkpoint-2" / "model.weights.h5")
    assert {array.dtype.name for array in saved.values()} == {"float32"}
    fresh = adapted(quantized=True)
    before = outputs(fresh)
    load_adapters(fresh, tmp_path)
    np.testing.assert_array_equal(outputs(fresh), outputs(model))
    assert np.abs(outputs(fresh) - before).max() > 0.1
    merged = merge_lora(model)  # quantizes anew, to the same numbers of bits
    assert {v.dtype for v in merged.variables} == {"float32", "int8"}
    assert np.abs(outputs(merged) - outputs(model)).max() < 0.5


def test_another_base_is_refused(run):
    _, folder, _ = run
    model = adapted(seed=1)
    before = weights(model)
    words = "value/kernel: it was frozen.*Load the pretrained weights that the run had"
    with pytest.raises(CheckpointMismatchError, match=re.compile(words, re.DOTALL)):
        trainer_of(folder, model).fit(resume_from_checkpoint=True)
    with pytest.raises(CheckpointMismatchError, match="another value now"):
        load_weights(model, folder)
    assert same(weights(model), before)


def test_adapters_of_another_alpha_are_refused(run, tmp_path):
    trainer, folder, _ = run
    model = language_model()
    enable_lora(model, 2, ["value", "up"], alpha=2, train="head")
    before = weights(model)
    words = r"alpha=4, and those of the model have alpha=2.*enable_lora\(..., rank=2, alpha=4\)"
    file = save_adapters(trainer.model, tmp_path / "a.weights.h5")
    for load in (
        lambda: trainer_of(folder, model).fit(resume_from_checkpoint=True),
        lambda: load_weights(model, folder, strict=False),
        lambda: load_adapters(model, folder),
        lambda: load_adapters(model, file),
    ):
        with pytest.raises(CheckpointMismatchError, match=words):
            load()
    assert same(weights(model), before)


class Shift(TrainerCallback):
    """Adds 1 to a frozen bias after the first update."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            bias = model.get_layer("up").bias
            bias.assign(bias + 1)


def test_a_frozen_variable_that_changes_in_training_is_saved(tmp_path, caplog):
    trainer = trainer_of(tmp_path, adapted(), Shift(), max_steps=2)
    trainer.fit()
    assert "Frozen variables were changed during training (up/bias)" in caplog.text
    assert "up/bias" in read_arrays(tmp_path / "checkpoint-2" / "model.weights.h5")
    fresh = language_model()
    load_adapters(fresh, tmp_path)
    np.testing.assert_array_equal(outputs(fresh), outputs(trainer.model))
    resumed = trainer_of(tmp_path, adapted(), max_steps=4)
    resumed.fit(resume_from_checkpoint=True)
    assert "up/bias" in read_arrays(tmp_path / "checkpoint-4" / "model.weights.h5")
    biases = [keras.ops.convert_to_numpy(t.model.get_layer("up").bias) for t in (trainer, resumed)]
    np.testing.assert_array_equal(*biases)


@pytest.mark.neutral
def test_a_change_of_a_divided_frozen_variable_is_warned_about(tmp_path, caplog, monkeypatch):
    def owned(variable):
        block = Block((0,), variable.value)
        return OwnedBlocks((6,), "float32", [block]) if variable.path == "up/bias" else None

    monkeypatch.setattr(backends.load(), "owned_blocks", owned)
    trainer_of(tmp_path, adapted(), Shift(), max_steps=4).fit()
    assert caplog.text.count("up/bias was changed during training. It is divided") == 1


@pytest.mark.neutral
def test_adapters_are_saved_for_the_base_of_now(tmp_path):
    """After a run, other pretrained weights are assigned to the model."""
    model = adapted()
    trainer_of(tmp_path, model, max_steps=1).fit()
    other = language_model()
    for each in (model, other):
        each.get_layer("up").bias.assign(np.ones(6))
    path = save_adapters(model, tmp_path / "a.safetensors")
    load_adapters(other, path)
    np.testing.assert_array_equal(outputs(other), outputs(model))
    with pytest.raises(CheckpointMismatchError, match="up/bias: it was frozen"):
        load_adapters(language_model(), path)


@pytest.mark.neutral
def test_what_is_trained_later_is_saved(tmp_path):
    def make():
        model = adapted()
        model.get_layer("tokens").trainable = True
        return model

    trainer = trainer_of(tmp_path, make(), max_steps=2)
    trainer.fit()
    assert "tokens/embeddings" in read_arrays(tmp_path / "checkpoint-2" / "model.weights.h5")
    again = make()
    load_weights(again, tmp_path)
    assert same(weights(trainer.model), weights(again))


@pytest.mark.parametrize("name", ["a.safetensors", "a.weights.h5", "checkpoint"])
def test_adapters_are_loaded_into_the_base(run, tmp_path, name):
    trainer, folder, _ = run
    path = folder if name == "checkpoint" else save_adapters(trainer.model, tmp_path / name)
    model = language_model()
    assert len(load_adapters(model, path).loaded) == 8
    np.testing.assert_array_equal(outputs(model), outputs(trainer.model))
    with pytest.raises(CheckpointMismatchError, match="another value now"):
        load_adapters(language_model(seed=1), path)


def test_merging_gives_a_plain_model(run, tmp_path):
    model = run[0].model
    merged = merge_lora(model)
    assert [v.shape for v in merged.variables] == [v.shape for v in language_model().variables]
    np.testing.assert_allclose(outputs(merged), outputs(model), atol=1e-5)
    loaded = keras.saving.load_model(run[0].save_model(tmp_path / "a.keras"))
    np.testing.assert_array_equal(outputs(loaded), outputs(merged))
    assert len(loaded.trainable_variables) == len(language_model().trainable_variables)


def test_a_divided_model_is_saved_merged(run, tmp_path):
    """The whole values of its variables come from all processes, not from the variables."""
    model, other = run[0].model, adapted()
    values = zip(other.variables, weights(model), strict=True)
    save_keras_file(other, tmp_path / "a.keras", list(values))
    loaded = keras.saving.load_model(tmp_path / "a.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(merge_lora(model)))
    assert not any("lora" in v.path for v in loaded.variables)


def test_a_checkpoint_of_adapters_is_exported_as_such(run, tmp_path):
    trainer, folder, _ = run
    path = export(folder / "checkpoint-4", tmp_path / "a.safetensors", "adapters")
    model = language_model()
    load_adapters(model, path)
    np.testing.assert_array_equal(outputs(model), outputs(trainer.model))
    with pytest.raises(ConfigurationError, match="not the frozen weights"):
        export(folder / "checkpoint-4", tmp_path / "a.keras")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "quary"}, "No layer fits the pattern 'quary'. Layers that Keras can adapt"),
        ({"patterns": []}, "needs patterns"),
        ({"patterns": 3}, "patterns must be a list of layers' names"),
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": 10**6, "patterns": "up"}, "'up' has at most 6 rows or columns.* rank=1000000"),
        ({"alpha": "x"}, "alpha must be a positive number.* alpha='x'"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": -1.0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"patterns": "up", "train": "heads"}, "No layer fits the pattern 'heads'. The layers: "),
        ({"patterns": "up", "train": "up"}, "fits both patterns and train"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(options, message):
    model = language_model()
    trained = [v.path for v in model.trainable_variables]
    with pytest.raises(ConfigurationError, match=message):
        enable_lora(model, **options)
    assert [v.path for v in model.trainable_variables] == trained


def test_more_mistakes(tmp_path):
    model = adapted()
    with pytest.raises(ConfigurationError, match="enable_lora can be called once"):
        enable_lora(model, patterns="up")
    with pytest.raises(ConfigurationError, match="end in .safetensors or .weights.h5"):
        save_adapters(model, tmp_path / "a.h5")
    with pytest.raises(ConfigurationError, match="has no adapters"):
        save_adapters(language_model(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigurationError, match="has no LoRA adapters to merge"):
        merge_lora(language_model())
    with pytest.raises(ConfigurationError, match="needs a keras.Model that is built"):
        enable_lora(keras.Sequential([keras.layers.Dense(2)]))
    constrained = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, kernel_constraint="non_neg", name="value")]
    )
    with pytest.raises(ConfigurationError, match="Keras cannot add an adapter to .*value'"):
        enable_lora(constrained, 2, patterns="value")
    assert constrained.trainable_variables


@pytest.mark.parametrize("name", ["a.safetensors", "a.weights.h5", "run"])
def test_layers_that_keras_numbers_are_found_by_their_order(tmp_path, name):
    """As text, dense_10 stands before dense_9; and a layer may be frozen as a whole."""

    def model(first):
        layers = [keras.layers.Dense(3, name=f"dense_{first + i}") for i in range(3)]
        built = keras.Sequential([keras.Input((3,)), *layers], name="net")
        with_weights(built, 0)
        enable_lora(built, 2, [f"dense_{first + 1}", f"dense_{first + 2}"])
        return built

    trained, other = model(9), model(2)
    if name == "run":
        data = np.ones((8, 3), "float32")
        args = arguments(tmp_path / name, max_steps=2, save_strategy="steps", save_steps=2)
        Trainer(trained, args, train_dataset=(data, data), loss="mse").fit()
    else:
        for variable in trained.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
        save_adapters(trained, tmp_path / name)
    load_adapters(other, tmp_path / name)
    for one, two in zip(trained.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
