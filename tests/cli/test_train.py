"""``kbtrain train``: files of settings and their mistakes, and whole runs of the examples."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import keras
import matplotlib.image
import numpy as np
import pandas
import pytest
from paths import ROOT

from kbtrain.cli import main
from kbtrain.cli.train import _split
from kbtrain.cli.train.backend import choose_backend
from kbtrain.cli.train.data import Data, read_data
from kbtrain.cli.train.model import image_preparation, make_loss
from kbtrain.cli.train.settings import OTHERS, SECTIONS, Settings
from kbtrain.errors import ConfigurationError

CONFIGS = ROOT / "examples" / "configs"
QUICK = ["--args.max_steps", "4", "--args.save_strategy", "no", "--args.eval_strategy", "no"]
QUICK += ["--args.load_best_model_at_end", "false", "--args.disable_tqdm", "true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data of the examples."""
    spec = importlib.util.spec_from_file_location("make_data", CONFIGS / "make_data.py")
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    folder = tmp_path_factory.mktemp("train")
    make_data.main(folder / "data", images=50)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """The same as the current folder; imports from it end with the test."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.core
def test_a_run_learns_is_saved_and_resumes(here, tmp_path, capsys, caplog):
    words = ["train", str(CONFIGS / "digits.yaml"), "--args.output_dir", str(tmp_path)]
    words += ["--callbacks", "null", "--args.per_device_eval_batch_size", "400"]
    words += ["--args.eval_strategy", "no", "--args.load_best_model_at_end", "false"]
    words += ["--args.num_train_epochs"]
    assert main([*words, "1"]) == 0
    out = capsys.readouterr().out
    assert "classification into 10 classes (0, 1, 2" in out
    assert "1,438 samples (train), 359 samples (eval)" in out
    first = json.loads((tmp_path / "eval_results.json").read_text())
    assert first["eval_accuracy"] > 0.6

    assert main([*words, "2"]) == 0
    assert "Resuming with a different setting: num_train_epochs" in caplog.text
    second = json.loads((tmp_path / "eval_results.json").read_text())
    assert second["epoch"] == 2
    assert second["eval_loss"] < first["eval_loss"]
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert "label: digit" in (tmp_path / "config.yaml").read_text()

    # The model alone, with the file beside it, has the accuracy that was printed.
    model = keras.saving.load_model(tmp_path / "model.keras")
    known = json.loads((tmp_path / "preprocessing.json").read_text())
    assert known["classes"] == list(range(10))
    rows = np.genfromtxt(here / "data" / "digits.csv", delimiter=",", skip_header=1)
    held_out = rows[np.random.default_rng(0).permutation(len(rows))[:359]]
    logits = keras.ops.convert_to_numpy(model(held_out[:, :64].astype("float32")))
    accuracy = np.mean(logits.argmax(-1) == held_out[:, 64])
    assert accuracy == pytest.approx(second["eval_accuracy"], abs=1e-6)


@pytest.mark.neutral
@pytest.mark.parametrize("name", ["docstrings", "images", "topics"])
def test_the_other_examples(here, tmp_path, name):
    words = ["train", str(CONFIGS / f"{name}.yaml"), "--args.output_dir", str(tmp_path), *QUICK]
    assert main(words) == 0
    assert np.isfinite(json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.keras", "preprocessing.json", "report.html", "config.yaml"} <= names
    assert ("tokenizer.json" in names) == (name == "docstrings")


MODELS = """
import keras

def linear(input_shape, num_outputs, start=0.0):
    first = keras.initializers.Constant(start)
    layer = keras.layers.Dense(num_outputs, kernel_initializer=first)
    return keras.Sequential([keras.Input(input_shape), layer])

def broken():
    raise KeyError("of the user's own")

def not_a_model():
    return {}
