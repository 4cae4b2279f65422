"""``kbtrain train`` with presets of KerasHub: real ones, made here from small configurations."""

import json
import shutil
import sys

import keras
import matplotlib.image
import numpy as np
import pytest

from kbtrain.cli import main
from kbtrain.cli.train.data import read_data
from kbtrain.cli.train.model import make_model
from kbtrain.cli.train.settings import Settings

hub = pytest.importorskip("keras_hub", reason="needs keras-hub")

pytestmark = pytest.mark.neutral

IMAGES = """
data: {train: images, image_size: [8, 8]}
model: {preset: vit}
args: {output_dir: runs/images, max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true}
"""
TEXT = """
data: {train: text.txt, length: 8, eval_fraction: 0.2}
model: {preset: gpt}
args: {output_dir: runs/text, max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true}
"""
LABELS = """
data: {train: labels.csv, label: y, text: text, length: 6, eval_fraction: 0.25}
model: {preset: bert}
args: {output_dir: runs/labels, max_steps: 100, learning_rate: 0.01, disable_tqdm: true}
"""
WORDS = "the cat sat on the mat, and the dog sat on the cat. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three presets, images of two classes, a text, and texts with labels."""
    folder, models = tmp_path_factory.mktemp("presets"), hub.models
    converter = hub.layers.ViTImageConverter(image_size=(4, 4), scale=[1 / 127.5] * 3, offset=-1.0)
    models.ViTImageClassifier(
        models.ViTBackbone((8, 8, 3), 4, 1, 2, 8, 16),
        num_classes=7,
        preprocessor=models.ViTImageClassifierPreprocessor(converter),
    ).save_to_preset(str(folder / "vit"))
    signs = ["<|endoftext|>", *sorted({*WORDS.replace(" ", "\u0120")}), "\u0120t", "\u0120th"]
    tokenizer = models.GPT2Tokenizer(
        {sign: number for number, sign in enumerate(signs)}, ["\u0120 t", "\u0120t h"]
    )
    models.GPT2CausalLM(
        models.GPT2Backbone(len(signs), 1, 2, 8, 16, max_sequence_length=8),
        models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8),
    ).save_to_preset(str(folder / "gpt"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s", "a"]
    models.BertTextClassifier(
        models.BertBackbone(len(words), 1, 2, 8, 16, max_sequence_length=6),
        num_classes=4,
        preprocessor=models.BertTextClassifierPreprocessor(
            models.BertTokenizer(words, lowercase=True), sequence_length=4
        ),
    ).save_to_preset(str(folder / "bert"))
    generator = np.random.default_rng(0)
    for number in range(8):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(path, generator.random((8, 8, 3)))
    lines = "text,y\n" + "Good films,1\na bad film,0\n" * 8
    (folder / "labels.csv").write_text(lines, encoding="utf-8")
    (folder / "text.txt").write_text(WORDS, encoding="utf-8")
    (folder / "table.csv").write_text("a,y\n1,0\n2,1\n", encoding="utf-8")
    (folder / "images.yaml").write_text(IMAGES, encoding="utf-8")
    (folder / "labels.yaml").write_text(LABELS, encoding="utf-8")
    (folder / "text.yaml").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    shutil.rmtree(folder / "runs", ignore_errors=True)


def prepared(settings):
    settings = Settings(settings, {})
    data = read_data(settings, lambda pixels: pixels)
    return data, make_model(settings, data)


def test_images_are_scaled_as_the_preset_wants_them(here, capsys):
    data, model = prepared(here / "images.yaml")
    image, label = data.sets["train"][1]
    path, expected = data.sets["train"].files[1]
    assert label == expected
    pixels = matplotlib.image.imread(path)[..., :3]  # from 0 to 1
    np.testing.assert_allclose(image, pixels * 2 - 1, atol=1e-6)
    whole = keras.utils.img_to_array(keras.utils.load_img(path))
    by_the_preset = keras.ops.convert_to_numpy(data.preprocessor(whole))
    np.testing.assert_allclose(image, by_the_preset, atol=1e-6)
    assert model.output_shape == (None, 2)

    assert main(["train", "images.yaml"]) == 0
    assert "into 2 classes (a, b); 8 samples (train)" in capsys.readouterr().out
    known = json.loads((here / "runs" / "images" / "preprocessing.json").read_text())
    assert known["prepared_by"].startswith("pixels x [0.00784")

    saved = keras.saving.load_model(here / "runs" / "images" / "model.keras")
    loaded = hub.models.ImageClassifier.from_preset(str(here / "runs" / "images" / "preset"))
    assert loaded.preprocessor.image_converter.image_size == (8, 8)
    np.testing.assert_allclose(
        loaded.predict(whole[None], verbose=0), saved.predict(image[None], verbose=0), atol=1e-6
    )


def test_a_text_has_the_tokens_of_the_preset(here, capsys):
    data, model = prepared(here / "text.yaml")
    x, y = data.sets["train"]
    ids = np.asarray(data.preprocessor.tokenizer(WORDS[: int(len(WORDS) * 0.8)]))
    np.testing.assert_array_equal(x["token_ids"][1], ids[8:16])
    np.testing.assert_array_equal(y[1], ids[9:17])
    assert model.output_shape == (None, None, data.outputs)

    assert main(["train", "text.yaml"]) == 0
    assert "language modeling" in capsys.readouterr().out
    assert json.loads((here / "runs" / "text" / "eval_results.json").read_text())["eval_loss"] > 0
    loaded = hub.models.CausalLM.from_preset(str(here / "runs" / "text" / "preset"))
    assert loaded.generate("the cat", max_length=8).startswith("the cat")


def test_texts_with_labels_have_the_tokens_of_the_preset(here):
    data, _ = prepared(here / "labels.yaml")
    ids = {tuple(row) for row in data.sets["train"][0]["token_ids"].tolist()}
    assert ids == {(2, 5, 7, 8, 3, 0), (2, 9, 6, 7, 3, 0)}  # [CLS] good film ##s [SEP] [PAD]

    assert main(["train", "labels.yaml"]) == 0
    results = json.loads((here / "runs" / "labels" / "eval_results.json").read_text())
    assert results["eval_accuracy"] == 1
    loaded = hub.models.TextClassifier.from_preset(str(here / "runs" / "labels" / "preset"))
    assert loaded.predict(["good film", "bad"], verbose=0).argmax(-1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["images.yaml", "--data.image_size", "[6, 6]"], "image_size: must be [8, 8]"),
        (["images.yaml", "--model.preset", "gpt"], "--model.preset: gpt:"),
        (["text.yaml", "--model.preset", "none"], "--model.preset: none:"),
        (["text.yaml", "--data.length", "5000"], "tokens are less than one sample of 5000 + 1"),
        (["text.yaml", "--data.train", "table.csv", "--data.label", "y"], "is for texts, whose"),
    ],
)
def test_what_does_not_fit_a_preset_is_refused(here, words, message, capsys):
    if "table.csv" in words:
        words = [*words, "--data.length", "null", "--data.eval_fraction", "null"]
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