"""


@pytest.fixture(scope="module")
def table(folder):
    """A regression with three columns as Parquet and JSON lines, and models for it."""
    x = np.random.default_rng(0).normal(size=(64, 3))
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    frame["y"] = x @ [1.0, 2.0, 3.0] + 0.5
    frame.to_parquet(folder / "r.parquet")
    frame.to_json(folder / "r.jsonl", orient="records", lines=True)
    write(folder / "my_models.py", MODELS)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.save(folder / "m.keras")
    write(folder / "m.json", model.to_json())
    args = "{max_steps: 150, learning_rate: 0.1, save_strategy: 'no', disable_tqdm: true}"
    text = f"data: {{train: r.parquet, label: y, test: r.jsonl}}\nargs: {args}\n"
    return write(folder / "r.yaml", text)


@pytest.mark.neutral
def test_a_regression_from_parquet_tested_on_json_lines(here, table, tmp_path):
    where = ["--args.output_dir", str(tmp_path)]
    function = ["--model.function", "my_models.py:linear", "--model.arguments", "{start: 0.5}"]
    assert main(["train", table, *where, *function]) == 0
    found = json.loads((tmp_path / "test_results.json").read_text())
    assert found["test_mae"] < 0.05  # the coefficients differ by up to 2.5 at the start
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert keras.ops.convert_to_numpy(model.layers[-1].bias) == pytest.approx([0.5], abs=0.05)


@pytest.mark.neutral
@pytest.mark.parametrize(
    "model",
    [
        ["--model.file", "m.keras"],
        ["--model.file", "m.json"],
        ["--model.function", "my_models:linear"],
        ["--model.layers", "[{Dense: {units: 1}}]", "--data.standardize", "--loss", "mae"],
    ],
)
def test_a_dry_run_builds_every_kind_of_model_and_writes_nothing(
    here, table, model, tmp_path, capsys
):
    assert main(["train", table, *model, "--dry-run", "--args.output_dir", str(tmp_path)]) == 0
    assert "regression; 64 samples (train), 64 samples (test)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.neutral
def test_the_file_on_the_page_about_the_command_line(here, tmp_path, capsys):
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    config = write(tmp_path / "c.yaml", re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert main(["train", config, "--dry-run"]) == 0
    assert "into 10 classes" in capsys.readouterr().out


@pytest.mark.neutral
def test_a_model_of_keras_applications(here, capsys):
    words = ["train", str(CONFIGS / "images.yaml"), "--model.layers", "null", "--dry-run"]
    words += ["--model.application", "MobileNetV2", "--model.arguments", "{alpha: 0.35}"]
    assert main([*words, "--data.image_size", "[32, 32]"]) == 0
    assert "40 samples (train), 10 samples (eval)" in capsys.readouterr().out


@pytest.mark.neutral
def test_images_are_prepared_as_an_application_wants_them(here):
    where = {("model", "application"): "MobileNetV2", ("model", "layers"): None}
    settings = Settings(CONFIGS / "images.yaml", where)
    data = read_data(settings, image_preparation(settings))
    image, label = data.sets["train"][0]
    path, expected = data.sets["train"].files[0]
    assert label == expected == int(path.parent.name)
    pixels = matplotlib.image.imread(path)[..., :3]  # from 0 to 1, where MobileNetV2 has -1 to 1
    np.testing.assert_allclose(image, pixels * 2 - 1, atol=1e-6)


@pytest.mark.cross
def test_a_data_set_of_hugging_face_on_disk(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.chdir(tmp_path)
    labels = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"x": datasets.Sequence(datasets.Value("float32")), "y": labels})
    rows = {"x": [[float(n), 1.0] for n in range(8)], "y": [0, 1] * 4}
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk("both")
    text = "data: {train: both/train, eval: both/test, label: y}\n"
    config = write(tmp_path / "c.yaml", text + "model: {layers: [Dense: {units: 2}]}\n")
    assert main(["train", config, "--dry-run"]) == 0
    assert "2 classes (cat, dog)" in capsys.readouterr().out
    assert main(["train", config, "--dry-run", "--data.train", "both"]) == 2
    assert "both holds several sets. Name one: both/test, both/train." in capsys.readouterr().err


# --- mistakes -------------------------------------------------------------------------------------

LAYERS = "layers:\n    - Dense: {units: 1}"
GOOD = """data:
  train: r.parquet
  label: y
model:
  layers:
    - Dense: {units: 1}
args:
  learning_rate: 1e-3
"""


@pytest.mark.neutral
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  label: y", "  lable: y", "line 3, data.lable: data has no setting 'lable'. Did you"),
        ("  label: y", "  label: z", "line 3, data.label: r.parquet has no column 'z'. It"),
        ("r.parquet", "no.csv", "line 2, data.train: there is no 'no.csv' here"),
        ("r.parquet", "my_models.py", "line 2, data.train: my_models.py is none of: a table"),
        ("label: y", "label: y\n  length: x", "line 4, data.length: must be a whole number"),
        ("label: y", "label: y\n  eval_fraction: 2", "line 4, data.eval_fraction: must be"),
        ("label: y", "label: y\n  eval: data", "line 4, data.eval: must be like train"),
        ("label: y", "label: y\n  image_size: [1, 1]", "line 4, data.image_size: has no"),
        ("label: y", "label: y\n  task: rank", "line 4, data.task: must be classification"),
        ("label: y", "label: a\n  features: [b, d]", "data.features: r.parquet has no column 'd'"),
        ("Dense", "Dens", "line 6, model.layers.0: there is no 'Dens' in keras.layers. Did"),
        ("units: 1", "unit: 1", "line 6, model.layers.0: Dense cannot be made"),
        ("units: 1", "units: 3", "line 5, model.layers: the model has 3 outputs, and there"),
        ("Dense: {units: 1}", "Conv2D: {filters: 1, kernel_size: 1}", "layers.0: does not fit on"),
        (LAYERS, "file: none.keras", "line 5, model.file: none.keras"),
        (LAYERS, "function: os", "line 5, model.function: must be package.module"),
        (LAYERS, "function: my_models:no", "line 5, model.function: 'my_models:no' cannot"),
        (LAYERS, "function: my_models:not_a_model", "must give a keras.Model. Received: dict"),
        (LAYERS, "application: Mobile", "keras.applications has no 'Mobile'. It has:"),
        (LAYERS, "preset: bert", "line 5, model.preset: is for texts, whose column"),
        ("model:", "model:\n  file: a.keras", "line 4, model: takes one of layers, file"),
        ("learning_rate: 1e-3", "learning_rate: -1", "line 8, args.learning_rate: `learning_rate`"),
        ("learning_rate: 1e-3", "warmup_ratio: 0.1", "line 8, args.warmup_ratio: `warmup_ratio`"),
        ("learning_rate: 1e-3", "seed: 1\n  seed: 2", "duplicate key 'seed'"),
        ("args:", "optimizer: adam\nargs:", "there is no setting 'optimizer'. It is args.optim"),
        ("args:", "learning_rate: 1\nargs:", "line 7, learning_rate: there is no setting"),
        ("args:", "loss: nope\nargs:", "line 7, loss: loss='nope' is not a loss of Keras"),
        ("args:", "metrics: [mse, nope]\nargs:", "line 7, metrics: metrics: 'nope' is not"),
        ("args:", "callbacks: [EarlyStopping]\nargs:", None),
        ("args:", "callbacks: [WandbCallback]\nargs:", "line 7, callbacks.0: there is no"),
        ("args:", "callbacks: EarlyStopping\nargs:", "line 7, callbacks: must be a list"),
        ("args:", "backend: mxnet\nargs:", "line 7, backend: must be torch, tensorflow, jax"),
        ("data:", "- data:", "is not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(here, table, tmp_path, capsys, old, new, said):
    assert GOOD.count(old) == 1
    config = write(tmp_path / "c.yaml", GOOD.replace(old, new))
    status = main(["train", config, "--dry-run"])
    error = capsys.readouterr().err
    if said is None:
        assert (status, error) == (0, "")
        return
    assert status == 2
    assert error.startswith(f"kbtrain train: {config}")
    assert said in error


@pytest.mark.neutral
def test_values_that_do_not_fit_the_data_are_told(here, tmp_path, capsys):
    def refusal(train, test=None, **settings):
        write(here / "train.csv", train)
        write(here / "test.csv", test or train)
        listed = "".join(f"  {name}: {value}\n" for name, value in settings.items())
        text = f"data:\n  train: train.csv\n  test: test.csv\n  label: y\n{listed}"
        config = write(tmp_path / "c.yaml", text + "model: {layers: [Dense: {units: 2}]}\n")
        status = main(["train", config, "--dry-run"])
        assert status == 2
        return capsys.readouterr().err

    assert "test: column 'x' has no value in 1 of 2 rows" in refusal(
        "x,y\n1,a\n2,b\n", "x,y\n1,a\n,b\n"
    )
    assert "labels that are not in the training set: c" in refusal(
        "x,y\n1,a\n2,b\n", "x,y\n1,c\n2,a\n"
    )
    assert "column 'n' of train.csv has values that are not numbers, such as 'k'" in refusal(
        "x,n,y\n1,k,a\n2,l,b\n"
    )
    assert "has infinite values" in refusal("x,y\n1,a\ninf,b\n")
    assert "there are 3 classes. Give its last layer as many, or write data.task" in refusal(
        "x,y\n1,0\n2,1\n3,2\n"
    )
    assert "leaves nothing of 2 samples" in refusal("x,y\n1,a\n2,b\n", eval_fraction=0.9)
    assert "train.csv cannot be read" in refusal("")
    assert "data.standardize: has no effect on a table with data.text" in refusal(
        "x,y\nu,a\nv,b\n", text="x", standardize="true"
    )


@pytest.mark.neutral
def test_a_table_of_tokens_that_is_too_small_is_told(here, capsys):
    words = ["train", str(CONFIGS / "topics.yaml"), "--dry-run", "--model.layers"]
    assert main([*words, "[{Embedding: {input_dim: 200, output_dim: 4}}]"]) == 2
    assert "input_dim 200, and there are 256 tokens" in capsys.readouterr().err


@pytest.mark.neutral
def test_a_missing_package_is_told_with_the_extra(here, table, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert main(["train", table, "--model.file", "m.json"]) == 2
    assert "pip install 'kbtrain[train]'" in capsys.readouterr().err


@pytest.mark.neutral
def test_what_a_function_of_the_user_raises_is_shown_as_it_is(here, table):
    with pytest.raises(KeyError, match="of the user's own"):
        main(["train", table, "--model.function", "my_models.py:broken"])


@pytest.mark.neutral
def test_the_default_loss_takes_logits_unless_the_model_ends_in_softmax(here):
    settings = Settings(CONFIGS / "digits.yaml", {})
    data = Data("classification", "features", (2,), {}, 3)
    logits = np.array([[2.0, 1.0, 0.0]], "float32")
    expected = -np.log(np.exp(2) / np.exp([2.0, 1.0, 0.0]).sum())
    for last in ({}, {"activation": "softmax"}):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, **last)])
        outputs = np.exp(logits) / np.exp(logits).sum() if last else logits
        loss = make_loss(settings, data, keras.Sequential([keras.Input((2,)), model]))
        assert float(loss(np.array([0]), outputs)) == pytest.approx(expected, rel=1e-5)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.neutral
def test_settings_of_the_command_line_win_and_are_shown(here, table, capsys):
    words = ["--args.learning-rate=2e-3", table, "--args.bf16", "--loss", "mse"]
    assert main(["train", *words, "--args.run_name", "a: b", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate: 0.002\n" in printed
    assert "bf16: true\n" in printed
    assert "run_name: 'a: b'\n" in printed
    assert main(["train", table, "--learning_rate", "1"]) == 2
    assert "there is no option --learning_rate." in capsys.readouterr().err
    assert main(["train", "nowhere.yaml"]) == 2
    assert "there is no file 'nowhere.yaml'" in capsys.readouterr().err
    assert _split(["c", "--args.a", "-1"]) == (["c"], {("args", "a"): -1})


@pytest.mark.neutral
def test_help_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    names = [name for section in SECTIONS.values() for name in section.__dataclass_fields__]
    assert all(f"\n  {name} " in printed for name in names)
    assert all(f"\n{name} " in printed for name in OTHERS)


@pytest.mark.neutral
def test_the_backend_of_the_file(here, tmp_path, monkeypatch):
    def settings(name):
        return Settings(Path(write(tmp_path / "c.yaml", f"backend: {name}\n")), {})

    other = next(n for n in ("jax", "torch") if n != keras.backend.backend())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "tensorflow" or None)
    with pytest.raises(ConfigurationError, match=r"pip install 'kbtrain\[tensorflow\]'"):
        choose_backend(settings("tensorflow"))
    with pytest.raises(ConfigurationError, match=r"line 1, backend: this process runs Keras on"):
        choose_backend(settings(other))
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "unset")
    choose_backend(settings(other))
    assert os.environ["KERAS_BACKEND"] == other
